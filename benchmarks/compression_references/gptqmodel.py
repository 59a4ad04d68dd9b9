"""GPTQModel (ModelCloud/GPTQModel, Apache-2.0): GPTQ and AWQ, packed for its own kernels.

The newest version that takes this project's torch; it insists on a numpy of its own. Weights are scored as its reference
kernel unpacks them from the checkpoint it writes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(
    name="gptqmodel",
    package="gptqmodel",
    version="7.6.0",
    source="https://github.com/ModelCloud/GPTQModel",
    frees=("numpy",),
)
_ROWS = 8  # windows of calibration text at once


def prepare(method: str) -> None:
    """Import what will be needed."""
    processors = os.cpu_count() or 1
    os.cpu_count = lambda: max(processors, 4)  # it asks for more workers than its pool has where processors are few
    import gptqmodel  # noqa: F401


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return its wrapper of the model: in float32, for AWQ in the 16 bits that its kernels insist on."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(method=method, offload_to_disk=False, device="cpu", **setting)
    return GPTQModel.load(str(folder.resolve()), config, dtype=torch.float16 if method == "awq" else torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Calibrate and quantise, for its kernels that need no GPU."""
    from gptqmodel import BACKEND

    rows = [{"input_ids": row[None], "attention_mask": row.new_ones(1, len(row))} for row in tokens]
    model.quantize(rows, batch_size=_ROWS, backend=BACKEND.AWQ_TORCH if method == "awq" else BACKEND.AUTO)
    return model


def save(model: Any, folder: Path) -> None:
    """Write its own checkpoint."""
    model.save(str(folder))


def plain(model: Any) -> dict[str, Any]:
    """Return all weights in their transformers names, as its kernel unpacks them: 16-bit floats, as its scales are."""
    import tempfile

    import torch
    from gptqmodel import GPTQModel

    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        again = GPTQModel.load(folder, device="cpu", backend=_backend(model), dtype=torch.float16).model
    packed = {name: module for name, module in again.named_modules() if hasattr(module, "dequantize_weight")}
    kept = {n: t.float() for n, t in again.state_dict().items() if n.rpartition(".")[0] not in packed}
    return kept | {f"{name}.weight": module.dequantize_weight().T.float() for name, module in packed.items()}


def _backend(model: Any) -> Any:
    """Return its reference kernel for the model's format."""
    from gptqmodel import BACKEND

    return BACKEND.AWQ_TORCH if model.quantize_config.method == "awq" else BACKEND.TORCH
