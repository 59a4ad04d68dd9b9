"""Choices of a service: slots, prompts kept between requests, prompts read in pieces. What is legal, predicted and done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from served import artefact
from tests_support import TOY_MACHINE, TOY_MODEL

import cost_models
from cost_models.calibration import Features
from cost_models.case import case_of
from cost_models.demand import chains
from cost_models.error_report import error_report
from cost_models.load import under_load
from cost_models.predict import evaluate
from knowledge_base.engines import llama_cpp
from knowledge_base.engines._serving import Piece, Wanted
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import batch_size, chunked_prefill, prefix_caching
from knowledge_base.types import Figure, Measurement, Plan, Step, Trace, Workload
from planner.load.requests import Words, conversations
from search.space import build_space

MODEL = replace(TOY_MODEL, architecture="llama", max_context_tokens=8192)
ARRIVING = Workload(prompt_tokens=400, output_tokens=32, requests_per_s=0.5, shared_prefix_tokens=300)
TALKING = Workload(prompt_tokens=400, output_tokens=32, concurrency=4, shared_prefix_tokens=100, turns=4)
ALONE = Workload(prompt_tokens=400, output_tokens=32, concurrency=4, shared_prefix_tokens=300)


# ---------------------------------------------------------------- what is legal


@pytest.mark.parametrize(
    ("workload", "said"),
    [
        (ARRIVING, None),
        (TALKING, None),
        (replace(TALKING, shared_prefix_tokens=0), None),  # a conversation repeats itself
        (ALONE, "leaves nothing to keep"),
        (replace(ARRIVING, shared_prefix_tokens=0), "share no beginning"),
        (Workload(prompt_tokens=9, output_tokens=9, trace=Trace(file="t.csv", replayed=True)), "share no beginning"),
    ],
)  # fmt: skip
def test_prompts_are_kept_where_they_come_again(workload: Workload, said: str | None) -> None:
    why = prefix_caching.rejects(MODEL, workload, TOY_MACHINE)
    assert why is None if said is None else why and said in why


def test_prompts_are_not_kept_where_a_layer_forgets() -> None:
    assert "have let go" in (
        prefix_caching.rejects(replace(MODEL, sliding_window_tokens=256), ARRIVING, TOY_MACHINE) or ""
    )
    mamba = replace(MODEL, attention_layers=0, architecture="mamba")
    assert "`mamba` keeps no keys" in (prefix_caching.rejects(mamba, ARRIVING, TOY_MACHINE) or "")


def test_pieces_are_for_prompts_beside_running_answers() -> None:
    def why(workload: Workload, tokens: int = 128) -> str | None:
        said = chunked_prefill.rejects(MODEL, workload, TOY_MACHINE)
        return said or chunked_prefill.legal({"tokens": tokens}, MODEL, workload, TOY_MACHINE)

    assert why(ARRIVING) is None and why(TALKING) is None
    assert "in one piece of 512" in (why(ARRIVING, 512) or "")
    assert why(TALKING, 512) is None  # later turns are longer
    assert "one batch after the other" in (why(ALONE) or "")
    assert "one request at a time" in (why(replace(TALKING, concurrency=1)) or "")


def test_any_number_of_slots_for_requests_that_come_when_they_come() -> None:
    arriving, clients = replace(ARRIVING, concurrency=1), replace(TALKING, concurrency=4)
    for count in (2, 32):
        assert batch_size.rejects(MODEL, arriving, TOY_MACHINE) is None
        assert batch_size.legal({"count": count}, MODEL, arriving, TOY_MACHINE) is None
    assert "never full with 4" in (batch_size.legal({"count": 8}, MODEL, clients, TOY_MACHINE) or "")


def test_the_search_proposes_them_on_engines_that_have_them() -> None:
    space = build_space(MODEL, ARRIVING, TOY_MACHINE, engine_names=["transformers", "onnxruntime", "llama_cpp"])
    told = {r.what: r.why for r in space.refused}
    assert not {"batch", "prefix", "prefill_schedule"} & set(space.options["onnxruntime"])
    assert any(what.startswith("batch_size(count=2) on onnxruntime") and "one request after another" in why for what, why in told.items())  # fmt: skip
    own = {family: [str(step) for step in steps] for family, steps in space.options["llama_cpp"].items()}
    assert [f"batch_size(count={n})" for n in (2, 4, 8, 16, 32)] == own["batch"]
    assert own["prefix"] == ["prefix_caching"] and own["prefill_schedule"] == ["chunked_prefill(tokens=128)"]
    pieces = Step("chunked_prefill", {"tokens": 128})
    assert space.plan("llama_cpp", [pieces]) is None  # with one slot nobody waits
    assert space.plan("llama_cpp", [pieces, Step("batch_size", {"count": 2})])
    several, eight_bits = Step("batch_size", {"count": 2}), Step("kv_cache_quantised", {"bits": 8})
    assert space.plan("transformers", [several]) and space.plan("transformers", [eight_bits])
    assert space.plan("transformers", [several, eight_bits]) is None  # answers join and leave at any step
    still = build_space(MODEL, ALONE, TOY_MACHINE, engine_names=["transformers", "onnxruntime", "llama_cpp"])
    assert still.plan("transformers", [several, eight_bits])
    assert still.options["onnxruntime"]["batch"] and "prefix" not in still.options["llama_cpp"]


# ---------------------------------------------------------------- what is predicted


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("turns", [1, 2, 5])
def test_what_is_found_again_is_what_the_load_repeats(turns: int) -> None:
    workload = replace(TALKING, turns=turns)
    words, found = Words(seed=1, vocabulary=30_000), []
    shared = words.take(workload.shared_prefix_tokens)
    for conversation in islice(conversations(workload, seed=1), 3):
        before, said = shared, shared + words.take(conversation.turns[0].new_tokens - len(shared))
        for number, turn in enumerate(conversation.turns):
            said = said + words.take(turn.new_tokens) if number else said
            found.append(common(before, said))
            before, said = said, said + words.take(turn.output_tokens)
    prefix, earlier = prefix_caching.reused(workload)
    assert prefix + earlier == pytest.approx(sum(found) / len(found), abs=0.01)


def figures(workload: Workload, *steps: Step, engine: str = "llama_cpp") -> dict[str, Any]:
    plan = Plan(model_digest="toy", engine=engine, steps=steps)
    return {n: v.mid[0] for n, v in cost_models.estimate_many([plan], MODEL, workload, TOY_MACHINE).items()}


def reused(workload: Workload, *steps: Step) -> float:
    """Return the tokens of a prompt that are found, in the mean over a conversation."""
    node = chains(MODEL, workload).node(Plan(model_digest="toy", engine="llama_cpp", steps=steps))
    case, _, _ = under_load(case_of([node], workload, TOY_MACHINE), lambda at: evaluate(at, None, Features([node])))
    return float(case.reused_tokens[0])


KEEP, SLOTS = Step("prefix_caching", {}), Step("batch_size", {"count": 4})


@pytest.mark.parametrize(("workload", "most"), [(ARRIVING, 0.4), (TALKING, 0.95)])
def test_what_is_kept_is_not_computed_again(workload: Workload, most: float) -> None:
    for steps in ((), (SLOTS,)):
        cold, warm = figures(workload, *steps), figures(workload, *steps, KEEP)
        assert warm["ttft_s"] < most * cold["ttft_s"] and warm["latency_s"] < cold["latency_s"]
        assert warm["peak_memory_bytes"] == cold["peak_memory_bytes"]  # the first prompt finds nothing
        assert warm["tpot_s"] <= cold["tpot_s"]


def test_a_slot_that_others_were_given_has_forgotten_a_conversation() -> None:
    talking = replace(TALKING, shared_prefix_tokens=0)
    few, enough = Step("batch_size", {"count": 2}), SLOTS
    assert figures(talking, few, KEEP)["ttft_s"] == pytest.approx(figures(talking, few)["ttft_s"])
    assert figures(talking, enough, KEEP)["ttft_s"] < 0.9 * figures(talking, enough)["ttft_s"]
    found = [reused(replace(talking, requests_per_s=rate), few, KEEP) for rate in (0.01, 1.0, 100.0)]
    assert found[0] == pytest.approx(sum(prefix_caching.reused(talking)), rel=0.01)
    assert found[0] > found[1] > found[2] == 0.0  # falling behind, no slot waits for the next turn


def test_one_batch_after_the_other_keeps_nothing_and_is_not_interrupted() -> None:
    plain = figures(ALONE, SLOTS)
    assert figures(ALONE, SLOTS, KEEP, Step("chunked_prefill", {"tokens": 128})) == plain


def test_slots_trade_the_wait_for_a_turn_for_slower_tokens() -> None:
    idle = figures(replace(ARRIVING, requests_per_s=1e-6))
    capacity = 1 / idle["latency_s"]
    workload = replace(ARRIVING, requests_per_s=0.8 * capacity)
    one, four = figures(workload), figures(workload, SLOTS)
    assert four["ttft_s"] < 2.0 * idle["ttft_s"] < 0.5 * one["ttft_s"]  # nor does it wait for a batch to end
    assert four["tpot_s"] > one["tpot_s"]
    beyond = replace(ARRIVING, requests_per_s=1.2 * capacity)
    assert figures(beyond)["ttft_s"] == float("inf") > figures(beyond, SLOTS)["ttft_s"]


def test_conversations_grow() -> None:
    two, four = (figures(replace(TALKING, turns=turns), SLOTS) for turns in (2, 4))
    assert four["ttft_s"] > two["ttft_s"] and four["tpot_s"] > two["tpot_s"]
    # the cache is full at the end of a conversation: 400 + 3 x (300 + 32) + 32 tokens, where one turn has 432
    alone = figures(replace(TALKING, turns=1), SLOTS)
    assert four["kv_cache_bytes"] / alone["kv_cache_bytes"] == pytest.approx(TALKING.longest_tokens / 432)


def test_pieces_cost_the_own_prompt_and_spare_the_others() -> None:
    long = replace(ARRIVING, prompt_tokens=2000, requests_per_s=0.1)
    whole, pieces = figures(long, SLOTS), figures(long, SLOTS, Step("chunked_prefill", {"tokens": 128}))
    assert pieces["ttft_s"] > whole["ttft_s"]
    assert pieces["peak_memory_bytes"] < whole["peak_memory_bytes"]
    busy = replace(long, output_tokens=128)
    busy = replace(busy, requests_per_s=0.5 / figures(replace(busy, requests_per_s=1e-6))["latency_s"])
    whole, pieces = figures(busy, SLOTS), figures(busy, SLOTS, Step("chunked_prefill", {"tokens": 128}))
    assert pieces["tpot_s"] < 0.95 * whole["tpot_s"]  # tokens that come along with others' prompts


def test_a_figure_of_nothing_is_not_compared_with() -> None:
    plan = Plan(model_digest="toy", engine="llama_cpp")
    told = cost_models.estimate(plan, MODEL, ARRIVING, TOY_MACHINE)
    zero, some = (Figure(value=value, low=0.0, high=1.0, n=9) for value in (0.0, 0.5))
    measured = Measurement(plan=plan, key="k", hardware_fingerprint="h", figures={"tpot_s": zero, "ttft_s": some, "quality_loss_ratio": zero})  # fmt: skip
    assert error_report([(told, measured)]).keys() == {"ttft_s", "quality_loss_ratio"}


# ---------------------------------------------------------------- what llama.cpp does

if why := llama_cpp.find():
    pytest.skip(why, allow_module_level=True)

SHARED = list(range(20, 220))
NO_TEXTS: Any = None  # llama.cpp knows text itself


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start servers of the shipped model, each in a folder of its own, where its socket is."""
    started: list[Any] = []

    def start(**runtime: Any) -> Any:
        place, folder = tmp_path / str(len(started)), artefact("llama_cpp", threads=1)
        place.mkdir()
        monkeypatch.chdir(place)
        started.append(llama_cpp.open_server(folder, {"threads": 1, **runtime}, 1024, NO_TEXTS))
        return started[-1]

    yield start
    for server in started:
        server.close()


