"""4-bit weights whose rounding errors are made up for by the weights not yet rounded (GPTQ).

Frantar et al., arXiv:2210.17323: columns are rounded in order; the error of each, weighed by the inverse of the
Hessian H = X^T X of its inputs, is taken off the columns that follow. Own code: what the field's libraries offer
runs on CUDA only or brings its own kernels, and the artefact here is exactly that of weight_int4. Columns keep their
order (no act-order), so groups stay contiguous, and scales are set from the weights as they stand when a group begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

TECHNIQUE = Technique(
    summary="4-bit weights in groups, rounding errors compensated on calibration text (GPTQ)",
    stage="quantise",
    family="weights",
    implements=("gptq",),
    knobs={"group_size": Choice(options=(32, 64, 128), default=32)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"packed:int4"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    modules=("torchao",),
    sources=("arXiv:2210.17323", "https://github.com/IST-DASLab/gptq"),
)

_PAPER, _AWQ = "https://arxiv.org/abs/2210.17323", "https://arxiv.org/abs/2306.00978"
EVIDENCE = (
    Evidence(model="OPT-125M", setting="4 bits, whole rows", quantity="WikiText-2 perplexity",
             baseline=27.65, value=31.12, source=_PAPER),
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

_BLOCK = 128  # columns updated together before the rest of the matrix
_DAMPING = (0.01, 0.1, 1.0)  # shares of the Hessian's mean diagonal, tried in turn


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"layers of {model.architecture} without attention read their weights in a way calibration cannot watch"
    return _weights.why_not(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, group_size: int) -> Demand:
    """Return the demand with 4-bit weights in the layers; a cast of the activations on either side of each matrix."""
    from dataclasses import replace

    demand = loss_after(demand, "gptq", bits=4, group_size=group_size)
    demand = _weights.packed(
        demand, bits=_weights.int4_bits(group_size), weight_format="int4", kernels=_weights.CAST_KERNELS
    )
    # Two passes over about 16k tokens, their Hessians, one inverse and one sweep for each matrix.
    inputs = demand.model.hidden_size
    flop = (
        4 * demand.linear_params * 16_384
        + 2 * inputs * demand.linear_params
        + 2 * 7 * demand.layers * inputs**2 * 16_384
    )
    return replace(demand, build_flop=demand.build_flop + flop)


def execute(session: Session, *, group_size: int) -> None:
    """Round layer by layer, each on the inputs the already rounded layers give, then hold the weights as int4.

    A matrix whose Hessian cannot be inverted is rounded to nearest; one whose inputs no group size divides stays as
    it is. The notes say which.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import each_layer

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
            nearest = _packed.quantise_groups(matrix.weight, size)
            found = round_with_compensation(matrix.weight, hessian, size)
            nearest_error = output_error(matrix.weight, nearest, hessian)
            error = nearest_error if found is None else output_error(matrix.weight, found, hessian)
            if found is None or error > nearest_error:
                plain.append(name)
                found, error = nearest, nearest_error
            errors, nearest_errors = errors + error, nearest_errors + nearest_error
            packed[name] = _packed.Int4Linear.from_quantised(*found, matrix.module.bias, matrix.weight.dtype)
            # The next layers are calibrated on what this one will give.
            matrix.weight.copy_(packed[name].dequantised())

    each_layer(session, change, full=True, label="weight_gptq")
    for name in names.values():
        if name in packed:
            session.model.set_submodule(name, packed[name])
        elif not _packed.pack(session.model, name, "int4", group_size):
            left.append(name)
        else:  # calibration never came through it
            plain.append(name)
    session.notes["weight_gptq.output_error_ratio_to_nearest"] = errors / nearest_errors if nearest_errors else 1.0
    _packed.note(session, "weight_gptq", len(names) - len(left), left)
    if plain:
        session.notes["weight_gptq.rounded_to_nearest"] = plain


def round_with_compensation(
    weight: torch.Tensor, hessian: torch.Tensor, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Return 4-bit weights uint8 (out, in), scales and zeros (out, in / group_size), or None.

    None: the Hessian (in, in) of the inputs cannot be inverted even when strongly damped.

    With U the upper Cholesky factor of H^-1, rounding column j leaves the error e = (w_j - q_j) / U_jj, and every
    later column k gives up e U_jk (algorithm 1 of the paper).
    """
    import torch

    from knowledge_base.techniques._packed import group_qparams

    factor = _inverse_factor(hessian)
    if factor is None:
        return None
    work = weight.detach().float().clone()
    outputs, inputs = work.shape
    quantised = torch.empty(outputs, inputs, dtype=torch.uint8, device=work.device)
    scales = torch.empty(outputs, inputs // group_size, device=work.device)
    zeros = torch.empty_like(scales)
    for first in range(0, inputs, _BLOCK):  # group sizes divide 128, so a group never spans two blocks
        last = min(first + _BLOCK, inputs)
        errors = torch.empty(outputs, last - first, device=work.device)
        for column in range(first, last):
            group = column // group_size
            if column % group_size == 0:
                found = group_qparams(work[:, column : column + group_size], group_size)
                scales[:, group], zeros[:, group] = found[0][:, 0], found[1][:, 0]
            scale, zero = scales[:, group], zeros[:, group]
            value = work[:, column]
            rounded = ((value - zero) / scale).round().add(8).clamp(0, 15)
            quantised[:, column] = rounded.to(torch.uint8)
            error = (value - ((rounded - 8) * scale + zero)) / factor[column, column]
            work[:, column + 1 : last] -= error[:, None] * factor[column, column + 1 : last]
            errors[:, column - first] = error
        work[:, last:] -= errors @ factor[first:last, last:]
    return quantised, scales, zeros


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
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


def output_error(weight: torch.Tensor, found: tuple, hessian: torch.Tensor) -> float:
    """Return the mean squared change of the outputs, summed: trace of D H D^T with D the change of the weights."""
    quantised, scales, zeros = found
    size = weight.shape[1] // scales.shape[1]
    rounded = (quantised.float() - 8) * scales.repeat_interleave(size, 1) + zeros.repeat_interleave(size, 1)
    change = weight.detach().float() - rounded
    return ((change @ hessian) * change).sum().item()
