"""NNCF (openvinotoolkit/nncf, Apache-2.0): 4-bit weights on torch, to nearest or with AWQ and estimated scales.

Its torch side has no GPTQ. What it does to activations' scales stays in its own hooks, so its own forward is scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(name="nncf", package="nncf", version="3.4.0", source="https://github.com/openvinotoolkit/nncf")


def prepare(method: str) -> None:
    """Import what will be needed."""
    import nncf
    import nncf.torch

    nncf.set_log_level(40)


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Compress the layers' matrices; head and embeddings stay."""
    import nncf

    model.config.use_cache = False
    rows = nncf.Dataset([{"input_ids": row[None]} for row in tokens])
    better = {"awq": True, "scale_estimation": True} if setting["calibrated"] else {}
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM if setting["bits"] == 4 else nncf.CompressWeightsMode.INT8_SYM,
        group_size=setting["group_size"],
        ratio=1.0,
        all_layers=False,
        ignored_scope=nncf.IgnoredScope(patterns=[".*lm_head.*", ".*embed_tokens.*"], validate=False),
        dataset=rows,
        subset_size=len(tokens),
        **better,
    )


def plain(model: Any) -> dict[str, Any]:
    """Return all weights in their transformers names; those its hooks unpack, unpacked."""
    import torch

    hooks = _unpackers(model)
    with torch.no_grad():
        weights = {n: t for n, t in model.state_dict().items() if not n.startswith("__nncf")}
        return {n: hooks[n](t).float() if n in hooks else t.float() for n, t in weights.items()}


def save(model: Any, folder: Path) -> None:
    """Write the tensors: it exports to OpenVINO, which is not here."""
    import torch

    torch.save(model.state_dict(), folder / "model.pt")


def stored_bytes(model: Any, folder: Path, matrices: list[str]) -> int:
    """Return the bytes of levels, scales and zeros."""
    hooks, state = _unpackers(model), model.state_dict()
    tensors = [
        t for name in matrices for t in (state[f"{name}.weight"], *hooks[f"{name}.weight"].state_dict().values())
    ]
    return sum(t.numel() * t.element_size() for t in tensors)


def runnable(model: Any) -> Any:
    """Return the model: a part of what AWQ does stays on the activations."""
    return model


def _unpackers(model: Any) -> dict[str, Any]:
    """Return the hooks that unpack weights, by the weights' names."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    found = {}
    for key, hook in get_hook_storage(model).named_hooks():  # post_hooks.model:layers:0:mlp:up_proj:weight__0.0
        if "Decompressor" in type(hook).__name__:
            found[key.split(".")[1].removesuffix("__0").replace(":", ".")] = hook
    return found
