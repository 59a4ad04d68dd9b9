"""4 bits for each weight that is not zero, a bit for each that might be; what rounding costs is made up for.

Half of the weights in 4 bits are 3 bits each, scales aside: less than 4-bit weights take, and as fast, since the artefact
is unpacked into them as it is loaded. SparseGPT's joint sweep (arXiv:2301.00774, section 3.5): columns are rounded in
order as GPTQ does, zeros stay zero, and the columns that follow give up what both cost. On the shipped model 3-bit GPTQ
of as many bytes (3.25 bits a weight) loses less, perplexity 1.025 against 1.035 times the unchanged model's; it has no
kernel that reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

TECHNIQUE = Technique(
    summary="4 bits for each weight that is not zero, rounding errors compensated; zeros left out of the artefact",
    stage="quantise",
    family="weights",
    implements=("gptq",),
    knobs={"group_size": Choice(options=(64, 128), default=64)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"packed:sparse", "packed:int4"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    sources=("arXiv:2301.00774", "arXiv:2210.17323"),
)

_PPL = "WikiText-2 perplexity"
EVIDENCE = (
    Evidence(model="OPT-175B", setting="50 % zeros and 4 bits together", quantity=_PPL,
             baseline=8.35, value=8.29, source="https://arxiv.org/abs/2301.00774"),
    Evidence(model="OPT-175B", setting="3 bits, the same bytes without zeros (GPTQ)", quantity=_PPL,
             baseline=8.35, value=8.68, source="https://arxiv.org/abs/2301.00774"),
)  # fmt: skip

_SCALES = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of the largest weight that are tried as the end of the grid


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model) or _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, group_size: int) -> Demand:
    """Return the demand with 4-bit weights in memory, and in the artefact only those that are not zero."""
    share = demand.zeros_share
    demand = loss_after(demand, "gptq", bits=4, group_size=group_size)
    stored = 1 + 4 * (1 - share) + 16 / group_size
    bits = _weights.int4_bits(group_size)
    demand = _weights.packed(demand, bits=bits, weight_format="int4", kernels=_weights.CAST_KERNELS)
    inputs = demand.model.hidden_size
    flop = 4 * demand.linear_params * 16_384 + 2 * inputs * demand.linear_params
    return demand.but(
        disk_share=stored / bits,
        build_flop=demand.build_flop + flop + 2 * 7 * demand.layers * inputs**2 * 16_384,
        because=(
            *demand.because,
            f"{share:.0%} zeros left out of the artefact: {stored:.3g} bits for each weight there",
        ),
    )


def execute(session: Session, *, group_size: int) -> None:
    """Round layer by layer, each on the inputs the already rounded layers give, then hold what is not zero in 4 bits.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", no zeros, or the layers hold nothing that can be packed.
    """
    from torch import nn

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import Matrix, each_layer, matrix_of
    from knowledge_base.techniques._experts_module import split_experts
    from knowledge_base.techniques._sparse_module import SparseInt4Linear

    split_experts(session.model)
    modules: dict[str, Any] = dict(_packed.linears(session.model))
    total = sum(module.weight.numel() for module in modules.values())
    zeros = sum(int((module.weight == 0).sum()) for module in modules.values())
    # A bit for each weight pays from a quarter of zeros on: those would take four bits.
    if zeros * 4 < total:
        raise CandidateFailed(
            "unsupported", f"{zeros / total:.0%} of the weights are zero, too few to leave out: saying where they are takes more",
            hint="prune at least a quarter of the weights before this step, or use weight_int4",
        )  # fmt: skip
    names = {id(module): name for name, module in modules.items()}
    packed: dict[str, SparseInt4Linear] = {}

    def pack(name: str, module: Any, hessian: torch.Tensor | None) -> None:
        weight = matrix_of(module)
        size = _packed.usable_group_size(weight.shape[1], group_size)
        if size is not None:
            there = weight != 0
            found = round_what_is_there(weight, hessian, size)
            packed[name] = SparseInt4Linear.from_quantised(*found, there, module.bias, weight.dtype)
            weight.copy_(packed[name].dequantised())  # the next layers are calibrated on what this one will give

    def change(index: int, layer: nn.Module, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            name = names.get(id(matrix.module))
            if name is not None and name not in packed:
                pack(name, matrix.module, matrix.inputs.products / max(matrix.inputs.rows, 1))

    each_layer(session, change, full=True, label="weight_int4_sparse")
    for name in names.values():
        if name not in packed:  # calibration never came through it
            pack(name, session.model.get_submodule(name), None)
        if name in packed:
            session.model.set_submodule(name, packed[name])
    _packed.note(session, "weight_int4_sparse", len(packed), [n for n in names.values() if n not in packed])
    session.notes["weight_int4_sparse.zeros_ratio"] = zeros / total


def round_what_is_there(
    weight: torch.Tensor, hessian: torch.Tensor | None, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights in -8..7 (out, in), 0 where they were 0, and scales (out, in / group_size), each as it is stored.

    Where the Hessian (in, in) of the inputs is unknown or cannot be inverted, or making up for errors makes the outputs
    worse, they are rounded to nearest.
    """
    import torch

    from knowledge_base.techniques._sparsity import change_of_outputs, sweep
    from knowledge_base.techniques.weight_gptq import inverse_factor

    groups = weight.detach().float().reshape(-1, group_size)
    scales = _scales(groups)
    nearest = _levels(groups, scales[:, None])
    plain = nearest.reshape(weight.shape), scales.reshape(len(weight), -1)
    factor = None if hessian is None else inverse_factor(hessian)
    if hessian is None or factor is None:
        return plain
    gone = weight == 0
    columns: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []

    def hold(part: torch.Tensor, gone: torch.Tensor, place: int) -> torch.Tensor:
        if place == 0:  # a group's scales are set from its weights as they stand when it begins
            steps.append(_scales(part.masked_fill(gone, 0.0)))
        columns.append(_levels(part[:, place], steps[-1]).masked_fill_(gone[:, place], 0.0))
        return columns[-1] * steps[-1]

    moved = sweep(weight, factor, lambda part, first: gone[:, first : first + group_size], run=group_size, hold=hold)
    rounded = (nearest * scales[:, None]).reshape(weight.shape)
    if change_of_outputs(weight, moved, hessian) > change_of_outputs(weight, rounded, hessian):
        return plain
    return torch.stack(columns, dim=1), torch.stack(steps, dim=1)


def _levels(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the nearest of -8..7 times the scale for each weight."""
    return (weight / scale).round_().clamp_(-8, 7)


def _scales(group: torch.Tensor) -> torch.Tensor:
    """Return the scale (n,) that rounds each group (n, size) best; its sign puts the largest weight at -8."""
    import torch

    largest = group.gather(1, group.abs().argmax(dim=1, keepdim=True))[:, 0]
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for share in _SCALES:
        scale = (share * largest / -8).bfloat16().float()
        scale = torch.where(scale == 0, 1.0, scale)
        error = (group - _levels(group, scale[:, None]) * scale[:, None]).square().sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
