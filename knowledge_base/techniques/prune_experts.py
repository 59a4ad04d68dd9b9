"""Remove the experts that add least, with their rows of the router: the others take their tokens.

An expert is worth what it adds to the layer's output on calibration text: the sum over the tokens sent to it of the
square of its output times the router's weight, so both how often and how much counts. Every layer keeps as many, which
config.json gives. Memory falls by their share; each token goes through as many experts as before.
"""

from __future__ import annotations

from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

SAVES = (
    "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start",
)  # fmt: skip
SPENDS = ("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s")

TECHNIQUE = Technique(
    summary="remove the experts that add least",
    stage="compress",
    family="expert_count",
    implements=("expert_pruning",),
    knobs={"keep": Choice(options=(0.5, 0.75), default=0.75)},
    saves=SAVES,
    spends=SPENDS,
    needs_calibration=True,
    sources=("arXiv:2402.14800", "arXiv:2206.00277"),
)

EVIDENCE: tuple[Evidence, ...] = ()


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.experts < 2:
        return f"{model.name} has no experts to remove"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    from knowledge_base.techniques import _mixture_size

    return _mixture_size.why_not(model, knobs["keep"])


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer experts; the model in it has the new number."""
    from knowledge_base.techniques import _mixture_size

    after = _mixture_size.fewer(demand, keep)
    share = 1 - after.linear_params / demand.linear_params
    told = f"{after.model.experts} of {demand.model.experts} experts: {share:.0%} fewer weights in the layers"
    return after.but(because=(*demand.because, told))


def execute(session: Session, *, keep: float) -> None:
    """Remove experts layer by layer, each layer judged on what the pruned ones before it give.

    Raises:
        CandidateFailed: "unsupported", experts or routers of an unknown form, or too few would be left.
    """
    from knowledge_base.techniques import _experts

    def change(mixture: _experts.Mixture, count: int) -> None:
        order = mixture.added.argsort(descending=True, stable=True)
        kept = order[:count].sort().values.to(mixture.experts.down_proj.device)
        _experts.store(
            mixture, mixture.experts.gate_up_proj.data[kept], mixture.experts.down_proj.data[kept],
            {name: p.data[kept] for name, p in mixture.router.named_parameters()},
        )  # fmt: skip

    session.notes["prune_experts.experts"] = _experts.each_mixture(session, keep, change, "prune_experts")