def messages(server: Any, prompt: list[int], **more: Any) -> list[dict[str, Any]]:
    """Ask llama.cpp itself, and return all it says."""
    told: list[dict[str, Any]] = []
    request = {"prompt": prompt, "max_tokens": 2, "ignore_eos": True, "stream": True, "timings_per_token": True, **more}

    def hear(message: dict[str, Any]) -> bool:
        told.append(message)
        return False

    server._server.handle_completions(request, hear)
    return told


@pytest.mark.parametrize(("runtime", "found"), [({}, 0), ({"prefix_cache": True}, len(SHARED))])
def test_only_a_service_that_keeps_prompts_finds_them_again(served: Any, runtime: dict[str, Any], found: int) -> None:
    server = served(**runtime)
    for number in range(3):
        timings = messages(server, [*SHARED, 300 + number, 400])[-1]["timings"]
        assert timings["cache_n"] == (found if number else 0)
        assert timings["cache_n"] + timings["prompt_n"] == len(SHARED) + 2


def test_a_kept_prompt_is_answered_as_a_new_one(served: Any) -> None:
    told: dict[bool, list[str]] = {}
    for keep in (False, True):
        server = served(prefix_cache=True) if keep else served()
        told[keep] = []
        for number in range(3):
            pieces: list[Piece] = []
            wanted = Wanted(prompt=(*SHARED, 300 + number), new_tokens=8, ignore_eos=True)
            server.answer(wanted, lambda piece, pieces=pieces: not pieces.append(piece))  # type: ignore[misc]
            told[keep].append("".join(piece.text for piece in pieces))
    assert told[True] == told[False] and all(told[True])


@pytest.mark.parametrize(("runtime", "steps"), [({"batch": 2}, 1), ({"batch": 2, "prefill_chunk": 64}, 10)])
def test_a_prompt_is_read_in_as_many_steps_as_pieces(served: Any, runtime: dict[str, Any], steps: int) -> None:
    told = messages(served(**runtime), (SHARED * 4)[:640], return_progress=True)
    read = [message["prompt_progress"]["processed"] for message in told if "prompt_progress" in message]
    assert read[-1] == 640
    assert len([n for n in read if n]) == steps


@pytest.mark.parametrize("runtime", [{"prefix_cache": False}, {"prefix_cache": 1}, {"prefill_chunk": 0}])
def test_a_value_that_means_nothing_is_refused(runtime: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CandidateFailed, match="runtime key"):
        llama_cpp.open_server(tmp_path, runtime, 1024, NO_TEXTS)
