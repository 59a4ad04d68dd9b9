"""A KV cache that lets go of tokens, and prompts whose later layers see fewer of them: chosen by the model's own attention.

    window         the first 4 tokens and the last ones (Xiao et al. 2023, "StreamingLLM", arXiv:2309.17453)
    heavy_hitters  half of the cells for the last tokens, half for those that drew most attention, for each head
                   (Zhang et al. 2023, "H2O", arXiv:2306.14048)
    snap           what the prompt's last tokens looked at and its neighbours, for each head; nothing that is written
                   later is let go of (Li et al. 2024, "SnapKV", arXiv:2404.14469)

A prompt is read whole; then each layer keeps a share of its tokens, in new and smaller tensors. The first two hold that
size while an answer is written, letting go of tokens sixteen at a time, so that reading sixteen tokens in one pass gives
what step-by-step decoding gives. Kept keys stay at the positions they had; StreamingLLM's own code numbers them anew.

sdpa tells no attention scores, so those that are needed are computed beside it: of a prompt's last 32 tokens for `snap`,
of each token over again for `heavy_hitters`, which adds half of attention's arithmetic and a softmax out of fast memory.

Pruning a prompt (Fu et al. 2024, "LazyLLM", arXiv:2407.14057; Chen et al. 2024, "FastV", arXiv:2403.06764): after the
first quarter of the layers, tokens that the prompt's last ones looked at least are left out of those that follow, which
keep no keys of them. LazyLLM prunes in several steps and can bring tokens back; this cannot.

Blocks of a prompt that are not looked at are in _torch_sparse.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from knowledge_base.engines._torch_cache import QuantisedLayer
from knowledge_base.engines._torch_sparse import FEWEST, SPAN, block_sparse
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import decoder_layers

METHODS = ("window", "heavy_hitters", "snap")
LEAST = 16  # tokens that are kept of any prompt
SINKS = 4  # first tokens, which models look at where there is nothing to look at
OBSERVED = 32  # last tokens of a prompt whose attention tells what matters
POOLED = 7  # neighbours that share the attention one of them draws
BLOCK = 16  # decoded tokens after which as many are let go of
FULL_LAYERS = 4  # one layer in so many sees the whole of a pruned prompt
ROWS = 64  # queries whose scores are held at once

_NAME = "leanplan_watched"  # of the attention function that tells what was attended to; it makes its own masks


class EvictingLayer(QuantisedLayer):
    """Keys and values of the tokens that one attention layer still holds, which may be others for each head."""

    is_croppable = False

    def __init__(self, watch: Watch, bits: int | None = None) -> None:
        super().__init__(bits)
        self.watch = watch
        self.budget: int | None = None  # cells it may hold; None: no prompt was read
        self.drawn: torch.Tensor | None = None  # attention each cell drew so far, (batch, heads, cells)
        self.queries: tuple[torch.Tensor, ...] = ()  # since tokens were let go of last
        self.waiting = 0  # tokens since then

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, and be the layer whose attention is watched next."""
        self.watch.latest = self
        return super().update(key_states, value_states, *args, **kwargs)

    def keep(self, cells: torch.Tensor) -> None:
        """Hold only these cells, (batch, heads, kept) in rising order."""
        self.stored = tuple(tuple(_chosen(t, cells) for t in part) for part in self.stored)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was let go of for a token cannot be brought back with it."""
        raise CandidateFailed(
            "unsupported", "a cache that lets go of tokens cannot take any back", hint="plan without drafts"
        )

    def reset(self) -> None:
        super().reset()
        self.budget, self.drawn, self.queries, self.waiting = None, None, (), 0


def _chosen(stored: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    return stored.gather(-2, cells.unsqueeze(-1).expand(*cells.shape, stored.shape[-1]))


class Watch:
    """What a model's attention looks at, and what is let go of for it."""

    def __init__(
        self, model: nn.Module, *, method: str | None = None, keep: float | None = None, prompt_keep: float | None = None,
        block_keep: float | None = None, bits: int | None = None,
    ) -> None:  # fmt: skip
        """Have a model's attention tell what it looks at.

        Args:
            method: which of METHODS chooses the tokens a layer's cache keeps; None: it keeps all.
            keep: share of the prompt's tokens that is kept then.
            prompt_keep: share of the prompt's tokens that later layers see; None: all.
            block_keep: share of the blocks before its own that a prompt's block looks at; None: all.
            bits: of stored keys and values; None: as they are.

        Raises:
            CandidateFailed: "unsupported", layers that keep something else than every token's keys and values, or
                attention that cannot be watched.
        """
        config: Any = model.config
        other = next((la for la in DynamicCache(config=config).layers if type(la) is not DynamicLayer), None)
        if other is not None:
            raise _unsupported(
                config, f"has {type(other).__name__} layers, which do not hold every token's keys and values"
            )
        if not getattr(model, "_supports_attention_backend", False) or not getattr(model, "_supports_sdpa", False):
            raise _unsupported(config, "computes attention in a way of its own, which cannot be watched")
        self._layers, self._method, self._keep, self._bits = decoder_layers(model), method, keep, bits
        self._prompt_keep, self._full = prompt_keep, max(1, len(self._layers) // FULL_LAYERS)
        self._block_keep, self._reading = block_keep, False
        self._kept: torch.Tensor | None = None  # tokens of the prompt that later layers see, (batch, kept)
        self.latest: EvictingLayer | None = None  # the layer that attention is computed over now
        self.on = True  # False: nothing is let go of
        if prompt_keep:
            if "position_embeddings" not in inspect.signature(self._layers[0].forward).parameters:
                raise _unsupported(config, "gives its layers no positions, which tokens that are left out would shift")
            for layer in self._layers[self._full :]:
                layer.register_forward_pre_hook(self._narrow, with_kwargs=True)
        attention: Any
        for attention in self._layers.modules():
            if hasattr(attention, "layer_idx"):
                attention.watch = self
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _watched_attention)
        config._attn_implementation = _NAME

    def empty_cache(self) -> Cache:
        """Return a cache for one text."""
        return Cache(layers=[EvictingLayer(self, self._bits) for _ in self._layers])

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Within the block a prompt is read, in one pass."""
        self._reading = True
        try:
            yield
        finally:
            self._reading, self._kept = False, None

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block nothing is let go of."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def blocks(self, new: int, held: int) -> float | None:
        """Return the share of blocks that attention over a whole prompt may look at, None: all."""
        return self._block_keep if self._reading and self.on and new == held >= FEWEST * SPAN else None

    def attended(self, index: int, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Take in what a layer attended to: (batch, heads, new tokens, size) queries over the keys of all it holds."""
        layer, self.latest = self.latest, None
        if layer is None or not self.on:
            return
        if self._reading:
            if self._prompt_keep and index == self._full - 1:
                self._kept = seen_tokens(query, keys, scaling, self._prompt_keep)
            if self._method:
                self._read(layer, query, keys, scaling)
        elif self._method in ("window", "heavy_hitters") and layer.budget is not None:
            self._decoded(layer, query, keys, scaling)

    def _read(self, layer: EvictingLayer, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Keep what a prompt leaves behind in one layer."""
        assert self._keep is not None
        tokens = keys.shape[-2]
        layer.budget = kept_tokens(tokens, self._keep)
        if self._method == "window":
            cells = recent(keys, layer.budget)
        elif self._method == "heavy_hitters":
            layer.drawn = attention_drawn(query, keys, scaling)
            cells = heavy(layer.drawn, layer.budget)
            layer.drawn = layer.drawn.gather(-1, cells)
        else:
            cells = observed(query, keys, scaling, layer.budget)
        if cells.shape[-1] < tokens:
            layer.keep(cells)

    def _decoded(self, layer: EvictingLayer, query: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Hold the size once `BLOCK` tokens were written: a layer with a budget lets as many go."""
        assert layer.budget is not None
        layer.waiting += query.shape[-2]
        if layer.drawn is not None:
            layer.queries = (*layer.queries, query)
        if layer.waiting < BLOCK:
            return
        if layer.drawn is None:
            cells = recent(keys, layer.budget)
        else:
            drawn = attention_drawn(torch.cat(layer.queries, dim=-2), keys, scaling)
            drawn[..., : layer.drawn.shape[-1]] += layer.drawn
            cells = heavy(drawn, layer.budget)
            layer.drawn = drawn.gather(-1, cells)
        layer.keep(cells)
        layer.queries, layer.waiting = (), 0

    def _narrow(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Leave tokens out of what enters a layer: states (batch, tokens, size) and what goes with each of them."""
        if self._kept is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != self._kept.shape[1]:
            hidden = _rows(hidden, self._kept)
        told = dict(kwargs)
        told["position_embeddings"] = tuple(_rows(part, self._kept) for part in kwargs["position_embeddings"])
        if kwargs.get("position_ids") is not None:
            told["position_ids"] = _rows(kwargs["position_ids"].unsqueeze(-1), self._kept).squeeze(-1)
        if args:
            return (hidden, *args[1:]), told
        return args, told | {"hidden_states": hidden}


def _rows(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return tokens of (batch or 1, tokens, size), those of each sequence its own: (batch, kept, size)."""
    x = x.expand(kept.shape[0], *x.shape[1:])
    return x.gather(1, kept.unsqueeze(-1).expand(*kept.shape, x.shape[-1]))


def _watched_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, scaling: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """sdpa over cells that all lie before the new tokens, however many a layer holds; then tell what was attended to."""
    new, held = query.shape[-2], key.shape[-2]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if share := module.watch.blocks(new, held):
        return block_sparse(query, key, value, scaling, share).transpose(1, 2).contiguous(), None
    if held > new > 1:
        attention_mask = torch.ones(new, held, dtype=torch.bool, device=key.device).tril(held - new)[None, None]
    out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    module.watch.attended(module.layer_idx, query, key, scaling)
    return out


def _unsupported(config: Any, why: str) -> CandidateFailed:
    return CandidateFailed(
        "unsupported", f"`{config.model_type}` {why}", hint="plan without letting go of prompt or cache"
    )


# ---------------------------------------------------------------- what stays


def kept_tokens(tokens: int, keep: float) -> int:
    """Return how many of a prompt's tokens a share is, at least LEAST.

    >>> kept_tokens(1000, 0.2), kept_tokens(40, 0.2)
    (200, 16)
    """
    return max(LEAST, round(keep * tokens))


def recent(keys: torch.Tensor, budget: int) -> torch.Tensor:
    """Return the first SINKS cells and the last ones, (batch, heads, budget) of (batch, heads, cells, size)."""
    cells = torch.arange(keys.shape[-2], device=keys.device)
    if budget < len(cells):
        cells = torch.cat([cells[:SINKS], cells[SINKS - budget :]])
    return cells.expand(*keys.shape[:2], -1)


def heavy(drawn: torch.Tensor, budget: int) -> torch.Tensor:
    """Return half of the budget's cells for the last ones and half for those that drew most, (batch, heads, budget)."""
    last = min(budget // 2, drawn.shape[-1])
    return _best(drawn, budget, last)


def observed(query: torch.Tensor, keys: torch.Tensor, scaling: float, budget: int) -> torch.Tensor:
    """Return the cells that the last ones look at most, beside themselves, (batch, heads, budget)."""
    last = min(OBSERVED, budget // 2, keys.shape[-2])
    drawn = attention_drawn(query[..., -last:, :], keys, scaling)
    return _best(nn.functional.max_pool1d(drawn, POOLED, stride=1, padding=POOLED // 2), budget, last)


def _best(drawn: torch.Tensor, budget: int, last: int) -> torch.Tensor:
    cells = drawn.shape[-1]
    best = drawn[..., : cells - last].topk(min(budget, cells) - last, dim=-1).indices
    newest = torch.arange(cells - last, cells, device=drawn.device).expand(*drawn.shape[:-1], -1)
    return torch.cat([best.sort(dim=-1).values, newest], dim=-1)


def seen_tokens(query: torch.Tensor, keys: torch.Tensor, scaling: float, keep: float) -> torch.Tensor:
    """Return the prompt's tokens that its last ones look at most, all heads together, (batch, kept) in rising order."""
    kept = kept_tokens(keys.shape[-2], keep)
    last = min(OBSERVED, kept // 2, keys.shape[-2])
    drawn = attention_drawn(query[..., -last:, :], keys, scaling).sum(1)
    drawn[..., :SINKS] = torch.inf
    return _best(drawn, kept, last)


def attention_drawn(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return how much attention each cell draws from the queries, which are those of the last cells, float32.

    Args:
        query: (batch, heads, new, size); several heads share keys, and what they look at is added up.
        keys: (batch, key heads, cells, size).

    Returns:
        (batch, key heads, cells); adds up to `new` x heads / key heads over the cells.
    """
    cells, new = keys.shape[-2], query.shape[-2]
    query = query.unflatten(1, (keys.shape[1], -1))  # (batch, key heads, group, new, size)
    drawn = torch.zeros(*keys.shape[:3], dtype=torch.float32, device=keys.device)
    for first in range(0, new, ROWS):
        part = query[..., first : first + ROWS, :]
        start = cells - new + first  # the cell of the part's first query
        seen = start + part.shape[-2]
        scores = (part @ keys[:, :, None, :seen].transpose(-1, -2)).float() * scaling
        later = torch.arange(seen, device=keys.device) > torch.arange(start, seen, device=keys.device)[:, None]
        drawn[..., :seen] += scores.masked_fill_(later, -torch.inf).softmax(dim=-1).sum(dim=(2, 3))
    return drawn
