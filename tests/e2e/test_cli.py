"""The real command line on a real (tiny) model: plan, look, rebuild, check, interrupt, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from knowledge_base.registry import engines
from planner.lock import read_lock, write_lock

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)  # whole runs of the real thing, on machines that may be busy
SPEC = """\
version: 1
goal: serve
model: {{source: {model}}}
hardware: local
workload: {{prompt_tokens: 32, output_tokens: 8}}
budgets:
  peak_memory: {{max: 4 GiB}}
  quality_loss: {{max: 60 %}}
objectives: [tpot_p50, peak_memory, quality_loss]
quality: {{data: {heldout}}}
techniques: {{only: [weight_int8, weight_gguf, drop_layers]}}
engines: [transformers, llama_cpp]
search: {{effort: quick, time_limit: 100 s, max_measured: 3, seed: 0}}
limits: {{memory: 4 GiB, time_per_candidate: 60 s, disk: 2 GiB}}
check: {{regression: 1000 %}}
"""


SECRET = "hf_planted1nTheEnvironment0123"


def leanplan(*argv: str, cwd: Path, timeout_s: float = 280, **more: str) -> subprocess.CompletedProcess[str]:
    """Run one command as a person would and return what it said."""
    environment = {**os.environ, "COLUMNS": "160", **more}
    command = [sys.executable, "-m", "planner", *argv]
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a tiny model and a spec, as a user's would be, and a store that knows this machine."""
    from planner.data import bundled
    from planner.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("user")
    make_tiny_model(folder / "model")
    shutil.copytree(machine, folder / ".leanplan")
    (folder / "leanplan.yaml").write_text(SPEC.format(model="model", heldout=bundled("heldout")))
    return folder


@pytest.fixture(scope="module")
def planned(place: Path) -> dict:
    """The result.json of one measured run."""
    done = leanplan("plan", "--lock", cwd=place, HF_TOKEN=SECRET, AWS_SECRET_ACCESS_KEY=SECRET)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "measured" in done.stdout
    (run,) = (p for p in (place / "runs").iterdir() if (p / "result.json").exists())
    return {"run": run, **json.loads((run / "result.json").read_text())}


def test_the_answer_is_complete(planned: dict) -> None:
    results = planned["results"]
    assert results[0]["plan"]["steps"] == []
    assert 2 <= len(results) <= 3
    for result in results:
        if result["measurement"]["failure"]:
            continue
        figures = result["measurement"]["figures"]
        wanted = (
            "ttft_s",
            "tpot_s",
            "throughput_tokens_per_s",
            "peak_memory_bytes",
            "weights_bytes",
            "artefact_bytes",
            "perplexity",
            "agreement_ratio",
            "kl_divergence_nats",
        )
        assert set(wanted) <= set(figures)
        assert all(f["low"] <= f["value"] <= f["high"] for f in figures.values())
        assert figures["tpot_s"]["source"] == "measured"
        assert (planned["run"] / result["artefact"] / "leanplan.json").exists()
    assert planned["recommended_id"] in {r["plan_id"] if "plan_id" in r else _id(r) for r in results}
    assert any(r["on_front"] for r in results)


def _id(result: dict) -> str:
    from knowledge_base.serde import restore
    from knowledge_base.types import Plan

    return restore(Plan, result["plan"]).id


@pytest.mark.promise("P2", "P4")
def test_no_plan_is_measured_twice_and_limits_hold(planned: dict) -> None:
    measured = [_id(result) for result in planned["results"]]
    assert len(set(measured)) == len(measured)
    assert planned["search"]["wall_s"] <= 100 * 1.1 + 5
    for result in planned["results"]:
        peak = result["measurement"]["figures"].get("peak_memory_bytes", {"value": 0})
        assert peak["value"] <= (4 << 30) * 1.1


