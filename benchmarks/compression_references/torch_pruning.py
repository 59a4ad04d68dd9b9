"""Torch-Pruning (VainF/Torch-Pruning, MIT): channels removed along its dependency graph.

Its DependencyGraph only: the pruners above it search a language model's graph without end. Feed-forward channels of every
layer, the least important first by its group importance: magnitude, or first-order Taylor on the loss of calibration text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.compression_references._reference import Reference

REFERENCE = Reference(
    name="torch_pruning", package="torch-pruning", version="1.6.1", source="https://github.com/VainF/Torch-Pruning"
)


def prepare(method: str) -> None:
    """Import what will be needed."""
    import torch_pruning  # noqa: F401


def load(folder: Path, method: str, setting: dict[str, Any]) -> Any:
    """Return the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def build(model: Any, tokens: Any, method: str, setting: dict[str, Any]) -> Any:
    """Remove channels, and tell the config how many are left."""
    import torch_pruning as tp

    from knowledge_base.techniques._blocks import decoder_layers, ffn_config_key, ffn_of
    from knowledge_base.techniques.prune_width import kept_channels

    if setting["importance"] == "taylor":
        for row in tokens:
            model(row[None], labels=row[None], use_cache=False).loss.backward()
        importance: Any = tp.importance.GroupTaylorImportance()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    parts = [ffn_of(layer) for layer in decoder_layers(model)]
    key, channels = ffn_config_key(model, parts[0]), kept_channels(parts[0].size, setting["keep"])
    model.config.use_cache = False  # the graph begins at what is returned
    graph = tp.DependencyGraph().build_dependency(model, tokens[:1, :8], output_transform=lambda out: out.logits)
    for part in parts:
        root = part.ups[0]
        whole = graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=list(range(part.size)))
        fewest = importance(whole).argsort()[: part.size - channels].tolist()
        graph.get_pruning_group(root, tp.prune_linear_out_channels, idxs=sorted(fewest)).prune()
    setattr(model.config, key, channels)
    model.zero_grad(set_to_none=True)
    return model


def save(model: Any, folder: Path) -> None:
    """Write the smaller model as transformers does."""
    model.save_pretrained(folder)


def plain(model: Any) -> Any:
    """Return the smaller model."""
    return model


def stored_bytes(model: Any, folder: Path, matrices: list[str]) -> None:
    """Return None: no bits were saved, but weights."""
