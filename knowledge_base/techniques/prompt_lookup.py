"""Draft the next tokens from an earlier occurrence of the last ones, and check the draft in one pass."""

from __future__ import annotations

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="prompt-lookup decoding: drafts copied from the text so far, checked by the model itself",
    stage="serve",
    family="decoding",
    implements=("prompt_lookup",),
    knobs={"tokens": Choice(options=(4, 8), default=4)},
    saves=("tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
           "cost_usd_per_token"),
    needs=frozenset({"lookup"}),
    provides=frozenset({"drafts"}),
    lossless=True,
    memory=SHAPES,
    sources=("https://github.com/apoorvumang/prompt-lookup-decoding", "arXiv:2401.07851"),
)  # fmt: skip

_SPEC_BENCH = "https://github.com/hemingkx/Spec-Bench/blob/main/Leaderboard.md"
EVIDENCE = (
    Evidence(model="Vicuna-7B-v1.3", setting="greedy, batch 1, RTX 3090, Spec-Bench", quantity="speed-up", baseline=1.0, value=1.64, source=_SPEC_BENCH),
    Evidence(model="Vicuna-7B-v1.3", setting="greedy, batch 1, Spec-Bench", quantity="tokens for each step", baseline=1.0, value=1.73, source=_SPEC_BENCH),
    Evidence(model="Vicuna-13B-v1.3", setting="greedy, batch 1, Spec-Bench", quantity="tokens for each step", baseline=1.0, value=1.67, source=_SPEC_BENCH),
    Evidence(model="Vicuna-33B-v1.3", setting="greedy, batch 1, Spec-Bench", quantity="tokens for each step", baseline=1.0, value=1.54, source=_SPEC_BENCH),
    Evidence(model="Vicuna-13B-v1.3", setting="translation", quantity="speed-up", baseline=1.0, value=1.03, source=_SPEC_BENCH),
    Evidence(model="Vicuna-7B-v1.3", setting="summarisation", quantity="speed-up", baseline=1.0, value=2.46, source=_SPEC_BENCH),
)  # fmt: skip

# Tokens gained for each step: Spec-Bench's 1.54 to 1.73 were taken with drafts of 10; shorter ones gain less.
# Where the last tokens are new there is no draft to check, which we take to be every other step.
_TOKENS_PER_STEP = {4: 1.5, 8: 1.6}
_STEPS_WITH_DRAFT = 0.5


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"a refused draft must be taken back, and the recurrent state of `{model.architecture}` cannot be"
    if workload.output_tokens < 3:
        return f"{workload.output_tokens} output tokens leave nothing to draft"
    return None


def rewrite(demand: Demand, *, tokens: int) -> Demand:
    """Return the demand with fewer, wider decode steps. How many fewer depends on the text; a mean is assumed."""
    gain = _TOKENS_PER_STEP[tokens]
    return demand.but(
        tokens_per_step=demand.tokens_per_step * gain,
        verified_tokens_per_step=demand.verified_tokens_per_step + _STEPS_WITH_DRAFT * tokens,
        because=(*demand.because, f"drafts of {tokens} tokens: about {gain} tokens a step, more where text repeats"),
    )


def execute(session: Session, *, tokens: int) -> None:
    """Ask the engine for drafts of at most `tokens` tokens."""
    session.runtime["lookup_tokens"] = tokens
