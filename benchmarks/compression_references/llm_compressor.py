"""llm-compressor (vllm-project/llm-compressor, Apache-2.0): GPTQ, SparseGPT, Wanda, and SmoothQuant for W8A8.

The pre-release is meant: no stable version takes the torch and transformers of this project. Weights are scored as its
fake quantisation leaves them; W8A8 by its own forward, which rounds activations for each token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(
    name="llm_compressor",
    package="llmcompressor",
    version="0.14.1a20261020",
    source="https://github.com/vllm-project/llm-compressor",
)
_ROWS = 8  # windows of calibration text at once: its own default of one is slower here


def prepare(method: str) -> None:
    """Import what will be needed."""
    import llmcompressor  # noqa: F401
    from llmcompressor.modifiers import gptq, pruning, quantization  # noqa: F401
    from llmcompressor.modifiers.transform import smoothquant  # noqa: F401
    from loguru import logger

    logger.remove()


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Calibrate and change the model in place."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    each: Any = [{"input_ids": row, "attention_mask": row.new_ones(len(row))} for row in tokens]
    rows: Any = DataLoader(each, batch_size=_ROWS)
    return oneshot(model=model, dataset=rows, recipe=_recipe(method, setting), num_calibration_samples=len(tokens))


def _recipe(method: str, setting: dict[str, Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    head = ["lm_head"]
    if method in ("gptq", "rtn"):
        group = {
            "targets": ["Linear"],
            "weights": {
                "num_bits": setting["bits"], "type": "int", "strategy": "group",
                "group_size": setting["group_size"], "symmetric": setting["symmetric"],
            },
        }  # fmt: skip
        made = GPTQModifier if method == "gptq" else QuantizationModifier
        return [made(config_groups={"group_0": group}, ignore=head)]
    if method in ("sparsegpt", "wanda"):
        made = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
        return [made(sparsity=setting["sparsity"], mask_structure=setting["pattern"], ignore=["re:.*lm_head"])]
    assert method == "smoothquant", method
    made = GPTQModifier if setting["gptq"] else QuantizationModifier
    return [
        SmoothQuantModifier(smoothing_strength=setting["strength"]),
        made(targets="Linear", scheme="W8A8", ignore=head),
    ]


def save(model: Any, folder: Path) -> None:
    """Write its own compressed checkpoint."""
    model.save_pretrained(folder, save_compressed=True)


def plain(model: Any) -> dict[str, Any]:
    """Return all weights in their transformers names."""
    return {n: t.float().clone() for n, t in model.state_dict().items() if n.endswith((".weight", ".bias"))}


def runnable(model: Any) -> Any:
    """Return the model where it rounds activations."""
    schemes = (getattr(module, "quantization_scheme", None) for module in model.modules())
    return model if any(scheme is not None and scheme.input_activations is not None for scheme in schemes) else None
