"""Draft with the model's own first layers, and check the draft with all of them.

The first layers share their weights and their part of the KV cache with the model, so nothing but a lens is stored: a
linear map from their state to the last one's, fitted on calibration text (see _lens.py). Where the text repeats itself the
draft is copied from it, which costs nothing. A model that was trained to exit early (LayerSkip) accepts far more than is
assumed here.
"""

from __future__ import annotations

from knowledge_base.techniques import _drafts
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="drafts by the model's own first layers, checked by all of them",
    stage="serve",
    family="decoding",
    implements=("self_speculation",),
    saves=_drafts.SAVES,
    spends=_drafts.SPENDS,
    needs=frozenset({"layer_exit"}),
    provides=frozenset({"drafts"}),
    needs_calibration=True,
    lossless=True,
    sources=("arXiv:2309.08168", "arXiv:2404.16710", "arXiv:2303.09435"),
)  # fmt: skip

_LAYERSKIP = "https://huggingface.co/blog/layerskip"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="trained for it, 4 of 32 layers draft, summaries", quantity="speed-up", baseline=1.0, value=1.297, source=_LAYERSKIP),
    Evidence(model="Llama-2-13B", setting="trained for it, 4 of 40 layers draft, summaries", quantity="speed-up", baseline=1.0, value=0.995, source=_LAYERSKIP),
    Evidence(model="Llama-2-13B", setting="trained for it, 8 of 40 layers draft, summaries", quantity="speed-up", baseline=1.0, value=1.746, source=_LAYERSKIP),
)  # fmt: skip

SHARE = 0.5  # of the layers: with fewer, in a model that was not trained for it, too little is accepted
MOST = 4  # tokens drafted at once; as long as it pays
_ACCEPTED = 0.59  # of the drafted tokens: own runs on the shipped model, by its first 4 of 8 layers


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.kind != "decoder":
        return f"a model of kind `{model.kind}` has no first layers that could write by themselves"
    if model.attention_layers < model.layers:
        return f"a refused draft must be taken back, and the recurrent state of `{model.architecture}` cannot be"
    if model.layers < 2:
        return "a model of one layer has no first layers to guess with"
    if workload.output_tokens < 3:
        return f"{workload.output_tokens} output tokens leave nothing to draft"
    return None


def rewrite(demand: Demand) -> Demand:
    """Return the demand with fewer, wider decode steps, and first layers that are read once more for each drafted token."""
    read, flop, kernels = _drafts.guess_of(demand, SHARE)
    first = _drafts.first_layers(demand.model, SHARE)
    demand = demand.but(other_bytes=demand.other_bytes + _drafts.lens_bytes(demand))
    return _drafts.drafting(
        demand, accepted=_ACCEPTED, most=MOST, draft_bytes=read, draft_flop=flop, draft_kernels=kernels,
        why=f"drafts of the first {first} layers",
    )  # fmt: skip


def execute(session: Session) -> None:
    """Fit a lens after the first layers and ask the engine to draft with them."""
    from knowledge_base.techniques._lens import fit_lens, guesses

    first = _drafts.first_layers(session.facts, SHARE)
    cut, kept_out = fit_lens(session, first, "draft_layers")
    session.notes["draft_layers.accepted_ratio"] = guesses(cut, session.model, kept_out)[1].float().mean().item()
    session.runtime["draft_layers"] = first
    session.runtime["draft_tokens"] = MOST
