"""The table of bad inputs, through the real command line: message, exit code, no traceback, nothing written."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worlds import ROOT, bound_by_permissions, copied, libraries

from planner.cli import main
from planner.data import bundled

GOOD = "version: 1\nmodel: {source: model}\nbudgets: {peak_memory: {max: 1 GiB}}\n"
WORKLOAD = "workload: {prompt_tokens: 16, output_tokens: 4}\n"


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


@pytest.mark.row(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 17, 18, 19, 22, 23)
@pytest.mark.parametrize("name", CASES)
def test_it_is_told_in_one_message(name: str, tmp_path: Path, place: Path) -> None:
    text, code, words = CASES[name]
    path = tmp_path / "leanplan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = tree(tmp_path)
    done = leanplan("plan", "--predict", "--offline", "--store", str(place / ".leanplan"), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "error:" in done.stderr
    assert "hint:" in done.stderr or "help:" in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == before, "something was written"


@pytest.mark.row(21, 22)
@pytest.mark.parametrize("source", ["no-such-model", "org/no-such-model", "."])
def test_a_model_that_is_not_there_is_told_before_the_machine_is_probed(tmp_path: Path, source: str) -> None:
    (tmp_path / "leanplan.yaml").write_text(GOOD.replace("source: model", f"source: {source}"))
    done = leanplan("plan", "--offline", cwd=tmp_path)
    assert done.returncode == (2 if source == "." else 4)
    assert tree(tmp_path) == {"leanplan.yaml"}, "the machine was probed"


@pytest.mark.row(1)
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


@pytest.mark.rule("redaction")
def test_a_secret_in_a_spec_is_not_repeated(tmp_path: Path, place: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwx"
    (tmp_path / "leanplan.yaml").write_text(GOOD.replace("source: model", f"source: {secret}"))
    done = leanplan("plan", "--predict", "--offline", "--store", str(place / ".leanplan"), cwd=tmp_path)
    assert done.returncode == 4
    assert secret not in done.stderr + done.stdout


def test_a_spec_from_stdin(tmp_path: Path) -> None:
    done = leanplan("validate", "-", cwd=ROOT / "examples", stdin=(ROOT / "examples" / "llama-70b.yaml").read_text())
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a tiny model and a store that knows this machine, so that each case below is quick."""
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("faults")
    make_tiny_model(folder / "model")
    shutil.copytree(machine, folder / ".leanplan")
    return folder


@pytest.mark.row(15)
def test_an_energy_budget_that_cannot_be_measured_is_named_at_the_start(place: Path) -> None:
    profile = json.loads(leanplan("probe", "--json", cwd=place).stdout)
    if profile.get("hardware", profile).get("energy_counters"):
        pytest.skip("this machine has an energy counter")
    (place / "energy.yaml").write_text(GOOD.replace("peak_memory: {max: 1 GiB}", "energy: {max: 1 J/token}") + WORKLOAD)
    for command in ("plan", "check"):
        done = leanplan(command, "energy.yaml", cwd=place)
        assert done.returncode == 4
        assert "source: any" in done.stderr


@pytest.mark.slow
@pytest.mark.row(56)
def test_a_baseline_that_does_not_run_is_told(place: Path) -> None:
    (place / "small.yaml").write_text(GOOD + WORKLOAD + "limits: {memory: 32 MiB}\nengines: [transformers]\n")
    done = leanplan("plan", "small.yaml", cwd=place)
    assert done.returncode == 4, done.stderr
    assert "limits.memory and this machine allow 32 MiB" in done.stderr  # by its forecast, before any work
    (place / "hasty.yaml").write_text(
        GOOD + WORKLOAD + "limits: {time_per_candidate: 100 ms}\nengines: [transformers]\n"
    )
    done = leanplan("plan", "hasty.yaml", cwd=place)
    assert done.returncode == 4, done.stderr
    assert "does not run here" in done.stderr
    assert "timeout" in done.stderr


@pytest.mark.row(58)
def test_a_run_folder_that_cannot_be_made_is_named(place: Path) -> None:
    (place / "file").write_text("not a folder")
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    done = leanplan("plan", "--run-dir", str(place / "file" / "runs"), cwd=place)
    assert done.returncode == 4, done.stderr
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.row(58)
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


