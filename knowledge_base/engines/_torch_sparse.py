"""Attention of a prompt over some of its blocks only, chosen for each head by what the prompt itself asks for.

Jiang et al. 2024, "MInference 1.0", arXiv:2407.02490, their block-sparse pattern: the mean query of a block of 64 tokens
is matched with the mean key of every block before it; its tokens then look at the best of these, at the first block,
where attention rests, and at the one before their own, in exact attention. Theirs gives each head one of three patterns
found beforehand, in kernels for GPUs; here all heads of one key-value head have this one, through sdpa block by block.
"""

from __future__ import annotations

import torch
from torch import nn

SPAN = 64  # tokens of a block
FEWEST = 8  # blocks; shorter prompts are read with exact attention


def chosen_blocks(earlier: int, keep: float) -> int:
    """Return at how many of the blocks before it a block looks: the first and the last of them, or more.

    >>> chosen_blocks(40, 0.25), chosen_blocks(3, 0.25), chosen_blocks(1, 0.25)
    (10, 2, 1)
    """
    return min(earlier, max(2, round(keep * earlier)))


def block_sparse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, keep: float
) -> torch.Tensor:
    """Return causal attention (batch, heads, tokens, size) over a share of the blocks before each block.

    Args:
        query: (batch, heads, tokens, size); several heads share keys and choose together.
        keys, values: (batch, key heads, tokens, size).
    """
    key_heads, tokens = keys.shape[1:3]
    grouped = query.unflatten(1, (key_heads, -1))  # (batch, key heads, group, tokens, size)
    whole = tokens // SPAN * SPAN
    blocks = [
        x[..., :whole, :].unflatten(-2, (-1, SPAN)) for x in (keys, values)
    ]  # (batch, key heads, blocks, SPAN, size)
    means = blocks[0].mean(-2)
    out = []
    for first in range(0, tokens, SPAN):
        asking = grouped[..., first : first + SPAN, :]
        group, new = asking.shape[2:4]
        parts = [x[..., first : first + SPAN, :] for x in (keys, values)]
        if earlier := first // SPAN:
            match = (asking.mean((2, 3)).unsqueeze(-2) @ means[..., :earlier, :].transpose(-1, -2)).squeeze(-2)
            match[..., 0] = match[..., -1] = torch.inf
            best = match.topk(chosen_blocks(earlier, keep), dim=-1).indices[..., None, None]
            past = [x.gather(2, best.expand(-1, -1, -1, *x.shape[-2:])).flatten(2, 3) for x in blocks]
            parts = [torch.cat(pair, dim=-2) for pair in zip(past, parts, strict=True)]
        held = parts[0].shape[-2]
        seen = torch.ones(new, held, dtype=torch.bool, device=keys.device).tril(held - new).repeat(group, 1)
        found = nn.functional.scaled_dot_product_attention(
            asking.flatten(2, 3), parts[0], parts[1], attn_mask=seen, scale=scaling
        )
        out.append(found.unflatten(2, (group, new)))
    return torch.cat(out, dim=3).flatten(1, 2)