@pytest.mark.promise("P8")
@pytest.mark.rule("measured warm", "measured quality")
def test_every_number_has_a_birth_certificate(planned: dict) -> None:
    """What was measured, how often, on which bytes, by which versions, on which machine and how busy it was."""
    for result in planned["results"]:
        measurement = result["measurement"]
        if measurement["failure"]:
            continue
        protocol = measurement["protocol"]
        assert len(measurement["key"]) == len(measurement["artefact_digest"]) == 64
        assert measurement["hardware_fingerprint"] == planned["hardware"]["fingerprint"]
        assert measurement["versions"] == engines.get(result["plan"]["engine"]).versions()
        assert protocol["data"] == planned["provenance"]["data"]
        assert {"seed", "dropped", "settled", "counted", "clock", "load_average", "other_cores"} <= set(protocol)
        for name, figure in measurement["figures"].items():
            assert figure["source"] in ("measured", "modelled"), name
            assert figure["n"] >= 1 and 0 < figure["confidence"] <= 1 and figure["statistic"], name
            assert len(figure["samples"]) in (0, figure["n"]), name
        timed, quality = measurement["figures"]["tpot_s"], measurement["figures"]["perplexity"]
        assert timed["n"] >= 9 and timed["samples"] and quality["samples"]
        assert timed["p95"] is None or timed["n"] >= 59


@pytest.mark.rule("redaction", "candidate")
def test_a_secret_of_the_environment_is_in_no_file_of_the_run(planned: dict, place: Path) -> None:
    for path in place.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.row(15)
def test_energy_is_modelled_and_says_so_where_there_is_no_counter(planned: dict) -> None:
    if planned["hardware"]["energy_counters"]:
        pytest.skip("this machine has an energy counter, so energy is measured")
    figures = planned["results"][0]["measurement"]["figures"]
    assert figures.get("energy_j_per_token", {"source": "modelled"})["source"] != "measured"


def test_the_run_folder_holds_what_it_promises(planned: dict) -> None:
    run = planned["run"]
    for name in ("run.json", "spec.yaml", "events.jsonl", "result.json", "summary.md", "study.db"):
        assert (run / name).is_file(), name
    import optuna

    (study,) = optuna.get_all_study_summaries(f"sqlite:///{run / 'study.db'}")
    assert study.n_trials == len(planned["results"])


def test_it_can_be_looked_at(planned: dict, place: Path) -> None:
    best = planned["recommended_id"]
    for argv in (
        ["ls", "runs"],
        ["ls", "plans"],
        ["show", best],
        ["explain"],
        ["explain", "baseline"],
        ["explain", "--why-not", "weight_int8"],
        ["explain", "--budget", "peak_memory"],
        ["compare", "baseline", best],
        ["compare", "leanplan.lock", best],
    ):
        done = leanplan(*argv, cwd=place)
        assert done.returncode == 0, (argv, done.stderr)
        assert done.stdout.strip(), argv
        as_json = leanplan(*argv, "--json", cwd=place)
        json.loads(as_json.stdout)


@pytest.mark.slow
@pytest.mark.promise("P10")
def test_the_recipe_rebuilds_the_same_artefact(planned: dict, place: Path, tmp_path: Path) -> None:
    recipe = planned["run"] / "plans" / planned["recommended_id"] / "plan.json"
    out = tmp_path / "again"
    built = leanplan("build", str(recipe), "-o", str(out), "--json", cwd=place)
    assert built.returncode == 0, built.stderr
    facts = json.loads(built.stdout)
    assert facts["same"] is True
    checked = leanplan("verify", str(out), "--digest", facts["digest"], cwd=place)
    assert checked.returncode == 0, checked.stderr
    (out / "tokenizer.json").write_bytes((out / "tokenizer.json").read_bytes() + b" ")
    spoilt = leanplan("verify", str(out), cwd=place)
    assert spoilt.returncode == 2
    assert "tokenizer.json" in spoilt.stderr


