"""Decoding with the feed-forward neurons a prompt used most (GRIFFIN, Dong et al., arXiv:2404.01365).

Nothing is copied: in memory the chosen neurons change places with those at the front, which leaves the model what it
was, and while an answer is written each matrix is a view of its front. The next prompt sees all of it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import Ffn, decoder_layers, ffn_of, matrix_of

GRAIN = 32


class PromptNeurons:
    """The feed-forward parts of a model, whole or narrowed to what the last prompt chose."""

    def __init__(self, model: nn.Module, keep: float) -> None:
        """Find the parts.

        Raises:
            CandidateFailed: "unsupported", experts, or matrices that are packed, factorised or hold gate and up at once.
        """
        self._parts = [_Part(ffn_of(layer), keep) for layer in decoder_layers(model)]

    @contextlib.contextmanager
    def reading(self, first: int = 0) -> Iterator[None]:
        """Within the block the model is whole; after it, narrowed to the neurons that tokens from `first` on used most."""
        for part in self._parts:
            part.widen()
        handles = [part.down.register_forward_pre_hook(part.watch(first)) for part in self._parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for part in self._parts:
            part.narrow()


class _Part:
    """One layer's feed-forward matrices."""

    def __init__(self, ffn: Ffn, keep: float) -> None:
        if ffn.down is None or any(matrix_of(up).shape[0] != ffn.size for up in ffn.ups):
            raise CandidateFailed(
                "unsupported", "neurons are chosen by the prompt in dense feed-forward parts whose gate and up are apart",
                hint="plan without ffn_prompt_neurons",
            )  # fmt: skip
        self.size, self.ups, self.down = ffn.size, ffn.ups, ffn.down
        self.count = min(ffn.size, max(round(keep * ffn.size / GRAIN), 1) * GRAIN)
        self.used = torch.zeros(ffn.size)
        self.whole: list[tuple[Any, str, nn.Parameter]] = []  # what `narrow` put views in place of

    def watch(self, first: int) -> Any:
        """Return a hook that adds up how much each neuron contributes, every token counting the same."""
        self.used = torch.zeros(self.size)

        def hook(module: Any, args: tuple) -> None:
            active = args[0][:, first:].flatten(0, 1).float()  # (tokens, neurons)
            share = active.square() / active.square().sum(1, keepdim=True).clamp_min(1e-30)
            self.used = share.sum(0)

        return hook

    def narrow(self) -> None:
        """Bring the most used neurons to the front and leave only those to be computed with."""
        chosen = torch.zeros(self.size, dtype=torch.bool, device=self.used.device)
        chosen[self.used.argsort(descending=True, stable=True)[: self.count]] = True
        out = (~chosen[: self.count]).nonzero()[:, 0]
        into = chosen[self.count :].nonzero()[:, 0] + self.count
        for up in self.ups:
            _swap(matrix_of(up), out, into)
            if up.bias is not None:
                _swap(up.bias.data, out, into)
        _swap(matrix_of(self.down).T, out, into)
        for module in (*self.ups, self.down):
            rows = isinstance(module, Conv1D) == (module is self.down)  # neurons are the weight's first dimension
            view = module.weight.data[: self.count] if rows else module.weight.data[:, : self.count]
            self._put(module, "weight", view)
        for up in self.ups:
            if up.bias is not None:
                self._put(up, "bias", up.bias.data[: self.count])
            if isinstance(up, Conv1D):
                up.nf = self.count

    def _put(self, module: Any, name: str, view: torch.Tensor) -> None:
        self.whole.append((module, name, getattr(module, name)))
        setattr(module, name, nn.Parameter(view, requires_grad=False))

    def widen(self) -> None:
        for module, name, parameter in self.whole:
            setattr(module, name, parameter)
            if isinstance(module, Conv1D) and module is not self.down:
                module.nf = self.size
        self.whole = []


def _swap(tensor: torch.Tensor, here: torch.Tensor, there: torch.Tensor) -> None:
    """Exchange the entries `here` and `there` of the first dimension in place."""
    kept = tensor[here]
    tensor[here] = tensor[there]
    tensor[there] = kept
