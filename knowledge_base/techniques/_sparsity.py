"""Which weights become zero, and what the others do to make up for it: what the techniques of sparsity share.

A pattern says where zeros may lie: `unstructured` anywhere, or `n:m`, where of every m neighbours in a row n are kept.
Matrices are (out, in); masks are True where a weight becomes zero. `layerwise` spreads a share of zeros over the parts
of a model (attention and feed-forward of each layer) by what their zeros were measured to cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._allocation import allocate
from knowledge_base.types import Demand, Model, Session

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._blocks import Matrix

SPENDS = ("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s")
UNSTRUCTURED = "unstructured"
PATTERNS = (UNSTRUCTURED, "2:4")
ALLOCATIONS = ("uniform", "layerwise")
PROBES = (0.5, 0.7)  # shares of zeros a part is tried at
# Parts cost more together than the sum of each alone, which the best shares leave out: we go half of the way. Shipped model
# at 70 % zeros, perplexity after / before: none of the way 1.415, a quarter 1.247, half 1.226, all of it 1.391.
TOWARDS_BEST = 0.5
SHARES = tuple(share / 100 for share in range(95, -1, -1))  # of zeros that a part may get, most first
POWER_MIN, LOSS_MIN = 1.2, 1e-9  # what is measured of tiny losses is noise: curves stay convex and above zero
BLOCK = 128  # columns whose zeros are chosen together where they may lie anywhere
CALIBRATION_TOKENS = 16_384


# ---------------------------------------------------------------- what is claimed


def why_not_pattern(model: Model, knobs: Mapping[str, Any]) -> str | None:
    """Return why these knobs do not go together or do not fit the model, or None."""
    pattern, sparsity = knobs.get("pattern", UNSTRUCTURED), knobs["sparsity"]
    if pattern == UNSTRUCTURED:
        return None
    kept, size = _kept_of(pattern)
    if sparsity != 1 - kept / size:
        return f"{pattern} means {1 - kept / size:.0%} of zeros, not {sparsity:.0%}"
    if knobs.get("allocation", "uniform") != "uniform":
        return f"{pattern} has the same share of zeros everywhere, so there is nothing to allocate"
    widths = {model.hidden_size, model.heads * model.head_size, model.ffn_size}
    if odd := sorted(width for width in widths if width % size):
        return f"runs of {size} weights do not divide the width {odd[0]} of {model.name}"
    return None


def priced(sparsity: float, pattern: str) -> dict[str, Any]:
    """Return the knobs as published figures name them."""
    return {"sparsity": sparsity} if pattern == UNSTRUCTURED else {"pattern": pattern}


def zeroed(demand: Demand, sparsity: float, passes: int) -> Demand:
    """Return the demand with that share of zeros: same bytes and arithmetic, until a format leaves them out.

    Args:
        passes: over the calibration text.
    """
    return demand.but(
        zeros_share=sparsity,
        build_flop=demand.build_flop + 2 * passes * demand.linear_params * CALIBRATION_TOKENS,
        because=(*demand.because, f"{sparsity:.0%} zeros: same bytes and arithmetic, dense kernels skip nothing"),
    )


# ---------------------------------------------------------------- matrix by matrix


def each_matrix(
    session: Session, technique: str, pruned: Callable[[int, Matrix], torch.Tensor], *, full: bool = False
) -> None:
    """Exchange every matrix inside the layers for `pruned(layer, matrix)`, each layer calibrated on those before it.

    The notes tell the share of zeros, by which later steps know to keep them.

    Raises:
        CandidateFailed: no calibration text, or a layer gives a number that is not finite.
    """
    from knowledge_base.techniques._blocks import each_layer

    zeros = total = 0

    def change(index: int, layer: Any, matrices: Sequence[Matrix]) -> None:
        nonlocal zeros, total
        for matrix in matrices:
            matrix.weight.copy_(pruned(index, matrix))
            zeros += int((matrix.weight == 0).sum())
            total += matrix.weight.numel()

    each_layer(session, change, full=full, label=technique)
    session.notes[f"{technique}.zeros_ratio"] = zeros / total


# ---------------------------------------------------------------- where the zeros go


def run_of(pattern: str) -> int:
    """Return how many columns the sweep chooses together."""
    return BLOCK if pattern == UNSTRUCTURED else _kept_of(pattern)[1]


def _kept_of(pattern: str) -> tuple[int, int]:
    """Return (n, m) of `n:m`."""
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise CandidateFailed("unsupported", f"no pattern of zeros is called `{pattern}`", hint="give 2:4 or 4:8")
    return int(found[1]), int(found[2])


def lowest(scores: torch.Tensor, sparsity: float, pattern: str = UNSTRUCTURED, *, rows: bool = False) -> torch.Tensor:
    """Return the mask of the lowest scores (out, in): that share of all, or of every row, or m - n of m neighbours.

    Raises:
        CandidateFailed: "unsupported", m does not divide the row.
    """
    import torch

    runs = scores if rows else scores.reshape(1, -1)
    count = round(sparsity * runs.shape[1])
    if pattern != UNSTRUCTURED:
        kept, size = _kept_of(pattern)
        if scores.shape[1] % size:
            raise CandidateFailed("unsupported", f"runs of {size} weights do not divide a row of {scores.shape[1]}")
        runs, count = scores.reshape(-1, size), size - kept
    order = runs.argsort(dim=1, stable=True)[:, :count]
    mask = torch.zeros(runs.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)
    return mask.reshape(scores.shape)


def sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    run: int = BLOCK,
    hold: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the weights (out, in) with zeros, and with the others moved to make up for them (SparseGPT, arXiv:2301.00774).

    Columns go in order, the error of each taken off the later ones (`_columns.each_column`).

    Args:
        factor: the upper Cholesky factor of the inverse Hessian (in, in).
        choose: given the weights of a run of columns as they stand, and its first column, their mask.
        run: columns chosen together, a divisor of BLOCK.
        hold: given the run's weights, their mask and a column within it, what storage makes of that column.
    """
    import torch

    from knowledge_base.techniques._columns import each_column

    columns = weight.detach().float().T.clone(memory_format=torch.contiguous_format)
    kept = torch.empty_like(columns)
    part = gone = columns

    def changed(number: int) -> torch.Tensor:
        nonlocal part, gone
        place = number % run
        if place == 0:
            part = columns[number : number + run].T
            gone = choose(part, number)
        value = hold(part, gone, place) if hold else columns[number]
        kept[number] = value.masked_fill(gone[:, place], 0.0)
        return kept[number]

    each_column(columns, factor, changed)
    return kept.T


