"""2- to 4-bit weights whose rounding errors are made up for by the weights not yet rounded (GPTQ).

Frantar et al., arXiv:2210.17323: columns are rounded in turn; the error of each, weighed by the inverse of the Hessian
H = X^T X of its inputs, is taken off the columns that follow. Own code: what the field's libraries offer runs on CUDA only
or brings its own kernels, and the artefact here is exactly that of rounding to nearest at the same bits.

Columns are taken by falling diagonal of H ("act-order"), with the groups' scales set before, so groups stay contiguous.
Scales are fitted to the weights by least squares weighed by that diagonal. On the shipped model, at 2 bits in groups of 32,
columns in their own order with the scales of the largest and smallest weight lose a factor of 1.25, by order 1.19, fitted
1.15. 8 bits are not offered: rounded to nearest they lose 0.0004.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._packed import Quantised

TECHNIQUE = Technique(
    summary="2- to 4-bit weights in groups, rounding errors compensated on calibration text (GPTQ)",
    stage="quantise",
    family="weights",
    implements=("gptq",),
    knobs={"bits": Choice(options=(2, 3, 4), default=4), "group_size": Choice(options=(32, 128), default=32)},
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,  # of 2 and 3 bits; 4 bits have a kernel
    needs=frozenset({"packed:int2", "packed:int3", "packed:int4"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    modules=("torchao",),
    sources=("arXiv:2210.17323", "https://github.com/IST-DASLab/gptq"),
)

_PAPER, _AWQ = "https://arxiv.org/abs/2210.17323", "https://arxiv.org/abs/2306.00978"
EVIDENCE = (
    Evidence(model="OPT-125M", setting="4 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=27.65, value=31.12, source=_PAPER),
    Evidence(model="OPT-125M", setting="3 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=27.65, value=53.85, source=_PAPER),
    Evidence(model="OPT-175B", setting="3 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=8.34, value=8.68, source=_PAPER),
    Evidence(model="OPT-2.7B", setting="4 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=12.47, value=12.87, source=_PAPER),
    Evidence(model="OPT-175B", setting="4 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=8.34, value=8.37, source=_PAPER),
    Evidence(model="BLOOM-560M", setting="4 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=22.42, value=24.03, source=_PAPER),
    Evidence(model="Llama-2-7B", setting="4 bits, groups of 128", quantity="WikiText-2 perplexity",
             baseline=5.47, value=5.69, source=_AWQ),
    Evidence(model="Llama-2-13B", setting="4 bits, groups of 128", quantity="WikiText-2 perplexity",
             baseline=4.88, value=4.98, source=_AWQ),
    Evidence(model="LLaMA-7B", setting="4 bits, groups of 128", quantity="WikiText-2 perplexity",
             baseline=5.68, value=5.85, source="https://github.com/qwopqwop200/GPTQ-for-LLaMa"),
)  # fmt: skip

_DAMPING = (0.01, 0.1, 1.0)  # shares of the Hessian's mean diagonal, tried in turn


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model) or _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, bits: int, group_size: int) -> Demand:
    """Return the demand with weights of few bits in the layers; below 4 bits unpacked at every step."""
    demand = loss_after(demand, "gptq", bits=bits, group_size=group_size)
    demand = _weights.grouped(demand, bits, group_size)
    # Two passes over about 16k tokens, their Hessians, one inverse and one sweep for each matrix.
    inputs = demand.model.hidden_size
    flop = (
        4 * demand.linear_params * 16_384
        + 2 * inputs * demand.linear_params
        + 2 * 7 * demand.layers * inputs**2 * 16_384
    )
    return demand.but(build_flop=demand.build_flop + flop)


def execute(session: Session, *, bits: int, group_size: int) -> None:
    """Round layer by layer, each on the inputs the already rounded layers give, then hold the weights packed.

    A matrix whose Hessian cannot be inverted, or an expert that calibration never chose, is rounded to nearest; a matrix
    whose inputs no group size divides stays as it is. The notes say which.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import each_layer
    from knowledge_base.techniques._experts_module import split_experts

    split_experts(session.model)
    kind = f"int{bits}"
    names = {id(module): name for name, module in _packed.linears(session.model).items()}
    packed: dict[str, Any] = {}
    plain: list[str] = []  # rounded to nearest
    left: list[str] = []
    errors, nearest_errors = 0.0, 0.0

    def change(index: int, layer: Any, matrices: list) -> None:
        nonlocal errors, nearest_errors
        for matrix in matrices:
            name = names.get(id(matrix.module))
            size = _packed.usable_group_size(matrix.weight.shape[1], group_size)
            if name is None or name in packed or size is None:
                continue
            hessian = matrix.inputs.products / max(matrix.inputs.rows, 1)
            found = compensated_or_nearest(matrix.weight, hessian, size, bits)
            if not found.compensated:
                plain.append(name)
            errors, nearest_errors = errors + found.error, nearest_errors + found.nearest_error
            made = _packed.module_class(kind)
            packed[name] = made.from_quantised(*found.levels, matrix.module.bias, matrix.weight.dtype)
            # The next layers are calibrated on what this one will give.
            matrix.weight.copy_(packed[name].dequantised())

    each_layer(session, change, full=True, label="weight_gptq")
    for name in names.values():
        if name in packed:
            session.model.set_submodule(name, packed[name])
        elif not _packed.pack(session.model, name, kind, group_size):
            left.append(name)
        else:  # calibration never came through it
            plain.append(name)
    session.notes["weight_gptq.output_error_ratio_to_nearest"] = errors / nearest_errors if nearest_errors else 1.0
    _packed.note(session, "weight_gptq", len(names) - len(left), left)
    if plain:
        session.notes["weight_gptq.rounded_to_nearest"] = plain


