"""`leanplan calibrate` as a person runs it: real measurements in a little time, and what comes of them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from worlds import command, environment, leanplan, libraries

from knowledge_base.errors import ExitCode
from planner.locks import measurement_lock_path

SHAPE = Path(__file__).resolve().parents[2] / "models" / "tiny-lm"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(machine, folder / ".leanplan")
    return folder


@pytest.fixture(scope="module")
def calibrated(place: Path) -> dict[str, Any]:
    """What the command printed: something was measured, however busy the machine is."""
    done = leanplan("calibrate", "--engine", "llama_cpp", "--time-limit", "5s", "--json", cwd=place)
    assert done.returncode == ExitCode.DONE, done.stderr
    return json.loads(done.stdout)


def estimated(place: Path, engine: str) -> dict[str, Any]:
    done = leanplan("estimate", str(SHAPE), "--engine", engine, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["predicted"]["values"]


@pytest.mark.slow
def test_a_little_time_measures_something_and_says_what_it_left_out(calibrated: dict[str, Any]) -> None:
    assert calibrated["measured"] and not calibrated["interrupted"]
    assert {served["engine"] for served in calibrated["measured"]} == {"llama_cpp"}
    assert calibrated["measurements"] == len(calibrated["measured"])
    assert calibrated["floor"]["cpu_s"] > 0
    assert {check["metric"] for check in calibrated["checks"]} == {"tpot_s", "ttft_s", "peak_memory_bytes"}


@pytest.mark.slow
def test_estimates_rest_on_it_from_then_on(place: Path, calibrated: dict[str, Any]) -> None:
    values = estimated(place, "llama_cpp")
    for check in calibrated["checks"]:
        assert values[check["metric"]]["source"] == ("calibrated" if check["kept"] else "analytic")
    assert values["weights_bytes"]["source"] == "analytic"
    assert estimated(place, "transformers")["tpot_s"]["source"] == "analytic", "it was not measured"
    shown = leanplan("probe", cwd=place).stdout
    assert "calibration" in shown and "today" in shown


@pytest.mark.slow
def test_what_is_known_is_not_measured_again(place: Path, calibrated: dict[str, Any]) -> None:
    again = leanplan("calibrate", "--engine", "llama_cpp", "--time-limit", "10s", "--json", cwd=place)
    assert again.returncode == ExitCode.DONE, again.stderr
    assert json.loads(again.stdout)["known"] >= len(calibrated["measured"])


@pytest.mark.slow
def test_forgetting_takes_it_all_back(place: Path, calibrated: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(place / ".leanplan", tmp_path / ".leanplan")
    gone = leanplan("calibrate", "--forget", "--json", cwd=tmp_path)
    assert gone.returncode == ExitCode.DONE
    assert len(json.loads(gone.stdout)["removed"]) > len(calibrated["measured"])
    assert estimated(tmp_path, "llama_cpp")["tpot_s"]["source"] == "analytic"


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(place: Path, tmp_path: Path, machine: Path) -> None:
    shutil.copytree(machine, tmp_path / ".leanplan")
    line = command("calibrate", "--engine", "llama_cpp", "--time-limit", "280s", "--json")
    with subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        told = next((text for text in process.stderr if "tpot" in text), None)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert told is not None
    assert process.returncode == ExitCode.INTERRUPTED
    data = json.loads(out)
    assert data["interrupted"] and data["measured"]
    assert len(list((tmp_path / ".leanplan" / "calibration" / "measurements").iterdir())) == len(data["measured"])


# ---------------------------------------------------------------- what stands in the way


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--time-limit", "1s"), ExitCode.BAD_INPUT, "--time-limit: error: 1 s are too few"),
        (("--time-limit", "60"), ExitCode.BAD_INPUT, "unit"),
        (("--engine", "nonsense"), ExitCode.BAD_INPUT, "nonsense"),
        (("--model", "."), ExitCode.BAD_INPUT, "config.json"),
    ],
)
def test_bad_input_is_one_clear_message(place: Path, flags: tuple[str, ...], code: int, said: str) -> None:
    done = leanplan("calibrate", *flags, cwd=place)
    assert done.returncode == code
    assert said in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_model_too_short_is_refused(place: Path, tmp_path: Path) -> None:
    from planner.tiny_models import make_tiny_model

    make_tiny_model(tmp_path / "short", context_tokens=64)
    done = leanplan("calibrate", "--model", str(tmp_path / "short"), cwd=place)
    assert done.returncode == ExitCode.BAD_INPUT
    assert "--model: error: context of 64 tokens is too short" in done.stderr


def test_a_store_that_keeps_nothing_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file", encoding="utf-8")
    done = leanplan("calibrate", "--store", "store", cwd=tmp_path)
    assert done.returncode == ExitCode.ENVIRONMENT
    assert "store" in done.stderr and "hint: " in done.stderr


def test_no_engine_is_told(place: Path, tmp_path: Path) -> None:
    there = libraries(tmp_path / "libraries", without=("xllamacpp",))
    done = leanplan("calibrate", "--engine", "llama_cpp", cwd=place, libraries=there)
    assert done.returncode == ExitCode.ENVIRONMENT
    assert "xllamacpp not installed" in done.stderr


def test_a_measurement_of_another_run_is_waited_for(place: Path) -> None:
    handle = os.open(measurement_lock_path(), os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with subprocess.Popen(
            command("calibrate", "--time-limit", "10s"), cwd=place, env=environment(), stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            said = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    finally:
        os.close(handle)
    assert "waiting for another measurement on this machine" in said and str(os.getpid()) in said
    assert process.returncode == ExitCode.INTERRUPTED
