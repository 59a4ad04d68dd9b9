"""Writing an answer in fewer passes of a torch model: what is guessed cheaply is checked several tokens at once, or trusted.

How drafts are made and checked is in _drafting.py; here are the drafters that are torch models, and early exit, which
trusts a guess that is sure enough and is not lossless.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicCache

from knowledge_base.engines._drafting import Drafter, ModelDrafts, PromptLookup, likeliest, passes
from knowledge_base.engines._torch_artefact import load, save
from knowledge_base.engines._torch_cache import cache_bytes
from knowledge_base.engines._torch_layers import LENS, CutModel, read_bytes, read_lens
from knowledge_base.errors import CandidateFailed

DRAFT = "draft"  # folder of the draft model in an artefact
PENDING_MAX = 8  # tokens that left early, before the other layers read them
Forward = Callable[[Sequence[int], Cache], torch.Tensor]  # tokens of one sequence -> logits (tokens, vocabulary)


class Decoding(Protocol):
    """A way to write one answer other than by a pass of the whole model for each token."""

    def passes(
        self, forward: Forward, cache: Cache, prompt: Sequence[int], first: int, new_tokens: int
    ) -> Iterator[list[int]]:
        """Yield the tokens each pass adds after `first`, `new_tokens` in all; `cache` has read the prompt, not `first`."""
        ...

    def scored(self, tokens: torch.Tensor, logits: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """Return what tokens are chosen from, of the model's logits (tokens, vocabulary) after tokens (1, tokens).

        `cache` is empty, None: none is needed.
        """
        ...

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give the weights it holds beside the model's."""
        ...

    def cache_bytes(self) -> int:
        """Return the bytes of the caches it holds beside the model's."""
        ...


class Holding(Protocol):
    """What is held in memory beside the model, to guess with."""

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give its weights."""
        ...

    def cache_bytes(self) -> int:
        """Return the bytes of its caches."""
        ...


def decoding_of(model: Any, folder: Path, runtime: Mapping[str, Any]) -> Decoding | None:
    """Return how an artefact's runtime asks for answers to be written, None: a pass for each token.

    Looking up costs nothing, so a draft is only made where the text does not repeat itself.

    Raises:
        CandidateFailed: "load_error", its draft model or lens is missing or damaged.
    """
    device = next(model.parameters()).device
    if "lookup_tokens" in runtime:
        return Drafted([PromptLookup()], runtime["lookup_tokens"])
    if "exit_layers" in runtime:
        return EarlyExit(CutModel(model, runtime["exit_layers"], read_lens(folder, device)), runtime["exit_confidence"])
    if "draft_layers" in runtime:
        cut = CutModel(model, runtime["draft_layers"], read_lens(folder, device))
        layers = FirstLayers(cut)
        return Drafted([PromptLookup(), layers], runtime["draft_tokens"], layers)
    if "draft_tokens" in runtime:
        reader = DraftModel(model, load(folder / DRAFT, device))
        return Drafted([PromptLookup(), ModelDrafts(reader, reader.cost)], runtime["draft_tokens"], reader)
    return None


def save_parts(storage: Mapping[str, str], folder: Path) -> None:
    """Put what answers are guessed with into an artefact: the lens, the draft model.

    Raises:
        CandidateFailed: "build_error", it is no longer where the technique left it.
    """
    try:
        if "lens" in storage:
            shutil.copyfile(storage["lens"], folder / LENS)
        if "draft" in storage:
            save(read_model(Path(storage["draft"])), None, folder / DRAFT)
    except OSError as error:
        raise CandidateFailed("build_error", f"what drafts are made with cannot be copied: {error}") from error


def read_model(folder: Path) -> Any:
    """Return a causal language model of a folder in its own dtype, in evaluation mode; no code of the folder runs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False)


class Drafted:
    """Greedy decoding that checks several drafted tokens in one pass; see _drafting.py."""

    def __init__(self, drafters: Sequence[Drafter], most: int, holding: Holding | None = None) -> None:
        self._drafters, self._most, self._holding = drafters, most, holding

    def passes(
        self, forward: Forward, cache: Cache, prompt: Sequence[int], first: int, new_tokens: int
    ) -> Iterator[list[int]]:
        """Yield what each pass keeps; see `_drafting.passes`."""
        cache.activate_past_recording()
        return passes(
            self._drafters, self._most, check=lambda tokens: forward(tokens, cache).argmax(dim=-1).tolist(),
            take_back=lambda count: cache.crop(-count), prompt=prompt, cache=cache, first=first, new_tokens=new_tokens,
        )  # fmt: skip

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `Decoding.tensors`."""
        return self._holding.tensors() if self._holding else iter(())

    def cache_bytes(self) -> int:
        """See `Decoding.cache_bytes`."""
        return self._holding.cache_bytes() if self._holding else 0

    def scored(self, tokens: torch.Tensor, logits: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """See `Decoding.scored`: the model's own."""
        return logits


