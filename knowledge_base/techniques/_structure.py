"""Structured removal: whole groups of a matrix's inputs go, and what stays makes up for them.

`shrinking` is the optimal brain surgeon on groups of columns (ZipLM, arXiv:2302.04089, equation 2): with
H = sum of x x^T over the calibrated inputs, W (out, in) the matrix and P = H^-1,

    the error of removing group g        tr(W_g (P_gg)^-1 W_g^T)
    what the other columns become        W - W_g (P_gg)^-1 P_g
    and the inverse without the group    P - P_g^T (P_gg)^-1 P_g

so groups go one after another, each judged on what the earlier ones left. Heads are groups of columns of the matrix
behind them; `attention_of` finds them in the layers of transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import keep_inputs, keep_outputs, matrix_of
from knowledge_base.techniques._kinds import other_sizes

DAMPING = 0.01  # of an input's mean square, added to each: calibration text is short


@dataclass(slots=True)
class Removal:
    """A matrix with some groups of its inputs left. `error` is what its output lost, summed over calibrated rows."""

    kept: torch.Tensor  # groups, sorted
    weight: torch.Tensor  # (out, groups kept * size), float64
    error: float


def shrinking(
    weight: torch.Tensor, products: torch.Tensor, size: int, levels: Sequence[int], *, at_once: int = 1
) -> Iterator[Removal]:
    """Yield the matrix with as many groups of `size` neighbouring inputs left as `levels` say, from most to fewest.

    Args:
        weight: (out, in).
        products: (in, in), sum of x x^T.
        at_once: groups that go before the others are judged anew.
    """
    gram = products.double()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(gram + DAMPING * gram.diagonal().mean().clamp_min(1e-12) * eye)
    weight, error = weight.double(), 0.0
    kept = torch.arange(weight.shape[1] // size, device=weight.device)
    for level in sorted(set(levels), reverse=True):
        while len(kept) > level:
            order = _costs(weight, inverse, size).argsort(stable=True)
            count = min(at_once, len(kept) - level)
            gone, stay = columns(order[:count], size), columns(order[count:].sort().values, size)
            lost = weight[:, gone]
            middle, across = inverse[gone][:, gone], inverse[gone][:, stay]
            error += float((lost * torch.linalg.solve(middle, lost.T).T).sum())
            step = torch.linalg.solve(middle, across)
            weight = weight[:, stay] - lost @ step
            inverse = inverse[stay][:, stay] - across.T @ step
            kept = kept[order[count:].sort().values]
        yield Removal(kept, weight, error)


def _costs(weight: torch.Tensor, inverse: torch.Tensor, size: int) -> torch.Tensor:
    """Return for each group the error that its removal alone causes: (groups,)."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    groups = weight.shape[1] // size
    blocks = inverse.reshape(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight.reshape(-1, groups, size).permute(1, 2, 0)  # (groups, size, out)
    return (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))


def columns(groups: torch.Tensor, size: int) -> torch.Tensor:
    """Return the inputs that groups of `size` neighbouring ones consist of, in the order of the groups.

    >>> columns(torch.tensor([0, 2]), 3).tolist()
    [0, 1, 2, 6, 7, 8]
    """
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


# ---------------------------------------------------------------- attention


@dataclass(slots=True)
class Attention:
    """The attention of one layer, in groups that can go: a key-value head with the query heads that read it."""

    module: Any
    ins: tuple[Any, ...]  # query, key, value; or one matrix of all three
    out: Any
    groups: int
    queries: int  # query heads in a group
    head_size: int
    layout: (
        str  # "apart", "stacked": all queries, keys, values; "by head": one head's query, key, value; the next head's
    )

    @property
    def size(self) -> int:
        """Inputs of the output matrix that belong to one group."""
        return self.queries * self.head_size


_OUT = ("o_proj", "out_proj", "dense", "c_proj")
_STACKED = ("qkv_proj", "c_attn")
_BY_HEAD = ("query_key_value",)
# Attributes that count heads, where a module keeps its own, and what they count.
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "embed_dim")


