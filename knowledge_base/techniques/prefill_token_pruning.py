"""Leave tokens out of the prompt after the first quarter of the layers: those its last tokens looked at least.

After LazyLLM (Fu et al., arXiv:2407.14057) and FastV (Chen et al., arXiv:2403.06764): the last of the layers that see the
whole prompt tells what matters, by the attention of the prompt's last 32 tokens over all heads. Later layers compute the
tokens that stay and keep no keys of the others. LazyLLM prunes in several steps and can bring tokens back for a later one
to see; this cannot.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Own
runs on the shipped model: perplexity 1.05 times with seven tokens in ten, 1.09 with half of them.
Of 40 facts in prompts of 512 tokens the whole recalls 27 there, and this 24 and 16.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="prompt tokens that matter little left out of all but the first layers",
    stage="serve",
    family="tokens",
    implements=("lazy_token_pruning",),
    knobs={"keep": Choice(options=(0.5, 0.7), default=0.7)},
    saves=(
        "ttft_s", "kv_cache_bytes", "peak_memory_bytes", "tpot_s", "latency_s", "throughput_tokens_per_s",
        "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio"),
    needs=frozenset({"prompt_pruning"}),
    sources=("arXiv:2407.14057", "arXiv:2403.06764"),
)  # fmt: skip

EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="LazyLLM, questions on several documents", quantity="time to first token, speed-up",
             baseline=1.0, value=2.34, source="https://arxiv.org/abs/2407.14057"),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {0.7: (0.05, 0.05), 0.5: (0.08, 0.08)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.layers < 2:
        return "a model of one layer has no later layers that could see less"
    return _pruned.why_not(model)


def legal(knobs: Mapping[str, float], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that workload, or None."""
    return _pruned.why_too_short(knobs["keep"], workload)


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer tokens in most layers, of the prompt's arithmetic and of its cache."""
    layers, prompt = demand.model.layers, demand.workload.prompt_tokens
    kept = _pruned.kept_tokens(prompt, keep)
    full = max(1, layers // _pruned.FULL_LAYERS) / layers  # share of the layers
    share = full + (1 - full) * kept / prompt
    pairs = full + (1 - full) * (kept / prompt) ** 2 + 0.5 * min(1.0, 2 * _pruned.OBSERVED / prompt) / layers
    tokens = share * prompt + demand.workload.output_tokens
    after = _pruned.shortened(demand, share=share, pairs=pairs, tokens=tokens)
    return _pruned.priced(after, _LOSS[keep], f"{kept} of the prompt's tokens in {1 - full:.0%} of the layers")


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime["prompt_keep"] = keep