class FirstLayers:
    """Guesses with the model's own first layers and a lens; they share the model's cache, so a prompt is read once."""

    def __init__(self, model: CutModel) -> None:
        self._model, self.cost = model, model.cost
        self.tensors = model.tensors
        self._last = 0

    def begin(self, prompt: Sequence[int], cache: Cache) -> None:
        """See `Drafter.begin`."""
        self._cache = self._model.first_of(cache)

    def append(self, tokens: Sequence[int]) -> None:
        """See `Drafter.append`."""
        self._last = tokens[-1]

    def draft(self, most: int, least: float) -> list[int]:
        """See `Drafter.draft`."""

        def read(tokens: Sequence[int]) -> tuple[int, float]:
            ids = torch.tensor([tokens], device=self._model.device)
            return _best(self._model.guess(ids, self._cache)[0][0, -1])

        made = likeliest(read, [self._last], most, least)
        self._cache.crop(-len(made))  # each was guessed from one more token in the cache
        return made

    def cache_bytes(self) -> int:
        """See `Holding.cache_bytes`: none beside the model's."""
        return 0


class DraftModel:
    """Another, smaller model and its cache; see `_drafting.Reader`."""

    def __init__(self, model: Any, draft: Any) -> None:
        """Take a draft of the same vocabulary.

        Raises:
            CandidateFailed: "unsupported", another vocabulary, a shorter context, or a draft that cannot take tokens back.
        """
        ours, its = (m.config.get_text_config(decoder=True) for m in (model, draft))
        context = "max_position_embeddings"
        if ours.vocab_size != its.vocab_size:
            wrong = f"has {its.vocab_size} tokens, the model {ours.vocab_size}: both must mean the same by a token"
        elif getattr(its, context, None) and its.max_position_embeddings < getattr(ours, context, 0):
            wrong = f"reads {its.max_position_embeddings} tokens at most, the model {ours.max_position_embeddings}"
        elif any(DynamicCache(config=draft.config).is_linear):
            wrong = f"is a `{its.model_type}`, whose recurrent state cannot take back a refused token"
        else:
            wrong = ""
        if wrong:
            raise CandidateFailed("unsupported", f"the draft {wrong}", hint="give another draft, or plan without one")
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(draft.forward).parameters else {}
        self._draft = partial(draft, use_cache=True, **last)
        self._weights = [*draft.parameters(), *draft.buffers()]
        self._config = draft.config
        self._device = next(draft.parameters()).device
        self.cost = read_bytes(draft) / read_bytes(model)
        self._cache = DynamicCache(config=self._config)

    def forget(self) -> None:
        """See `Reader.forget`."""
        self._cache = DynamicCache(config=self._config)
        self._cache.activate_past_recording()

    def read(self, tokens: Sequence[int]) -> tuple[int, float]:
        """See `Reader.read`."""
        ids = torch.tensor([tokens], device=self._device)
        return _best(self._draft(input_ids=ids, past_key_values=self._cache).logits[0, -1])

    def take_back(self, count: int) -> None:
        """See `Reader.take_back`; also lets go of what left a sliding window."""
        self._cache.crop(-count)

    def tensors(self) -> Iterator[torch.Tensor]:
        """See `Holding.tensors`."""
        return iter(self._weights)

    def cache_bytes(self) -> int:
        """See `Holding.cache_bytes`."""
        return cache_bytes(self._cache)


def _best(logits: torch.Tensor) -> tuple[int, float]:
    """Return the likeliest token after logits (vocabulary,), and its chance."""
    share, token = logits.float().softmax(-1).max(-1)
    return int(token), share.item()


class EarlyExit:
    """Decoding that takes the first layers' guess where it is sure, and finishes with the other layers where it is not.

    When a token needs all layers, those after the exit read with it the tokens that left before, from the states they left
    with, in one pass: the cache then holds what it would hold without exits (Bae et al. 2023, "synchronized parallel
    decoding", arXiv:2310.05424; confidence as in Schuster et al. 2022, CALM, arXiv:2207.07061), and exits change nothing
    but their own token. A pass of the rest is what counts as a step.
    """

    def __init__(self, model: CutModel, confidence: float) -> None:
        self._model, self._confidence = model, confidence
        self.tensors = model.tensors

    def passes(
        self, forward: Forward, cache: Cache, prompt: Sequence[int], first: int, new_tokens: int
    ) -> Iterator[list[int]]:
        """Yield the tokens that left early and the one that did not, at most PENDING_MAX and one at a time."""
        token, missing = first, new_tokens
        while missing:
            added: list[int] = []
            unread, states = [], []
            while len(added) < missing:
                ids = torch.tensor([[token]], device=self._model.device)
                logits, state = self._model.guess(ids, cache)
                unread.append(token)
                states.append(state)
                share, best = logits[0, -1].float().softmax(-1).max(-1)
                if share < self._confidence or len(added) == PENDING_MAX:
                    ids = torch.tensor([unread], device=self._model.device)
                    token = int(self._model.finish(ids, torch.cat(states, dim=1), cache)[0, -1].argmax())
                    added.append(token)
                    break
                token = int(best)
                added.append(token)
            missing -= len(added)
            yield added

    def scored(self, tokens: torch.Tensor, logits: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        """See `Decoding.scored`: where the exit is sure, its logits. Left out: PENDING_MAX, which makes it surer."""
        guessed = self._model.guess(tokens, cache)[0][0]
        sure = guessed.float().softmax(-1).amax(-1, keepdim=True) >= self._confidence
        return torch.where(sure, guessed, logits)

    def cache_bytes(self) -> int:
        """See `Decoding.cache_bytes`: none beside the model's."""
        return 0
