"""The machine-wide measurement lock, and the lock of a run folder (rows 64 and 65 of the table of faults)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from knowledge_base.errors import EnvironmentProblem, ExitCode
from planner.locks import RunLock, measurement_lock, measurement_lock_path

ROOT = Path(__file__).resolve().parents[2]


def holder(code: str, *arguments: str) -> subprocess.Popen:
    """Start a process that takes a lock, says so, and keeps it."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


MEASURING = """
import sys, time
from pathlib import Path
from planner.locks import measurement_lock
with measurement_lock(path=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
RUNNING = """
import sys, time
from pathlib import Path
from planner.locks import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.row(65)
def test_one_measurement_at_a_time(tmp_path):
    path = tmp_path / "lock"
    process = holder(MEASURING, str(path))
    told = []
    try:
        with (
            pytest.raises(EnvironmentProblem, match="another measurement") as caught,
            measurement_lock(path=path, timeout_s=0.3, waiting=told.append),
        ):
            pytest.fail("two hold the lock")
        assert str(process.pid) in told[0] or "unknown process" in told[0]
        assert caught.value.exit_code is ExitCode.ENVIRONMENT
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with measurement_lock(path=path, timeout_s=5) as waited:  # the kernel freed it
        assert waited < 1


def test_threads_of_one_process_take_turns(tmp_path):
    inside, most = [], []

    def work():
        with measurement_lock(path=tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.05)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_link_in_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentProblem, match="cannot open"), measurement_lock(path=tmp_path / "lock"):
        pytest.fail("followed the link")
    assert not (tmp_path / "elsewhere").exists()


def test_the_lock_file_is_one_for_all_users():
    assert measurement_lock_path() == measurement_lock_path()
    with measurement_lock(timeout_s=600):
        assert measurement_lock_path().stat().st_mode & 0o777 == 0o644


@pytest.mark.row(64, 65)
@pytest.mark.promise("P2")
def test_a_run_folder_has_one_process(tmp_path):
    process = holder(RUNNING, str(tmp_path))
    try:
        with (
            pytest.raises(EnvironmentProblem, match=rf"run is in use by pid {process.pid} \(since \d\d:\d\d\)"),
            RunLock(tmp_path),
        ):
            pytest.fail("two hold the run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / "lock.json").exists()  # SIGKILL leaves it behind
    with RunLock(tmp_path) as lock:
        assert lock.taken_over
    assert not (tmp_path / "lock.json").exists()


def test_a_free_run_folder_is_not_taken_over(tmp_path):
    with RunLock(tmp_path) as lock:
        assert not lock.taken_over


@pytest.mark.row(65)
@pytest.mark.parametrize("change", [{"started": 1}, {"boot": "another"}, {"pid": 2**22 - 3}])
def test_a_living_process_with_the_dead_holders_id_does_not_keep_the_lock(tmp_path, change):
    with RunLock(tmp_path):
        recorded = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(recorded | change))
    with RunLock(tmp_path) as lock:
        assert lock.taken_over


def test_a_holder_on_another_host_is_believed(tmp_path):
    with RunLock(tmp_path):
        recorded = json.loads((tmp_path / "lock.json").read_text())
    (tmp_path / "lock.json").write_text(json.dumps(recorded | {"host": "elsewhere"}))
    with pytest.raises(EnvironmentProblem, match="on elsewhere"), RunLock(tmp_path):
        pytest.fail("took it")


@pytest.mark.row(65)
@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', '{"pid": "x"}'])
def test_a_damaged_lock_is_taken_over(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with RunLock(tmp_path) as lock:
        assert lock.taken_over
