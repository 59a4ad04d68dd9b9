"""Set the smallest weights of each matrix to zero: the oldest criterion, which needs no text.

Large language models lose far more by it than by criteria that look at what enters a matrix (arXiv:2301.00774): it is
the baseline, and what is left where there is nothing to calibrate on. Dense kernels multiply by zeros as by any number.
"""

from __future__ import annotations

from knowledge_base.techniques import _sparsity
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="zero the smallest weights; pays with a format that leaves zeros out",
    stage="compress",
    family="sparsity",
    implements=("unstructured_pruning_magnitude",),
    knobs={
        "sparsity": Choice(options=(0.3, 0.5), default=0.3),
        "pattern": Choice(options=_sparsity.PATTERNS, default=_sparsity.UNSTRUCTURED),
    },
    spends=_sparsity.SPENDS,
    provides=frozenset({"zeros"}),
    sources=("arXiv:1510.00149", "arXiv:2301.00774"),
)

_PPL = "WikiText-2 perplexity"
_SPARSEGPT, _WANDA = "https://arxiv.org/abs/2301.00774", "https://github.com/locuslab/wanda"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=_PPL, baseline=baseline, value=value, source=source)
    for model, setting, baseline, value, source in (
        ("OPT-350M", "50%", 22.0, 97.80, _SPARSEGPT),
        ("OPT-2.7B", "50%", 12.47, 265, _SPARSEGPT),
        ("Llama-2-7B", "50%, context 4096", 5.12, 14.89, _WANDA),
        ("Llama-2-13B", "50%, context 4096", 4.57, 6.37, _WANDA),
        ("Llama-2-7B", "2:4, context 4096", 5.12, 54.59, _WANDA),
        ("Llama-2-13B", "2:4, context 4096", 4.57, 8.33, _WANDA),
    )
)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why these knobs do not go together or do not fit that model, or None."""
    return _sparsity.why_not_pattern(model, knobs)


def rewrite(demand: Demand, *, sparsity: float, pattern: str) -> Demand:
    """Return the demand: bytes and arithmetic unchanged, quality worse."""
    demand = loss_after(demand, "unstructured_pruning_magnitude", **_sparsity.priced(sparsity, pattern))
    return _sparsity.zeroed(demand, sparsity, passes=0)


def execute(session: Session, *, sparsity: float, pattern: str) -> None:
    """Zero the smallest weights of every matrix inside the layers, and of every expert."""
    from knowledge_base.techniques._blocks import decoder_layers, experts_of, is_matrix, matrix_of

    zeros = total = 0
    layers = decoder_layers(session.model)
    for index, layer in enumerate(layers):
        weights = [matrix_of(module) for module in layer.modules() if is_matrix(module)]
        if experts := experts_of(layer):
            weights += [*experts[1].gate_up_proj.data, *experts[1].down_proj.data]
        for weight in weights:
            weight.masked_fill_(_sparsity.lowest(weight.abs(), sparsity, pattern), 0.0)
            zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
        session.progress("prune_magnitude", (index + 1) / len(layers))
    session.notes["prune_magnitude.zeros_ratio"] = zeros / max(total, 1)
