"""Set weights to zero column by column, the others moved to make up for each (SparseGPT).

Frantar and Alistarh, arXiv:2301.00774: a weight's cost is w^2 / U_jj^2 with U the Cholesky factor of the inverse Hessian of
the inputs, and what its removal changes is taken off the columns that follow. The share of zeros may differ between
the parts of a model, by what zeros in each were measured to cost, with as many in all.
"""

from __future__ import annotations

from knowledge_base.techniques import _sparsity, _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="zero weights column by column, the others making up for it (SparseGPT); pays with a format without zeros",
    stage="compress",
    family="sparsity",
    implements=("sparsegpt",),
    knobs={
        "sparsity": Choice(options=(0.5, 0.6, 0.7), default=0.5),
        "pattern": Choice(options=_sparsity.PATTERNS, default=_sparsity.UNSTRUCTURED),
        "allocation": Choice(options=_sparsity.ALLOCATIONS, default="layerwise"),
    },
    spends=_sparsity.SPENDS,
    provides=frozenset({"zeros"}),
    needs_calibration=True,
    sources=("arXiv:2301.00774", "https://github.com/IST-DASLab/sparsegpt", "arXiv:2310.05175"),
)

_PPL = "WikiText-2 perplexity"
_PAPER, _WANDA, _OWL = (
    "https://arxiv.org/abs/2301.00774",
    "https://github.com/locuslab/wanda",
    "https://github.com/luuyin/OWL",
)
EVIDENCE = tuple(
    Evidence(model=model, setting=setting, quantity=_PPL, baseline=baseline, value=value, source=source)
    for model, setting, baseline, value, source in (
        ("OPT-350M", "50%", 22.0, 31.58, _PAPER),
        ("OPT-2.7B", "50%", 12.47, 13.48, _PAPER),
        ("OPT-175B", "50%", 8.35, 8.21, _PAPER),
        ("OPT-2.7B", "2:4", 12.47, 17.18, _PAPER),
        ("OPT-175B", "2:4", 8.35, 8.74, _PAPER),
        ("Llama-2-7B", "50%, context 4096", 5.12, 6.51, _WANDA),
        ("Llama-2-7B", "2:4, context 4096", 5.12, 10.17, _WANDA),
        ("LLaMA-7B", "70%, the same everywhere", 5.68, 26.30, _OWL),
        ("LLaMA-7B", "70%, layers by their outliers (OWL)", 5.68, 19.49, _OWL),
    )
)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why these knobs do not go together or do not fit that model, or None."""
    return _sparsity.why_not_pattern(model, knobs)


def rewrite(demand: Demand, *, sparsity: float, pattern: str, allocation: str) -> Demand:
    """Return the demand: bytes and arithmetic unchanged, quality worse."""
    owl = {"allocation": "owl"} if allocation == "layerwise" else {}  # the nearest way of sharing zeros with figures
    demand = loss_after(demand, "sparsegpt", **_sparsity.priced(sparsity, pattern), **owl)
    # Beside the passes, one more and the probes of two parts of each layer; the Hessians, one inverse and one sweep for each matrix.
    inputs = demand.model.hidden_size
    flop = 2 * inputs * demand.linear_params + 2 * 7 * demand.layers * inputs**2 * _sparsity.CALIBRATION_TOKENS
    return _sparsity.zeroed(demand, sparsity, passes=2 if allocation == "uniform" else 4).but(
        build_flop=demand.build_flop + flop,
    )


def execute(session: Session, *, sparsity: float, pattern: str, allocation: str) -> None:
    """Prune layer by layer, each on the inputs the already pruned layers give.

    A matrix whose Hessian cannot be inverted is pruned as Wanda does; the notes say which.

    Raises:
        CandidateFailed: no calibration text, or a row the pattern does not divide.
    """
    import torch

    from knowledge_base.techniques._blocks import Matrix
    from knowledge_base.techniques.weight_gptq import inverse_factor

    share_of = _sparsity.shares(session, "prune_sparsegpt", sparsity, allocation)
    plain: list[str] = []

    def pruned(layer: int, matrix: Matrix) -> torch.Tensor:
        share = share_of(layer, matrix.name)
        factor = inverse_factor(matrix.inputs.products / max(matrix.inputs.rows, 1))
        if factor is None:
            plain.append(f"{layer}.{matrix.name}")
            scores = matrix.weight.abs().float() * matrix.inputs.squares.sqrt()
            return matrix.weight.masked_fill(_sparsity.lowest(scores, share, pattern, rows=True), 0.0)
        spread = factor.diagonal()

        def choose(part: torch.Tensor, first: int) -> torch.Tensor:
            scores = (part / spread[first : first + part.shape[1]]).square()
            return _sparsity.lowest(scores, share, pattern)

        return _sparsity.sweep(matrix.weight, factor, choose, run=_sparsity.run_of(pattern))

    _sparsity.each_matrix(session, "prune_sparsegpt", pruned, full=True)
    if plain:
        session.notes["prune_sparsegpt.not_made_up_for"] = plain
