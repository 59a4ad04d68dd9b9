"""Keep the cache of what the prompt's last tokens looked at, for each head.

SnapKV (Li et al., arXiv:2404.14469). The prompt is read whole; what its last 32 tokens attended to, spread over neighbours,
decides which share of it every head of keys and values keeps. All that is written later is kept. Scores of those 32 tokens
are computed beside attention itself.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Own
runs on the shipped model: perplexity 1.04 times at half of the prompt, 1.10 at a fifth.
Of 40 facts in prompts of 512 tokens the whole recalls 27 there, and this 19 and 14:
what a later question asks for may be gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="a cache of what the prompt's last tokens looked at",
    stage="serve",
    family="kv_eviction",
    implements=("kv_cache_eviction",),
    knobs={"keep": Choice(options=(0.2, 0.5), default=0.5)},
    saves=(
        "kv_cache_bytes", "peak_memory_bytes", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token",
        "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio", "ttft_s"),
    needs=frozenset({"kv_eviction"}),
    sources=("arXiv:2404.14469", "https://github.com/FasterDecoding/SnapKV"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2404.14469"
EVIDENCE = (
    Evidence(model="models of the paper", setting="prompts of 16K tokens, against the whole cache", quantity="generation speed-up",
             baseline=1.0, value=3.6, source=_PAPER),
    Evidence(model="models of the paper", setting="prompts of 16K tokens, against the whole cache", quantity="memory, times less",
             baseline=1.0, value=8.2, source=_PAPER),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {0.5: (0.04, 0.04), 0.2: (0.09, 0.09)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _pruned.why_not(model)


def legal(knobs: Mapping[str, float], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    return _pruned.why_too_short(knobs["keep"], workload)


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with a share of the prompt in the cache, and the scores of its last tokens computed over again."""
    prompt = demand.workload.prompt_tokens
    kept = _pruned.kept_tokens(prompt, keep)
    scored = 0.5 * min(1.0, 2 * _pruned.OBSERVED / prompt)  # queries times keys, of those tokens' share of all pairs
    after = _pruned.cached(demand, kept + demand.workload.output_tokens, scored=scored)
    return _pruned.priced(after, _LOSS[keep], f"of the prompt {kept} tokens stay in the cache for each head")


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime |= {"kv_evict": "snap", "kv_keep": keep}
