"""Continuous batching with a torch model: answers are decoded together, each at its own length, and join and leave at any step.

    cache of the batch, padded on the left    ....ppppttt   p: prompt, t: tokens written, .: padding that no row looks at
                                              ppppppppttt
                                              .......pptt

A prompt is read alone in one pass, and its cache is then laid beside those of the others. transformers has continuous
batching of its own, in which all answers are drawn from one stream of chance: a request's seed means nothing there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from knowledge_base.engines._sampling import Sampler
from knowledge_base.engines._serving import OneByOneOnly, Texts, Wanted
from knowledge_base.engines._stepped_server import OneFailed, SteppedServer
from knowledge_base.engines._torch_running import TorchRunning


def served(running: TorchRunning, texts: Texts, *, slots: int, context_tokens: int) -> SteppedServer:
    """Return a server of an opened model, which is closed with it.

    Raises:
        OneByOneOnly: the model cannot read sequences of different lengths together, or would keep more of them than alone.
    """
    context = min(context_tokens, running.context_tokens or context_tokens)
    if why := running.why_no_padding(context):
        running.close()
        raise OneByOneOnly(why)
    engine = _Batch(running, slots)
    return SteppedServer(engine, texts, slots=slots, context_tokens=context, vocabulary=running.vocabulary)


@dataclass(slots=True, kw_only=True)
class _Row:
    """An answer being written. `length`: tokens in its cache; `last`: the token that is read next."""

    number: int
    sampler: Sampler
    stop: frozenset[int]
    left: int
    length: int = 0
    last: int = 0

    def draw(self, logits: torch.Tensor) -> bool:
        """Draw the next token from logits (vocabulary,); return whether it is the last."""
        self.last = self.sampler.draw(logits.float().cpu().numpy())
        self.left -= 1
        return not self.left or self.last in self.stop


class _Batch:
    """See `_stepped_server.Stepped`."""

    def __init__(self, running: TorchRunning, slots: int) -> None:
        self._running, self._slots = running, slots
        self._waiting: deque[tuple[_Row, Sequence[int]]] = deque()
        self._rows: list[_Row] = []  # as they lie in the cache
        self._cache: Cache | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def begin(self, number: int, wanted: Wanted, stop: frozenset[int]) -> None:
        row = _Row(number=number, sampler=Sampler(wanted.sampling), stop=stop, left=wanted.new_tokens)
        self._waiting.append((row, wanted.prompt))

    @torch.inference_mode()
    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        """Write a token of each answer; then read one prompt, if there is a free slot."""
        if self._rows:
            yield from self._decode()
        if self._waiting and len(self._rows) < self._slots:
            yield self._read(*self._waiting.popleft())

    def drop(self, number: int) -> None:
        self._waiting = deque(item for item in self._waiting if item[0].number != number)
        self._keep([row for row in self._rows if row.number != number])

    def close(self) -> None:
        self._rows, self._cache = [], None
        self._running.close()

    def _decode(self) -> Iterator[tuple[int, list[int], bool]]:
        assert self._cache is not None
        lengths = torch.tensor([[row.length] for row in self._rows])
        longest = int(lengths.max())
        seen = torch.arange(longest + 1) >= longest - lengths  # (rows, tokens): not their padding
        logits = self._running.last_logits(
            [[row.last] for row in self._rows], self._cache, attention_mask=seen.long(), position_ids=lengths
        )
        ended = []
        for row, drawn in zip(self._rows, logits, strict=True):
            row.length += 1
            over = row.draw(drawn)
            if over:
                ended.append(row)
            yield row.number, [row.last], over
        self._keep([row for row in self._rows if row not in ended])

    def _read(self, row: _Row, prompt: Sequence[int]) -> tuple[int, list[int], bool]:
        cache = DynamicCache()
        try:
            over = row.draw(self._running.last_logits([prompt], cache)[0])
        except RuntimeError as error:  # out of memory, as long prompts may be; the batch is as it was
            raise OneFailed(row.number) from error
        row.length = len(prompt)
        if not over:
            self._cache = cache if self._cache is None else _beside(self._cache, cache)
            self._rows.append(row)
        return row.number, [row.last], over

    def _keep(self, rows: list[_Row]) -> None:
        """Leave the other rows and the padding that only they needed out of the cache."""
        if len(rows) == len(self._rows):
            return
        places = [place for place, row in enumerate(self._rows) if row in rows]
        self._rows = rows
        if not rows or self._cache is None:
            self._cache = None
            return
        longest = max(row.length for row in rows)
        for layer in _filled(self._cache):
            layer.keys = layer.keys[places, :, -longest:]
            layer.values = layer.values[places, :, -longest:]


def _beside(batch: Cache, one: Cache) -> Cache:
    """Return the caches as one, the shorter padded on the left."""
    for ours, new in zip(_filled(batch), _filled(one), strict=True):
        longest = max(ours.keys.shape[-2], new.keys.shape[-2])
        ours.keys = torch.cat([_padded(ours.keys, longest), _padded(new.keys, longest)])
        ours.values = torch.cat([_padded(ours.values, longest), _padded(new.values, longest)])
    return batch


def _padded(states: torch.Tensor, length: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0))


def _filled(cache: Any) -> list[Any]:
    """Return the layers that keep something: some models have layers that look at the keys of another."""
    return [layer for layer in cache.layers if layer.is_initialized]
