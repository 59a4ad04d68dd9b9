"""Faults in the middle of a real measured run: what is said, which exit code, what is kept, and how it goes on."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import command, copied, environment, house_with, leanplan, libraries

from planner.tiny_models import make_tiny_model

pytestmark = pytest.mark.timeout(600)  # whole runs of the real thing, on machines that may be busy
SPEC = """\
version: 1
model: {source: model}
workload: {prompt_tokens: 16, output_tokens: 4}
objectives: [tpot_p50, artefact_size, quality_loss]
budgets: {energy: {max: 1 kJ/token, level: warn}}
search: {effort: quick, time_limit: 100 s, max_measured: 3}
limits: {memory: 3 GiB, time_per_candidate: 40 s, disk: 1 GiB}
"""
ZEROED = '''
"""Every weight set to zero: what is left answers nothing."""

from knowledge_base.types import Technique

TECHNIQUE = Technique(
    summary="zeros", stage="compress", family="zeroed", knobs={}, spends=("quality_loss_ratio",), sources=("test",)
)
EVIDENCE = ()


def rejects(model, workload, hardware):
    return None


def rewrite(demand):
    return demand


def execute(session):
    import torch

    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.zero_()
'''


OTHERS = ("openvino", "onnxruntime")  # engines that would do what is to fail


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a tiny model, and a store that knows this machine."""
    folder = tmp_path_factory.mktemp("faults")
    make_tiny_model(folder / "model")
    shutil.copytree(machine, folder / ".leanplan")
    return folder


def result_of(place: Path) -> dict:
    (path,) = place.glob("runs/*/result.json")
    return json.loads(path.read_text())


@pytest.mark.row(54, 43, 15)
@pytest.mark.slow
def test_a_plan_whose_quality_collapses_is_shown_and_never_chosen(place: Path, tmp_path: Path) -> None:
    """With a technique that zeroes every weight, on an installation without llama.cpp."""
    house = house_with(tmp_path / "house", zeroed=ZEROED)
    spec = SPEC + "techniques: {only: [zeroed]}\n"
    (place / "zeroed.yaml").write_text(spec)
    without = libraries(tmp_path / "libraries", without=("xllamacpp", *OTHERS))
    runs = ("--run-dir", str(tmp_path / "runs"))
    done = leanplan("plan", "zeroed.yaml", *runs, cwd=place, house=house, libraries=without)
    assert done.returncode == 0, done.stderr
    assert "failed: quality_collapse" in done.stderr
    assert "■ transformers: zeroed: quality_collapse" in done.stdout
    answer = result_of(tmp_path)
    baseline, zeroed = answer["results"]
    assert zeroed["measurement"]["failure"]["kind"] == "quality_collapse"
    assert "perplexity" in zeroed["measurement"]["figures"]
    assert (baseline["on_front"], zeroed["on_front"]) == (True, False)
    (engine,) = (r for r in answer["rejected"] if r["what"] == "llama_cpp")  # told once
    assert engine["why"] == "xllamacpp not installed; pip install xllamacpp"
    if not answer["hardware"]["energy_counters"]:  # a budget of level warn goes on, and says what the figure is
        assert baseline["measurement"]["figures"]["energy_j_per_token"]["source"] == "modelled"
        (verdict,) = baseline["verdicts"]
        assert verdict["outcome"] == "not judged" and "modelled" in verdict["sentence"]


@pytest.mark.row(55, 44)
@pytest.mark.promise("P3", "P12")
@pytest.mark.slow
def test_when_every_candidate_fails_the_causes_are_grouped(place: Path, tmp_path: Path) -> None:
    """With a gguf package that cannot be imported: the unchanged model runs in torch, every candidate needs gguf."""
    (place / "gguf.yaml").write_text(SPEC + "techniques: {only: [weight_gguf]}\n")
    broken = libraries(tmp_path / "libraries", without=OTHERS)
    (copied(broken, "gguf") / "__init__.py").write_text(
        "raise ImportError('libgguf.so: undefined symbol: ggml_init')\n"
    )
    runs = ("--run-dir", str(tmp_path / "runs"))
    done = leanplan("plan", "gguf.yaml", *runs, cwd=place, libraries=broken)
    assert done.returncode == 4, done.stderr
    assert done.stderr.count("failed: engine_missing: ImportError: libgguf.so: undefined symbol: ggml_init") == 2
    told = "every candidate failed: engine_missing candidates (2×): ImportError: libgguf.so: undefined symbol"
    assert told in done.stderr
    assert (
        "hint: leanplan doctor shows what is broken; once it is mended, the same command tries them again"
        in done.stderr
    )
    assert done.stdout == ""
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "result.json").exists()
    kept = [json.loads(path.read_text()) for path in (place / ".leanplan" / "measurements").iterdir()]
    assert not any(
        r["measurement"]["failure"] and r["measurement"]["failure"]["kind"] == "engine_missing" for r in kept
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Use up every byte of a disk; return the file that does."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def wait_for(pattern: str, folder: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := next(folder.glob(pattern), None):
            return found
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.05)
    raise AssertionError(f"no {pattern} within 120 s")


