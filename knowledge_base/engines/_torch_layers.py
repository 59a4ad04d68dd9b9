"""A model cut in two after some layers: a first part that guesses the next token by itself, and the rest that finishes.

Both parts are models that share every tensor and the cache with the whole one. The first ends in a lens, a linear map
from the state after its layers to the state after all of them, fitted on calibration text by least squares (Din et al.
2023, arXiv:2303.09435; Belrose et al. 2023, "tuned lens", arXiv:2303.08112), and goes on to the model's own norm and head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques._blocks import decoder_layers

LENS = "lens.safetensors"


class Lens(nn.Module):
    """Stands where the next layer would: maps the state, and remembers the one that came in."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)  # (hidden, hidden)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)  # of logits, (1,): a guess is less sure than it looks
        self.came: torch.Tensor | None = None  # (1, tokens, hidden)

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.came = states
        return nn.functional.linear(states, self.weight, self.bias)


class _Resuming(nn.Module):
    """Stands where a layer was that has been computed before: gives what the last of them gave."""

    def __init__(self) -> None:
        super().__init__()
        self.states: torch.Tensor | None = None

    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.states is not None
        return self.states


class CutModel:
    """The first layers of a model with a lens, and its other layers."""

    def __init__(self, model: Any, first: int, lens: Lens) -> None:
        """Cut.

        Raises:
            CandidateFailed: "unsupported", no layer is left on one side, or nothing is known of how they follow each other.
        """
        layers = list(decoder_layers(model))
        if not 1 <= first < len(layers):
            raise CandidateFailed(
                "unsupported", f"{len(layers)} layers cannot be cut after {first}", hint="plan this for a deeper model"
            )
        self._count, self._lens, self._resuming = first, lens, _Resuming()
        self._first = with_layers(model, [*layers[:first], lens])
        self._rest = with_layers(model, [self._resuming] * first + layers[first:])
        self.device = next(model.parameters()).device
        self.tensors = lens.parameters  # what it holds beside the model
        self.cost = read_bytes(self._first) / read_bytes(model)  # of a guess, in passes of the whole model

    def guess(self, tokens: torch.Tensor, cache: Cache | None, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first part's logits (1, tokens, vocabulary) after tokens (1, tokens), and the states to finish from."""
        logits = self._first(input_ids=tokens, past_key_values=cache, use_cache=cache is not None, **settings).logits
        states, self._lens.came = self._lens.came, None
        assert states is not None
        return logits * self._lens.scale, states

    def finish(self, tokens: torch.Tensor, states: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Return the whole model's logits after tokens whose states, (1, tokens, hidden), the first part gave.

        The rest's part of `cache` may lag behind the first's: these are the tokens that it lacks.
        """
        self._resuming.states = states
        logits = self._rest(
            input_ids=tokens, past_key_values=self._behind(cache) if cache else None, use_cache=cache is not None
        ).logits
        self._resuming.states = None
        return logits

    def first_of(self, cache: Cache) -> Cache:
        """Return the first part's layers of a cache, as a cache."""
        return Cache(layers=cache.layers[: self._count])

    def _behind(self, cache: Cache) -> Cache:
        """Return the cache with the rest's lengths: transformers asks the first layer of a kind how far the text is."""
        rest: list[Any] = cache.layers[self._count :]
        like = {layer.is_sliding: layer for layer in reversed(rest)}
        first: list[Any] = cache.layers[: self._count]
        return Cache(layers=[like.get(layer.is_sliding, rest[0]) for layer in first] + rest)


def read_bytes(model: Any) -> int:
    """Return the bytes of weights a pass for one token reads: all but an embedding table that is not the head."""
    head = model.get_output_embeddings()
    table = model.get_input_embeddings().weight
    tied = head is not None and head.weight.data_ptr() == table.data_ptr()
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else table.nbytes)


def with_layers(model: Any, layers: list[Any]) -> Any:
    """Return a model that has these decoder layers, and shares everything else with the one given."""
    found = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is found).split(".")
    copied = top = _copy(model)
    for name in path[:-1]:
        copied._modules[name] = _copy(copied._modules[name])
        copied = copied._modules[name]
    copied._modules[path[-1]] = nn.ModuleList(layers)
    return top


def _copy(module: Any) -> Any:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    return made


def read_lens(folder: Path, device: torch.device) -> Lens:
    """Return the lens of an artefact.

    Raises:
        CandidateFailed: "load_error", it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / LENS, device=str(device))
        return Lens(*(tensors[name] for name in ("weight", "bias", "scale")))
    except (OSError, KeyError, SafetensorError) as error:
        raise CandidateFailed(
            "load_error", f"{folder.name}/{LENS} cannot be loaded: {error}", hint="build the artefact again"
        ) from error


def write_lens(lens: Lens, path: Path) -> None:
    """Write a lens to a file."""
    from safetensors.torch import save_file

    save_file({name: p.detach().cpu().contiguous() for name, p in lens.named_parameters()}, path)
