"""2- to 4-bit weights whose zero points and scales are found by solving for few large errors, without any text (HQQ).

Badri and Shaji, half-quadratic quantisation: the error of rounding is split into a few large parts, which may stay, and
the rest, which the zero point of each group is set to even out; the two are solved in turns. The published solver leaves
scales as they were; here scale and zero are then fitted again by least squares, which on the shipped model takes 2 bits
from 1.73 to 1.56 times the perplexity. Own code; the artefact is that of rounding to nearest at the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._packed import Quantised

TECHNIQUE = Technique(
    summary="2- to 4-bit weights in groups, scales and zeros optimised without calibration text (HQQ)",
    stage="quantise",
    family="weights",
    implements=("hqq",),
    knobs={"bits": Choice(options=(2, 3, 4), default=4), "group_size": Choice(options=(32, 64), default=32)},
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,  # of 2 and 3 bits; 4 bits have a kernel
    needs=frozenset({"packed:int2", "packed:int3", "packed:int4"}),
    provides=frozenset({"quantised"}),
    modules=("torchao",),
    sources=("https://mobiusml.github.io/hqq_blog/", "https://github.com/mobiusml/hqq"),
)

_AO = "https://github.com/pytorch/ao/blob/main/torchao/prototype/awq/README.md"
EVIDENCE = (
    Evidence(model="Llama-3-8B-Instruct", setting="4 bits, torchao int4wo-hqq", quantity="WikiText perplexity",
             baseline=10.936, value=11.905, source=_AO),
    Evidence(model="Llama-2-7B-chat", setting="4 bits, torchao int4wo-hqq, A100", quantity="decode tokens/s",
             baseline=107.38, value=209.19, source=_AO),
)  # fmt: skip

# Of the published solver: exponent of the norm, weight of the split and its growth, rounds.
_NORM, _BETA, _KAPPA, _ROUNDS = 0.7, 10.0, 1.01, 20
_SLAB = 2**16  # weights solved together
_FLOP = 2_500  # of a matrix product, that take as long as the rounds do for one weight; 0.07 us on two cores, own runs 2026-11


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, bits: int, group_size: int) -> Demand:
    """Return the demand with weights of few bits in the layers; below 4 bits unpacked at every step."""
    demand = loss_after(demand, "hqq", bits=bits, group_size=group_size)
    return _weights.grouped(demand, bits, group_size).but(build_flop=demand.build_flop + _FLOP * demand.linear_params)


def execute(session: Session, *, bits: int, group_size: int) -> None:
    """Replace the layers' linear modules by int2, int3 or int4 ones.

    A matrix whose inputs the group size does not divide takes smaller groups, or stays as it is; the notes say which.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_hqq", f"int{bits}", group_size, quantise)


def quantise(weight: torch.Tensor, group_size: int, bits: int) -> Quantised:
    """Return weights in 0..2^bits - 1, uint8 (out, in), scales and zeros (out, in / group_size)."""
    from knowledge_base.techniques._packed import group_qparams, levels, refit

    scales, zeros = group_qparams(weight, group_size, bits)
    scales, zeros = refit(weight, scales, half_quadratic(weight, scales, zeros, bits), bits)
    return levels(weight, scales, zeros, bits), scales, zeros


def half_quadratic(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Return zeros (out, groups) with a smaller mean |error| of rounding in each group, at the scales given.

    With e = w - (q s + z):  f = sign(e) max(0, |e| - |e|^(p-1) / beta),  z = mean(w - f - q s),  beta grows.
    """
    import torch

    middle, rows = 2 ** (bits - 1), max(1, _SLAB // weight.shape[1])  # each slab stays in a core's cache for all rounds
    slabs = zip(weight.detach().split(rows), scales.split(rows), zeros.split(rows), strict=True)
    return torch.cat([_solved(*slab, middle) for slab in slabs]).bfloat16().float()


def _solved(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, middle: int) -> torch.Tensor:
    grouped, scale = weight.float().unflatten(1, (scales.shape[1], -1)), scales[..., None]
    beta, best, zero = _BETA, scales * float("inf"), zeros[..., None]
    for _ in range(_ROUNDS):
        rounded = ((grouped - zero) / scale).round_().clamp_(-middle, middle - 1).mul_(scale)
        rest = grouped - rounded
        error = rest - zero
        size = error.abs()
        mean = size.mean(2)
        zeros, best = zeros.where(mean >= best, zero[..., 0]), best.minimum(mean)
        split = size.sub_(size.log2().mul_(_NORM - 1).exp2_().div_(beta)).relu_().mul_(error.sign_())
        zero = rest.sub_(split).mean(2, keepdim=True)
        beta *= _KAPPA
    return zeros
