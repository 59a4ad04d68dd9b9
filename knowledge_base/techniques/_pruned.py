"""What techniques that keep a part of the prompt have in common: whom they can be done to, and what a smaller cache asks for."""

from __future__ import annotations

import math

from knowledge_base.types import Demand, Model, Workload

LEAST = 16  # tokens that are kept of any prompt; as in engines/_torch_eviction.py, and so are the next two
BLOCK = 16  # decoded tokens after which as many are let go of
OBSERVED = 32  # last tokens of a prompt whose attention tells what matters
FULL_LAYERS = 4  # one layer in so many sees the whole of a prompt


def why_not(model: Model) -> str | None:
    """Return why tokens cannot be left out of a model's cache, or None."""
    if model.kind != "decoder":
        return f"`{model.architecture}` is no decoder, so its prompt leaves no cache that could be smaller"
    if model.attention_layers < model.layers:
        return f"the recurrent state of `{model.architecture}` holds no tokens that could be let go of"
    if model.kv_values_per_layer is not None:
        return f"the latent cache of `{model.architecture}` is shared by all heads, which choose tokens of their own"
    if model.sliding_window_tokens:
        return f"layers of `{model.architecture}` let go of what is {model.sliding_window_tokens} tokens back already"
    return None


def kept_tokens(tokens: int, keep: float) -> int:
    """Return how many of a prompt's tokens a share is.

    >>> kept_tokens(1000, 0.2), kept_tokens(40, 0.2), kept_tokens(9, 0.5)
    (200, 16, 9)
    """
    return min(tokens, max(LEAST, round(keep * tokens)))


def why_too_short(keep: float, workload: Workload) -> str | None:
    """Return why a share of that workload's prompts is all of them, or None."""
    if kept_tokens(workload.prompt_tokens, keep) < workload.prompt_tokens:
        return None
    return f"prompts of {workload.prompt_tokens} tokens are kept whole: {LEAST} are the least that is kept"


def cached(demand: Demand, tokens: float, *, scored: float = 0.0) -> Demand:
    """Return the demand with a cache of `tokens` tokens at full length, all layers' mean; reading the prompt costs the same.

    `scored`: of the prompt's attention, what is computed over again to choose what stays: queries times keys is half of it.
    """
    whole = demand.workload.prompt_tokens + demand.workload.output_tokens
    share = min(1.0, tokens / whole)
    return demand.but(
        kv_bytes_per_token=demand.kv_bytes_per_token * share,
        attention_flop_per_token_pair=demand.attention_flop_per_token_pair * share,
        prompt_pairs_ratio=demand.prompt_pairs_ratio * (1 + scored) / share,
    )


def shortened(demand: Demand, *, share: float, pairs: float, tokens: float) -> Demand:
    """Return the demand of a prompt that is read in part.

    Args:
        share: of the layers' arithmetic for the whole prompt. That all weights are read, however few tokens, is left out.
        pairs: share of its attention.
        tokens: in the cache at full length, all layers' mean.
    """
    after = cached(demand, tokens)
    return after.but(prompt_share=after.prompt_share * share, prompt_pairs_ratio=after.prompt_pairs_ratio * pairs)


def priced(demand: Demand, loss: tuple[float, float], because: str) -> Demand:
    """Return the demand with a loss of (log perplexity ratio, its standard deviation) and the reason told."""
    return demand.but(
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss[0]),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, loss[1]),
        because=(*demand.because, because),
    )
