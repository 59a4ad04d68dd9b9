"""Take matrices apart into two thin factors and a rest of which most weights are zero; store both without the zeros.

The factors hold what all inputs share, the rest the weights that stand out (OATS, arXiv:2409.13652; LoSparse,
arXiv:2306.11222). Both are fitted in turns to the outputs on calibrated inputs, the rest at last column by column with
the others making up for each, as SparseGPT does, and the factors once more to what it left. Bytes are given to the parts
of the model by what zeros cost there. Whether a matrix gets factors at all is tried: they pay most in what widens the
hidden state, and seldom in what narrows it. Only the artefact gets smaller: once loaded the parts are added up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_base.techniques import _sparsity, _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

TECHNIQUE = Technique(
    summary="each matrix as thin factors and a sparse rest, fitted in turns; the zeros left out of the artefact",
    stage="quantise",
    family="weights",
    implements=("oats",),
    knobs={"keep": Choice(options=(0.4, 0.5, 0.6), default=0.5)},
    saves=("artefact_bytes", "network_bytes_per_start"),
    spends=_sparsity.SPENDS,
    needs=frozenset({"packed:sparse"}),
    needs_calibration=True,
    sources=("arXiv:2409.13652", "arXiv:2306.11222", "https://github.com/stephenqz/OATS"),
)

EVIDENCE: tuple[Evidence, ...] = ()

FACTOR_SHARES = (0.0, 0.2)  # of a matrix's kept bytes that its factors may get
MULTIPLE = 8  # of ranks
ROUNDS, SWEEPS = 16, 2  # rest chosen by size alone, then with the others making up; errors hardly fall after


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model) or _weights.why_not(model)


def sparsity_of(keep: float, weight_bytes: float) -> float:
    """Return the share of zeros that leaves `keep` of the bytes where there are no factors: a bit tells each weight's place.

    >>> sparsity_of(0.5, 2.0)
    0.5625
    """
    return 1 + 1 / (8 * weight_bytes) - keep


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with an artefact whose matrices take that share of their bytes.

    Quality is taken for that of SparseGPT at as many bytes, since no factors are among what is tried: on the shipped
    model half of the bytes lose 1.040 times the perplexity, SparseGPT's 1.042, though outputs of single matrices change
    up to a quarter less.
    """
    sparsity = sparsity_of(keep, demand.linear_bytes / demand.linear_params)
    demand = loss_after(demand, "sparsegpt", sparsity=sparsity, allocation="owl")
    inputs, tries = demand.model.hidden_size, len(FACTOR_SHARES)
    hessians = 2 * 7 * demand.layers * inputs**2 * _sparsity.CALIBRATION_TOKENS
    fits = 2 * inputs * demand.linear_params * tries * (2 * ROUNDS + 3 * SWEEPS)
    return demand.but(
        disk_share=keep,
        build_flop=demand.build_flop + 8 * demand.linear_params * _sparsity.CALIBRATION_TOKENS + hessians + fits,
        because=(*demand.because, f"thin factors and a sparse rest: {keep:.0%} of the layers' bytes in the artefact"),
    )