def change_of_outputs(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return the mean squared change of the outputs, summed: trace of D H D^T with D the change of the weights."""
    change = weight.detach().float() - other
    return ((change @ hessian) * change).sum().item()


# ---------------------------------------------------------------- how many zeros each part gets


def shares(session: Session, technique: str, sparsity: float, allocation: str) -> Callable[[int, str], float]:
    """Return a function from a layer and a matrix's name in it to the share of zeros it gets.

    `layerwise`: every part of a layer (attention, feed-forward) is pruned alone by Wanda's scores at each of PROBES, and
    the divergence from the unchanged model on calibration text measured. The model is unchanged after.

    Raises:
        CandidateFailed: no calibration text, or the model's layers are not found.
    """
    if allocation == "uniform":
        return lambda layer, name: sparsity
    best = spread(*_probe(session), sparsity)
    given = {part: sparsity + TOWARDS_BEST * (share - sparsity) for part, share in best.items()}
    session.notes[f"{technique}.shares"] = {
        f"{layer}.{part}": round(share, 4) for (layer, part), share in given.items()
    }
    return lambda layer, name: given[layer, _part(name)]


Part = tuple[int, str]  # layer, and the child of it that holds the matrices: "self_attn", "mlp", ...


def _part(name: str) -> str:
    return name.partition(".")[0]


def spread(measured: Mapping[Part, Sequence[float]], sizes: Mapping[Part, int], sparsity: float) -> dict[Part, float]:
    """Return the share of zeros of each part that loses least, with `sparsity` of all weights zero, up to one step.

    What a part loses at a share s is taken as c s^p through its two probes, p > 1, and losses to add up.

    Args:
        measured: loss of each part at each of PROBES.
    """
    low, high = PROBES
    curves = {}
    for part, (first, second) in measured.items():
        first = max(first, LOSS_MIN)
        power = max(math.log(max(second, first) / first) / math.log(high / low), POWER_MIN)
        curves[part] = [((1 - share) * sizes[part], first * (share / low) ** power) for share in SHARES]
    chosen = allocate(curves, (1 - sparsity) * sum(sizes.values()))
    return {part: SHARES[number] for part, number in chosen.items()}


def _probe(session: Session) -> tuple[dict[Part, tuple[float, ...]], dict[Part, int]]:
    """Return what zeros in each part alone cost at each of PROBES, in nats for each token, and its weights."""
    import torch

    from knowledge_base.techniques._blocks import decoder_layers, each_layer
    from knowledge_base.techniques._sensitivity import Trial, calibration_tokens

    parts: dict[Part, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # weights (views) and the norms of their inputs

    def record(index: int, layer: Any, matrices: Sequence[Matrix]) -> None:
        for matrix in matrices:
            found = (matrix.weight, matrix.inputs.squares.sqrt())
            parts.setdefault((index, _part(matrix.name)), []).append(found)

    each_layer(session, record, full=False, label="what zeros see", same=True)
    sizes = {part: sum(weight.numel() for weight, _ in found) for part, found in parts.items()}
    measured: dict[Part, tuple[float, ...]] = {}
    with torch.no_grad():
        trial = Trial(session.model, decoder_layers(session.model), calibration_tokens(session))
        for number, (part, found) in enumerate(parts.items()):
            kept = [weight.clone() for weight, _ in found]
            losses = []
            try:
                for share in PROBES:
                    for (weight, norms), whole in zip(found, kept):
                        weight.copy_(whole.masked_fill(lowest(whole.abs().float() * norms, share, rows=True), 0.0))
                    losses.append(trial.divergence(part[0]))
            finally:
                for (weight, _), whole in zip(found, kept):
                    weight.copy_(whole)
            measured[part] = tuple(losses)
            session.progress("what zeros cost", (number + 1) / len(parts))
    return measured, sizes
