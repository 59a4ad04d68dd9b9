"""A candidate cannot end the search (promise P3): each fault is provoked for real and becomes a result with a reason."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import ROOT

from knowledge_base.errors import CandidateFailed
from planner.isolation import Limits, Servers, watching

ROOMY = {"memory_bytes": 1 << 30, "time_s": 60, "disk_bytes": 64 << 20}


@pytest.fixture(scope="module")
def servers():
    with Servers(extra_ops="hostile_ops") as servers:
        yield servers


@pytest.fixture
def fault(servers, tmp_path):
    """Run one hostile operation; return its failure, how long it took, and the candidate. Nothing may be left."""

    def fault(op, payload=None, timeout_s=20.0, preload=(), **limits):
        limits = Limits(**{**ROOMY, **limits})
        with servers.start(preload, folder=tmp_path / "work", limits=limits, log=tmp_path / "log.txt") as candidate:
            began = time.monotonic()
            with pytest.raises(CandidateFailed) as caught:
                candidate.call(op, payload or {}, timeout_s=timeout_s)
            took = time.monotonic() - began
        assert watching.group_of(candidate.pid) == []
        return caught.value, took, candidate

    return fault


@pytest.mark.row(46, 48, 50, 52)
@pytest.mark.promise("P3", "P12")
@pytest.mark.parametrize(
    ("op", "payload", "kind", "words"),
    [
        ("segfault", {}, "crashed", "crashed (SIGSEGV)"),
        ("abort", {}, "crashed", "crashed (SIGABRT)"),
        ("illegal_instruction", {}, "crashed", "crashed (SIGILL)"),
        ("kill_myself", {}, "killed", "killed by the system, probably out of memory"),
        ("leave", {"code": 0}, "invalid_result", "ended without a result (exit 0)"),
        ("leave", {"code": 7}, "crashed", "exit 7"),
        ("leave_child_with_socket", {}, "crashed", "exit 3"),
        ("raw", {"text": "garbage\n"}, "invalid_result", "what is not a result"),
        ("raw", {"text": '{"id": 1, "ok": {"x": NaN}}\n'}, "invalid_result", "NaN is not a finite number"),
        ("raw", {"text": '{"id": 1, "ok": {"x": 1e999}}\n'}, "invalid_result", "1e999 is not a finite number"),
        ("raw", {"text": '{"id": 1, "ok": 5}\n'}, "invalid_result", "malformed reply"),
        ("raw", {"text": '{"id": 1, "error": {"kind": "made_up", "message": "x"}}\n'}, "invalid_result", "malformed reply"),
        ("raw", {"text": '{"id": 9, "ok": {}}\n'}, "invalid_result", "answers no question"),
        ("raw", {"text": '{"progress": 5}\n'}, "invalid_result", "malformed progress"),
        ("raw", {"text": "[1]\n"}, "invalid_result", "what is not a result: list"),
        ("raw", {"text": "[" * 100_000 + "\n"}, "invalid_result", "what is not a result"),
        ("raw", {"text": "9" * 10_000 + "\n"}, "invalid_result", "what is not a result"),
        ("raw", {"text": "\udcff\n".encode("utf-8", "replace").decode() + "\n"}, "invalid_result", "what is not a result"),
        ("raw", {"text": "x" * 1024, "times": 4096}, "invalid_result", "more than 1 MiB in one line"),
        ("nan", {}, "invalid_result", "no JSON form"),
        ("big_reply", {}, "invalid_result", "1048576 are allowed"),
        ("unserialisable", {}, "invalid_result", "no JSON form"),
        ("fail", {}, "crashed", "ValueError: the first cause"),
        ("fail_late", {}, "oom_host", "MemoryError"),
        ("fail_disk", {}, "disk_full", "No space left on device"),
        ("fail_candidate", {"kind": "unsupported", "message": "no such layer"}, "unsupported", "no such layer"),
        ("fail_candidate", {"kind": "build_error", "message": "hf_abcdefghijklmnopqrst"}, "build_error", "***"),
        ("no_such_operation", {}, "crashed", "KeyError: 'no_such_operation'"),
    ],
)  # fmt: skip
def test_a_fault_is_a_result_with_its_reason(fault, op, payload, kind, words):
    failure, took, _ = fault(op, payload)
    assert failure.kind == kind
    assert words in failure.message
    assert "log.txt" in failure.hint
    assert took < 5


@pytest.mark.row(49)
@pytest.mark.promise("P4")
def test_a_hang_that_ignores_sigterm_is_stopped_within_five_seconds_of_the_limit(fault):
    failure, took, candidate = fault("hang", timeout_s=0.5)
    assert failure.kind == "timeout"
    assert "pondering the question" in failure.message
    assert 0.5 <= took < 0.5 + 5.5
    log = candidate.log.read_text()
    assert "hostile_ops.py" in log and "in hang" in log  # its last stack


@pytest.mark.row(49)
@pytest.mark.promise("P4")
def test_the_limit_on_the_whole_life_ends_a_call_too(fault):
    failure, took, _ = fault("raw", {"text": ""}, timeout_s=60, time_s=1.0)
    assert failure.kind == "timeout"
    assert took < 1.0 + 5.5


@pytest.mark.row(46)
@pytest.mark.promise("P4")
def test_memory_above_the_limit_ends_it(fault):
    limit = 1 << 30
    failure, _, candidate = fault("allocate", memory_bytes=limit)
    assert failure.kind == "oom_host"
    assert "of the 1 GiB limit while quantising layer 12" in failure.message
    assert candidate.group_peak_bytes < limit * 1.1


@pytest.mark.row(46)
def test_memory_is_counted_over_all_its_processes(fault):
    failure, _, _ = fault("allocate_in_children", memory_bytes=250 << 20)
    assert failure.kind == "oom_host"


@pytest.mark.row(51)
def test_too_many_processes_end_it(fault):
    failure, _, _ = fault("fork_many", {"count": 40}, processes=20)
    assert failure.kind == "killed"
    assert "20 are allowed" in failure.message


@pytest.mark.row(51)
@pytest.mark.promise("P4")
def test_too_many_bytes_on_disk_end_it(fault):
    failure, _, _ = fault("write_much", disk_bytes=40 << 20)
    assert failure.kind == "disk_full"
    assert "the limit is 40 MiB" in failure.message


@pytest.mark.row(51)
@pytest.mark.promise("P4")
@pytest.mark.rule("limits")
def test_one_file_never_grows_beyond_the_limit(fault, tmp_path):
    failure, _, _ = fault("write_one_file", disk_bytes=40 << 20)
    assert failure.kind == "disk_full"
    assert "File too large" in failure.message
    assert (tmp_path / "work" / "big").stat().st_size <= 40 << 20


@pytest.mark.row(51)
def test_too_many_files_end_it(fault):
    failure, _, _ = fault("write_many", files=2000)
    assert failure.kind == "disk_full"
    assert "2000 files" in failure.message


@pytest.mark.row(46)
def test_torch_out_of_host_memory_is_recognised(fault):
    pytest.importorskip("torch")
    failure, _, _ = fault("torch_memory", preload=("torch",))
    assert failure.kind == "oom_host"


@pytest.mark.row(47)
@pytest.mark.gpu
def test_torch_out_of_device_memory_is_recognised(fault):
    failure, _, _ = fault("gpu_memory", preload=("torch",), memory_bytes=16 << 30)
    assert failure.kind == "oom_device"


@pytest.mark.row(48)
def test_a_kill_from_outside_is_told_as_the_system_s(servers, tmp_path):
    with servers.start((), folder=tmp_path / "work", limits=Limits(**ROOMY), log=tmp_path / "log.txt") as candidate:
        threading.Timer(0.3, os.kill, (candidate.pid, signal.SIGKILL)).start()
        with pytest.raises(CandidateFailed, match="killed by the system, probably out of memory") as caught:
            candidate.call("hang", {}, timeout_s=20)
    assert caught.value.kind == "killed"
    assert "while pondering the question" in caught.value.message


@pytest.fixture
def small_memory_group() -> Iterator[Path]:
    """A control group of 400 MiB below this process's own; skips where one may not be made."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {controllers: path.lstrip("/") for _, controllers, path in groups}
    if "memory" in places:
        group, limit = Path("/sys/fs/cgroup/memory", places["memory"], f"test-{os.getpid()}"), "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup", places.get("", ""), f"test-{os.getpid()}"), "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(400 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