@pytest.mark.slow
@pytest.mark.promise("P2")
def test_a_second_plan_measures_nothing_twice(planned: dict, place: Path) -> None:
    """A new run of the same spec: the baseline comes from the store, and with it the answer."""
    before = set((place / ".leanplan" / "measurements").iterdir())
    done = leanplan("plan", "--max-measured", "1", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "known from an earlier run" in done.stderr
    assert set((place / ".leanplan" / "measurements").iterdir()) == before
    built = leanplan(
        "build", "recommended", "-o", "again", cwd=place
    )  # the newest run's, which measured nothing itself
    assert built.returncode == 0, built.stderr


@pytest.mark.promise("P10")
@pytest.mark.slow
def test_check_judges_the_locked_plan(planned: dict, place: Path) -> None:
    """Measured against a spec whose one budget is met and whose other is not, and a lock of another artefact."""
    tight = (place / "leanplan.yaml").read_text().replace("max: 4 GiB}\n  q", "max: 1 MiB}\n  q")
    (place / "tight.yaml").write_text(tight)
    locked = read_lock(place / "leanplan.lock")
    write_lock(place / "leanplan.lock", replace(locked, artefact_digest="0" * 64))
    failed = leanplan("check", "tight.yaml", "--json", cwd=place)
    write_lock(place / "leanplan.lock", locked)
    assert failed.returncode == 1, failed.stderr
    found = json.loads(failed.stdout)
    outcomes = {v["budget"]["metric"]: v["outcome"] for v in found["verdicts"]}
    assert outcomes["peak_memory_bytes"] == "not met"
    assert outcomes["quality_loss_ratio"] == "met"
    assert any("the artefact is not the locked one" in note for note in found["notes"])
    assert leanplan("check", "tight.yaml", "--predict", "--exit-zero", cwd=place).returncode == 0


@pytest.mark.row(14)
def test_impossible_budgets_are_told_with_the_nearest_plan(place: Path) -> None:
    (place / "tiny.yaml").write_text(
        (place / "leanplan.yaml").read_text().replace("max: 4 GiB}\n  q", "max: 1 KiB}\n  q")
    )
    done = leanplan("plan", "tiny.yaml", "--predict", cwd=place)
    assert done.returncode == 1
    assert "No plan meets every budget" in done.stdout
    assert "peak_memory: the best found is predicted peak_memory" in done.stdout
    assert "nearest to all budgets: " in done.stdout


@pytest.mark.promise("P6")
def test_prediction_is_the_same_every_time_and_measures_nothing(place: Path) -> None:
    first, again = (leanplan("plan", "--predict", "--json", cwd=place) for _ in range(2))
    assert first.stdout == again.stdout
    answer = json.loads(first.stdout)
    assert answer["measured"] is False
    assert all(r["measurement"] is None for r in answer["results"])


def _start(place: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "planner", "plan", *argv], cwd=place, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _wait_for_a_measurement(runs: Path, process: subprocess.Popen[str]) -> Path:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        found = list(runs.glob("*/plans/*/measurement.json"))
        if found:
            return found[0].parents[2]
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.2)
    raise AssertionError("no measurement within 200 s")


def _processes_under(folder: Path) -> list[int]:
    """Return processes whose working directory lies under a folder: candidates work in the run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str((entry / "cwd").readlink()).startswith(str(folder)):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.row(59, 60, 64, 65)
@pytest.mark.promise("P1", "P5")
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_an_interrupted_run_goes_on_where_it_was(
    place: Path, machine: Path, tmp_path: Path, how: signal.Signals
) -> None:
    runs, store = tmp_path / "runs", shutil.copytree(machine, tmp_path / "store")
    where = ("--run-dir", str(runs), "--store", str(store))
    process = _start(place, *where)
    folder = _wait_for_a_measurement(runs, process)
    second = leanplan("plan", *where, cwd=place)
    assert second.returncode == 4, second.stderr
    assert f"run is in use by pid {process.pid} (since " in second.stderr
    process.send_signal(how)
    _, talk = process.communicate(timeout=60)
    wanted = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how]
    assert process.returncode == wanted, talk
    if how != signal.SIGKILL:
        assert "resumes" in talk
    deadline = time.monotonic() + 10
    while _processes_under(runs) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _processes_under(runs), "candidates outlived the planner"
    measured = set(folder.glob("plans/*/measurement.json"))
    times = {p: p.stat().st_mtime_ns for p in measured}
    again = leanplan("plan", *where, "--max-measured", str(len(measured) + 1), cwd=place)
    assert again.returncode in (0, 5), again.stderr
    assert "resuming" in again.stderr
    assert "known from an earlier run" in again.stderr
    assert (folder / "result.json").exists()
    assert times.keys() <= set(folder.glob("plans/*/measurement.json"))
