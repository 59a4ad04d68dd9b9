"""Accelerators: CUDA GPUs, named without torch, measured with torch where there are any."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from planner.probes._child import measure_apart

PROBE = "accelerators: CUDA GPUs, their memory, bandwidth and matrix product rates"
SHAPE = (4096, 8192, 8192)


def find() -> dict[str, Any]:
    """Return {"gpus": [{"name", "memory_bytes", "memory_bytes_per_s", "flop_per_s", ...}]}; empty where there are none.

    Where a driver is there but torch cannot use it, "problem" says why.
    """
    return measure_apart("accelerators") if names() else {"gpus": []}


def names() -> list[str]:
    """Return the names of the NVIDIA GPUs the driver shows, without importing torch."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                found.append(line.partition(":")[2].strip())
    if found or not (Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi")):
        return found
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def measure() -> dict[str, Any]:
    """Measure every GPU torch can use: reading and copying a large array, one large product for each dtype."""
    import torch

    from planner.probes.matmul import DTYPES, product_rate

    if not torch.cuda.is_available():
        return {"gpus": [], "problem": f"torch {torch.__version__} finds no CUDA device: driver or build do not fit"}
    gpus = []
    for index in range(torch.cuda.device_count()):
        torch.cuda.set_device(index)
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rates = {dtype: product_rate(dtype, *SHAPE, device="cuda") for dtype in DTYPES}
        gpus.append({
            "name": facts.name,
            "memory_bytes": total,
            "free_bytes": free,
            "compute_capability": f"{facts.major}.{facts.minor}",
            "memory_bytes_per_s": _read_rate(min(2**30, free // 4)),
            "host_link_bytes_per_s": _link_rate(min(2**27, free // 4)),
            "flop_per_s": {dtype: rate for dtype, rate in rates.items() if rate},
            "busy_w": _power_limit_w(index),
        })  # fmt: skip
    return {"gpus": gpus, "torch": torch.__version__, "cuda": torch.version.cuda}


def _read_rate(size: int) -> float:
    import torch

    array = torch.ones(size // 4, dtype=torch.float32, device="cuda")
    best = float("inf")
    for _ in range(20):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        array.sum()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return array.numel() * 4 / best


def _link_rate(size: int) -> float:
    """Return bytes/s of copies from the host's ordinary memory, which is where offloaded weights wait."""
    import torch

    there, here = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8, device="cuda")
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        here.copy_(there)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return size / best


def _power_limit_w(index: int) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetEnforcedPowerLimit(pynvml.nvmlDeviceGetHandleByIndex(index)) / 1e3
    except Exception:  # the library is missing, or the driver does not say: power is then modelled
        return None
