"""Keep the cache of the tokens that drew most attention so far and of the last ones, for each head.

H2O (Zhang et al., arXiv:2306.14048). The prompt is read whole; what each of its tokens drew from all later ones is computed
beside attention itself, which adds half of attention's arithmetic to the prompt. Every head of keys and values then keeps a
share of the prompt, half of it for the last tokens, and holds that size while the answer is written: every sixteen tokens
it adds up what they attended to and lets sixteen go. Their queries wait in the cache until then.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Own
runs on the shipped model: perplexity 1.14 times at half of the prompt, 1.36 at a fifth: no better there than keeping the
last tokens alone (kv_cache_window).
Of 40 facts in prompts of 512 tokens the whole recalls 27 there, and this 19 and 12.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="a cache of the tokens that drew most attention so far and of the last ones",
    stage="serve",
    family="kv_eviction",
    implements=("h2o",),
    knobs={"keep": Choice(options=(0.2, 0.5), default=0.5)},
    saves=("kv_cache_bytes", "peak_memory_bytes", "tpot_s"),
    spends=(
        "perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio", "ttft_s", "latency_s",
        "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    needs=frozenset({"kv_eviction"}),
    sources=("arXiv:2306.14048", "https://github.com/FMInference/H2O"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2306.14048"
EVIDENCE = (
    Evidence(model="OPT-6.7B", setting="a fifth of the cache, 2048 + 2048 tokens, batch 24, A100", quantity="seconds",
             baseline=99.5, value=53.5, source=_PAPER),
    Evidence(model="OPT-13B", setting="a fifth of the cache, 5000 + 5000 tokens, batch 4, A100", quantity="seconds",
             baseline=214.2, value=155.4, source=_PAPER),
    Evidence(model="OPT-30B", setting="a fifth of the cache, 7000 + 1024 tokens, batch 1, A100", quantity="seconds",
             baseline=57.0, value=50.4, source=_PAPER),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {0.5: (0.13, 0.13), 0.2: (0.3, 0.3)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _pruned.why_not(model)


def legal(knobs: Mapping[str, float], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    return _pruned.why_too_short(knobs["keep"], workload)


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with a cache that does not grow with the output, and scores computed over again."""
    model, workload = demand.model, demand.workload
    kept = _pruned.kept_tokens(workload.prompt_tokens, keep)
    queries = model.heads / (2 * model.kv_heads)  # of a token that waits, over its keys and values
    after = _pruned.cached(demand, kept + (1 + queries) * min(workload.output_tokens, _pruned.BLOCK), scored=0.5)
    return _pruned.priced(after, _LOSS[keep], f"a cache of what drew most attention, {kept} tokens for each head")


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime |= {"kv_evict": "heavy_hitters", "kv_keep": keep}
