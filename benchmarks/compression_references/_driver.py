"""One build in one process, measured: run in a reference's environment, and in the project's own for ours.

    python -P _driver.py < job.json > answer.json

Job: reference, model, calibration (.npy), heldout (.npy), method, setting, out. Written under `out`: `artefact`, what the
library itself saves, and `plain`, a folder of float32 weights that transformers loads. Seconds are those of `build` alone, by the
clock and of processor time, which a busy machine changes less; memory is the highest resident size while it runs, above that before.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

WEIGHT_FILES = (".safetensors", ".pt", ".bin")


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Build, measure, write; return the figures."""
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import mean_loss

    library = importlib.import_module(f"benchmarks.compression_references.{job['reference']}")
    torch.manual_seed(0)
    folder, out = Path(job["model"]), Path(job["out"])
    tokens = torch.from_numpy(numpy.load(job["calibration"]).astype("int64"))
    library.prepare(job["method"])
    model = library.load(folder, job["method"], job["setting"])
    with peak_memory() as peak:
        began, began_cpu = time.perf_counter(), time.process_time()
        built = library.build(model, tokens, job["method"], job["setting"])
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    del model

    answer: dict[str, Any] = {
        "build_s": seconds, "build_cpu_s": cpu_seconds, "peak_bytes": peak[0], "threads": torch.get_num_threads(),
    }  # fmt: skip
    if runnable := getattr(library, "runnable", lambda built: None)(built):
        answer["loss_nats"] = mean_loss(runnable, torch.from_numpy(numpy.load(job["heldout"]).astype("int64")))
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = list(_packed.linears(dense))
    weights = sum(dense.get_submodule(name).weight.numel() for name in names)
    plain = library.plain(built)
    if hasattr(plain, "save_pretrained"):  # of other shapes: it brings its own config
        plain.save_pretrained(out / "plain")
    else:
        missing, unknown = dense.load_state_dict(plain, strict=False)
        assert not unknown and {f"{name}.weight" for name in names}.isdisjoint(missing), (missing[:3], unknown[:3])
        dense.save_pretrained(out / "plain")
    artefact = out / "artefact"
    artefact.mkdir(parents=True)
    library.save(built, artefact)
    files = [path for path in artefact.rglob("*") if path.suffix in WEIGHT_FILES]
    answer["artefact_bytes"] = sum(path.stat().st_size for path in files)
    stored = getattr(library, "stored_bytes", _stored_bytes)(built, artefact, names)
    answer["bits_per_weight"] = round(8 * stored / weights, 3) if stored else None
    return answer


@contextlib.contextmanager
def peak_memory() -> Any:
    """Yield a list that afterwards holds the highest resident size within, above that at the start, in bytes."""
    gc.collect()
    found: list[int] = []
    before = _status("VmRSS")
    Path(f"/proc/{os.getpid()}/clear_refs").write_text("5", encoding="ascii")  # a new count of the peak
    yield found
    found.append(max(_status("VmHWM") - before, 0))


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s*(\d+) kB", text)
    assert found, field
    return int(found[1]) * 1024


def _stored_bytes(built: Any, artefact: Path, names: list[str]) -> int:
    """Return the bytes of everything that safetensors files hold under the matrices' names, biases left out."""
    from safetensors import safe_open

    total = 0
    for path in artefact.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if key.rpartition(".")[0] in names and not key.endswith(".bias"):
                    tensor = file.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


if __name__ == "__main__":
    told = os.dup(1)
    os.dup2(2, 1)  # libraries print
    job = json.load(sys.stdin)
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    os.chdir(job["out"])  # and leave logs where they stand
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    answer = json.dumps(run(job))
    os.write(told, answer.encode())
