"""A KV cache stored in 8 or 4 bits: real bytes, dequantised a layer at a time for attention.

Every 32 channels of a (token, head), or the whole head where 32 does not divide it, are quantised alone, so tokens
can be appended and taken back without touching the others:

    8 bits: x ~ scale * q,           q in -127..127, a float16 scale
    4 bits: x ~ low + scale * q,     q in 0..15, two to a byte, a float16 scale and low

Attention always sees the stored values, also during prefill and for the token itself, so one pass over a text
scores what step-by-step decoding would compute. After Liu et al. 2024, "KIVI", arXiv:2402.02750 (theirs groups
keys by channel and keeps the last 128 tokens unquantised; ours does neither).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from knowledge_base.errors import CandidateFailed

GROUP = 32  # channels that share a scale


def quantise(x: torch.Tensor, bits: int | None) -> tuple[torch.Tensor, ...]:
    """Return the stored tensors of `x`, (..., head size): (x,) for None, (q, scale) for 8 bits, (packed, scale, low) for 4."""
    if bits is None:
        return (x,)
    groups = x.unflatten(-1, (-1, _group(x.shape[-1]))).float()
    if bits == 8:
        scale = _stored(groups.abs().amax(-1, keepdim=True) / 127, x.dtype)
        return torch.round(groups / scale.float()).clamp(-127, 127).to(torch.int8).flatten(-2), scale.squeeze(-1)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    low = low.to(x.dtype).half()
    scale = _stored((high - low.float()) / 15, x.dtype)
    q = torch.round((groups - low.float()) / scale.float()).clamp(0, 15).to(torch.uint8).flatten(-2)
    return q[..., 0::2] | (q[..., 1::2] << 4), scale.squeeze(-1), low.squeeze(-1)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round to what `dtype` and float16 both hold, so that dequantising uses the very number quantising used."""
    return scale.to(dtype).clamp(min=2**-14).half()


def dequantise(stored: tuple[torch.Tensor, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return (..., head size) in `dtype` from what `quantise` returned."""
    if len(stored) == 1:
        return stored[0]
    q, scale = stored[:2]
    if len(stored) == 3:
        q = torch.stack((q & 15, q >> 4), dim=-1).flatten(-2)
    groups = q.unflatten(-1, (scale.shape[-1], -1)).to(dtype)
    scale = scale.unsqueeze(-1).to(dtype)
    if len(stored) == 2:
        return groups.mul_(scale).flatten(-2)
    return torch.addcmul(stored[2].unsqueeze(-1).to(dtype), groups, scale).flatten(-2)


def _group(head_size: int) -> int:
    return GROUP if head_size % GROUP == 0 else head_size


class QuantisedLayer(CacheLayerMixin):
    """Keys and values of one attention layer, in 8 or 4 bits or as they are; with a window, of its last `window - 1` tokens."""

    is_croppable = True

    def __init__(self, bits: int | None, window: int | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.window = window
        self.is_sliding = window is not None
        self.record_past = False
        self.tokens_seen = 0
        self.stored: tuple[tuple[torch.Tensor, ...], ...] = ()  # (keys, values), each of quantise()'s tensors

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append (batch, heads, tokens, head size) keys and values; return all that this step may attend to."""
        self.is_initialized = True
        new = (quantise(key_states, self.bits), quantise(value_states, self.bits))
        self.stored = (
            tuple(
                tuple(torch.cat(pair, dim=-2) for pair in zip(old, fresh, strict=True))
                for old, fresh in zip(self.stored, new, strict=True)
            )
            if self.stored
            else new
        )
        added = key_states.shape[-2]
        self.tokens_seen += added
        visible = self._held() if self.window is None else min(self._held(), self.window - 1 + added)
        keys, values = (dequantise(tuple(t[..., -visible:, :] for t in part), key_states.dtype) for part in self.stored)
        if not self.record_past:
            self._keep_window()
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens (a number <= 0, as in transformers' caches)."""
        if tokens_to_remove < 0 and self.stored:
            self.tokens_seen += tokens_to_remove
            self._keep(slice(0, self._held() + tokens_to_remove))
        self._keep_window()

    def activate_past_recording(self) -> None:
        """Keep tokens that leave the window until the next `crop`, so that drafts can be taken back."""
        self.record_past = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the keys that `update` will return for a query of that many tokens."""
        if self.window is None:
            return self.tokens_seen + query_length, 0
        held = min(self.tokens_seen, self.window - 1)
        return held + query_length, self.tokens_seen - held

    def get_seq_length(self) -> int:
        return self.tokens_seen

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def reset(self) -> None:
        self.stored, self.tokens_seen, self.is_initialized = (), 0, False

    def _held(self) -> int:
        return self.stored[0][0].shape[-2]

    def _keep(self, tokens: slice) -> None:
        self.stored = tuple(tuple(t[..., tokens, :].clone() for t in part) for part in self.stored)

    def _keep_window(self) -> None:
        if self.window is not None and self.stored and self._held() >= self.window:
            self._keep(slice(self._held() - self.window + 1, None))


def quantised_cache(config: Any, bits: int) -> Cache:
    """Return an empty quantised cache for a model's configuration.

    Raises:
        CandidateFailed: "unsupported", a layer keeps something other than keys and values, or heads of odd size.
    """
    layers: list[Any] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicLayer:
            layers.append(QuantisedLayer(bits))
        elif type(layer) is DynamicSlidingWindowLayer:
            layers.append(QuantisedLayer(bits, layer.sliding_window))
        else:
            raise CandidateFailed(
                "unsupported",
                f"the KV cache of `{config.model_type}` has {type(layer).__name__} layers, which hold no keys and values",
                hint="plan without kv_cache_quantised",
            )
    return Cache(layers=layers)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all storages a cache holds, each counted once."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.dim() > 1:  # lengths and window sizes are bookkeeping
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(storages.values())
