"""Scale up the channels that meet large activations before weights are rounded, and scale them down where they are made.

AWQ's search (Lin et al., arXiv:2306.00978): a scale of (mean size of the activation)^r for each channel, r from a small
grid, kept where rounding in groups then changes the outputs least on calibration text. The scales are folded into the
norm or matrix before, so the model computes what it did and any rounding that follows profits: nearest, GPTQ, HQQ, and
llama.cpp's block formats, which know nothing of it. AWQ's clipping is left to the rounding itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import eased
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._blocks import Matrix
    from knowledge_base.techniques._folding import Junction

TECHNIQUE = Technique(
    summary="scales for channels with large activations, folded in before weights are rounded (AWQ)",
    stage="quantise",
    family="scaling",
    implements=("awq",),
    knobs={"bits": Choice(options=(3, 4), default=4)},
    spends=("build_s",),
    provides=frozenset({"scaled", "ready_to_round"}),
    needs_calibration=True,
    sources=("arXiv:2306.00978", "https://github.com/mit-han-lab/llm-awq"),
)

_AWQ = "https://arxiv.org/abs/2306.00978"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="4 bits, groups of 128; round to nearest 5.73", quantity="WikiText-2 perplexity",
             baseline=5.47, value=5.60, source=_AWQ),
    Evidence(model="Llama-2-13B", setting="4 bits, groups of 128; round to nearest 4.98", quantity="WikiText-2 perplexity",
             baseline=4.88, value=4.97, source=_AWQ),
    Evidence(model="Llama-2-7B", setting="3 bits, groups of 128; round to nearest 6.66", quantity="WikiText-2 perplexity",
             baseline=5.47, value=6.24, source=_AWQ),
    Evidence(model="Llama-2-13B", setting="3 bits, groups of 128; round to nearest 5.52", quantity="WikiText-2 perplexity",
             baseline=4.88, value=5.32, source=_AWQ),
)  # fmt: skip

GROUP_SIZE = 64  # of the rounding the search tries; scales found for one group size serve others
# (a, b): a channel is scaled by (size of its activations)^a / (size of its weights)^b
_POWERS = tuple((a / 8, b / 8) for a in range(2, 7) for b in (0, 2, 4))
_OUTPUTS_JUDGED = 512  # rows of a matrix that a trial rounds: enough to tell scales apart
# Share of the loss of rounding weights that stays: 0.5 to 0.7 in the rows above; 0.9 of the divergence on the shipped
# model, which has no outliers, and 0.2 on the same model with a few channels made twenty times as large.
_LEFT = 0.7


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model) or _weights.why_not_again(model)


def rewrite(demand: Demand, *, bits: int) -> Demand:
    """Return the demand as it was, with less to lose for a step that rounds weights after; and the work of searching."""
    trials = 1 + len(_POWERS)
    flop = demand.linear_params * (4 * 16_384 + 2 * 256 * trials)  # two passes over the text, trials on 256 vectors
    return eased(demand, weights=_LEFT).but(
        build_flop=demand.build_flop + flop,
        because=(*demand.because, f"scales folded in that {bits}-bit rounding profits from"),
    )


def execute(session: Session, *, bits: int) -> None:
    """Search and fold scales, layer by layer; the model computes what it did.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", nothing is found that scales fold into.
    """
    from knowledge_base.techniques._blocks import each_layer
    from knowledge_base.techniques._folding import fold, junctions, unchanged

    found = junctions(session)
    scaled = before = after = 0.0

    def change(index: int, layer: object, matrices: list[Matrix]) -> None:
        nonlocal scaled, before, after
        for junction in found[index]:
            scales, plain, best = best_scales(junction, matrices, bits)
            before, after = before + plain, after + best
            if scales is not None:
                fold(junction, scales)
                scaled += 1

    with unchanged(session, "scaling channels"):
        each_layer(session, change, full=False, label="scale_awq", same=True)
    session.notes["scale_awq.scaled"] = int(scaled)
    session.notes["scale_awq.output_error_ratio_to_nearest"] = after / before if before else 1.0


def best_scales(junction: Junction, matrices: list[Matrix], bits: int) -> tuple[torch.Tensor | None, float, float]:
    """Return the scales (channels,) that lose least, None for none; the error without and with them.

    The error is that of the outputs of every matrix that reads the junction, summed over calibration vectors.
    """
    import torch

    from knowledge_base.techniques._packed import usable_group_size

    seen = [(r.weight, m.inputs) for r in junction.readers if (m := r.inputs_of(matrices))]
    size = usable_group_size(junction.readers[0].weight.shape[-1], GROUP_SIZE)
    if not seen or size is None:
        return None, 0.0, 0.0
    step = [max(1, len(weight) // _OUTPUTS_JUDGED) for weight, _ in seen]
    judged = [(weight[::n].float(), inputs.sample, n) for (weight, inputs), n in zip(seen, step)]
    rows = sum(inputs.rows for _, inputs in seen)
    squares = torch.stack([inputs.squares for _, inputs in seen]).sum(0) / rows
    sizes = junction.gathered(squares, "mean").sqrt()  # root mean square of each channel
    sizes = sizes.clamp_min(1e-4 * sizes.max() + 1e-12)
    columns = torch.stack([weight.float().square().mean(0) for weight, _ in seen]).sum(0)
    columns = junction.gathered(columns, "mean").sqrt()
    columns = columns.clamp_min(1e-4 * columns.max() + 1e-12)

    def error(scales: torch.Tensor | None) -> float:
        spread = None if scales is None else junction.spread(scales)
        return sum(n * _rounding_error(weight, sample, spread, size, bits) for weight, sample, n in judged)

    plain = best = error(None)
    chosen = None
    for a, b in _POWERS:
        scales = sizes**a / columns**b
        scales = scales / (scales.max() * scales.min()).sqrt()
        if (now := error(scales)) < best:
            best, chosen = now, scales
    return chosen, plain, best


def _rounding_error(
    weight: torch.Tensor, sample: torch.Tensor, scales: torch.Tensor | None, group_size: int, bits: int
) -> float:
    from knowledge_base.techniques._packed import dequantise_groups, quantise_groups

    scaled = weight if scales is None else weight * scales
    rounded = dequantise_groups(*quantise_groups(scaled, group_size, bits), bits)
    change = (rounded if scales is None else rounded / scales) - weight
    return (sample @ change.T).square().sum().item()
