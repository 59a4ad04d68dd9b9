"""A run says what it will take, keeps to it, and its measurements answer changed budgets: the real thing on a tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import leanplan

from planner import Budget, ParetoSet, isolation, replan
from planner import spec as specs
from planner.finding import find_run
from planner.forecast import sample
from planner.loop import Run, Settings
from planner.predicting import problem_of
from planner.preparing import prepare
from planner.progress import Progress
from planner.results import load
from planner.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)  # whole runs of the real thing, on machines that may be busy
SPEC = """\
version: 1
model: {{source: model}}
workload: {{prompt_tokens: 16, output_tokens: 4}}
budgets: {{quality_loss: {loss}}}
objectives: [artefact_size, quality_loss]
techniques: {{only: [weight_gguf]}}
search: {{effort: quick, time_limit: 5 min, max_measured: 3}}
limits: {{memory: {memory}, time_per_candidate: 60 s, disk: {disk}}}
"""


def spec(loss: str = "60 %", memory: str = "3 GiB", disk: str = "1 GiB") -> str:
    return SPEC.format(loss=loss, memory=memory, disk=disk)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a tiny model, a spec, and a store that knows this machine."""
    folder = tmp_path_factory.mktemp("forecast")
    make_tiny_model(folder / "model")
    shutil.copytree(machine, folder / ".leanplan")
    (folder / "leanplan.yaml").write_text(spec())
    return folder


