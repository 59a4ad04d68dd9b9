"""Laws of every engine's own server (`open_server`), on the shipped model: what several requests at once may expect."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from typing import Any

import psutil
import pytest
from served import artefact

from knowledge_base.engines._running import Sampling
from knowledge_base.engines._serving import CANCELLED, LENGTH, Piece, Server, Wanted
from knowledge_base.errors import BadInput, LeanplanError
from knowledge_base.registry import engines
from planner.serving.texts import Texts

SLOTS, CONTEXT = 3, 256
PROMPT = (5, 6, 7, 8, 9, 10, 11, 12)
PROMPTS = (PROMPT, (300, 301, 302, *PROMPT * 6), (40, 41))  # of one step, of several, of less than a page
SHARED = PROMPT * 9  # longer than any page of a cache


@pytest.fixture(scope="module", params=[n for n, m in engines.all().items() if hasattr(m, "open_server")])
def engine(request: pytest.FixtureRequest) -> str:
    if why := engines.get(request.param).find():
        pytest.skip(why)
    if engines.get(request.param).ENGINE.environment is not None:
        pytest.skip("it runs in an environment of its own, through a candidate process: tests/unit/test_vllm.py")
    return str(request.param)


def opened(engine: str, context_tokens: int = CONTEXT, **runtime: Any) -> Server:
    """Return a server, opened in a working folder of its own as a candidate's is."""
    folder = artefact(engine)
    given = {"threads": 1, "batch": SLOTS, **runtime}
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        server: Server = engines.get(engine).open_server(folder, given, context_tokens, Texts(folder))
    return server


@pytest.fixture(scope="module")
def server(engine: str) -> Iterator[Server]:
    one = opened(engine)
    yield one
    one.close()


def answered(server: Server, prompt: tuple[int, ...], new_tokens: int = 24, **more: Any) -> tuple[str, int, str]:
    """Return text, tokens and end of an answer past any end-of-text token."""
    pieces: list[Piece] = []

    def told(piece: Piece) -> bool:
        pieces.append(piece)
        return True

    ended = server.answer(Wanted(prompt=prompt, new_tokens=new_tokens, ignore_eos=True, **more), told)
    return "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces), ended


@cache
def generated(engine: str, prompt: tuple[int, ...], new_tokens: int = 24) -> tuple[str, int, str]:
    """Return what `answered` is to return: what the engine generates without a server."""
    from tokenizers import Tokenizer

    folder = artefact(engine)
    running = engines.get(engine).open_artefact(folder, {"threads": 1})
    tokens = running.generate([prompt], new_tokens).tokens[0]
    running.close()
    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens), new_tokens, LENGTH


def test_it_says_how_many_at_once_and_how_long(server: Server, engine: str) -> None:
    assert (server.slots, server.context_tokens) == (SLOTS, CONTEXT)
    whole = opened(engine, 10**6)
    assert whole.context_tokens == 1024  # the model's
    whole.close()


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_an_answer_is_what_is_generated(server: Server, engine: str, prompt: tuple[int, ...]) -> None:
    assert answered(server, prompt) == generated(engine, prompt)


def test_pieces_come_one_by_one(server: Server) -> None:
    pieces: list[Piece] = []
    server.answer(Wanted(prompt=PROMPT, new_tokens=24, ignore_eos=True), lambda piece: not pieces.append(piece))  # type: ignore[func-returns-value]
    assert len(pieces) > 12 and all(piece.tokens <= 2 for piece in pieces)


def test_answers_side_by_side_are_those_one_by_one(server: Server, engine: str) -> None:
    with ThreadPoolExecutor(SLOTS) as pool:
        several = list(pool.map(lambda prompt: answered(server, prompt), PROMPTS * 2))
    assert several == [generated(engine, prompt) for prompt in PROMPTS * 2]


def test_they_are_computed_in_the_same_steps(server: Server) -> None:
    """A short answer asked for during a long one does not wait for its end."""

    def ends() -> list[str]:
        told: list[str] = []
        begun = threading.Event()

        def long() -> None:
            server.answer(Wanted(prompt=PROMPT, new_tokens=240, ignore_eos=True), lambda piece: not begun.set())  # type: ignore[func-returns-value]
            told.append("long")

        thread = threading.Thread(target=long)
        thread.start()
        begun.wait()
        answered(server, PROMPTS[2], 4)
        told.append("short")
        thread.join()
        return told

    # On a busy machine this thread may sleep through the tenth of a second that the long one takes.
    assert any(ends() == ["short", "long"] for _ in range(5))


