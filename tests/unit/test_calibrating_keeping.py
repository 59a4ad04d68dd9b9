"""A machine's calibration, kept: picked up by whoever asks for the machine, refined by runs, void with its engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from known_machines import LARGE, LOAD, SLOWER, SMALL, measured, truth
from tests_support import TOY_MACHINE

from knowledge_base.types import Model
from planner.calibrating import keeping
from planner.store import Record, Store


def keep(store: Store, model: Model, *, version: str | None = None, taken_at: str = "2026-11-20T10:00:00Z") -> None:
    for measurement in measured(model, truth(model, SLOWER))[0]:
        versions = keeping.installed(measurement.plan.engine)
        if version is not None:
            versions = dict.fromkeys(versions, version)
        taken = replace(measurement, versions=versions, taken_at=taken_at)
        store.put(Record(measurement=taken, model=model, workload=LOAD))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for model in (SMALL, LARGE):
        keep(keeping.own_store(tmp_path), model)
    return tmp_path


def test_a_store_without_measurements_leaves_the_machine_as_it_is(tmp_path: Path) -> None:
    assert keeping.laid_on(TOY_MACHINE, tmp_path) is TOY_MACHINE
    keep(Store(tmp_path), replace(SMALL, digest="another machine's"))
    other = replace(TOY_MACHINE, fingerprint="other")
    assert keeping.laid_on(other, tmp_path) is other


def test_what_was_measured_is_laid_on_the_machine_and_kept(store: Path) -> None:
    reached = keeping.laid_on(TOY_MACHINE, store).device.reached
    assert {r.engine for r in reached} == {"transformers", "llama_cpp"}
    path = store / "machines" / "toy.laws.json"
    written = path.read_bytes()
    assert keeping.laid_on(TOY_MACHINE, store).device.reached == reached
    assert path.read_bytes() == written, "nothing new was measured: nothing is fitted again"


def test_a_measured_plan_of_a_run_refines_it(store: Path) -> None:
    before = keeping.laws_of(TOY_MACHINE, store)
    keep(Store(store), replace(LARGE, digest="a run's"), taken_at="2026-11-21T10:00:00Z")
    after = keeping.laws_of(TOY_MACHINE, store)
    assert before is not None and after is not None
    assert (before.models, after.models) == (2, 3)
    assert after.measurements == 1.5 * before.measurements
    assert after.measured_at > before.measured_at


def test_another_version_of_an_engine_voids_its_part_and_says_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeping.laid_on(TOY_MACHINE, store).device.reached
    present = keeping.installed
    newer = {"xllamacpp": "99.0", "gguf": "99.0"}
    monkeypatch.setattr(keeping, "installed", lambda name: newer if name == "llama_cpp" else present(name))
    told: list[str] = []
    reached = keeping.laid_on(TOY_MACHINE, store, tell=told.append).device.reached
    assert {r.engine for r in reached} == {"transformers"}
    assert len(told) == 1 and "llama_cpp is void" in told[0] and "99.0" in told[0] and "leanplan calibrate" in told[0]


def test_measurements_under_other_versions_teach_nothing(tmp_path: Path) -> None:
    keep(keeping.own_store(tmp_path), SMALL, version="0.0")
    assert keeping.laws_of(TOY_MACHINE, tmp_path) is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 1, "reached": 3}', '{"schema": 0}'])
def test_a_damaged_file_is_fitted_again(store: Path, damage: str) -> None:
    kept = keeping.laws_of(TOY_MACHINE, store)
    path = store / "machines" / "toy.laws.json"
    path.write_text(damage, encoding="utf-8")
    assert keeping.laws_of(TOY_MACHINE, store) == kept
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == keeping.SCHEMA


def test_a_store_that_keeps_nothing_still_tells(store: Path) -> None:
    (store / "machines").write_text("a file where a folder should be", encoding="utf-8")
    assert keeping.laid_on(TOY_MACHINE, store).device.reached


def test_every_like_device_of_a_machine_has_them(store: Path) -> None:
    processor = TOY_MACHINE.devices[0]
    gpu = replace(processor, kind="gpu", name="toy gpu")
    machine = replace(TOY_MACHINE, devices=(processor, gpu, replace(gpu)))
    first, *others = keeping.laid_on(machine, store).devices
    assert first == processor
    assert others[0] == others[1] and others[0].reached, "devices that were alike still are: they share the load"


def test_forgetting_removes_calibration_and_leaves_runs(store: Path) -> None:
    keep(Store(store), LARGE)
    keeping.laws_of(TOY_MACHINE, store)
    gone = keeping.forget(store, "toy")
    assert len(gone) == len(set(gone)) and all(not path.exists() for path in gone)
    assert not list((store / "calibration" / "measurements").iterdir())
    kept = keeping.laws_of(TOY_MACHINE, store)
    assert kept is not None and kept.models == 1
    assert keeping.forget(store, "another machine") == []
