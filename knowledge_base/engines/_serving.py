"""What serves requests as they come: what an engine's optional `open_server` returns.

An engine that answers several requests at once by itself, as llama.cpp's and vLLM's servers do, defines

    open_server(folder, runtime, context_tokens, texts) -> Server

beside `open_artefact`, and may say by `one_by_one(model)` which models it cannot answer so. One that does not, or that raises
`OneByOneOnly` there, is served through `Running.stream`, one request after another. `READS_APART` says that its server reads a prompt
in a step of its own; without it, tokens of running answers are computed along with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

from knowledge_base.engines._running import GREEDY, Sampling
from knowledge_base.types import Model

STOP, LENGTH, CANCELLED = "stop", "length", "cancelled"  # why an answer ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One answer that somebody waits for."""

    prompt: tuple[int, ...]
    new_tokens: int
    sampling: Sampling = GREEDY
    ignore_eos: bool = False  # go on past the end-of-text token


@dataclass(frozen=True, slots=True)
class Piece:
    """What became known of an answer: text, empty where a character is not yet whole, of so many tokens more."""

    text: str
    tokens: int


Told = Callable[[Piece], bool]  # takes a piece, and says whether to go on


class Texts(Protocol):
    """The artefact's tokenizer, for engines that know tokens only."""

    end: frozenset[int]  # tokens that end an answer

    def reading(self) -> Callable[[int], str]:
        """Return a function that takes an answer's tokens one by one and gives the text each completes."""
        ...


def tell(tokens: Iterable[int], wanted: Wanted, texts: Texts, told: Told) -> str:
    """Tell the text of each token; return why the answer ended. The end-of-text token has no text."""
    stop, text = stops(wanted, texts), texts.reading()
    for token in tokens:
        if token in stop:
            told(Piece("", 1))
            return STOP
        if not told(Piece(text(token), 1)):
            return CANCELLED
    return LENGTH


def stops(wanted: Wanted, texts: Texts) -> frozenset[int]:
    """Return the tokens that end an answer."""
    return frozenset() if wanted.ignore_eos else texts.end


class OneByOneOnly(Exception):
    """What is wanted of an artefact can be had of its engine one request at a time only; the message says why."""


class Server(Protocol):
    """An artefact that answers up to `slots` requests at once, each in a thread of the caller's."""

    slots: int
    context_tokens: int | None  # most tokens of prompt and output together

    def answer(self, wanted: Wanted, told: Told) -> str:
        """Tell each piece as soon as it is known; return why the answer ended: STOP, LENGTH or CANCELLED.

        Raises:
            BadInput: the engine cannot serve this request; CandidateFailed: it failed.
        """
        ...

    def close(self) -> None:
        """Free the model. No request may be running."""
        ...


def side_by_side(engine: ModuleType, model: Model) -> bool:
    """Return whether an engine answers several requests of a model at once here.

    It may name a module it needs for it, `SERVES`, and say why some models are answered `one_by_one`.
    """
    needed, one_by_one = getattr(engine, "SERVES", None), getattr(engine, "one_by_one", None)
    there = hasattr(engine, "open_server") and (needed is None or find_spec(needed) is not None)
    return there and not (one_by_one and one_by_one(model))
