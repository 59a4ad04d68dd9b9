"""The table of bad inputs, through the real command line: message, exit code, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD = "version: 1\nmodel: {source: model}\nbudgets: {peak_memory: {max: 1 GiB}}\n"


def leanplan(*argv: str, cwd: Path, stdin: str | None = None, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, "-m", "planner", *argv],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        input=stdin,
    )


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


CASES: dict[str, tuple[str | bytes, int, tuple[str, ...]]] = {
    "malformed yaml": ("{a: 1", 2, ("leanplan.yaml:1",)),
    "empty": ("", 2, ("mapping",)),
    "a list": ("- 1\n", 2, ("mapping",)),
    "unknown key": (GOOD.replace("budgets", "budegts"), 2, ("budegts", "budgets")),
    "duplicate key": (GOOD + "version: 1\n", 2, ("version", "already")),
    "unknown unit": (GOOD.replace("peak_memory: {max: 1 GiB}", "ttft_p95: {max: 50 lightyears}"), 2, ("lightyears",)),
    "wrong dimension": (GOOD.replace("1 GiB", "50 ms"), 2, ("a time", "bytes")),
    "missing unit": (GOOD.replace("1 GiB", "50"), 2, ("unit",)),
    "ambiguous": (GOOD.replace("1 GiB", "2 Gb"), 2, ("GiB",)),
    "negative": (GOOD.replace("1 GiB", "-5 GiB"), 2, ("positive",)),
    "infinite": (GOOD.replace("1 GiB", ".inf"), 2, ()),
    "decimal comma": (GOOD.replace("1 GiB", "1,5 GiB"), 2, ("1.5 GiB",)),
    "nothing to decide": ("version: 1\nmodel: {source: model}\nbudgets: {}\nobjectives: []\n", 2, ("objectives",)),
    "not utf-8": (b"\xff\xfeversion: 1\n", 2, ("UTF-8",)),
    "a tag": (GOOD.replace("model}", "!!python/object/apply:os.system ['touch canary']}"), 2, ()),
    "an alias": ("a: &x [1]\nb: *x\n", 2, ()),
    "deep nesting": ("[" * 3000, 2, ()),
    "too large": (GOOD + "# " + "x" * 300_000, 2, ("KiB",)),
    "path escape in the name": (GOOD + "name: ../../etc/x\n", 2, ("name",)),
    "no model there and no network": (GOOD, 4, ("model", "network")),
    "not a model id": (GOOD.replace("source: model", "source: 'http://169.254.169.254/'"), 2, ("model",)),
    "unknown technique": (GOOD + "techniques: {only: [wieght_int4]}\n", 2, ("weight_int4",)),
    "unknown machine": (GOOD + "hardware: h1000\n", 2, ("h1000",)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_told_in_one_message(name: str, tmp_path: Path) -> None:
    text, code, words = CASES[name]
    path = tmp_path / "leanplan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(tmp_path)
    done = leanplan("plan", "--predict", "--offline", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    assert "hint:" in done.stderr or "help:" in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stdout == ""
    left = {n for n in tree(tmp_path) - before if not n.startswith(".leanplan")}
    assert not left, "something was written"


def test_missing_spec_names_the_way_to_make_one(tmp_path: Path) -> None:
    done = leanplan("plan", cwd=tmp_path)
    assert done.returncode == 2
    assert "leanplan init" in done.stderr


def test_errors_are_json_when_asked(tmp_path: Path) -> None:
    done = leanplan("plan", "--json", cwd=tmp_path)
    assert done.returncode == 2
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == 2
    assert error["hint"]


def test_unknown_command_and_flag_are_usage_errors(tmp_path: Path) -> None:
    for argv in (["plna"], ["plan", "--frobnicate"], ["ls", "everything"]):
        done = leanplan(*argv, cwd=tmp_path)
        assert done.returncode == 2, argv
        assert "Traceback" not in done.stderr


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} -m planner ls techniques | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("technique")


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        {"COLUMNS": "20"},
    ],
    ids=str,
)
def test_poor_terminals_survive(environment: dict[str, str], tmp_path: Path) -> None:
    done = leanplan("plan", "examples/llama-70b.yaml", "--predict", "--store", str(tmp_path), cwd=ROOT, **environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout


def test_a_secret_in_a_spec_is_not_repeated(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwx"
    (tmp_path / "leanplan.yaml").write_text(GOOD.replace("source: model", f"source: {secret}"))
    done = leanplan("plan", "--predict", "--offline", cwd=tmp_path)
    assert secret not in done.stderr + done.stdout


def test_a_spec_from_stdin(tmp_path: Path) -> None:
    done = leanplan("validate", "-", cwd=ROOT / "examples", stdin=(ROOT / "examples" / "llama-70b.yaml").read_text())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a machine profile already measured, so that each case below is quick."""
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("faults")
    make_tiny_model(folder / "model")
    assert leanplan("probe", cwd=folder).returncode == 0
    return folder


WORKLOAD = "workload: {prompt_tokens: 16, output_tokens: 4}\n"


def test_an_energy_budget_that_cannot_be_measured_is_named_at_the_start(place: Path) -> None:
    profile = json.loads(leanplan("probe", "--json", cwd=place).stdout)
    if profile.get("hardware", profile).get("energy_counters"):
        pytest.skip("this machine has an energy counter")
    (place / "energy.yaml").write_text(GOOD.replace("peak_memory: {max: 1 GiB}", "energy: {max: 1 J/token}") + WORKLOAD)
    for command in ("plan", "check"):
        done = leanplan(command, "energy.yaml", cwd=place)
        assert done.returncode == 4
        assert "source: any" in done.stderr


def test_a_baseline_that_does_not_run_is_told(place: Path) -> None:
    (place / "small.yaml").write_text(GOOD + WORKLOAD + "limits: {memory: 32 MiB}\nengines: [transformers]\n")
    done = leanplan("plan", "small.yaml", cwd=place)
    assert done.returncode == 4, done.stderr
    assert "does not run here" in done.stderr
    assert "oom_host" in done.stderr


def test_a_run_folder_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "file").write_text("not a folder")
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    done = leanplan("plan", "--run-dir", str(place / "file" / "runs"), cwd=place)
    assert done.returncode == 4, done.stderr
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_home_is_no_problem(place: Path) -> None:
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    environment = {k: v for k, v in os.environ.items() if k != "HOME"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "planner", "plan", "--predict"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_told(place: Path) -> None:
    done = leanplan("ls", "metrics", "--output-file", "/dev/full", cwd=place)
    assert done.returncode == 4
    assert "free space" in done.stderr
    assert Path("/dev/full").is_char_device(), "a device was replaced by a file"
