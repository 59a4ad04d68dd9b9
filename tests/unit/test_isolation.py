"""Candidates live in processes of their own: clean environment, limits, and nothing of them is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from knowledge_base.errors import CandidateFailed
from planner.isolation import Limits, Servers, watching
from planner.isolation.environment import clean_environment
from planner.scrubbing import scrub, scrub_bytes

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(memory_bytes=1 << 30, time_s=60, disk_bytes=64 << 20)


@pytest.fixture(scope="module")
def servers():
    with Servers(extra_ops="hostile_ops") as servers:
        yield servers


@pytest.fixture
def start(servers, tmp_path):
    def start(preload=(), **changes):
        limits = Limits(**{**{f: getattr(LIMITS, f) for f in LIMITS.__slots__}, **changes})
        return servers.start(preload, folder=tmp_path / "work", limits=limits, log=tmp_path / "log.txt")

    return start


def gone(pid: int, within_s: float = 3.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        stat = watching.read_stat(pid)
        if stat is None or stat.state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_replies_and_progress_come_back(start):
    told = []
    with start() as candidate:
        reply = candidate.call("echo", {"a": 1, "b": [2.5, "ü"]}, timeout_s=10, progress=lambda *p: told.append(p))
        again = candidate.call("echo", {"big": "x" * 500_000}, timeout_s=10)
    assert reply == {"a": 1, "b": [2.5, "ü"]}
    assert told == [("repeating", 0.5)]
    assert len(again["big"]) == 500_000


def test_forking_a_candidate_takes_less_than_a_second(start):
    start().stop()  # the server's own start is paid once
    with start() as candidate:
        assert candidate.ready_s < 1.0


@pytest.mark.rule("candidate", "limits")
def test_the_candidate_sees_a_clean_world(start, tmp_path, monkeypatch):
    for name in (
        "HF_TOKEN",
        "MY_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD",
        "CI",
        "GITHUB_SHA",
        "LD_PRELOAD",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, "canary")
    with Servers(extra_ops="hostile_ops") as servers:  # a server started with these in the planner's environment
        with servers.start((), folder=tmp_path / "work", limits=LIMITS, log=tmp_path / "log.txt") as candidate:
            facts = candidate.call("facts", {}, timeout_s=10)
            assert facts["session"] == candidate.pid
    assert "canary" not in json.dumps(facts["environ"])
    assert facts["environ"]["HF_HUB_OFFLINE"] == "1"
    assert facts["environ"]["HOME"] == facts["environ"]["TMPDIR"] == facts["cwd"] == str(tmp_path / "work")
    assert facts["stdin"] == "/dev/null"
    assert facts["umask"] == 0o077
    assert facts["core"] == 0
    assert facts["oom_score_adj"] == 500
    assert facts["fds"] <= 5  # 0, 1, 2, the socket, and the listing itself


@pytest.mark.rule("candidate", "redaction")
def test_the_environment_is_an_allow_list():
    given = {"PATH": "/bin", "LANG": "C", "ANYTHING_NEW": "x", "LD_LIBRARY_PATH": "y", "PYTHONHOME": "z"}
    kept = clean_environment(Path("/nowhere"), given)
    assert kept["PATH"] == "/bin"
    assert not {"ANYTHING_NEW", "LD_LIBRARY_PATH", "PYTHONHOME"} & set(kept)


@pytest.mark.rule("redaction")
def test_secrets_are_scrubbed():
    text = b"hf_abcdefghijklmnopqrst postgresql://me:pass@host/db AKIAABCDEFGHIJKLMNOP and shf_short"
    assert scrub(text.decode()) == "*** postgresql://***@host/db *** and shf_short"
    assert scrub_bytes(text) == b"*** postgresql://***@host/db *** and shf_short"


def test_an_engine_that_needs_no_torch_gets_none(start):
    with start() as candidate:
        assert candidate.call("facts", {}, timeout_s=10)["modules"] == []


def test_torch_is_preloaded_with_one_thread_and_runs_its_pool_in_the_candidate(start):
    pytest.importorskip("torch")
    with start(("torch",)) as candidate:
        assert candidate._server.threads == 1
        assert candidate.call("facts", {}, timeout_s=10)["modules"] == ["torch", "numpy"]
        assert candidate.call("parallel", {}, timeout_s=60) == {"sum": 600.0**3, "threads": 2}


@pytest.mark.row(43)
def test_a_module_that_cannot_be_imported_is_named(start):
    with pytest.raises(CandidateFailed, match="no_such_engine_module") as caught:
        start(("no_such_engine_module",))
    assert caught.value.kind == "engine_missing"


@pytest.mark.row(49)
def test_stop_takes_descendants_along_even_daemonised_ones(start):
    told = []
    with start() as candidate, pytest.raises(CandidateFailed) as caught:
        candidate.call("hang_with_child", {}, timeout_s=1.5, progress=lambda *p: told.append(p))
    assert caught.value.kind == "timeout"
    pids = [candidate.pid, *map(int, told[0][0].split())]
    assert len(pids) == 3
    assert all(gone(pid) for pid in pids)


def test_two_candidates_live_side_by_side(servers, tmp_path):
    def begin(n):
        return servers.start((), folder=tmp_path / f"w{n}", limits=LIMITS, log=tmp_path / f"{n}.txt")

    with begin(1) as first, begin(2) as second:
        with pytest.raises(CandidateFailed):
            first.call("segfault", {}, timeout_s=10)
        assert second.call("echo", {"x": 1}, timeout_s=10) == {"x": 1}


def test_a_killed_server_is_replaced(start):
    with start() as candidate:
        os.kill(candidate._server.process.pid, signal.SIGKILL)
        with pytest.raises(CandidateFailed) as caught:
            candidate.call("hang", {}, timeout_s=10)
        assert caught.value.kind == "killed"
        assert gone(candidate.pid)
    with start() as candidate:
        assert candidate.call("echo", {"x": 1}, timeout_s=10) == {"x": 1}


@pytest.mark.row(60)
@pytest.mark.promise("P5")
def test_hurry_interrupts_a_call(servers, start):
    candidate = start()
    began = time.monotonic()
    servers.hurry(0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            candidate.call("raw", {"text": ""}, timeout_s=60)
    finally:
        servers.stop_at = None
    assert time.monotonic() - began < 3
    assert gone(candidate.pid)


PLANNER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from planner.isolation import Limits, Servers
    limits = Limits(memory_bytes=1 << 30, time_s=60, disk_bytes=1 << 30)
    with Servers(extra_ops="hostile_ops") as servers:
        with servers.start((), folder=Path(sys.argv[1]), limits=limits, log=Path(sys.argv[1], "log.txt")) as candidate:
            print(candidate.pid, candidate._server.process.pid, flush=True)
            candidate.call("hang_with_child", {}, timeout_s=60, progress=lambda stage, _: print(stage, flush=True))
    """
)


@pytest.mark.row(59)
@pytest.mark.promise("P1")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_planner_takes_everything_along(tmp_path, number):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    planner = subprocess.Popen(
        [sys.executable, "-c", PLANNER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        pids = [int(p) for p in f"{planner.stdout.readline()} {planner.stdout.readline()}".split()]
        assert len(pids) == 4
        assert not any(gone(pid, 0) for pid in pids)
        planner.send_signal(number)
        planner.wait(20)
        assert all(gone(pid, 8) for pid in pids)
    finally:
        planner.kill()
        planner.wait()