def attention_of(layer: nn.Module) -> Attention:
    """Return a decoder layer's attention.

    Raises:
        CandidateFailed: "unsupported", there is none, or none of a known shape.
    """
    for module in layer.modules():
        out = next((getattr(module, name) for name in _OUT if _is_matrix(getattr(module, name, None))), None)
        size = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
        if out is None or not isinstance(size, int):
            continue
        heads = matrix_of(out).shape[1] // size
        apart = tuple(getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj"))
        if all(map(_is_matrix, apart)):
            ins, layout = apart, "apart"
            groups = matrix_of(apart[1]).shape[0] // size
            fits = matrix_of(apart[0]).shape[0] == heads * size and matrix_of(apart[2]).shape[0] == groups * size
        else:
            names = [name for name in (*_STACKED, *_BY_HEAD) if _is_matrix(getattr(module, name, None))]
            if not names:
                continue
            ins, layout = (getattr(module, names[0]),), "by head" if names[0] in _BY_HEAD else "stacked"
            rows = matrix_of(ins[0]).shape[0]
            groups = (rows // size - heads) // 2
            fits = rows == (heads + 2 * groups) * size and (layout == "stacked" or groups == heads)
        if groups and fits and heads % groups == 0:
            return Attention(module, ins, out, groups, heads // groups, size, layout)
        raise CandidateFailed("unsupported", f"the attention of {type(module).__name__} is laid out in an unknown way")
    raise CandidateFailed("unsupported", f"{type(layer).__name__} has no attention of a known shape")


def _is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def keep_groups(attention: Attention, kept: torch.Tensor, out: torch.Tensor) -> None:
    """Keep the groups `kept` (sorted) and store `out` (hidden, kept * size) as the new output matrix."""
    heads, groups, size = attention.groups * attention.queries, attention.groups, attention.head_size
    queries, keys = columns(kept, attention.size), columns(kept, size)
    if attention.layout == "apart":
        for module, rows in zip(attention.ins, (queries, keys, keys)):
            keep_outputs(module, rows)
    elif attention.layout == "stacked":
        rows = torch.cat([queries, heads * size + keys, (heads + groups) * size + keys])
        keep_outputs(attention.ins[0], rows)
    else:
        keep_outputs(attention.ins[0], columns(kept, 3 * size))
    keep_inputs(attention.out, out)
    for name in _COUNTS:
        if isinstance(value := getattr(attention.module, name, None), int):
            setattr(attention.module, name, round(value * len(kept) / groups))
    if _reads_config(attention):  # one of its own, until all layers are done
        attention.module.config = _with_heads(attention.module.config, replace(attention, groups=len(kept)))


def _reads_config(attention: Attention) -> bool:
    """Return whether an attention counts its heads in config.json at every step, as Phi-3's does."""
    return attention.layout == "stacked" and hasattr(attention.module, "num_key_value_groups")


def _with_heads(config: Any, attention: Attention) -> Any:
    """Return a copy of a config with that many heads in every layer."""
    found = copy.deepcopy(config)
    found.num_attention_heads, found.head_dim = attention.groups * attention.queries, attention.head_size
    if getattr(config, "num_key_value_heads", None) is not None:
        found.num_key_value_heads = attention.groups
    return found


def describe_heads(model: Any, attentions: Sequence[Attention]) -> bool:
    """Let config.json give the number of heads, where all layers have the same and the model reads it from there.

    Otherwise the attention modules are marked as of other sizes, for structure.json; returns False then.

    Raises:
        CandidateFailed: "unsupported", neither can describe the model.
    """
    config, first = model.config.get_text_config(), attentions[0]
    wanted = _with_heads(config, first)
    alike = all((a.groups, a.queries) == (first.groups, first.queries) for a in attentions)
    for attention in attentions:
        if _reads_config(attention):
            attention.module.config = config
    if alike and _as_built(first.module, wanted):
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            if hasattr(wanted, key):
                setattr(config, key, getattr(wanted, key))
        return True
    if _reads_config(first):
        raise CandidateFailed(
            "unsupported",
            f"{type(first.module).__name__} reads the number of heads from config.json, so layers cannot differ in it",
        )
    for attention in attentions:
        for module in (*attention.ins, attention.out):
            other_sizes(module)
        counts = {n: v for n in _COUNTS if isinstance(v := getattr(attention.module, n, None), int)}
        if counts:
            other_sizes(attention.module, **counts)
    return False


def describe_head_size(config: Any, attention: Attention) -> None:
    """Let config.json give the size of heads, where it is no longer the hidden size over their number.

    An architecture that has no such field gets its attention marked as of other sizes. Its scores are scaled by the size it
    takes heads to have, so the queries make up for that.

    Raises:
        CandidateFailed: "unsupported", neither can describe the model.
    """
    module = attention.module
    config.head_dim = attention.head_size
    if _as_built(module, config):
        return
    made = _built(module, config)
    if made is None or not isinstance(getattr(made, "scaling", None), float):
        raise CandidateFailed(
            "unsupported", f"{type(module).__name__} cannot be built with heads of {attention.head_size}"
        )
    query, bias = matrix_of(attention.ins[0]), attention.ins[0].bias
    heads = torch.arange(attention.groups * attention.queries)
    if attention.layout == "by head":
        heads = 3 * heads
    rows, ratio = columns(heads, attention.head_size).to(query.device), module.scaling / made.scaling
    query[rows] *= ratio
    if bias is not None:
        bias.data[rows] *= ratio
    module.scaling = made.scaling
    for matrix in (*attention.ins, attention.out):
        other_sizes(matrix)
    sizes = ("head_dim", "head_size", "split_size", "rotary_ndims")
    other_sizes(module, **{name: value for name in sizes if type(value := getattr(module, name, None)) is int})


def _built(module: Any, config: Any) -> Any:
    """Return the attention that the architecture builds from that config, without weights, or None."""
    try:
        with torch.device("meta"):
            return type(module)(config, layer_idx=getattr(module, "layer_idx", 0))
    except (TypeError, ValueError):
        return None


def _as_built(module: Any, config: Any) -> bool:
    """Return whether the architecture builds this attention from that config: same tensors, same sizes of heads."""
    made = _built(module, config)
    if made is None:
        return False
    sizes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in (made, module)]
    heads = [getattr(m, "head_dim", None) or getattr(m, "head_size", None) for m in (made, module)]
    return sizes[0] == sizes[1] and heads[0] == heads[1]