@pytest.mark.row(57)
def test_a_full_disk_is_told(place: Path) -> None:
    done = leanplan("ls", "metrics", "--output-file", "/dev/full", cwd=place)
    assert done.returncode == 4
    assert "free space" in done.stderr
    assert Path("/dev/full").is_char_device(), "a device was replaced by a file"


# ---------------------------------------------------------------- models, texts and engines, through `leanplan plan`


@pytest.fixture
def refused(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Plan a spec that must be refused, for measuring; check that nothing was written; return what stderr says."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # `--offline` sets it for good

    def run(spec: str, code: int = 2) -> str:
        (place / "leanplan.yaml").write_text(spec)
        before = {name for name in tree(place) if not name.startswith(".leanplan")}
        assert main(["plan", "--offline"]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert "error:" in said.err and "hint:" in said.err
        assert "Traceback" not in said.err
        assert {name for name in tree(place) if not name.startswith(".leanplan")} == before
        return said.err

    return run


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def spoil_a_weight(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", float("nan")))


class Canary:
    def __reduce__(self) -> Any:
        return (open, ("canary", "w"))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary()))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(link_out, "refusing to follow a link out of", marks=pytest.mark.row(20)),
        pytest.param(empty, "no config.json in", marks=pytest.mark.row(21)),
        pytest.param(cut, "damaged (file shorter than its header says by 5 bytes)", marks=pytest.mark.row(25)),
        pytest.param(
            lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}"),
            "its header claims 4611686018427387904 bytes", marks=pytest.mark.row(26),
        ),
        pytest.param(spoil_a_weight, "has 1 non-finite value", marks=pytest.mark.row(27)),
        pytest.param(lambda f: configure(f, num_hidden_layers=5), "9 weights missing (model.layers.4.", marks=pytest.mark.row(28)),
        pytest.param(
            lambda f: configure(f, num_attention_heads=0), "num_attention_heads must be ≥ 1, got 0", marks=pytest.mark.row(29)
        ),
        pytest.param(lambda f: configure(f, model_type="zzz"), "architecture `zzz` is not", marks=pytest.mark.row(30)),
        pytest.param(
            lambda f: configure(f, auto_map={"AutoModelForCausalLM": "modeling.Model"}), "--trust-remote-code",
            marks=pytest.mark.row(31),
        ),
        pytest.param(only_pickle, "no safetensors, only pytorch_model.bin", marks=pytest.mark.row(32)),
    ],
)  # fmt: skip
def test_a_model_nobody_should_plan(
    refused: Callable[..., str], place: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    folder = shutil.copytree(place / "model", tmp_path / "model")
    damage(folder)
    assert words in refused(GOOD.replace("source: model", f"source: {folder}") + WORKLOAD)
    assert not (place / "canary").exists()


TEXT = bundled("heldout").read_bytes()[:200_000]


@pytest.mark.parametrize(
    ("heldout", "calibration", "words"),
    [
        pytest.param(b"", None, "has 0 samples", marks=pytest.mark.row(38)),
        pytest.param(b"one line\n", None, "too few", marks=pytest.mark.row(38)),
        pytest.param(b"same line\n" * 900, None, "one line, 900 times over", marks=pytest.mark.row(38)),
        pytest.param(TEXT, TEXT, "held-out text overlaps calibration (100%)", marks=pytest.mark.row(40)),
        pytest.param(TEXT, b"new text\n" + TEXT[:60_000], "held-out text overlaps calibration", marks=pytest.mark.row(40)),
        pytest.param(TEXT + b"caf\xe9\n", None, "not UTF-8: byte 0xe9", marks=pytest.mark.row(41)),
        pytest.param(gzip.compress(TEXT), None, "compressed", marks=pytest.mark.row(41)),
        pytest.param(TEXT + b"\0", None, "a binary file", marks=pytest.mark.row(41)),
    ],
)  # fmt: skip
def test_a_text_nobody_should_measure_on(
    refused: Callable[..., str], tmp_path: Path, heldout: bytes, calibration: bytes | None, words: str
) -> None:
    spec = GOOD + WORKLOAD + f"quality: {{data: {tmp_path / 'heldout.txt'}}}\n"
    (tmp_path / "heldout.txt").write_bytes(heldout)
    if calibration is not None:
        (tmp_path / "calibration.txt").write_bytes(calibration)
        spec += f"calibration: {{data: {tmp_path / 'calibration.txt'}}}\n"
    assert words in refused(spec)


@pytest.mark.promise("P13")
def test_a_model_in_a_folder_touches_no_network(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.chdir(place)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network used"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network used"))
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    assert main(["plan", "--predict"]) == 0


