"""HQQ (mobiusml/hqq, Apache-2.0): half-quadratic quantisation, no calibration text.

Its own layers, scales and zeros in its own 16 bits. `axis` 1 shares a scale among neighbours of a row, as ours; 0 among rows, its more accurate way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(name="hqq", package="hqq", version="0.2.8.post1", source="https://github.com/mobiusml/hqq")


def prepare(method: str) -> None:
    """Import what will be needed."""
    from hqq.core import quantize  # noqa: F401


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Exchange the layers' Linear modules for its own."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    from knowledge_base.techniques._packed import linears

    config = BaseQuantizeConfig(nbits=setting["bits"], group_size=setting["group_size"], axis=setting["axis"])
    for name, module in linears(model).items():
        made = HQQLinear(module, config, compute_dtype=torch.float16, device="cpu")
        model.set_submodule(name, made)
    return model


def save(model: Any, folder: Path) -> None:
    """Write the tensors: its own saving knows only models it loaded itself."""
    import torch

    torch.save(model.state_dict(), folder / "model.pt")


def plain(model: Any) -> dict[str, Any]:
    """Return all weights in their transformers names."""
    packed = _packed(model)
    kept = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in packed}
    return kept | {f"{name}.weight": module.dequantize().float() for name, module in packed.items()}


def stored_bytes(model: Any, folder: Path, matrices: list[str]) -> int:
    """Return the bytes of levels, scales and zeros."""
    tensors = (t for module in _packed(model).values() for t in (module.W_q, module.meta["scale"], module.meta["zero"]))
    return sum(t.numel() * t.element_size() for t in tensors)


def _packed(model: Any) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "HQQLinear"}
