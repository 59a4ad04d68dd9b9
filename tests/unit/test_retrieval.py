"""Facts hidden in prompts: they are there, the right answer is asked for, and the shipped model tells what eviction costs."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

from knowledge_base.errors import CandidateFailed
from knowledge_base.metrics import METRICS
from planner import data, retrieval, texts
from planner.isolation import Limits, Servers
from planner.tiny_models import make_tiny_model

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-lm"
LENGTH = 128


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Windows of the bundled text in the shipped model's tokens, as a run keeps its prompts."""
    ids = texts.tokenise(MODEL, texts.read_text(data.bundled("heldout")))
    rows = [list(ids[i * 700 : i * 700 + 200]) for i in range(retrieval.PROMPTS)]
    return data.save_windows(tmp_path_factory.mktemp("data") / "prompts.npy", rows)


@pytest.fixture(scope="module")
def ask(text, tmp_path_factory):
    """Open a model with a runtime in a process of its own and ask it for facts."""
    with Servers() as servers:

        def asked(folder, runtime, **settings):
            work = tmp_path_factory.mktemp("work")
            limits = Limits(memory_bytes=6 << 30, time_s=240, disk_bytes=1 << 30)
            with servers.start((), folder=work / "folder", limits=limits, log=work / "log.txt") as candidate:
                opening = {"folder": str(folder), "engine": "transformers", "runtime": runtime}
                candidate.call("open", opening, timeout_s=240)
                asking = {"prompt_tokens": LENGTH, "context_tokens": 1024, **settings}
                return retrieval.observe(candidate, text, **asking)

        yield asked


def test_every_fact_stands_once_in_its_prompt_and_is_asked_for_after_it(text):
    source = numpy.load(text).tolist()
    rows = retrieval.questions(source, LENGTH, seed=3)
    assert len(rows) == retrieval.PROMPTS
    asked = []
    for number, row in enumerate(rows):
        prompt, tail = row[:LENGTH], row[LENGTH:]
        assert len(tail) == retrieval.TAIL
        facts = [tail[i : i + retrieval.FACT] for i in range(0, retrieval.TAIL, retrieval.FACT)]
        assert len({token for fact in facts for token in fact}) == retrieval.TAIL
        places = [[i for i in range(LENGTH - 2) if prompt[i : i + retrieval.FACT] == fact] for fact in facts]
        assert all(len(found) == 1 for found in places)
        asked.append([found[0] for found in places])
        hidden = {i + j for (i,) in places for j in range(retrieval.FACT)}
        left = [token for i, token in enumerate(prompt) if i not in hidden]
        assert left == source[number][: LENGTH - retrieval.TAIL]
        quarter = LENGTH / retrieval.FACTS
        assert sorted(int(i // quarter) for i in asked[-1]) == list(range(retrieval.FACTS))
    assert any(places != sorted(places) for places in asked)  # asked for in another order
    assert rows == retrieval.questions(source, LENGTH, seed=3) != retrieval.questions(source, LENGTH, seed=4)


def test_the_likeliest_of_all_answers_must_be_the_facts_own():
    tail = [1, 2, 30, 3, 4, 31, 5, 6, 32, 7, 8, 33]
    log_probs = numpy.full((12, 40), -9.0)
    log_probs[2, 30] = log_probs[5, 30] = log_probs[8, 32] = -1.0
    log_probs[11, [33, 39]] = [-5.0, -0.1]  # likelier, but no answer
    assert retrieval.answered(log_probs, tail) == [1, 0, 1, 1]


@pytest.mark.slow
def test_what_was_let_go_of_is_not_recalled(ask):
    found = ask(MODEL, {"kv_evict": "heavy_hitters", "kv_keep": 0.2})
    (figure,) = found.figures.values()
    assert retrieval.METRIC in METRICS
    assert found.warnings == ()
    whole = int(figure.note.split("; ")[1].split()[0])
    questions = retrieval.PROMPTS * retrieval.FACTS
    assert figure.n == len(figure.samples) == questions
    assert whole > 0.6 * questions > sum(figure.samples) + 4
    assert figure.low <= figure.value <= figure.high
    half = ask(MODEL, {"kv_evict": "snap", "kv_keep": 0.5}).figures[retrieval.METRIC]
    assert half.value > figure.value
    assert half.note == figure.note


@pytest.mark.slow
def test_a_model_that_cannot_is_told(ask, tmp_path):
    tiny = make_tiny_model(tmp_path / "tiny", vocab_size=4096)
    found = ask(tiny, {"prompt_keep": 0.5}, context_tokens=256)
    assert found.figures == {}
    assert found.warnings[0].startswith("retrieval not told: with nothing left out the model itself recalls ")
    assert found.warnings[0].endswith(f" of {retrieval.PROMPTS * retrieval.FACTS}")


@pytest.mark.slow
def test_where_nothing_is_left_out_nothing_is_asked(ask):
    assert ask(MODEL, {}) == retrieval.Recalled()
    assert ask(MODEL, {"kv_bits": 8}) == retrieval.Recalled()
    assert ask(MODEL, {"prompt_keep": 0.5}, prompt_tokens=40) == retrieval.Recalled()
    with pytest.raises(CandidateFailed):
        ask(MODEL, {"kv_evict": "window"})
