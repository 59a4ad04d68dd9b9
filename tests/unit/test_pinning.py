"""Which cores the threads of a plan are kept on, by what the system tells of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knowledge_base.engines import _pinning
from knowledge_base.errors import CandidateFailed


def lay(system: Path, cores: dict[int, tuple[int, int, int]], **more: str) -> Path:
    """Write a system's files of cores, each with its socket, physical core and memory node."""
    for number, (package, physical, node) in cores.items():
        folder = system / "system" / "cpu" / f"cpu{number}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology" / "physical_package_id").write_text(f"{package}\n")
        (folder / "topology" / "core_id").write_text(f"{physical}\n")
        (folder / f"node{node}").mkdir()
        if capacity := more.get(f"capacity{number}"):
            (folder / "cpu_capacity").write_text(capacity)
    if fast := more.get("fast"):
        (system / "cpu_core").mkdir()
        (system / "cpu_core" / "cpus").write_text(fast)
    return system


def test_one_thread_of_each_core_comes_first_and_one_node_before_the_next(tmp_path: Path) -> None:
    two_sockets = {n: (n % 4 // 2, n % 2, n % 4 // 2) for n in range(8)}  # 4..7 are the second threads of 0..3
    assert _pinning.in_order(range(8), lay(tmp_path, two_sockets)) == (0, 1, 2, 3, 4, 5, 6, 7)
    beside = {n: (n // 4, n // 2, n // 4) for n in range(8)}  # threads of a core are neighbours
    assert _pinning.in_order(range(8), lay(tmp_path / "beside", beside)) == (0, 2, 4, 6, 1, 3, 5, 7)
    assert _pinning.in_order({3, 5, 1}, tmp_path / "beside") == (1, 3, 5)  # each is its core's only one that is allowed


def test_the_fast_cores_of_two_kinds_come_first(tmp_path: Path) -> None:
    cores = {n: (0, n // 2 if n < 4 else n, 0) for n in range(6)}
    assert _pinning.in_order(range(6), lay(tmp_path / "intel", cores, fast="0-3\n")) == (0, 2, 1, 3, 4, 5)
    assert _pinning.in_order(range(6), lay(tmp_path / "none", cores)) == (0, 2, 4, 5, 1, 3)
    arm = {n: (0, n, 0) for n in range(4)}
    capacities = {"capacity0": "400", "capacity1": "400", "capacity2": "1024", "capacity3": "1024"}
    assert _pinning.in_order(range(4), lay(tmp_path / "arm", arm, **capacities)) == (2, 3, 0, 1)


def test_a_system_that_tells_nothing_gives_cores_in_their_order(tmp_path: Path) -> None:
    assert _pinning.in_order({7, 2, 5}, tmp_path) == (2, 5, 7)


def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(CandidateFailed, match=r"threads cannot each have one of the \d+ cores"):
        _pinning.chosen(10_000)
    assert set(_pinning.chosen()) == os.sched_getaffinity(0)


def test_without_the_word_nothing_is_pinned() -> None:
    before = os.sched_getaffinity(0)
    _pinning.pin({"threads": 1})
    assert os.sched_getaffinity(0) == before
