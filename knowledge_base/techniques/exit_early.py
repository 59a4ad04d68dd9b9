"""Leave after some layers where their guess of the next token is sure, and go through all layers where it is not.

The guess is that of a lens on the first layers' state, fitted on calibration text, its confidence with it (see _lens.py).
Tokens that left early are read by the other layers later, several in one pass, so that the cache is what it would be
(see _torch_drafting.py): an exit costs its own token's exactness and no other's. Lossy, and scored as it is decoded.
"""

from __future__ import annotations

import math

from knowledge_base.techniques import _drafts
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="tokens of which the first layers are sure enough go through no others",
    stage="serve",
    family="depth_at_run_time",
    implements=("early_exit_layers",),
    knobs={"share": Choice(options=(0.5, 0.75), default=0.75), "confidence": Choice(options=(0.4, 0.5), default=0.5)},
    saves=_drafts.SAVES,
    spends=(*_drafts.SPENDS, "perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats"),
    needs=frozenset({"layer_exit"}),
    provides=frozenset({"drafts"}),  # guesses, as far as other steps are concerned
    needs_calibration=True,
    sources=("arXiv:2207.07061", "arXiv:2310.05424", "arXiv:2303.09435"),
)  # fmt: skip

_CALM, _FREE = "https://arxiv.org/abs/2207.07061", "https://arxiv.org/abs/2310.05424"
EVIDENCE = (
    Evidence(model="T5, 8 layers, fine-tuned with exits", setting="confidence of the exit, up to", quantity="speed-up", baseline=1.0, value=3.0, source=_CALM),
)  # fmt: skip

# Own runs on the shipped model, by (share, confidence): tokens that leave early as it decodes, log of the perplexity ratio.
_LEAVE = {(0.5, 0.4): 0.40, (0.5, 0.5): 0.32, (0.75, 0.4): 0.67, (0.75, 0.5): 0.57}
_LOSS = {(0.5, 0.4): 0.21, (0.5, 0.5): 0.12, (0.75, 0.4): 0.084, (0.75, 0.5): 0.064}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.kind != "decoder":
        return f"a model of kind `{model.kind}` has no first layers that could write by themselves"
    if model.attention_layers < model.layers:
        return f"layers that lag behind catch up from a cache, and `{model.architecture}` keeps a recurrent state"
    if model.layers < 2:
        return "a model of one layer has no first layers to leave after"
    if workload.output_tokens < 3:
        return f"{workload.output_tokens} output tokens leave nothing to leave early"
    return None


def rewrite(demand: Demand, *, share: float, confidence: float) -> Demand:
    """Return the demand of a mean token: all go through the first layers and their guess, some through the rest as well.

    Those that leave are read by the other layers later, together with one that does not: arithmetic, no more bytes. Left
    out: fewer operators to start, fewer readings of the other layers' cache.
    """
    leave, loss = _LEAVE[share, confidence], _LOSS[share, confidence]
    part = _drafts.first_layers(demand.model, share) / demand.model.layers
    stays = part + (1 - leave) * (1 - part)  # of the layers' bytes, what a mean token reads
    later = (1 - stays) * demand.output_share * demand.linear_flop_per_token
    lens = _drafts.lens_bytes(demand)
    return demand.but(
        output_share=demand.output_share * stays,
        other_bytes=demand.other_bytes + lens,
        draft_bytes_per_step=demand.draft_bytes_per_step + lens + (1 - leave) * demand.head_read_bytes,
        draft_flop_per_step=demand.draft_flop_per_step
        + later
        + 2 * demand.model.hidden_size**2
        + (1 - leave) * demand.head_flop_per_token,
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, loss),
        because=(*demand.because, f"about {leave:.0%} of tokens leave after {part:.0%} of the layers"),
    )


def execute(session: Session, *, share: float, confidence: float) -> None:
    """Fit a lens after the first layers and ask the engine to let tokens leave there."""
    from knowledge_base.techniques._lens import fit_lens, guesses

    first = _drafts.first_layers(session.facts, share)
    cut, kept_out = fit_lens(session, first, "exit_early")
    sure, right = guesses(cut, session.model, kept_out)
    leaving = sure >= confidence
    session.notes["exit_early.leave_ratio"] = leaving.float().mean().item()
    session.notes["exit_early.wrong_ratio"] = (leaving & ~right).float().mean().item()
    session.runtime["exit_layers"] = first
    session.runtime["exit_confidence"] = confidence
