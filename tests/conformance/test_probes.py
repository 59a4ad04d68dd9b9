"""Every probe answers with plain facts within its time; the profile made of them is read back without torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.serde import plain
from planner import machine
from planner.machine import probes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    found, spent = {}, {}
    for name in probes.names():
        start = time.monotonic()
        found[name] = probes.get(name).find()
        spent[name] = time.monotonic() - start
    found["spent"] = spent
    return found


@pytest.mark.parametrize("name", probes.names())
def test_a_probe_says_what_it_is_and_gives_plain_facts(name: str, facts: dict[str, Any]) -> None:
    assert 10 < len(probes.get(name).PROBE) < 100
    assert isinstance(facts[name], dict)
    assert json.loads(json.dumps(plain(facts[name]), allow_nan=False)) == plain(facts[name])
    assert not facts[name].get("problem")


def test_all_together_take_less_than_half_a_minute(facts: dict[str, Any]) -> None:
    # Generous where the machine is shared: the limit holds for the time a quiet machine needs.
    assert sum(facts["spent"].values()) < 30 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def test_figures_are_possible(facts: dict[str, Any]) -> None:
    reads = facts["bandwidth"]["read_bytes_per_s"]
    cores = facts["linux_cpu"]["cores"]
    assert 1 <= cores <= facts["linux_cpu"]["logical_cores"]
    assert set(reads) >= {"1", str(cores)}
    assert all(1e8 < rate < 1e13 for rate in reads.values())
    rates = facts["matmul"]["flop_per_s"]
    assert {"float32", "bfloat16"} <= set(rates)
    assert all(1e7 < rate < 1e15 for shapes in rates.values() for rate in shapes.values())
    prefill = "512x2048x2048"
    assert rates["float32"][prefill] > rates["float32"]["1x8192x8192"], "one token cannot reuse weights, many can"
    memory = facts["memory_limits"]
    assert 0 < memory["limit_bytes"] <= memory["host_bytes"]
    assert memory["available_bytes"] <= memory["host_bytes"]
    assert 0 <= facts["noise"]["busy_ratio"] <= 1
    assert facts["disk"]["free_bytes"] <= facts["disk"]["total_bytes"]


def test_counters_agree_with_what_energy_is_read_from(facts: dict[str, Any]) -> None:
    from planner.energy import Counters

    assert facts["energy_counters"]["counters"] == list(Counters().names)
    if not facts["energy_counters"]["kinds"]:
        assert facts["energy_counters"]["problems"]


# ---------------------------------------------------------------- reading what kernels show


def test_control_groups_of_both_versions_limit_memory(tmp_path: Path) -> None:
    from planner.probes.memory_limits import group_limits

    membership = tmp_path / "cgroup"
    membership.write_text("0::/user/job\n")
    for path, text in (("memory.max", "max"), ("user/memory.max", "5000000"), ("user/job/memory.max", "7000000")):
        (tmp_path / "v2" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v2" / path).write_text(text + "\n")
    assert group_limits(tmp_path / "v2", membership) == {"/user": 5_000_000, "/user/job": 7_000_000}
    membership.write_text("4:memory:/job\n3:cpu:/\n0::/\n")
    for path, text in (
        ("memory/memory.limit_in_bytes", str(2**63 - 4096)),
        ("memory/job/memory.limit_in_bytes", "9000000"),
    ):
        (tmp_path / "v1" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "v1" / path).write_text(text + "\n")
    assert group_limits(tmp_path / "v1", membership) == {"/job": 9_000_000}
    assert group_limits(tmp_path, tmp_path / "absent") == {}


def test_control_groups_of_both_versions_limit_cores(tmp_path: Path) -> None:
    from planner.probes.linux_cpu import _quota

    assert _quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert _quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert _quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _quota(tmp_path) is None


def test_a_ulimit_counts(tmp_path: Path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))\n"
        "from planner.probes import memory_limits; facts = memory_limits.find()\n"
        "print(facts['limit_bytes'], facts['limit_source'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{3 * 2**30} ulimit -v"


def test_noise_is_told_with_what_to_do() -> None:
    from planner.probes.noise import warnings

    quiet = {
        "busy_ratio": 0.01,
        "load_1m": 0.2,
        "governors": {"performance": 4},
        "swap_used_bytes": 0,
        "throttle_events": 0,
    }
    assert warnings(quiet, 4) == []
    noisy = {**quiet, "busy_ratio": 0.6, "governors": {"powersave": 4}, "swap_used_bytes": 2**31}
    busy, governor, swap = warnings(noisy, 4)
    assert "60%" in busy
    assert "`powersave`: sudo cpupower" in governor
    assert "2.0 GiB" in swap
    assert "load average 9.0 on 4 cores" in warnings({**quiet, "load_1m": 9.0}, 4)[0]


def test_other_programs_are_noticed() -> None:
    from planner.probes import noise

    spin = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)
        facts = noise.find()
        assert facts["busy_ratio"] > 0.5
        assert facts["warnings"]
    finally:
        for process in spin:
            process.kill()
            process.wait()


def test_a_measurement_that_fails_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.probes import _child

    assert (
        "No module named" in _child.measure_apart("_child.nothing")["problem"]
        or _child.measure_apart("_child.nothing")["problem"]
    )
    monkeypatch.setattr(_child, "TIME_LIMIT_S", 0.01)
    assert _child.measure_apart("matmul")["problem"] == "took over 0.01 s"


# ---------------------------------------------------------------- the profile


@pytest.fixture
def quick(facts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Probes that answer at once with what the real ones found in this session; returns who was asked."""
    asked: list[str] = []
    for name in ("bandwidth", "matmul", "accelerators", "disk", "noise"):

        def find(name: str = name) -> dict[str, Any]:
            asked.append(name)
            return dict(facts[name], **({"busy_ratio": 0.0, "warnings": []} if name == "noise" else {}))

        monkeypatch.setattr(probes.get(name), "find", find)
    return asked