def execute(session: Session, *, keep: float) -> None:
    """Replace every matrix inside the layers, each calibrated on those before it.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", experts stored as 3-D weights.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import Matrix, each_layer
    from knowledge_base.techniques._low_rank_sparse_module import LowRankSparseLinear
    from knowledge_base.techniques._sparse_module import SparseLinear

    size = next(session.model.parameters()).element_size()
    share_of = _sparsity.shares(session, "low_rank_sparse", sparsity_of(keep, size), "layerwise")
    ranks: dict[str, int] = {}

    def change(index: int, layer: torch.nn.Module, found: list[Matrix]) -> None:
        for matrix in found:
            if matrix.expert is not None:
                raise CandidateFailed("unsupported", "experts stored as 3-D weights are not taken apart")
            kept = 1 - share_of(index, matrix.name)
            rest, factors = taken_apart(matrix.weight, matrix.inputs.products / max(matrix.inputs.rows, 1), kept)
            rest = rest.to(matrix.weight.dtype)
            bias = matrix.module.bias
            made = (
                SparseLinear.from_weight(rest, bias)
                if factors is None
                else LowRankSparseLinear.from_parts(rest, *factors, bias)
            )
            layer.set_submodule(matrix.name, made)
            ranks[f"{index}.{matrix.name}"] = 0 if factors is None else len(factors[1])

    each_layer(session, change, full=True, label="low_rank_sparse")
    session.notes["low_rank_sparse.ranks"] = ranks


Factors = tuple["torch.Tensor", "torch.Tensor"]  # (out, rank), (rank, in)


def taken_apart(weight: torch.Tensor, hessian: torch.Tensor, kept: float) -> tuple[torch.Tensor, Factors | None]:
    """Return the rest (out, in) and the factors, None where none were best: together `kept` of the matrix's numbers.

    Args:
        hessian: (in, in), mean of x x^T over calibrated inputs.
    """
    weight, best = weight.detach().float(), None
    for share in FACTOR_SHARES:
        found = _fitted(weight, hessian, kept, share)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    assert best is not None, "no factors at all always fit"
    return best[1], best[2]


def _fitted(
    weight: torch.Tensor, hessian: torch.Tensor, kept: float, share: float
) -> tuple[float, torch.Tensor, Factors | None] | None:
    """Return error, rest and factors with `share` of the kept numbers in the factors; None where no rank is so small."""

    from knowledge_base.techniques._low_rank_module import best_factors
    from knowledge_base.techniques.weight_gptq import inverse_factor

    outputs, inputs = weight.shape
    rank = round(share * kept * outputs * inputs / (outputs + inputs) / MULTIPLE) * MULTIPLE
    if share and not 0 < rank < min(outputs, inputs):
        return None
    zeros = 1 - kept + rank * (outputs + inputs) / (outputs * inputs)
    factor = inverse_factor(hessian)
    norms = hessian.diagonal().clamp_min(0).sqrt()

    def largest(left: torch.Tensor) -> torch.Tensor:
        scores = left.abs() * norms
        bound = scores.flatten().kthvalue(max(1, round(zeros * scores.numel()))).values
        return left.masked_fill(scores <= bound, 0.0)

    def swept(left: torch.Tensor) -> torch.Tensor:
        if factor is None:  # inputs that were never seen: nothing can make up for a weight
            return largest(left)
        spread = factor.diagonal()

        def choose(part: torch.Tensor, first: int) -> torch.Tensor:
            return _sparsity.lowest((part / spread[first : first + part.shape[1]]).square(), zeros)

        return _sparsity.sweep(left, factor, choose)

    if rank == 0:
        rest = swept(weight)
        return _sparsity.change_of_outputs(weight, rest, hessian), rest, None
    expand, reduce = (part.float() for part in best_factors(weight, hessian, rank))
    for number in range(ROUNDS + SWEEPS):
        left = weight - expand @ reduce
        rest = largest(left) if number < ROUNDS else swept(left)
        expand, reduce = _refitted(weight - rest, hessian, expand)
    return _sparsity.change_of_outputs(weight, rest + expand @ reduce, hessian), rest, (expand, reduce)


def _refitted(weight: torch.Tensor, hessian: torch.Tensor, expand: torch.Tensor) -> Factors:
    """Return nearly the best factors for other weights (out, in), from those of the weights before.

    The best `expand` spans the leading eigenvectors of W H W^T; a step of power iteration from the last ones follows
    them, as W changes little from one round to the next. Given `expand` with orthonormal columns, expand^T W is best.
    """
    import torch

    basis = torch.linalg.qr(weight @ (hessian @ (weight.T @ expand))).Q
    return basis, basis.T @ weight
