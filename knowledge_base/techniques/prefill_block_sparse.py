"""Let each block of a long prompt look at those blocks before it that match it best.

After MInference (Jiang et al., arXiv:2407.02490), its block-sparse pattern: attention while a prompt is read goes over the
first block of 64 tokens, the last one before, the block itself and a share of the others, chosen for each head by the
means of queries and keys. What is written afterwards looks at the whole cache. Attention grows with the square of the
prompt and all else with its length, so this is for prompts of thousands of tokens; those below 512 are read exactly.

Quality is judged as it is decoded: each token of a held-out window after a prompt of half of what comes before it. Windows
below 1024 tokens hold no prompt that is read so: what long ones lose is told by `retrieval`, at the workload's own length.
Own runs on the shipped model, prompts of 768 and 1000 tokens: perplexity 1.001 times at either share, and the 22 facts in
40 that the whole recalls.
"""

from __future__ import annotations

from knowledge_base.techniques import _pruned
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

SPAN = 64  # tokens of a block, as in engines/_torch_sparse.py, and so is the next
FEWEST = 8  # blocks of a prompt that is not read exactly

TECHNIQUE = Technique(
    summary="attention of long prompts over the blocks that match best",
    stage="serve",
    family="prefill_attention",
    implements=("block_sparse_prefill",),
    knobs={"keep": Choice(options=(0.1, 0.25), default=0.25)},
    saves=(
        "ttft_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
        "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "retrieval_ratio"),
    needs=frozenset({"prompt_blocks"}),
    sources=("arXiv:2407.02490", "https://github.com/microsoft/MInference"),
)  # fmt: skip

EVIDENCE = (
    Evidence(model="LLaMA-3-8B and others", setting="prompts of a million tokens, A100, up to", quantity="prefill speed-up",
             baseline=1.0, value=10.0, source="https://arxiv.org/abs/2407.02490"),
)  # fmt: skip

# (log perplexity ratio, its standard deviation): own runs on the shipped model; doubt grows with what is left out.
_LOSS = {0.25: (1e-3, 0.01), 0.1: (2e-3, 0.02)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model or gains nothing, or None."""
    if workload.prompt_tokens < FEWEST * SPAN:
        return (
            f"prompts of {workload.prompt_tokens} tokens are read exactly: {FEWEST * SPAN} are the fewest that are not"
        )
    return _pruned.why_not(model)


def looked_at(tokens: int, keep: float) -> float:
    """Return the share of a prompt's causal pairs that is computed, its blocks taken for full.

    >>> round(looked_at(4096, 0.25), 2), round(looked_at(512, 0.25), 2)
    (0.28, 0.57)
    """
    blocks = round(tokens / SPAN)
    before = sum(min(earlier, max(2, round(keep * earlier))) for earlier in range(blocks))
    return (before + blocks / 2) / (blocks**2 / 2)


def rewrite(demand: Demand, *, keep: float) -> Demand:
    """Return the demand with fewer pairs of attention while the prompt is read. Choosing, a 64th of it, is left out."""
    share = looked_at(max(demand.workload.prompt_tokens, FEWEST * SPAN), keep)
    after = demand.but(prompt_pairs_ratio=demand.prompt_pairs_ratio * share)
    return _pruned.priced(after, _LOSS[keep], f"{share:.0%} of the prompt's pairs of tokens are looked at")


def execute(session: Session, *, keep: float) -> None:
    """Ask the engine for it."""
    session.runtime["block_keep"] = keep
