"""A server around a stepped engine, where the engine fails: those who wait are told, and nobody waits for ever.

What it does while all goes well is held to the laws of tests/conformance/test_serving_engines.py on real engines.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from knowledge_base.engines._serving import LENGTH, STOP, Piece, Wanted
from knowledge_base.engines._stepped_server import THREAD, SteppedServer
from knowledge_base.errors import CandidateFailed


class Letters:
    """A tokenizer whose token 26 ends an answer."""

    end = frozenset({26})

    def reading(self):
        return lambda token: chr(ord("a") + token)


class Counting:
    """Answers each prompt with the numbers after its last; a 100 in it is refused, a 13 breaks the step, a 50 gives up."""

    def __init__(self) -> None:
        self.running: dict[int, list[int]] = {}
        self.dropped: list[int] = []
        self.steps = 0
        self.closed = False
        self.held = False  # after the first step, until `go`
        self.go = threading.Event()

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def begin(self, number: int, wanted: Wanted, stop: frozenset[int]) -> None:
        if wanted.prompt[-1] == 100:
            raise ValueError("not a prompt")
        self.running[number] = [wanted.prompt[-1], wanted.new_tokens, *stop]

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        if self.held and self.steps:
            self.go.wait(30)
        self.steps += 1
        for number, state in list(self.running.items()):
            state[0] += 1
            state[1] -= 1
            if state[0] == 14:
                raise OverflowError("thirteen")
            over = state[1] == 0 or state[0] in state[2:] or state[0] > 50
            if over:
                del self.running[number]
            yield number, [] if state[0] > 50 else [state[0]], over

    def drop(self, number: int) -> None:
        self.dropped.append(number)
        del self.running[number]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine() -> Counting:
    return Counting()


@pytest.fixture
def server(engine: Counting) -> Iterator[SteppedServer]:
    one = SteppedServer(engine, Letters(), slots=2, context_tokens=64, vocabulary=128)
    yield one
    one.close()
    assert engine.closed
    assert THREAD not in {thread.name for thread in threading.enumerate()}


def answered(server: SteppedServer, last: int, new_tokens: int = 3, **more: bool) -> tuple[str, int, str]:
    pieces: list[Piece] = []

    def told(piece: Piece) -> bool:
        pieces.append(piece)
        return True

    ended = server.answer(Wanted(prompt=(1, last), new_tokens=new_tokens, **more), told)
    return "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces), ended


def test_it_steps_while_there_is_something_to_do(server: SteppedServer, engine: Counting) -> None:
    assert answered(server, 0) == ("bcd", 3, LENGTH)
    assert answered(server, 3) == ("efg", 3, LENGTH)
    assert engine.steps == 6


def test_the_end_of_text_token_has_no_text_and_may_be_ignored(server: SteppedServer) -> None:
    assert answered(server, 24, 5) == ("z", 2, STOP)
    assert answered(server, 24, 5, ignore_eos=True) == ("z{|}~", 5, LENGTH)


def test_a_request_that_is_refused_is_the_only_one_that_fails(server: SteppedServer) -> None:
    with pytest.raises(CandidateFailed, match="ValueError: not a prompt"):
        answered(server, 100)
    assert answered(server, 0) == ("bcd", 3, LENGTH)


def test_what_the_engine_gives_up_is_no_end_of_an_answer(server: SteppedServer) -> None:
    with pytest.raises(CandidateFailed, match="gave up"):
        answered(server, 48, 5)


def test_after_a_step_that_failed_everybody_is_told(server: SteppedServer) -> None:
    failed: list[str] = []

    def ask(last: int) -> None:
        with pytest.raises(CandidateFailed, match="OverflowError: thirteen") as raised:
            answered(server, last, 40)
        failed.append(raised.value.kind)

    beside = threading.Thread(target=ask, args=(10,), daemon=True)
    beside.start()
    ask(12)
    beside.join(30)
    ask(1)  # and whoever asks later, rather than wait for ever
    assert failed == ["crashed"] * 3


def test_whoever_asks_may_fail_and_frees_the_slot(server: SteppedServer, engine: Counting) -> None:
    engine.held = True

    def told(piece: Piece) -> bool:
        raise RuntimeError("no one there")

    with pytest.raises(RuntimeError, match="no one there"):
        server.answer(Wanted(prompt=(27,), new_tokens=10), told)
    engine.go.set()
    assert answered(server, 0) == ("bcd", 3, LENGTH)
    assert engine.dropped == [1] and not engine.running
