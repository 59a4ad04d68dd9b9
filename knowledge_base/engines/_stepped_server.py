"""A server around an engine that is stepped: each step computes a token of every running request, or part of a prompt.

    answer() ──orders──► the stepping thread, which alone touches the engine ──tokens──► answer(), in its caller's thread

Once a step has failed the engine is not used again: every answer fails as that one did.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from knowledge_base.engines._running import require
from knowledge_base.engines._serving import Texts, Told, Wanted, stops, tell
from knowledge_base.errors import CandidateFailed

THREAD = "engine steps"
Heard = SimpleQueue[int | CandidateFailed]  # the tokens of one answer, or why there are no more


class OneFailed(Exception):
    """A step could not work on one request, which is left out from now on; the others are as they were."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stepped(Protocol):
    """An engine and the requests it works on, by their numbers. Used by one thread only."""

    @property
    def busy(self) -> bool:
        """Whether another step would do anything."""
        ...

    def begin(self, number: int, wanted: Wanted, stop: frozenset[int]) -> None:
        """Take up a request, which ends after `new_tokens` or the first token of `stop`; that one is given too."""
        ...

    def step(self) -> Iterable[tuple[int, Sequence[int], bool]]:
        """Work on all of them; yield number, new tokens, and whether that was the last, of those that have any.

        Raises:
            OneFailed: from what stopped that request, and no other.
        """
        ...

    def drop(self, number: int) -> None:
        """Work no more on a request, which may have ended by itself."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


class SteppedServer:
    """See `_serving.Server`."""

    def __init__(self, engine: Stepped, texts: Texts, *, slots: int, context_tokens: int, vocabulary: int) -> None:
        self.slots = slots
        self.context_tokens: int | None = context_tokens
        self._engine, self._texts, self._vocabulary = engine, texts, vocabulary
        self._orders: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: close
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Heard] = {}  # this and what follows: the stepping thread's
        self._fault: CandidateFailed | None = None
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)
        self._thread.start()

    def answer(self, wanted: Wanted, told: Told) -> str:
        """Tell each token's text; see `_serving.Server.answer`. The end-of-text token has none."""
        require([wanted.prompt], wanted.new_tokens, context=self.context_tokens, vocabulary=self._vocabulary)
        number, heard = next(self._numbers), Heard()
        self._orders.put(partial(self._begin, number, wanted, stops(wanted, self._texts), heard))
        try:
            return tell(_heard(heard, wanted.new_tokens), wanted, self._texts, told)
        finally:
            self._orders.put(partial(self._drop, number))

    def close(self) -> None:
        """Free the model."""
        self._orders.put(None)
        self._thread.join()

    @property
    def fault(self) -> CandidateFailed | None:
        """Why no request can be answered any more, or None."""
        return self._fault

    # ---------------------------------------------------------------- in the stepping thread

    def _work(self) -> None:
        while True:
            while self._fault or not self._engine.busy or not self._orders.empty():
                order = self._orders.get()
                if order is None:
                    return self._engine.close()
                order()
            try:
                for number, tokens, over in self._engine.step():
                    self._hand_out(number, tokens, over)
            except OneFailed as one:
                self._waiting.pop(one.number).put(_failure(one.__cause__ or one))
            except Exception as error:  # whatever it is, those who wait must hear of it
                self._fault = _failure(error)
                for heard in self._waiting.values():
                    heard.put(self._fault)
                self._waiting.clear()

    def _begin(self, number: int, wanted: Wanted, stop: frozenset[int], heard: Heard) -> None:
        if self._fault:
            heard.put(self._fault)
            return
        try:
            self._engine.begin(number, wanted, stop)
        except Exception as error:  # whatever it is, who waits must hear of it
            heard.put(_failure(error))
        else:
            self._waiting[number] = heard

    def _hand_out(self, number: int, tokens: Sequence[int], over: bool) -> None:
        heard = self._waiting[number]
        for token in tokens:
            heard.put(token)
        if over:
            del self._waiting[number]
            heard.put(CandidateFailed("crashed", "the engine gave up an answer"))  # nobody reads on after a true end

    def _drop(self, number: int) -> None:
        if self._waiting.pop(number, None) is not None and not self._fault:
            self._engine.drop(number)


def _heard(heard: Heard, most: int) -> Iterator[int]:
    for _ in range(most):
        token = heard.get()
        if isinstance(token, CandidateFailed):
            raise token
        yield token


def _failure(error: BaseException) -> CandidateFailed:
    if isinstance(error, CandidateFailed):
        return error
    return CandidateFailed("crashed", f"the engine stopped: {type(error).__name__}: {str(error)[:300]}")