@pytest.mark.slow
@pytest.mark.row(57)
@pytest.mark.promise("P1")
def test_a_disk_that_fills_up_costs_nothing_already_measured(place: Path, machine: Path, small_disk: Path) -> None:
    (place / "disk.yaml").write_text(SPEC + "techniques: {only: [weight_dtype]}\nengines: [llama_cpp]\n")
    shutil.copytree(machine, small_disk / "store")
    where = ("--run-dir", str(small_disk / "runs"), "--store", str(small_disk / "store"))
    process = subprocess.Popen(
        command("plan", "disk.yaml", *where), cwd=place, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    measured = wait_for("runs/*/plans/*/measurement.json", small_disk, process)
    ballast = fill(small_disk)
    content = measured.read_bytes()
    out, talk = process.communicate(timeout=120)
    assert process.returncode == 4, talk
    assert "error: No space left on device" in talk
    assert "hint: free space, then run the same command: finished measurements are kept" in talk
    assert "Traceback" not in talk
    assert out == ""
    assert measured.read_bytes() == content
    ballast.unlink()
    again = leanplan("plan", "disk.yaml", *where, "--max-measured", "1", cwd=place)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stderr and ": 1 measured" in again.stderr
    assert "known from an earlier run" in again.stderr
    assert (measured.parents[2] / "result.json").exists()


@pytest.mark.row(20)
def test_a_run_folder_with_a_link_out_is_not_resumed(place: Path, tmp_path: Path) -> None:
    """An unfinished run of somebody else's making, whose artefacts folder leads elsewhere."""
    (place / "links.yaml").write_text(SPEC + "engines: [llama_cpp]\n")
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    outside.mkdir()
    (runs / "theirs").mkdir(parents=True)
    (runs / "theirs" / "run.json").write_text("{}")
    (runs / "theirs" / "artefacts").symlink_to(outside)
    done = leanplan("plan", "links.yaml", "--run-dir", str(runs), "--resume", "theirs", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "refusing to follow a link out of the run folder" in done.stderr
    assert str(runs / "theirs" / "artefacts") in done.stderr
    assert list(outside.iterdir()) == []


class Terminal:
    """A command on a terminal of its own, as a person has it."""

    def __init__(self, argv: list[str], cwd: Path) -> None:
        self.master, theirs = pty.openpty()
        self.said = ""
        self.process = subprocess.Popen(
            argv, cwd=cwd, env=environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def read(self) -> bool:
        """Read what is there; return whether more may come. Somebody must read, or the command waits to write."""
        if select.select([self.master], [], [], 0.2)[0]:
            try:
                self.said += os.read(self.master, 1 << 16).decode(errors="replace")
            except OSError:  # the other side has ended
                return False
        return True

    def wait_for(self, words: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while words not in self.said:
            assert time.monotonic() < deadline and self.read(), self.said

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def end(self, timeout_s: float = 60) -> int:
        """Return the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.read():
            assert time.monotonic() < deadline, self.said
        return self.process.wait(timeout=10)


@pytest.mark.row(60)
@pytest.mark.promise("P5")
def test_ctrl_c_twice_on_a_terminal_stops_at_once(place: Path, tmp_path: Path) -> None:
    (place / "keys.yaml").write_text(SPEC)
    patient = "import sys; from planner import cli, loop; loop.STOP_GRACE_S = 200.0; sys.exit(cli.main())"
    argv = [sys.executable, "-c", patient, "plan", "keys.yaml", "--run-dir", str(tmp_path / "runs"), "--fresh"]
    with Terminal(argv, place) as terminal:
        terminal.wait_for("batches")  # the status line of a candidate at work
        terminal.press(b"\x03")
        terminal.wait_for("stopping: the running candidate has 200 s; again to stop at once")
        pressed = time.monotonic()
        terminal.press(b"\x03")
        assert terminal.end() == 130
    assert time.monotonic() - pressed < 100
    assert "interrupted; the same command resumes this run with nothing lost" in terminal.said
    assert "Traceback" not in terminal.said
