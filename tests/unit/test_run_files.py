"""Run folders, the store, locks of figures, recipes: nothing lost, nothing doubled, nothing believed unread."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

from knowledge_base.errors import BadInput
from knowledge_base.types import Figure, Measurement, Plan, Step
from planner.checking import compare
from planner.lock import Lock, read_lock, write_lock
from planner.recipe import Recipe, read_recipe, write_recipe
from planner.run_folder import RunFolder
from planner.store import Record, Store, measurement_key

PLAN = Plan(model_digest=TOY_MODEL.digest, engine="transformers", steps=(Step("weight_int4", {"group_size": 32}),))
FIGURES = {
    "tpot_s": Figure(value=0.01, low=0.0099, high=0.0101, n=9, samples=(0.01, 0.0101)),
    "peak_memory_bytes": Figure(value=1e9, low=1e9, high=1e9, n=1),
    "quality_loss_ratio": Figure(value=0.02, low=0.019, high=0.021, n=24),
}


def record(key: str = "k" * 64) -> Record:
    measurement = Measurement(plan=PLAN, key=key, hardware_fingerprint="toy", figures=FIGURES)
    return Record(measurement=measurement, model=TOY_MODEL, workload=TOY_WORKLOAD)


def test_store_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(record())
    assert store.get("k" * 64) == record()
    assert list(store.records("toy")) == [record()]
    assert list(store.records("another machine")) == []


@pytest.mark.promise("P1")
def test_a_damaged_record_counts_as_absent_and_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(record())
    path = store.path("k" * 64)
    path.write_bytes(path.read_bytes()[:100])
    assert store.get("k" * 64) is None
    assert store.damaged == [path]


OLD = (
    Step("weight_int4", {"group_size": 32, "knob of old": 1}), Step("weight_int4"), Step("weight_int4", {"group_size": 7}), Step("gone"),
)  # fmt: skip


@pytest.mark.parametrize("step", OLD, ids=str)
def test_plans_of_another_version_are_refused_in_words(tmp_path: Path, step: Step) -> None:
    plan = replace(PLAN, steps=(step,))
    numbers: Any = {"layers.0": 4}  # as allocations once were
    write_recipe(tmp_path, Recipe(plan=plan, model="model", model_digest="m", allocation=numbers))
    lock = Lock(
        plan=plan, artefact_digest="a", hardware_name="toy", hardware_fingerprint="toy", workload=TOY_WORKLOAD, figures=FIGURES,
        allocation=numbers,
    )  # fmt: skip
    write_lock(tmp_path / "toy.lock", lock)
    for read, file in ((read_recipe, "plan.json"), (read_lock, "toy.lock")):
        with pytest.raises(BadInput, match="of another version") as caught:
            read(tmp_path / file)
        assert step.technique in caught.value.message and caught.value.hint


@pytest.mark.parametrize("step", OLD, ids=str)
def test_plans_that_are_no_longer_possible_teach_nothing(tmp_path: Path, step: Step) -> None:
    store, old = Store(tmp_path), record("o" * 64)
    store.put(record())
    store.put(replace(old, measurement=replace(old.measurement, plan=replace(PLAN, steps=(step,)))))
    assert list(store.records("toy")) == [record()]


FACTS = {
    "plan": PLAN,
    "model": "m",
    "data": "d",
    "workload": TOY_WORKLOAD,
    "versions": {"torch": "2"},
    "machine": "toy",
    "protocol": {"n": 9},
}


@pytest.mark.promise("P11")
@pytest.mark.parametrize("changed", list(FACTS))
def test_changing_any_one_input_changes_the_key(changed: str) -> None:
    assert measurement_key(**FACTS) != measurement_key(**{**FACTS, changed: "something else"})


def test_an_unfinished_run_is_found_again_and_a_finished_one_is_not(tmp_path: Path) -> None:
    first, resumed = RunFolder.open(tmp_path, fingerprint="abcd" * 16, title="serve-toy")
    assert not resumed
    again, resumed = RunFolder.open(tmp_path, fingerprint="abcd" * 16, title="serve-toy")
    assert resumed
    assert again.path == first.path
    other, resumed = RunFolder.open(tmp_path, fingerprint="ef01" * 16, title="serve-toy")
    assert not resumed
    assert other.path != first.path
    first.write("result.json", {"schema": 1})
    new, resumed = RunFolder.open(tmp_path, fingerprint="abcd" * 16, title="serve-toy")
    assert not resumed
    assert new.path not in (first.path, other.path)


@pytest.mark.row(59)
@pytest.mark.promise("P1")
def test_a_resumed_run_says_what_is_there_and_what_was_cut_off(tmp_path: Path) -> None:
    folder, _ = RunFolder.open(tmp_path, fingerprint="abcd" * 16, title="t")
    for plan, name in (("a", "attempts"), ("a", "measurement"), ("b", "attempts"), ("b", "measurement")):
        folder.write(f"plans/{plan}/{name}.json", {})
    assert folder.progress == "2 measured"
    folder.write("plans/c/attempts.json", {"attempts": 1})
    assert folder.progress == "2 measured, 1 interrupted (will be tried again)"


@pytest.mark.row(20)
@pytest.mark.rule("paths")
@pytest.mark.parametrize("link", ["plans", "artefacts", "work", "plans/1234567890", "artefacts/1234567890"])
def test_a_run_folder_that_writes_elsewhere_is_refused(tmp_path: Path, link: str) -> None:
    folder, _ = RunFolder.open(tmp_path / "runs", fingerprint="abcd" * 16, title="t")
    (folder.path / link).parent.mkdir(exist_ok=True)
    folder.refuse_links()
    (folder.path / link).symlink_to(tmp_path)
    with pytest.raises(BadInput, match="refusing to follow a link out of the run folder") as caught:
        folder.refuse_links()
    assert str(caught.value.where) == str(folder.path / link)


@pytest.mark.promise("P1")
def test_a_torn_last_event_is_cut_off(tmp_path: Path) -> None:
    folder, _ = RunFolder.open(tmp_path, fingerprint="abcd" * 16, title="t")
    folder.event("started")
    folder.close()
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"n": 2, "event": "meas')
    folder.event("resumed")
    folder.close()
    events = [json.loads(line) for line in (folder.path / "events.jsonl").read_text().splitlines()]
    assert [(e["n"], e["event"]) for e in events] == [(1, "started"), (2, "resumed")]


def lock() -> Lock:
    return Lock(
        plan=PLAN,
        artefact_digest="a" * 64,
        hardware_name="toy",
        hardware_fingerprint="toy",
        workload=TOY_WORKLOAD,
        figures=FIGURES,
    )


def test_lock_round_trip_leaves_samples_out(tmp_path: Path) -> None:
    write_lock(tmp_path / "leanplan.lock", lock())
    read = read_lock(tmp_path / "leanplan.lock")
    assert read.plan == PLAN
    assert read.figures["tpot_s"].samples == ()
    assert read.figures["tpot_s"].value == 0.01


@pytest.mark.promise("P10")
def test_an_edited_lock_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "leanplan.lock"
    write_lock(path, lock())
    path.write_text(path.read_text().replace("0.0099", "0.0001"))
    with pytest.raises(BadInput, match="digest mismatch"):
        read_lock(path)


def figure(value: float, half: float = 0.0) -> dict[str, Figure]:
    return {"tpot_s": Figure(value=value, low=value - half, high=value + half, n=9)}


def outcome(value: float, half: float, *, baseline: float = 0.02, same_machine: bool = True) -> str:
    locked = replace(lock(), baseline=figure(0.02))
    now = Measurement(plan=PLAN, key="k", hardware_fingerprint="toy", figures=figure(value, half))
    return compare(locked, now, slack=0.03, baseline=figure(baseline), same_machine=same_machine)[0].outcome


def test_regressions_need_the_whole_interval_beyond_the_slack() -> None:
    assert outcome(0.0108, 0.0001) == "same"  # less than runs differ by
    assert outcome(0.0120, 0.0001) == "worse"
    assert outcome(0.0120, 0.0015) == "same"  # noise as large as the change
    assert outcome(0.0080, 0.0001) == "better"
    assert outcome(0.02, 0.0, same_machine=False) == "not compared"


def test_memory_may_move_by_what_the_system_maps() -> None:
    def peak(mib: float) -> dict[str, Figure]:
        return {"peak_memory_bytes": Figure(value=mib * 2**20, low=mib * 2**20, high=mib * 2**20, n=1)}

    def judged(mib: float) -> str:
        now = Measurement(plan=PLAN, key="k", hardware_fingerprint="toy", figures=peak(mib))
        return compare(replace(lock(), figures=peak(52)), now, slack=0.03, baseline={}, same_machine=True)[0].outcome

    assert judged(64) == "same"
    assert judged(70) == "worse"
    assert judged(30) == "better"


def test_a_slower_machine_is_not_a_slower_plan() -> None:
    assert outcome(0.0120, 0.0001, baseline=0.024) == "same"
    assert outcome(0.0160, 0.0001, baseline=0.024) == "worse"
    assert outcome(0.0120, 0.0001, baseline=0.016) == "worse"  # a faster machine is no excuse, and no accusation:
    assert outcome(0.0100, 0.0001, baseline=0.016) == "same"


def test_recipe_round_trip(tmp_path: Path) -> None:
    recipe = Recipe(plan=PLAN, model="models/toy", model_digest="toy", allocation={"a": "4 zeros 0.5"})
    write_recipe(tmp_path, recipe)
    assert read_recipe(tmp_path / "plan.json") == recipe
    assert "weight_int4" in (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "plan": 3}', "\x00"])
def test_bad_plan_files_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput):
        read_recipe(tmp_path / "plan.json")
