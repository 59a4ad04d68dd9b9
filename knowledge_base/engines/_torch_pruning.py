"""Reading and keeping less of a prompt: shorter prompts, layers that see fewer of its tokens, a cache that lets go of some.

What the last two do is in _torch_eviction.py. A prompt is shortened after Li et al. 2023, "Compressing Context to Enhance
Inference Efficiency of Large Language Models" (Selective Context), arXiv:2310.06201: tokens that could have been guessed
from those before them are left out. Theirs leaves out phrases, judged by another model; here the model's own first
quarter of layers judges each token through the output matrix, so that judging costs a quarter of reading.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from knowledge_base.engines._torch_eviction import FULL_LAYERS, OBSERVED, ROWS, SINKS, Watch
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import decoder_layers

SHORTEST = 32  # tokens; shorter prompts are read as they are


class Pruning:
    """What an artefact's runtime asks to be left out of prompts and cache."""

    def __init__(self, model: Any, runtime: Mapping[str, Any]) -> None:
        """See `Watch`; `prompt_times` is how many times shorter prompts become.

        Raises:
            CandidateFailed: "unsupported", a model this cannot be done to.
        """
        self._model = model
        self._times: int | None = runtime.get("prompt_times")
        self._on = True
        self._watch = None
        if self._times and getattr(model, "base_model", model) is model:
            raise CandidateFailed(
                "unsupported", f"`{model.config.model_type}` has no states to judge tokens by", hint="plan without prompt_compression"
            )  # fmt: skip
        if {"kv_evict", "prompt_keep", "block_keep"} & runtime.keys():
            self._watch = Watch(
                model, method=runtime.get("kv_evict"), keep=runtime.get("kv_keep"), prompt_keep=runtime.get("prompt_keep"),
                block_keep=runtime.get("block_keep"), bits=runtime.get("kv_bits"),
            )  # fmt: skip

    def empty_cache(self) -> Cache | None:
        """Return a cache that lets go of tokens, None where the usual one does."""
        return self._watch.empty_cache() if self._watch else None

    def shortened(self, prompts: torch.Tensor) -> torch.Tensor:
        """Return what is read of prompts, (batch, tokens) -> (batch, at most as many)."""
        if not self._times or not self._on or prompts.shape[1] < SHORTEST:
            return prompts
        return prompts.gather(1, informative(surprise(self._model, prompts), self._times))

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """Within the block a prompt is read, in one pass."""
        return self._watch.reading() if self._watch else contextlib.nullcontext()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block nothing is left out."""
        self._on = False
        try:
            with self._watch.off() if self._watch else contextlib.nullcontext():
                yield
        finally:
            self._on = True


def pruning_of(model: Any, runtime: Mapping[str, Any]) -> Pruning | None:
    """Return what a runtime asks to be left out of prompts and cache; None: nothing."""
    asked = {"kv_evict", "prompt_keep", "block_keep", "prompt_times"} & runtime.keys()
    return Pruning(model, runtime) if asked else None


def informative(surprises: torch.Tensor, times: int) -> torch.Tensor:
    """Return which tokens stay, (batch, kept) in rising order: one in `times`, the most surprising of (batch, tokens).

    The first few, which attention rests on, and the last ones, where a question stands, stay in any case.
    """
    tokens = surprises.shape[1]
    last = min(OBSERVED, tokens // times // 2)
    judged = surprises.clone()
    judged[:, :SINKS] = torch.inf
    judged[:, tokens - last :] = torch.inf
    return judged.topk(tokens // times, dim=1).indices.sort(dim=1).values


def surprise(model: Any, prompts: torch.Tensor) -> torch.Tensor:
    """Return -log p of each token given those before it, in nats, by the model's first layers: (batch, tokens).

    The first token has none before it: 0.
    """
    with _first_layers(model, max(1, len(decoder_layers(model)) // FULL_LAYERS)):
        states = model.base_model(input_ids=prompts, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    found = torch.zeros(prompts.shape, dtype=torch.float32, device=prompts.device)
    for first in range(0, prompts.shape[1] - 1, ROWS):  # in parts: logits are wide
        nexts = prompts[:, first + 1 : first + 1 + ROWS]
        logits = head(states[:, first : first + nexts.shape[1]]).float()
        found[:, first + 1 : first + 1 + ROWS] = nn.functional.cross_entropy(
            logits.transpose(1, 2), nexts, reduction="none"
        )
    return found


@contextlib.contextmanager
def _first_layers(model: nn.Module, count: int) -> Iterator[None]:
    """Within the block the model has only so many layers."""
    layers = decoder_layers(model)
    parent, name = next((m, n) for m in model.modules() for n, child in m.named_children() if child is layers)
    setattr(parent, name, layers[:count])
    try:
        yield
    finally:
        setattr(parent, name, layers)