@pytest.mark.row(39, 45)
def test_what_is_left_out_is_told_once(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(place)
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    assert main(["plan", "--predict", "--json"]) == 0
    rejected = json.loads(capsys.readouterr().out)["rejected"]
    (uncalibrated,) = (r for r in rejected if "need calibration text" in r["why"])
    assert "weight_gptq" in uncalibrated["what"]
    assert "add calibration.data" in uncalibrated["why"]
    gpus = [r["why"] for r in rejected if r["what"] == "GPU plans"]
    if json.loads((next((place / ".leanplan" / "machines").iterdir())).read_text())["facts"]["accelerators"]["gpus"]:
        assert gpus == []
    else:
        assert len(gpus) == 1
        assert gpus[0].startswith(("no CUDA device", "torch cannot use"))


@pytest.mark.row(45)
def test_doctor_tells_of_a_missing_gpu(tmp_path: Path) -> None:
    from planner.probes import accelerators

    if accelerators.names():
        pytest.skip("this machine has a GPU")
    rows = json.loads(leanplan("doctor", "--json", cwd=tmp_path).stdout)
    (gpu,) = (row for row in rows if row["check"] == "GPU")
    assert gpu["found"] == "no CUDA device; plans run on the processor"


@pytest.fixture
def alone(place: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command where only the llama_cpp engine is wanted, with the libraries of the test's choice."""
    (place / "alone.yaml").write_text(GOOD + WORKLOAD + "engines: [llama_cpp]\n")

    def run(*argv: str, libraries: Path) -> subprocess.CompletedProcess[str]:
        from worlds import leanplan

        return leanplan(*argv, cwd=place, libraries=libraries)

    return run


@pytest.mark.row(43)
def test_an_engine_that_is_not_installed(alone: Any, place: Path, tmp_path: Path) -> None:
    without = libraries(tmp_path / "libraries", without=("xllamacpp",))
    before = tree(place)
    done = alone("plan", "alone.yaml", libraries=without)
    assert done.returncode == 4, done.stderr
    assert "no engine can run here: llama_cpp: xllamacpp not installed; pip install xllamacpp" in done.stderr
    assert "hint: leanplan doctor" in done.stderr
    assert tree(place) == before
    rows = json.loads(alone("doctor", "--json", libraries=without).stdout)
    (row,) = (r for r in rows if r["check"] == "engine llama_cpp")
    assert (row["state"], row["found"], row["fix"]) == ("warn", "xllamacpp not installed", "pip install xllamacpp")


@pytest.mark.row(44)
def test_an_engine_that_is_present_but_broken(alone: Any, place: Path, tmp_path: Path) -> None:
    broken = libraries(tmp_path / "libraries")
    (library,) = copied(broken, "xllamacpp").glob("xllamacpp*.so")
    library.write_bytes(b"not a library\n")
    before = tree(place)
    done = alone("plan", "alone.yaml", libraries=broken)
    assert done.returncode == 4, done.stderr
    assert "no engine can run here: llama_cpp: the library of xllamacpp" in done.stderr
    assert "cannot be loaded" in done.stderr and "Traceback" not in done.stderr
    assert tree(place) == before
    rows = json.loads(alone("doctor", "--json", libraries=broken).stdout)
    (row,) = (r for r in rows if r["check"] == "engine llama_cpp")
    assert row["state"] == "warn" and "cannot be loaded" in row["found"] and row["fix"]


# ---------------------------------------------------------------- folders nobody may write to


@pytest.mark.row(58)
@pytest.mark.parametrize("flag", ["--run-dir", "--store"])
def test_a_folder_that_may_not_be_written_is_named(place: Path, tmp_path: Path, flag: str) -> None:
    (place / "leanplan.yaml").write_text(GOOD + WORKLOAD)
    shut = tmp_path / "shut"
    shutil.copytree(place / ".leanplan", shut)
    for folder in (shut, *(p for p in shut.rglob("*") if p.is_dir())):
        folder.chmod(0o555)
    before = tree(shut)
    done = subprocess.run(
        [sys.executable, "-m", "planner", "plan", "--offline", flag, str(shut)], cwd=place, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120, preexec_fn=bound_by_permissions(),
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert str(shut) in done.stderr and "Permission denied" in done.stderr
    assert flag in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(shut) == before
