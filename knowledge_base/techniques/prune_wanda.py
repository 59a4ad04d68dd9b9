"""Set the weights that matter least to zero, wherever they stand: |weight| times the norm of what it multiplies.

Wanda (Sun et al., arXiv:2306.11695), row by row, layer by layer, each layer calibrated on the pruned ones before it.
Dense kernels multiply by zeros as by any number, so this alone saves neither bytes nor time; formats that leave zeros
out do. SparseGPT loses less for little more work; this one changes no weight that stays.
"""

from __future__ import annotations

from knowledge_base.techniques import _sparsity, _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="zero the least important weights (Wanda); pays with a format that leaves zeros out",
    stage="compress",
    family="sparsity",
    implements=("wanda",),
    knobs={
        "sparsity": Choice(options=(0.3, 0.5), default=0.5),
        "pattern": Choice(options=_sparsity.PATTERNS, default=_sparsity.UNSTRUCTURED),
    },
    spends=_sparsity.SPENDS,
    provides=frozenset({"zeros"}),
    needs_calibration=True,
    sources=("arXiv:2306.11695", "https://github.com/locuslab/wanda", "https://arxiv.org/abs/2401.00625"),
)

_PPL = "WikiText-2 perplexity"
_BESA = "https://github.com/OpenGVLab/LLMPrune-BESA"
_WANDA = "https://github.com/locuslab/wanda"
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=_PPL, baseline=baseline, value=value, source=source)
    for model, setting, baseline, value, source in (
        ("LLaMA-7B", "50%", 5.68, 7.26, _BESA),
        ("LLaMA-13B", "50%", 5.09, 6.15, _BESA),
        ("LLaMA-30B", "50%", 4.10, 5.25, _BESA),
        ("Llama-2-70B", "50%", 3.31, 4.22, _BESA),
        ("Llama-2-7B", "50%, context 4096", 5.12, 6.42, _WANDA),
        ("Llama-2-7B", "2:4, context 4096", 5.12, 11.02, _WANDA),
        ("Llama-2-13B", "2:4, context 4096", 4.57, 8.27, _WANDA),
        ("LLaMA-7B", "70%", 5.68, 85.77, "https://github.com/luuyin/OWL"),
    )
)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why these knobs do not go together or do not fit that model, or None."""
    return _sparsity.why_not_pattern(model, knobs)


def rewrite(demand: Demand, *, sparsity: float, pattern: str = _sparsity.UNSTRUCTURED) -> Demand:
    """Return the demand: bytes and arithmetic unchanged, quality worse."""
    demand = loss_after(demand, "wanda", **_sparsity.priced(sparsity, pattern))
    return _sparsity.zeroed(demand, sparsity, passes=2)


def execute(session: Session, *, sparsity: float, pattern: str = _sparsity.UNSTRUCTURED) -> None:
    """Zero what scores lowest in every row of every matrix inside the layers.

    score = |W_ij| * ||x_j||_2. Source: arXiv:2306.11695, equation 1.
    """
    import torch

    from knowledge_base.techniques._blocks import Matrix

    def pruned(layer: int, matrix: Matrix) -> torch.Tensor:
        scores = matrix.weight.abs().float() * matrix.inputs.squares.sqrt()
        return matrix.weight.masked_fill(_sparsity.lowest(scores, sparsity, pattern, rows=True), 0.0)

    _sparsity.each_matrix(session, "prune_wanda", pruned)
