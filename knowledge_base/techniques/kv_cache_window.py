"""Keep the cache of the first tokens and the last ones, and let go of all between.

StreamingLLM (Xiao et al., arXiv:2309.17453). The prompt is read whole; then every layer keeps the first four tokens and as
many of the last ones as make up a share of the prompt, and holds that size while the answer is written. Keys stay at the
positions they had, where the paper's code numbers them anew: texts longer than the model's context gain nothing.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Own
runs on the shipped model: perplexity 1.14 times at half of the prompt, 1.36 at a fifth.
Of 40 facts in prompts of 512 tokens the whole recalls 27 there, and this 20 and 16.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="a cache of the first four tokens and the last ones",
    stage="serve",
    family="kv_eviction",
    implements=("streaming_window",),
    knobs={"keep": Choice(options=(0.2, 0.5), default=0.5)},
    saves=(
        "kv_cache_bytes", "peak_memory_bytes", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token",
        "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio"),
    needs=frozenset({"kv_eviction"}),
    sources=("arXiv:2309.17453", "https://github.com/mit-han-lab/streaming-llm"),
)  # fmt: skip

_README = "https://github.com/mit-han-lab/streaming-llm"
EVIDENCE = (
    Evidence(model="Llama-2, MPT, Falcon, Pythia", setting="against computing the window anew each step, up to", quantity="decode speed-up",
             baseline=1.0, value=22.2, source=_README),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {0.5: (0.13, 0.13), 0.2: (0.31, 0.3)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _pruned.why_not(model)


def legal(knobs: Mapping[str, float], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    return _pruned.why_too_short(knobs["keep"], workload)


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with a cache that does not grow with the output, but for a block of tokens let go of together."""
    workload = demand.workload
    kept = _pruned.kept_tokens(workload.prompt_tokens, keep)
    after = _pruned.cached(demand, kept + min(workload.output_tokens, _pruned.BLOCK))
    return _pruned.priced(after, _LOSS[keep], f"a cache of the first tokens and the last, {kept} of the prompt's size")


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime |= {"kv_evict": "window", "kv_keep": keep}
