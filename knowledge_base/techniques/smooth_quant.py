"""Divide outliers of activations out into the weights, so that both survive being rounded to 8 bits.

SmoothQuant (Xiao et al., arXiv:2211.10438): a channel is divided by max|x|^a / max|w|^(1-a) where it is made and
multiplied back where it is read. The strength a is chosen for each norm and matrix by the error that 8-bit weights and
activations then make on calibration text, no smoothing among the choices; so a model without outliers is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import eased
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    import torch

    from knowledge_base.techniques._blocks import Matrix
    from knowledge_base.techniques._folding import Junction

TECHNIQUE = Technique(
    summary="outliers of activations moved into the weights before both are rounded (SmoothQuant)",
    stage="quantise",
    family="scaling",
    implements=("smoothquant",),
    spends=("build_s",),
    provides=frozenset({"smoothed", "ready_to_round"}),
    needs_calibration=True,
    sources=("arXiv:2211.10438", "https://github.com/mit-han-lab/smoothquant"),
)

_IPEX = (
    "https://github.com/intel/neural-compressor/blob/master/examples/pytorch/nlp/huggingface_models/language-modeling/"
    "quantization/ptq_static/ipex/smooth_quant/README.md"
)
_SMOOTH = "https://github.com/mit-han-lab/smoothquant"
EVIDENCE = (
    Evidence(model="OPT-6.7B", setting="static W8A8; without smoothing 0.7944", quantity="LAMBADA accuracy",
             baseline=0.8151, value=0.8158, source=_IPEX),
    Evidence(model="BLOOM-3B", setting="static W8A8; without smoothing 0.7073", quantity="LAMBADA accuracy",
             baseline=0.7406, value=0.7441, source=_IPEX),
    Evidence(model="OPT-1.3B", setting="static W8A8; without smoothing 0.7386", quantity="LAMBADA accuracy",
             baseline=0.7542, value=0.7464, source=_IPEX),
    Evidence(model="Llama-2-7B", setting="W8A8, alpha 0.85", quantity="WikiText-2 perplexity",
             baseline=5.474, value=5.515, source=_SMOOTH),
)  # fmt: skip

_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_OUTPUTS_JUDGED = 512  # rows of a matrix a trial multiplies by
_LEFT = 0.6  # share of the loss of rounding activations that stays: 0.4 with static scales on the shipped model, 1.0 with dynamic


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model) or _weights.why_not_again(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand as it was, with less to lose for a step that rounds activations; and the work of searching."""
    trials = 1 + len(_STRENGTHS)
    flop = demand.linear_params * (4 * 16_384 + 2 * 256 * trials)  # two passes over the text, trials on 256 vectors
    return eased(demand, activations=_LEFT).but(
        build_flop=demand.build_flop + flop,
        because=(*demand.because, "outliers of activations moved into the weights"),
    )


def execute(session: Session) -> None:
    """Choose and fold the scales, layer by layer; the model computes what it did.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", nothing is found that scales fold into.
    """
    from knowledge_base.techniques._blocks import each_layer
    from knowledge_base.techniques._folding import fold, junctions, unchanged

    found = junctions(session)
    strengths: list[float] = []

    def change(index: int, layer: object, matrices: list[Matrix]) -> None:
        for junction in found[index]:
            strength, scales = best_strength(junction, matrices)
            strengths.append(strength)
            if scales is not None:
                fold(junction, scales)

    with unchanged(session, "smoothing"):
        each_layer(session, change, full=False, label="smooth_quant", same=True)
    session.notes["smooth_quant.strengths"] = {str(s): strengths.count(s) for s in sorted(set(strengths))}


def best_strength(junction: Junction, matrices: list[Matrix]) -> tuple[float, torch.Tensor | None]:
    """Return the strength that loses least and its scales (channels,); 0 and None where smoothing helps nothing."""
    import torch

    seen = [(r.weight, m.inputs) for r in junction.readers if (m := r.inputs_of(matrices))]
    if not seen:
        return 0.0, None
    peaks = junction.gathered(torch.stack([inputs.peaks for _, inputs in seen]).amax(0), "amax")
    columns = torch.stack([weight.abs().amax(0).float() for weight, _ in seen]).amax(0)
    columns = junction.gathered(columns, "amax").clamp_min(1e-5)
    peaks = peaks.clamp_min(1e-5)
    judged = [(weight[:: max(1, len(weight) // _OUTPUTS_JUDGED)].float(), inputs.sample) for weight, inputs in seen]

    def error(scales: torch.Tensor | None) -> float:
        spread = torch.ones(()) if scales is None else junction.spread(scales)
        return sum(_error_in_8_bits(weight * spread, sample / spread) for weight, sample in judged)

    best = error(None)
    chosen: tuple[float, torch.Tensor | None] = (0.0, None)
    for strength in _STRENGTHS:
        scales = peaks**strength / columns ** (1 - strength)
        scales = scales / (scales.max() * scales.min()).sqrt()
        if (now := error(scales)) < best:
            best, chosen = now, (strength, scales)
    return chosen


def _error_in_8_bits(weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the squared change of the outputs when weights (by row) and inputs (one scale for all) have 8 bits."""

    def rounded(values: torch.Tensor, peaks: torch.Tensor) -> torch.Tensor:
        scales = (peaks / 127).clamp_min(1e-12)
        return (values / scales).round() * scales

    product = rounded(inputs, inputs.abs().amax()) @ rounded(weight, weight.abs().amax(1, keepdim=True)).T
    return (product - inputs @ weight.T).square().sum().item()
