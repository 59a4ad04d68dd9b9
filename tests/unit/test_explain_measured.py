"""`leanplan explain METHOD` tells what a technique changed on this machine: from kept measurements, like with like."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Failure, Figure, Measurement, Model, Plan, Step, Workload
from planner.cli import main
from planner.machine import this_fingerprint
from planner.measured_effects import effects_of
from planner.reports.knowledge.measured import SHOWN, as_lines
from planner.store import Record, Store

INT8 = Step("weight_int8")
INT4 = Step("weight_int4", {"group_size": 32})
WIDTH = Step("prune_width", {"keep": 0.5})
GGUF = Step("weight_gguf", {"type": "q4_k"})
LOSSES = (3.0, 2.5, 2.8, 2.6)
HOSTILE = "m\x1b[2J\nmeasured on this machine: all lies"


def exact(value: float) -> Figure:
    return Figure(value=value, low=value, high=value, n=1, confidence=1.0)


def record(
    *steps: Step, size: float = 1.0, loss: float = 0.0, engine: str = "transformers", day: int = 1, data: str = "d",
    torch: str = "2.9", model: Model = TOY_MODEL, workload: Workload = TOY_WORKLOAD, failure: Failure | None = None,
    other_cores: float = 0.0,
) -> Record:  # fmt: skip
    """Return a record of a plan whose sizes and times are `size` of the unchanged model's, its losses `loss` more."""
    losses = tuple(x + loss for x in LOSSES)
    figures = {
        "artefact_bytes": exact(4e6 * size), "peak_memory_bytes": exact(4e8 * size),
        "tpot_s": Figure(value=0.01 * size, low=0.009 * size, high=0.011 * size, n=9),
        "ttft_s": Figure(value=0.04 * size, low=0.04 * size, high=0.04 * size, n=7),
        "perplexity": Figure(value=math.exp(sum(losses) / 4), low=1, high=99, n=4, samples=losses),
    }  # fmt: skip
    plan = Plan(model_digest=model.digest, engine=engine, steps=steps)
    measurement = Measurement(
        plan=plan, key=f"{plan.id}{day}{data}{torch}{workload.prompt_tokens}", hardware_fingerprint=this_fingerprint(),
        figures={} if failure else figures, failure=failure, versions={"torch": torch},
        protocol={"data": data, "cores": 2, "own_cores": 2.0, "other_cores": other_cores},
        taken_at=f"2026-11-{day:02}T10:00:00Z",
    )  # fmt: skip
    return Record(measurement=measurement, model=model, workload=workload)


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what the command prints with these records in its store."""

    def explain(name: str, *records: Record, flags: tuple[str, ...] = ()) -> str:
        for one in records:
            Store(tmp_path).put(one)
        assert main(["explain", name, "--store", str(tmp_path), *flags]) == 0
        return capsys.readouterr().out

    return explain


# ---------------------------------------------------------------- what is compared


def test_a_step_is_compared_with_the_unchanged_model() -> None:
    (effect,) = effects_of(["weight_int8"], [record(), record(INT8, size=0.25, loss=0.02, day=3), record(WIDTH)])
    assert (effect.step, effect.beside, effect.against) == ("weight_int8", (), "transformers: unchanged")
    assert (effect.model, effect.taken_at[:10], effect.crowded) == ("toy", "2026-11-03", False)
    ratios = effect.ratios
    assert ratios["artefact_bytes"].value == ratios["artefact_bytes"].high == 0.25
    assert ratios["tpot_s"].value == pytest.approx(0.25) and ratios["tpot_s"].n == 9
    assert ratios["tpot_s"].low == pytest.approx(0.25 * 9 / 11) and ratios["tpot_s"].high == pytest.approx(
        0.25 * 11 / 9
    )
    perplexity = ratios["perplexity"]  # paired: every window loses as much, though windows differ widely
    assert [perplexity.value, perplexity.low, perplexity.high] == pytest.approx([math.exp(0.02)] * 3)
    assert "throughput_tokens_per_s" not in ratios, "it was not measured"


def test_a_step_beside_others_is_compared_with_the_others_alone() -> None:
    both, width = record(WIDTH, INT8, size=0.2), record(WIDTH, size=0.5)
    effects = effects_of(["weight_int8"], [record(), both, width, record(INT8, size=0.25)])
    assert [e.beside for e in effects] == [(), (str(WIDTH),)], "alone first"
    assert [round(e.ratios["artefact_bytes"].value, 6) for e in effects] == [0.25, 0.4]
    assert [e.step for e in effects_of(["prune_width"], [both, width])] == [], "nothing without it was measured"


@pytest.mark.parametrize(
    "other",
    [
        record(data="another text"), record(torch="2.8"), record(model=replace(TOY_MODEL, digest="another")),
        record(workload=replace(TOY_WORKLOAD, prompt_tokens=7)), record(failure=Failure(kind="timeout", stage="open", message="")),
    ],
    ids=["text", "library", "model", "load", "failed"],
)  # fmt: skip
def test_only_like_is_compared_with_like(other: Record) -> None:
    changed = record(INT8, size=0.25)
    assert effects_of(["weight_int8"], [record(), changed])
    assert effects_of(["weight_int8"], [other, changed]) == ()


def test_the_newest_of_a_pair_counts() -> None:
    old, new = record(INT8, size=0.3, day=2, data="old"), record(INT8, size=0.25, day=4)
    (effect,) = effects_of(["weight_int8"], [new, old, record(), record(data="old")])
    assert effect.ratios["artefact_bytes"].value == 0.25


def test_an_engine_that_ran_nothing_else_is_compared_with_the_model_as_it_came() -> None:
    (effect,) = effects_of(["weight_gguf"], [record(), record(GGUF, size=0.2, engine="llama_cpp", torch="none")])
    assert effect.against == "transformers: unchanged"
    there = record(engine="llama_cpp", size=0.8, torch="none")
    (effect,) = effects_of(["weight_gguf"], [record(), there, record(GGUF, size=0.2, engine="llama_cpp", torch="none")])
    assert effect.against == "llama_cpp: unchanged"
    assert effect.ratios["artefact_bytes"].value == 0.25


def test_times_of_a_busy_machine_are_said_to_be_that() -> None:
    (effect,) = effects_of(["weight_int8"], [record(), record(INT8, other_cores=1.0)])
    assert effect.crowded
    assert "other programs kept the machine busy" in as_lines([effect], ["weight_int8"])[1]


# ---------------------------------------------------------------- what is told


def test_explain_tells_it_beside_the_evidence(told: Callable[..., str]) -> None:
    text = told("rtn", record(), record(INT8, size=0.25, loss=0.02), record(INT4, size=0.15))
    assert "measured on this machine, each figure over that of the same plan without it:" in text
    assert "weight_int8 on transformers, toy (7.3 M), 128 + 64 tokens, 2026-11-01" in text
    assert "artefact_size ×0.25, peak_memory ×0.25, perplexity ×1.02" in text
    assert "weight_int4(group_size=32) on transformers" in text
    assert text.index("evidence") < text.index("measured on this machine")


def test_nothing_measured_is_said_with_the_way_to_it(told: Callable[..., str]) -> None:
    text = told("weight_hqq", record(), record(INT8))
    assert "measured on this machine: nothing yet" in text
    assert "leanplan plan SPEC, with `techniques: {only: [weight_hqq]}`" in text


def test_what_leanplan_does_not_execute_is_not_said_to_be_unmeasured(told: Callable[..., str]) -> None:
    assert "on this machine" not in told("spinquant")


def test_figures_of_another_machine_are_not_told(told: Callable[..., str]) -> None:
    elsewhere = [
        replace(r, measurement=replace(r.measurement, hardware_fingerprint="elsewhere"))
        for r in (record(), record(INT8))
    ]
    assert "nothing yet" in told("rtn", *elsewhere)


def test_as_data(told: Callable[..., str]) -> None:
    import jsonschema

    from planner import schemas

    data = json.loads(told("rtn", record(), record(INT8, size=0.25), flags=("--json",)))
    assert data["measured"][0]["ratios"]["artefact_bytes"]["value"] == 0.25
    assert data["status"] == "executable", "the card stays what it was"
    validator = jsonschema.Draft202012Validator(schemas.schema("explain"))
    validator.validate(data)
    data["measured"][0]["ratios"]["artefact_bytes"] = "less"
    assert not validator.is_valid(data)


def test_foreign_names_are_shown_and_not_obeyed(told: Callable[..., str]) -> None:
    model = replace(TOY_MODEL, name=HOSTILE)
    text = told("rtn", record(model=model), record(INT8, model=model))
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.startswith("measured on this machine: all lies")]


def test_a_long_list_is_cut() -> None:
    loads = [replace(TOY_WORKLOAD, prompt_tokens=n) for n in range(1, SHOWN + 3)]
    effects = effects_of(["weight_int8"], [record(*s, workload=load) for load in loads for s in ((), (INT8,))])
    lines = as_lines(effects, ["weight_int8"])
    assert len(effects) == SHOWN + 2 and lines[-1].strip() == "… 2 more: --json"


@pytest.mark.slow
def test_what_a_real_run_measured_is_explained(tmp_path: Path, machine: Path, told: Callable[..., str]) -> None:
    import shutil
    import time

    from planner import spec as specs
    from planner.loop import Run, Settings
    from planner.preparing import prepare
    from planner.progress import Progress
    from planner.tiny_models import make_tiny_model

    shutil.copytree(machine, tmp_path, dirs_exist_ok=True)
    spec = specs.from_mapping({
        "model": str(make_tiny_model(tmp_path / "model")), "engines": ["transformers"], "objectives": ["artefact_size"],
        "workload": {"prompt_tokens": 16, "output_tokens": 4}, "search": {"effort": "quick", "time_limit": "10 min"},
    })  # fmt: skip
    prepared = prepare(spec, store=tmp_path)
    plan = prepared.space.plan("transformers", (INT8,))
    assert plan
    settings = Settings(run_root=tmp_path / "runs", store_root=tmp_path)
    Run(prepared, settings, Progress(quiet=True), time.monotonic()).go(only=(plan, None))
    (effect,) = json.loads(told("rtn", flags=("--json",)))["measured"]
    assert (effect["step"], effect["against"]) == ("weight_int8", "transformers: unchanged")
    assert 0.2 < effect["ratios"]["artefact_bytes"]["value"] < 0.6
    assert 0.9 < effect["ratios"]["perplexity"]["value"] < 1.1
    assert effect["ratios"]["tpot_s"]["n"] > 1
