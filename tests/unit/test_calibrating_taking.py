"""What calibration measures first, and what it leaves out, without measuring anything; and how it is told."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from known_machines import LARGE, LOAD, SLOWER, SMALL, measured, truth
from tests_support import TOY_MACHINE

from knowledge_base.errors import BadInput, EnvironmentProblem
from planner.calibrating import taking, telling, work
from planner.calibrating.keeping import Kept, grouped
from planner.calibrating.taking import PROGRAMME, Format, Taken
from planner.machine import Profile
from planner.progress import Progress
from planner.store import Record, Store


def begun(tmp_path: Path) -> taking._Taking:
    """Return a calibration whose time is up."""
    return taking._Taking(
        PROGRAMME, TOY_MACHINE, Store(tmp_path), None, tmp_path, time.monotonic(), Progress(quiet=True), Taken(), fresh=False
    )  # type: ignore[arg-type]  # fmt: skip


def planned(tmp_path: Path, **given: Any) -> list[str]:
    """Return the tasks of a calibration of both engines, in order."""
    tasks = begun(tmp_path)
    tasks.models = {"small": SMALL, **given}
    return [str(task) for task in tasks._tasks(["llama_cpp", "transformers"])]


def test_the_most_telling_come_first(tmp_path: Path) -> None:
    order = planned(tmp_path)
    assert order[:4] == [
        "llama_cpp float32, small model", "transformers float32, small model",
        "llama_cpp float32, large model", "transformers float32, large model",
    ]  # fmt: skip
    assert len(order) == len(set(order))
    large = [task for task in order[4:] if "large" in task]
    assert order[4 : 4 + len(large)] == large, "the smaller model's other formats are last"
    engines = [task.partition(" ")[0] for task in large]
    assert engines[:4] == ["llama_cpp", "transformers"] * 2, "engines take turns"


def test_when_the_time_is_up_one_is_measured_and_no_second(tmp_path: Path) -> None:
    late = begun(tmp_path)
    assert late._time_for("small")
    late.tried = True
    assert not late._time_for("small")


def test_every_format_of_an_engine_is_measured_and_compiling_is_not(tmp_path: Path) -> None:
    order = planned(tmp_path)
    for form in ("q4_k", "q8_0", "f16", "bfloat16"):
        assert f"llama_cpp {form}, large model" in order
    for form in ("int8", "int4", "int8_dynamic", "bfloat16"):
        assert f"transformers {form}, large model" in order
    assert not any("compiled" in task for task in order)


def test_a_given_model_is_measured_in_its_own_formats(tmp_path: Path) -> None:
    half = replace(LARGE, digest="half", weight_dtype="bfloat16", weight_bytes=LARGE.weight_bytes // 2)
    order = planned(tmp_path, given=half)
    own = [task for task in order if "given" in task]
    assert own[0] == "llama_cpp bfloat16, given model"
    assert not any("float32" in task for task in own)


def test_formats_of_every_width_come_before_their_neighbours() -> None:
    forms = [Format(name=str(bits), bits=bits, steps=()) for bits in (3.4, 4.5, 5.5, 6.6, 8.5, 16.0, 16.5)]
    assert [f.name for f in taking._by_width(forms)] == ["4.5", "8.5", "16.0", "3.4", "5.5", "6.6", "16.5"]


def test_engines_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from knowledge_base.registry import engines

    monkeypatch.setattr(engines.get("llama_cpp"), "find", lambda: "xllamacpp not installed")
    assert "transformers" in taking._engines([]) and "llama_cpp" not in taking._engines([])
    with pytest.raises(EnvironmentProblem, match="xllamacpp not installed"):
        taking._engines(["llama_cpp"])
    for name in engines.names():
        monkeypatch.setattr(engines.get(name), "find", lambda: "torch not installed")
    with pytest.raises(EnvironmentProblem, match="torch not installed"):
        taking._engines([])
    with pytest.raises(BadInput):
        taking._engines(["nonsense"])


def test_the_launch_floor_of_this_machine_is_a_time_and_a_gpu_is_not_made_up() -> None:
    import torch

    floor = work.launch_floor({}, {}, lambda *_: None)["floor"]
    assert 0 < floor["cpu_s"] < 1e-2
    assert (floor["gpu"] is not None) == torch.cuda.is_available()


def told(taken: Taken) -> str:
    from cost_models.laws import fit_laws

    laws = fit_laws(grouped(taken.records), TOY_MACHINE)
    kept = Kept(
        reached=laws.reached, checks=laws.checks, versions={}, measurements=len(taken.records), models=2,
        measured_at="2026-11-21T10:00:00Z", seen={},
    )  # fmt: skip
    facts = {
        "bandwidth": {"read_bytes_per_s": {"1": 20e9, "2": 39e9, "4": 40e9}},
        "matmul": {"flop_per_s": {"float32": {"512x2048x2048": 200e9, "1x8192x8192": 12e9}}},
    }
    profile = Profile(hardware=TOY_MACHINE, facts=facts, taken_at="2026-11-21 10:00:00")
    return telling.as_text(telling.calibrated(profile, taken, kept, wall_s=42.0))


def records(**protocol: float) -> list[Record]:
    return [
        Record(measurement=m, model=model, workload=LOAD)
        for model in (SMALL, LARGE)
        for m in measured(model, truth(model, SLOWER), **{"other_cores": 0.0, "cores": 2, **protocol})[0]
    ]


def test_what_is_told() -> None:
    floor = {"torch": "2.0", "cpu_s": 2e-6, "gpu": None}
    text = told(Taken(records=records(), known=3, left_out=["no time for the large model in q3_k"], floor=floor))
    assert "39.0 GB/s with 2" in text and "2 saturate it" in text
    assert "2 us on the processor; no GPU that torch can use" in text
    assert "left out: no time for the large model in q3_k" in text
    assert "12 measurements (3 known from before) in 42 s" in text
    assert "without calibration" in text and "not used" not in text
    row = next(line for line in text.splitlines() if line.startswith("llama_cpp") and " q4_k " in line)
    assert "GB/s ±" in row and row.endswith("2×")
    unmeasured = next(line for line in text.splitlines() if line.startswith("llama_cpp") and " q3_k " in line)
    assert unmeasured.endswith("by the engine's others")
    assert "other programs" not in text
    assert "up to 1.2 cores during 12 of 12 measurements" in told(Taken(records=records(other_cores=1.2), floor=floor))


def test_a_gpu_floor_is_told_where_one_was_timed() -> None:
    gpu = {"name": "toy gpu", "host_s": 4e-6, "device_s": 2e-6}
    text = told(Taken(records=records(), floor={"torch": "2.0", "cpu_s": 2e-6, "gpu": gpu}))
    assert "on toy gpu 4 us of the host, 2 us of the device" in text