class Rounded(NamedTuple):
    """A rounded matrix: levels, scales and zeros, with the error of its outputs and that of rounding to nearest."""

    levels: Quantised
    compensated: bool
    error: float
    nearest_error: float


def compensated_or_nearest(weight: torch.Tensor, hessian: torch.Tensor, group_size: int, bits: int) -> Rounded:
    """Return weights (out, in) rounded with compensation, or to nearest where that fails or is better."""
    from knowledge_base.techniques._packed import quantise_groups

    nearest = quantise_groups(weight, group_size, bits)
    nearest_error = output_error(weight, nearest, hessian, bits)
    found = round_with_compensation(weight, hessian, group_size, bits)
    error = math.inf if found is None else output_error(weight, found, hessian, bits)
    if found is None or error > nearest_error:
        return Rounded(nearest, False, nearest_error, nearest_error)
    return Rounded(found, True, error, nearest_error)


def round_with_compensation(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int, bits: int = 4
) -> Quantised | None:
    """Return weights in 0..2^bits - 1, uint8 (out, in), scales and zeros (out, in / group_size), or None.

    None: the Hessian (in, in) of the inputs cannot be inverted even when strongly damped. The rounding errors of each
    column are taken off those that follow (`_columns.each_column`).
    """
    import torch

    from knowledge_base.techniques._columns import each_column
    from knowledge_base.techniques._packed import group_qparams, refit

    importance = hessian.diagonal()
    order = importance.argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])
    if factor is None:
        return None
    scales, zeros = refit(weight, *group_qparams(weight, group_size, bits), bits, importance)
    groups = (order // group_size).tolist()
    scale_of, zero_of = (t.T.contiguous() for t in (scales, zeros))
    columns = weight.detach().float()[:, order].T.contiguous()
    found = torch.empty(columns.shape, dtype=torch.uint8, device=weight.device)
    middle = 2 ** (bits - 1)

    def rounded(number: int) -> torch.Tensor:
        scale, zero = scale_of[groups[number]], zero_of[groups[number]]
        level = columns[number].sub(zero).div_(scale).round_().clamp_(-middle, middle - 1)
        found[number] = level + middle
        return level.mul_(scale).add_(zero)

    each_column(columns, factor, rounded)
    return found[order.argsort()].T.contiguous(), scales, zeros


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """Return the upper Cholesky factor of the damped Hessian's inverse, float32, or None."""
    import torch

    hessian = hessian.float()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean) or mean <= 0:
        return None
    for share in _DAMPING:
        damped = hessian + torch.diag((diagonal == 0) * mean + share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(factor).all():
            return factor
    return None


def output_error(weight: torch.Tensor, found: Quantised, hessian: torch.Tensor, bits: int = 4) -> float:
    """Return the mean squared change of the outputs, summed: trace of D H D^T with D the change of the weights."""
    from knowledge_base.techniques._packed import dequantise_groups

    change = weight.detach().float() - dequantise_groups(*found, bits)
    return ((change @ hessian) * change).sum().item()
