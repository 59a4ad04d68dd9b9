"""The kinds of module an artefact's structure.json may name: replaced ones, and plain ones of other sizes.

A replaced module has a `kind`, a `spec()` and a class with `from_spec(...)`, found in the table below. A plain module
whose tensors are not what config.json gives (heads or channels that differ from layer to layer) is `resized`: its shapes
are written down, and the sizes its code reads from attributes; a step says so with `other_sizes`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed

RESIZED = "resized"
# kind: module of this package, class in it
_CLASSES = {
    "int8": ("_packed", "Int8Linear"),
    "int8_dynamic": ("_packed", "Int8DynamicLinear"),
    "int8_static": ("_static_module", "Int8StaticLinear"),
    "int4": ("_packed", "Int4Linear"),
    "int3": ("_packed", "Int3Linear"),
    "int2": ("_packed", "Int2Linear"),
    "codebook": ("_codebook_module", "CodebookLinear"),
    "fp8": ("_fp8_module", "Fp8Linear"),
    "int8_table": ("_table_module", "Int8Table"),
    "int4_table": ("_table_module", "Int4Table"),
    "experts": ("_experts_module", "Experts"),
    "rotated_table": ("_rotation_module", "RotatedTable"),
    "rotated_head": ("_rotation_module", "RotatedHead"),
    "low_rank": ("_low_rank_module", "LowRankLinear"),
    "corrected": ("_corrected_module", "CorrectedLinear"),
    "split_ffn": ("_split_ffn_module", "SplitFfn"),
    "thresholded": ("_threshold_module", "ThresholdedLinear"),
    "sparse": ("_sparse_module", "SparseLinear"),
    "sparse_int4": ("_sparse_module", "SparseInt4Linear"),
    "low_rank_sparse": ("_low_rank_sparse_module", "LowRankSparseLinear"),
    "zero": ("_zero_module", "ZeroLinear"),
}


def module_class(kind: str) -> Any:
    """Return the class of a replaced module by its kind.

    Raises:
        CandidateFailed: "load_error", no such kind.
    """
    if kind not in _CLASSES:
        raise CandidateFailed(
            "load_error", f"unknown kind of module `{kind}`; known: {', '.join(sorted(_CLASSES))}",
            hint="build the artefact again with this version",
        )  # fmt: skip
    file, name = _CLASSES[kind]
    return getattr(importlib.import_module(f"{__package__}.{file}"), name)


def other_sizes(module: nn.Module, **sizes: int) -> None:
    """Say that a plain module is no longer as config.json gives it, and set the attributes its code computes with.

    Its tensors may have any shape then; `sizes` are integers it keeps (`num_heads=6`).
    """
    for name, value in sizes.items():
        setattr(module, name, value)
    module.__dict__.setdefault("sizes_set", {}).update(sizes)


def resized(module: nn.Module) -> dict[str, Any] | None:
    """Return the structure entry of a module whose sizes were changed; None for any other."""
    if (sizes := module.__dict__.get("sizes_set")) is None:
        return None
    shapes = {name: list(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
    return {"kind": RESIZED, "shapes": shapes, "sizes": sizes}


def resize(module: nn.Module, shapes: Mapping[str, list[int]], sizes: Mapping[str, int]) -> None:
    """Give a module without weights the shapes and sizes of its structure entry.

    Raises:
        CandidateFailed: "load_error", the module has no such tensor or size.
    """
    for name, shape in shapes.items():
        old = getattr(module, name, None)
        if not isinstance(old, torch.Tensor):
            raise _unknown(module, name)
        setattr(module, name, nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=False))
    for name, value in sizes.items():
        if type(getattr(module, name, None)) is not int or type(value) is not int:
            raise _unknown(module, name)
    other_sizes(module, **sizes)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape


def _unknown(module: nn.Module, name: str) -> CandidateFailed:
    return CandidateFailed(
        "load_error", f"{type(module).__name__} has no `{name}` that structure.json could resize",
        hint="build the artefact again with this version",
    )  # fmt: skip