def test_a_seed_draws_the_same_answer_again(server: Server) -> None:
    def drawn(seed: int | None) -> str:
        return answered(server, PROMPT, sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed))[0]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in (1, 2, 2**63 - 25, None, None)}) == 5


def test_next_to_no_share_leaves_the_likeliest_token(server: Server, engine: str) -> None:
    sampling = Sampling(temperature=1.0, top_p=1e-6)
    assert answered(server, PROMPT, sampling=sampling) == generated(engine, PROMPT)


def test_an_answer_that_nobody_wants_any_more_leaves_its_slot(engine: str) -> None:
    server = opened(engine, batch=1)
    for _ in range(3):
        told: list[Piece] = []

        def few(piece: Piece, told: list[Piece] = told) -> bool:
            told.append(piece)
            return len(told) < 3

        assert server.answer(Wanted(prompt=SHARED, new_tokens=CONTEXT - len(SHARED), ignore_eos=True), few) == CANCELLED
        assert len(told) == 3
    assert answered(server, PROMPT) == generated(engine, PROMPT)
    server.close()


def test_all_slots_fit_at_their_longest(server: Server, engine: str) -> None:
    new_tokens = CONTEXT - len(PROMPT)
    with ThreadPoolExecutor(SLOTS) as pool:
        ends = list(pool.map(lambda prompt: answered(server, prompt, new_tokens)[1:], [PROMPT] * SLOTS))
    assert ends == [(new_tokens, LENGTH)] * SLOTS


@pytest.mark.parametrize(
    ("prompt", "kind"), [((5,) * 2 * CONTEXT, LeanplanError), ((2**20,), BadInput)], ids=["too long", "no such token"]
)
def test_what_cannot_be_served_is_refused_in_a_sentence(
    server: Server, engine: str, prompt: tuple[int, ...], kind: type[LeanplanError]
) -> None:
    with pytest.raises(kind) as refused:
        answered(server, prompt)
    assert refused.value.message and "\n" not in refused.value.message
    assert answered(server, PROMPT, 4) == generated(engine, PROMPT, 4)  # and it stands


@pytest.mark.parametrize("runtime", [{"prefix_cache": True}, {"prefill_chunk": 16}], ids=str)
def test_what_is_lossless_changes_no_answer(engine: str, runtime: dict[str, Any]) -> None:
    (key,) = runtime
    if key not in engines.get(engine).ENGINE.offers:
        pytest.skip(f"the engine offers no {key}")
    server = opened(engine, **runtime)
    prompts = [(*SHARED, number) for number in (20, 21, 20)] + [SHARED[:40], *PROMPTS]
    assert [answered(server, prompt) for prompt in prompts] == [generated(engine, prompt) for prompt in prompts]
    with ThreadPoolExecutor(SLOTS) as pool:
        several = list(pool.map(lambda prompt: answered(server, prompt), prompts))
    assert several == [generated(engine, prompt) for prompt in prompts]
    server.close()


@pytest.mark.slow
def test_closing_leaves_no_thread_and_no_weights(engine: str) -> None:
    """In a process of its own: what the tests before it took and gave back moves memory by more than a model."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        resident_bytes, threads = pool.submit(opened_and_closed, engine, 8).result()
    size = sum(file.stat().st_size for file in artefact(engine).iterdir())
    # Three models that stayed would be 3; what allocators keep varies.
    assert min(resident_bytes[5:]) - min(resident_bytes[2:5]) < 1.5 * size
    assert len(set(threads[1:])) == 1


def opened_and_closed(engine: str, times: int) -> tuple[list[int], list[int]]:
    """Return the memory and the threads of this process after each of so many servers."""
    resident_bytes, threads = [], []
    for _ in range(times):
        server = opened(engine)
        answered(server, PROMPT, 2)
        server.close()
        del server
        gc.collect()
        resident_bytes.append(psutil.Process().memory_info().rss)
        threads.append(threading.active_count())
    return resident_bytes, threads


@pytest.mark.parametrize("runtime", [{"warp": 9}, {"batch": 0}, {"prefill_chunk": 0}], ids=str)
def test_it_refuses_what_it_cannot_honour(engine: str, runtime: dict[str, Any]) -> None:
    with pytest.raises(LeanplanError, match=next(iter(runtime))):
        opened(engine, **runtime)