PLANNER_IN_A_GROUP = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
    from knowledge_base.errors import CandidateFailed
    from planner.isolation import Limits, Servers
    limits = Limits(memory_bytes=1 << 40, time_s=60, disk_bytes=1 << 30)
    with Servers(extra_ops="hostile_ops") as servers:
        with servers.start((), folder=Path(sys.argv[2]), limits=limits, log=Path(sys.argv[2], "log.txt")) as candidate:
            try:
                candidate.call("allocate", {}, timeout_s=50)
            except CandidateFailed as failure:
                print(failure.kind, failure.message)
        with servers.start((), folder=Path(sys.argv[2]), limits=limits, log=Path(sys.argv[2], "log.txt")) as candidate:
            print(candidate.call("echo", {"goes": "on"}, timeout_s=10))
    """
)


@pytest.mark.row(48)
def test_the_kernel_s_own_memory_killer_takes_the_candidate_and_is_recognised(small_memory_group, tmp_path):
    """Real pressure: the whole group is short of memory, the kernel chooses, and it must choose the candidate."""
    done = subprocess.run(
        [sys.executable, "-c", PLANNER_IN_A_GROUP, str(small_memory_group), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    first, then = done.stdout.splitlines()
    assert first == "oom_host killed by the system for memory (oom_kill 0 -> 1) while quantising layer 12"
    assert then == "{'goes': 'on'}"


def test_an_error_it_reports_leaves_it_usable(servers, tmp_path):
    with servers.start((), folder=tmp_path, limits=Limits(**ROOMY), log=tmp_path / "log.txt") as candidate:
        with pytest.raises(CandidateFailed):
            candidate.call("fail", {}, timeout_s=10)
        assert candidate.call("echo", {"x": 1}, timeout_s=10) == {"x": 1}
    with pytest.raises(CandidateFailed, match="already stopped"):
        candidate.call("echo", {}, timeout_s=10)


@pytest.mark.rule("redaction")
def test_the_log_is_capped_and_scrubbed(servers, tmp_path):
    limits = Limits(**ROOMY, log_bytes=1 << 20)
    with servers.start((), folder=tmp_path / "w", limits=limits, log=tmp_path / "log.txt") as candidate:
        candidate.call("chatter", {"kilobytes": 5000}, timeout_s=20)
    text = (tmp_path / "log.txt").read_bytes()
    assert text.startswith(b"token ***\nyyy")
    assert 500_000 < len(text) <= 1 << 20
