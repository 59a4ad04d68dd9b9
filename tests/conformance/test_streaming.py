"""Laws of `Running.stream`, on the shipped model: what every engine's service rests on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from served import artefact

from knowledge_base.engines._running import Sampling
from knowledge_base.errors import BadInput
from knowledge_base.registry import engines

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module", params=engines.names())
def running(request: pytest.FixtureRequest) -> Iterator[Any]:
    engine = engines.get(request.param)
    if why := engine.find():
        pytest.skip(why)
    opened = engine.open_artefact(artefact(request.param), {})
    yield opened
    opened.close()


def test_a_stream_is_what_is_generated(running: Any) -> None:
    assert list(running.stream(PROMPT, 24)) == running.generate([PROMPT], 24).tokens[0]


def test_it_ends_after_a_token_to_stop_at(running: Any) -> None:
    whole = running.generate([PROMPT], 24).tokens[0]
    stop = whole[7]
    assert list(running.stream(PROMPT, 24, stop={stop})) == whole[: whole.index(stop) + 1]


def test_closing_it_leaves_the_engine_as_it_was(running: Any) -> None:
    stream = running.stream(PROMPT, 200)
    assert [next(stream) for _ in range(3)] == running.generate([PROMPT], 3).tokens[0]
    stream.close()
    assert list(running.stream(PROMPT, 24)) == running.generate([PROMPT], 24).tokens[0]


def test_a_seed_draws_the_same_tokens_again(running: Any) -> None:
    def drawn(seed: int | None) -> list[int]:
        return list(running.stream(PROMPT, 24, sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed)))

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in (1, 2, None, None)}) == 4


def test_next_to_no_share_leaves_the_likeliest_token(running: Any) -> None:
    drawn = running.stream(PROMPT, 12, sampling=Sampling(temperature=1.0, top_p=1e-6))
    assert list(drawn) == running.generate([PROMPT], 12).tokens[0]


def test_it_knows_its_context(running: Any) -> None:
    limit = running.context_tokens
    assert limit == 1024
    assert len(list(running.stream([5] * (limit - 2), 2))) == 2


@pytest.mark.parametrize(
    ("prompt", "new_tokens"),
    [([], 4), (PROMPT, 0), ([5] * 1020, 5), ([2**20], 4)],
    ids=["no prompt", "no output", "beyond the context", "no such token"],
)
def test_the_call_itself_refuses_what_cannot_be_served(running: Any, prompt: list[int], new_tokens: int) -> None:
    with pytest.raises(BadInput):
        running.stream(prompt, new_tokens)


@pytest.mark.slow
def test_compiled_code_is_made_once_for_answers_of_any_length() -> None:
    """torch.compile makes code for one shape of the cache: a service that made it anew for each request would crawl."""
    engine = engines.get("transformers")
    compiled, plain = (engine.open_artefact(artefact("transformers"), runtime) for runtime in ({"compile": True}, {}))
    try:
        list(compiled.stream(PROMPT, 4))
        made_for = compiled._static  # another cache means other code
        for prompt, new_tokens in ((PROMPT, 24), (PROMPT * 3, 30), (PROMPT[:2], 5)):
            assert list(compiled.stream(prompt, new_tokens)) == plain.generate([prompt], new_tokens).tokens[0]
        assert compiled._static is made_for
        assert len(list(compiled.stream([5] * 1000, 24))) == 24  # up to the end of the context
    finally:
        compiled.close()
        plain.close()
