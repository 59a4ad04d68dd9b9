"""Read a shorter prompt: without the tokens that could have been guessed from those before them.

Selective Context (Li et al., arXiv:2310.06201). The model's own first quarter of layers judges each token through the
output matrix, so nothing else is needed; the paper judges with another model and leaves out phrases. The first four tokens
and the last 32 stay, or half of what stays where that is less. What is read is renumbered, as a shorter text would be.

Judging costs a quarter of the layers and the output matrix at every token: with a large vocabulary on a small model that
takes more than reading less saves, and the cache is what is gained.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Own
runs on the shipped model: perplexity 1.10 times with half of the tokens, 1.13 with a third.
Of 40 facts in prompts of 512 tokens the whole recalls 27 there, and this 25 and 21.
"""

from __future__ import annotations

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

SHORTEST = 32  # tokens; shorter prompts are read as they are, as in engines/_torch_pruning.py

TECHNIQUE = Technique(
    summary="prompts without the tokens that could have been guessed",
    stage="serve",
    family="prompt",
    implements=("prompt_compression",),
    knobs={"times": Choice(options=(2, 3), default=2)},
    saves=(
        "ttft_s", "kv_cache_bytes", "peak_memory_bytes", "tpot_s", "latency_s", "throughput_tokens_per_s",
        "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio"),
    needs=frozenset({"prompt_compression"}),
    sources=("arXiv:2310.06201", "https://github.com/liyucheng09/Selective_Context"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2310.06201"
EVIDENCE = (
    Evidence(model="four tasks of the paper", setting="half of the context", quantity="inference time, relative",
             baseline=1.0, value=0.68, source=_PAPER),
    Evidence(model="four tasks of the paper", setting="half of the context", quantity="inference memory, relative",
             baseline=1.0, value=0.64, source=_PAPER),
    Evidence(model="four tasks of the paper", setting="half of the context", quantity="BERTScore, difference",
             baseline=0.0, value=-0.023, source=_PAPER),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; larger models are told to lose less.
_LOSS = {2: (0.1, 0.1), 3: (0.12, 0.12)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.kind != "decoder":
        return f"`{model.architecture}` is no decoder, which could tell what was to be guessed"
    if model.attention_layers == 0:
        return f"the state of `{model.architecture}` is as large and as quick after any prompt"
    if workload.prompt_tokens < SHORTEST:
        return (
            f"prompts of {workload.prompt_tokens} tokens are read as they are: {SHORTEST} are the shortest that are not"
        )
    return None


def rewrite(demand: Demand, *, times: int) -> Demand:
    """Return the demand with a shorter prompt, and the first layers and the head at each of its tokens to choose it."""
    model, prompt = demand.model, demand.workload.prompt_tokens
    judging = max(1, model.layers // _pruned.FULL_LAYERS) / model.layers
    after = _pruned.shortened(
        demand,
        share=1 / times + judging + demand.head_flop_per_token / (demand.linear_flop_per_token * demand.prompt_share),
        pairs=1 / times**2 + judging,
        tokens=prompt / times + demand.workload.output_tokens,
    )
    return _pruned.priced(
        after, _LOSS[times], f"prompts {times} times shorter, chosen by the first {judging:.0%} of the layers"
    )


def execute(session: Session, *, times: int) -> None:
    """Ask the engine for it."""
    session.runtime["prompt_times"] = times