@pytest.fixture(scope="module")
def foretold(place: Path) -> dict:
    """What `plan --forecast` prints before anything was measured."""
    done = leanplan("plan", "--forecast", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def answer(place: Path, foretold: dict) -> ParetoSet:
    done = leanplan("plan", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "expected: plans measured 3, wall time" in done.stderr
    assert done.stderr.index("expected: ") < done.stderr.index("unchanged  (the model as it came)")
    assert "The run's forecast against what it took" in done.stdout
    return find_run(None, place / "runs")


def measured(place: Path) -> set[str]:
    return {path.name for path in place.glob(".leanplan/measurements/*.json")}


def test_the_forecast_alone_runs_nothing(place: Path, foretold: dict) -> None:
    assert foretold["obstacles"] == []
    assert set(foretold["amounts"]) >= {"candidates", "wall_s", "peak_memory_bytes", "disk_bytes", "download_bytes"}
    assert all(amount["fact"] is None for amount in foretold["amounts"].values())


@pytest.mark.slow
def test_what_the_run_took_lies_within_what_was_told_before(answer: ParetoSet, foretold: dict) -> None:
    """Time is shown, not judged here: other programs may hold the cores."""
    assert answer.forecast is not None
    amounts = answer.forecast.amounts
    for name in ("candidates", "peak_memory_bytes", "disk_bytes", "download_bytes"):
        assert amounts[name].held, (name, amounts[name])
        before = foretold["amounts"][name]  # the memory and disk of the run itself, told by the command alone
        assert before["low"] <= amounts[name].fact <= before["high"]
    assert amounts["candidates"].fact == len(answer.results) == 3
    assert amounts["disk_bytes"].fact > 0
    own = max(r.measurement.figures["peak_memory_bytes"].value for r in answer.results if r.measurement)
    assert amounts["peak_memory_bytes"].fact > own  # the planner is there beside the largest candidate
    assert (
        amounts["wall_s"].fact > 0
        and amounts["wall_s"].fact >= sum(stage.fact or 0.0 for stage in answer.forecast.stages_s.values()) * 0.99
    )


def test_the_next_forecast_has_learned(place: Path, answer: ParetoSet) -> None:
    done = leanplan("plan", "--forecast", "--fresh", "--json", cwd=place)
    again = json.loads(done.stdout)["amounts"]["peak_memory_bytes"]
    first, fact = answer.forecast.amounts["peak_memory_bytes"], answer.forecast.amounts["peak_memory_bytes"].fact
    assert "1 earlier on this machine" in again["because"]
    assert abs(again["mid"] - fact) < abs(first.mid - fact)


def test_changed_budgets_are_answered_without_starting_anything(
    place: Path, answer: ParetoSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a fork server was started")

    monkeypatch.setattr(isolation.candidate._Server, "__init__", refuse)
    monkeypatch.chdir(place)
    before = measured(place)
    sizes = {r.plan.id: r.measurement.figures["artefact_bytes"].value for r in answer.results if r.measurement}
    small = Budget(metric="artefact_bytes", statistic="mean", bound="max", value=min(sizes.values()) * 1.001)
    tight = replan(budgets=[small])
    assert tight.measured and measured(place) == before
    assert {r.plan.id for r in tight.results if r.feasible} <= {i for i, size in sizes.items() if size <= small.value}
    assert tight.recommended_id == min(sizes, key=lambda i: sizes[i])
    assert small in tight.budgets and len(tight.budgets) == 2  # the one on quality stays
    never = replan(budgets={"artefact_size": "1 KiB"}, objectives=["artefact_size"])
    assert never.recommended is None and never.conflicts
    assert never.objectives == ("artefact_size",)
    lossless = replan(budgets={"quality_loss": "0.0001 %"})
    assert lossless.recommended_id == answer.baseline.plan.id


@pytest.fixture
def only_baseline(place: Path, answer: ParetoSet, tmp_path: Path) -> Path:
    """Runs of which the only one measured nothing but the unchanged model."""
    run = tmp_path / "runs" / answer.run_id
    shutil.copytree(place / "runs" / answer.run_id, run)
    replace(answer, results=answer.results[:1], recommended_id=answer.results[0].plan.id, folder=str(run)).save(run)
    return run.parent


def test_plans_worth_measuring_are_unmeasured_and_come_with_their_price(place: Path, only_baseline: Path) -> None:
    found = replan(run_dir=only_baseline, store=place / ".leanplan", objectives=["artefact_size"])
    assert found.unmeasured
    assert all(r.plan != found.baseline.plan and r.estimate and not r.measurement for r in found.unmeasured)
    size = found.baseline.measurement.figures["artefact_bytes"].value
    assert all(r.estimate.values["artefact_bytes"].mid < size for r in found.unmeasured)
    assert found.forecast is not None
    assert 0 < found.forecast.amounts["candidates"].mid <= len(found.unmeasured)
    assert load(found.save(place / "replanned")) == replace(found, folder=str(place / "replanned"))
    told = leanplan("replan", "--run-dir", str(only_baseline), cwd=place).stdout
    assert "Worth measuring" in told and "Measuring them is expected to take" in told
    assert found.unmeasured[0].plan.id in told


def test_replan_ends_with_the_exit_codes_of_plan(place: Path, answer: ParetoSet) -> None:
    met = leanplan("replan", cwd=place)
    assert met.returncode == 0, met.stderr
    assert met.stderr == ""
    missed = leanplan("replan", "--budget", "artefact_size<=1 KiB", cwd=place)
    assert missed.returncode == 1 and "No plan meets every budget." in missed.stdout
    wrong = leanplan("replan", "--budget", "artefact_size>=1 KiB", cwd=place)
    assert wrong.returncode == 2 and "asks for the worse" in wrong.stderr
    (place / "other.yaml").write_text(spec().replace("output_tokens: 4", "output_tokens: 5"))
    other = leanplan("replan", "--spec", "other.yaml", cwd=place)
    assert other.returncode == 2 and "another workload" in other.stderr


@pytest.mark.slow
def test_a_run_after_a_budget_changed_measures_only_what_is_new(place: Path, answer: ParetoSet) -> None:
    before = measured(place)
    (place / "changed.yaml").write_text(spec(loss="61 %"))
    done = leanplan("plan", "changed.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(known from an earlier run)") >= 1
    assert "(the model as it came)" not in done.stderr.partition("finalists")[0]
    took = find_run(None, place / "runs").forecast
    assert took is not None and took.amounts["candidates"].fact == len(measured(place) - before)
    assert took.amounts["candidates"].held


def test_candidates_there_is_no_memory_or_disk_for_are_left_out_with_the_reason(place: Path) -> None:
    def left_out(**limits: int) -> tuple[int, dict[str, int]]:
        read = specs.load(place / "leanplan.yaml")
        prepared = prepare(replace(read, limits=replace(read.limits, **limits)), store=place / ".leanplan")
        run = Run(
            prepared, Settings(run_root=place / "runs", store_root=place / ".leanplan"), Progress(quiet=True), 0.0
        )
        fits, short = run._with_room(sample(problem_of(prepared)))
        return len(fits.plans), short

    everything, nothing = left_out()
    assert everything > 3 and nothing == {}
    few, short = left_out(disk_bytes=500 * 2**10)  # the smallest types alone
    assert 0 < few < everything and short == {"limits.disk (500 KiB)": everything - few}
    none, short = left_out(memory_bytes=100 * 2**20)
    assert none == 0 and short == {"limits.memory (100 MiB)": everything}


@pytest.mark.parametrize(
    ("limits", "said", "change"),
    [
        ({"memory": "64 MiB"}, "limits.memory and this machine allow 64 MiB", "raise limits.memory"),
        ({"disk": "16 KiB"}, "limits.disk allows 16 KiB", "raise limits.disk"),
    ],
)
def test_what_cannot_suffice_is_told_before_any_work(
    place: Path, tmp_path: Path, limits: dict, said: str, change: str
) -> None:
    (place / "tight.yaml").write_text(spec(**limits))
    elsewhere = ("--run-dir", str(tmp_path / "runs"))
    done = leanplan("plan", "tight.yaml", *elsewhere, cwd=place)
    assert done.returncode == 4, done.stderr
    assert said in done.stderr and f"hint: {change}" in done.stderr
    assert not (tmp_path / "runs").exists()
    alone = leanplan("plan", "tight.yaml", "--forecast", *elsewhere, cwd=place)
    assert alone.returncode == 4
    assert "It cannot be done here: the unchanged model" in alone.stdout and said in alone.stdout
