"""torchao (pytorch/ao, BSD-3-Clause): int8 and int4 weights, rounded to nearest or with its half-quadratic scales.

In the project's own environment, which has it. Its int4 for processors keeps an opaque layout that cannot be saved, so the
integers of its `IntxWeightOnlyConfig` are used, which computes the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(name="torchao", version="0.18.0", source="https://github.com/pytorch/ao")


def prepare(method: str) -> None:
    """Import what will be needed."""
    import torchao.quantization  # noqa: F401


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Quantise the layers' matrices in place."""
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    from knowledge_base.techniques._packed import linears

    names = set(linears(model))
    if setting["bits"] == 8:
        config: Any = Int8WeightOnlyConfig()
    else:
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{setting['bits']}"),
            granularity=PerGroup(setting["group_size"]),
            mapping_type=MappingType.SYMMETRIC if setting["symmetric"] else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm="hqq_scale_only" if setting.get("hqq") else "affine",
        )
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    return model


def save(model: Any, folder: Path) -> None:
    """Write the tensors: transformers' files hold no 4-bit ones of its."""
    import torch

    torch.save(model.state_dict(), folder / "model.pt")


def plain(model: Any) -> dict[str, Any]:
    """Return all weights in their transformers names."""
    return {
        n: (t.dequantize() if hasattr(t, "tensor_data_names") else t).float() for n, t in model.state_dict().items()
    }


def stored_bytes(model: Any, folder: Path, matrices: list[str]) -> int:
    """Return the bytes of levels, scales and zeros as they are held: 4 bits take a byte each."""
    total = 0
    for name in matrices:
        weight = model.get_submodule(name).weight
        for part in weight.tensor_data_names:
            tensor = getattr(weight, part)
            total += tensor.numel() * tensor.element_size()
    return total
