"""Draft with a smaller model, and check the draft in one pass.

The draft is a model of the same tokenizer: the one that `draft` of the spec names, else the folder NAME-draft beside the
model's, or `draft` within it; the artefact holds a copy. Where the text repeats itself the draft is copied from it, which costs nothing. Greedy output stays
the same. Own runs, models/tiny-lm with tiny-lm-draft, the draft alone: 0.40 of its tokens kept, 1.32 tokens a step.
"""

from __future__ import annotations

from knowledge_base.techniques import _drafts
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="drafts by a smaller model, checked by the model itself",
    stage="serve",
    family="decoding",
    implements=("speculative_decoding",),
    knobs={"tokens": Choice(options=(2, 4), default=4)},
    saves=_drafts.SAVES,
    spends=(*_drafts.SPENDS, "kv_cache_bytes"),
    needs=frozenset({"draft_model"}),
    provides=frozenset({"drafts"}),
    lossless=True,
    sources=("arXiv:2211.17192", "arXiv:2302.01318"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2211.17192"
_SPEC_BENCH = "https://github.com/hemingkx/Spec-Bench/blob/main/Leaderboard.md"
EVIDENCE = (
    Evidence(model="T5-XXL 11B", setting="draft T5-small 77M, WMT EnDe, greedy, batch 1, TPU-v4", quantity="speed-up", baseline=1.0, value=3.4, source=_PAPER),
    Evidence(model="T5-XXL 11B", setting="draft T5-large 800M, WMT EnDe, greedy, batch 1, TPU-v4", quantity="speed-up", baseline=1.0, value=1.7, source=_PAPER),
    Evidence(model="Vicuna-7B-v1.3", setting="draft of 68M, greedy, batch 1, A100, Spec-Bench", quantity="tokens for each step", baseline=1.0, value=2.28, source=_SPEC_BENCH),
    Evidence(model="Vicuna-7B-v1.3", setting="draft of 68M, greedy, batch 1, A100, Spec-Bench", quantity="speed-up", baseline=1.0, value=1.52, source=_SPEC_BENCH),
)  # fmt: skip

# Share of drafted tokens that are kept. Spec-Bench's 2.28 tokens a step are 0.57 of long drafts; the shipped model keeps
# 0.39 of its draft's, a model of one layer and a perplexity of 110.
_ACCEPTED = 0.57


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"a refused draft must be taken back, and the recurrent state of `{model.architecture}` cannot be"
    if model.kind != "decoder":
        return f"a draft goes on with one text, and a model of kind `{model.kind}` has two or writes none"
    if workload.output_tokens < 3:
        return f"{workload.output_tokens} output tokens leave nothing to draft"
    if model.draft is None:
        return "no draft model: name one of the same tokenizer with `draft`, or put it beside the model's folder with `-draft` after its name"
    return _drafts.why_unfit(model, model.draft)


def rewrite(demand: Demand, *, tokens: int) -> Demand:
    """Return the demand with fewer, wider decode steps, and the draft's weights read once for each drafted token.

    The draft reads the prompt as well, after the first token is known: that is spread over the steps.
    """
    draft = demand.model.draft
    if draft is None:  # refused by `rejects`
        return demand
    stored, read, cache = _drafts.draft_bytes(demand, draft)
    flop = 2.0 * (draft.params_active - (0 if draft.tied_embeddings else draft.embedding_params))
    workload = demand.workload
    prompt_flop = flop * workload.prompt_tokens * demand.tokens_per_step / max(1, workload.output_tokens - 1)
    demand = demand.but(
        other_bytes=demand.other_bytes + stored,
        kv_bytes_per_token=demand.kv_bytes_per_token + cache,
        draft_flop_per_step=demand.draft_flop_per_step + prompt_flop,
    )
    return _drafts.drafting(
        demand, accepted=_ACCEPTED, most=tokens, draft_bytes=read, draft_flop=flop,
        draft_kernels=demand.kernels_per_step * draft.layers / demand.layers, why=f"drafts of at most {tokens} tokens",
    )  # fmt: skip


def execute(session: Session, *, tokens: int) -> None:
    """Check that the draft means the same by each token, and have the engine take it along."""
    from knowledge_base.techniques._draft_loading import accepted_ratio, load_draft

    folder, draft = load_draft(session)
    if session.calibration is not None:
        session.notes["draft_model.accepted_ratio"] = accepted_ratio(session, draft)
    session.notes["draft_model.parameters"] = sum(p.numel() for p in draft.parameters())
    session.storage["draft"] = str(folder)
    session.runtime["draft_tokens"] = tokens