def test_a_machine_is_measured_once(quick: list[str], tmp_path: Path, facts: dict[str, Any]) -> None:
    told: list[str] = []
    first = machine.probe(tmp_path, tell=told.append)
    assert sorted(quick) == ["accelerators", "bandwidth", "disk", "matmul", "noise"]
    assert len(told) == 4
    assert first.measured
    assert first.device.memory_bytes_per_s == max(facts["bandwidth"]["read_bytes_per_s"].values())
    assert first.device.flop_per_s["float32"] == max(facts["matmul"]["flop_per_s"]["float32"].values())
    assert first.device.source.startswith("measured 20")
    quick.clear()
    assert machine.find("local", tmp_path) == first
    assert quick == []
    machine.probe(tmp_path, refresh=True)
    assert "bandwidth" in quick


def test_limits_are_looked_at_each_time(quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = machine.probe(tmp_path)
    memory = {**probes.get("memory_limits").find(), "limit_bytes": 2**30, "limit_source": "control group"}
    monkeypatch.setattr(probes.get("memory_limits"), "find", lambda: memory)
    again = machine.probe(tmp_path)
    assert again.memory_limit_bytes == 2**30
    assert again.fingerprint == first.fingerprint
    monkeypatch.setattr(probes.get("memory_limits"), "find", lambda: {**memory, "host_bytes": memory["host_bytes"] * 2})
    assert machine.probe(tmp_path).fingerprint != first.fingerprint


def test_rates_taken_under_load_are_taken_again_when_it_is_quieter(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = {**probes.get("noise").find(), "busy_ratio": 0.9, "warnings": ["other programs use 90%: stop them"]}
    monkeypatch.setattr(probes.get("noise"), "find", lambda: busy)
    assert machine.profile(tmp_path).problems == ("when the rates were measured, other programs use 90%: stop them",)
    quick.clear()
    monkeypatch.setattr(machine, "_PRICED_ON", set())  # as another process would find it
    machine.probe(tmp_path)
    assert "bandwidth" not in quick, "still as busy: nothing would be gained"
    monkeypatch.setattr(probes.get("noise"), "find", lambda: {**busy, "busy_ratio": 0.05, "warnings": []})
    machine.probe(tmp_path)
    assert "bandwidth" not in quick, "what one process prices is priced on the same rates"
    monkeypatch.setattr(machine, "_PRICED_ON", set())
    assert machine.profile(tmp_path).problems == ()
    assert "bandwidth" in quick


def test_damaged_or_foreign_profiles_are_replaced(quick: list[str], tmp_path: Path) -> None:
    first = machine.probe(tmp_path)
    (path,) = (tmp_path / "machines").iterdir()
    for text in ("", "{", "[]", json.dumps({"schema": 99}), json.dumps({"schema": 1, "hardware": 3})):
        path.write_text(text)
        assert machine.probe(tmp_path).fingerprint == first.fingerprint
        assert json.loads(path.read_text())["schema"] == machine.SCHEMA


@pytest.mark.parametrize("probe, what", [("bandwidth", "memory bandwidth"), ("matmul", "matrix product rates")])
def test_a_failed_measurement_is_an_error_with_its_cause(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: str, what: str
) -> None:
    monkeypatch.setattr(probes.get(probe), "find", lambda: {"problem": "took over 180 s"})
    with pytest.raises(EnvironmentProblem, match=f"{what} of this machine cannot be measured: took over 180 s"):
        machine.probe(tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_machines_are_found_by_name_and_file(quick: list[str], tmp_path: Path) -> None:
    here = machine.probe(tmp_path)
    (path,) = (tmp_path / "machines").iterdir()
    assert machine.find(str(path), tmp_path) == here
    from cost_models.catalogue import names

    known = next(n for n in names() if n.startswith("a100"))
    assert machine.find(known, tmp_path).name == known
    with pytest.raises(BadInput, match="unknown machine"):
        machine.find("no-such-machine", tmp_path)
    with pytest.raises(BadInput, match="not found"):
        machine.find(str(tmp_path / "absent.json"), tmp_path)
    stale = tmp_path / "stale.json"
    stale.write_text(json.dumps({"schema": 99, "hardware": {}}))
    with pytest.raises(BadInput, match="not a machine profile of this version"):
        machine.find(str(stale), tmp_path)


# ---------------------------------------------------------------- the commands


def command(*argv: str, cwd: Path) -> tuple[int, str, str, str]:
    script = (
        "import sys\nfrom planner.cli import main\n"
        f"code = main({list(argv)!r})\n"
        "heavy = sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))\n"
        "print('LOADED', heavy, file=sys.stderr)\nsys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, done.stderr.strip().splitlines()[-1]


def test_probe_shows_the_kept_profile_without_torch(quick: list[str], tmp_path: Path) -> None:
    kept = machine.profile(tmp_path / "store")
    code, out, err, loaded = command("probe", "--json", "--store", "store", cwd=tmp_path)
    assert (code, loaded) == (0, "LOADED []"), err
    shown = json.loads(out)
    assert shown["hardware"] == plain(kept.hardware)
    assert shown["taken_at"] == kept.taken_at
    code, out, err, _ = command("probe", "--store", "store", cwd=tmp_path)
    assert code == 0
    for what in (
        "processor",
        "memory limit",
        "memory read, 1 thread ",
        "float32 product",
        "GB/s",
        "Gflop/s",
        kept.hardware.fingerprint,
    ):
        assert what in out
    (tmp_path / "machine.json").write_text(json.dumps(shown))
    assert machine.find(str(tmp_path / "machine.json"), tmp_path) == kept.hardware


def test_doctor_is_quick_and_light(tmp_path: Path) -> None:
    start = time.process_time()
    code, out, err, loaded = command("doctor", "--json", cwd=tmp_path)
    assert (code, loaded) == (0, "LOADED []"), err
    assert time.process_time() - start < 1
    rows = json.loads(out)
    assert {row["check"] for row in rows} >= {
        "python",
        "torch",
        "engine transformers",
        "techniques",
        "GPU",
        "energy",
        "memory",
        "store",
        "noise",
    }
    assert {row["state"] for row in rows} <= {"ok", "warn", "fail"}
    assert all(row["fix"] for row in rows if row["state"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_doctor_fails_where_nothing_can_be_written(tmp_path: Path) -> None:
    code, out, err, _ = command("doctor", "--run-dir", "/proc/nowhere", cwd=tmp_path)
    assert code == 4
    line = next(line for line in out.splitlines() if line.startswith("run folder"))
    assert "fail" in line
    assert "--run-dir PATH" in line
    assert "1 check failed" in err


@pytest.mark.row(44)
def test_doctor_names_a_broken_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from planner.cli.doctor import _import_problem

    assert _import_problem(("json",)) is None
    problem = _import_problem(("no_such_module_at_all",))
    assert problem is not None
    assert "present but broken: ModuleNotFoundError" in problem


def test_rates_are_numbers(facts: dict[str, Any]) -> None:
    assert all(math.isfinite(rate) for rate in facts["bandwidth"]["read_bytes_per_s"].values())
