"""What calibration asks of its candidate processes besides serving: to make a small model, to time a kernel's launch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LAUNCHES = 2000
REPEATS = 5


def make_model(state: dict[str, Any], payload: Mapping[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    """Write a model with random weights. Payload: folder, and the settings of make_tiny_model."""
    from planner.tiny_models import make_tiny_model

    make_tiny_model(Path(payload["folder"]), **payload["settings"])
    return {}


def launch_floor(state: dict[str, Any], payload: Mapping[str, Any], progress: Callable[..., None]) -> dict[str, Any]:
    """Return the seconds torch takes to start one operator that has nothing to do: on the processor, and on a GPU.

    On a GPU twice: what the host takes to send it off, and, between events on the device, what the device takes to
    go from one to the next. The best of some repeats counts, since noise only slows.
    """
    import torch

    torch.set_num_threads(1)
    gpu = None
    if torch.cuda.is_available():
        one = torch.ones(1, device="cuda")
        gpu = {"name": torch.cuda.get_device_name(), "host_s": _host_s(one), "device_s": _device_s(one)}
    return {"floor": {"torch": torch.__version__, "cpu_s": _host_s(torch.ones(1)), "gpu": gpu}}


def _host_s(one: Any) -> float:
    import torch

    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            one.add_(0.0)
        best = min(best, (time.perf_counter() - began) / LAUNCHES)
        if one.is_cuda:
            torch.cuda.synchronize()
    return best


def _device_s(one: Any) -> float:
    import torch

    best = float("inf")
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(LAUNCHES):
            one.add_(0.0)
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3 / LAUNCHES)
    return best


OPS = {"make_model": make_model, "launch_floor": launch_floor}
