"""What a candidate's processes use, read from outside: the planner takes nobody's word for it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The fields of /proc/<pid>/stat that matter here. Times are in seconds, `started` in clock ticks since boot."""

    state: str
    parent: int
    session: int
    cpu_s: float
    started: int
    resident_bytes: int


def read_stat(pid: int) -> ProcessStat | None:
    """Return a process's figures, or None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessStat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=sum(int(f) for f in fields[11:15]) / TICKS_PER_S,  # own and reaped children's, user and system
        started=int(fields[19]),
        resident_bytes=int(fields[21]) * PAGE_BYTES,
    )


def group_of(pid: int) -> list[int]:
    """Return the ids of a candidate's processes: those of its session, and all descendants."""
    names = (p.name for p in Path("/proc").iterdir())
    stats = {int(n): s for n in names if n.isdigit() and (s := read_stat(int(n)))}
    members = {p for p, s in stats.items() if p == pid or s.session == pid}
    grown = True
    while grown:
        more = {p for p, s in stats.items() if s.parent in members} - members
        members |= more
        grown = bool(more)
    return sorted(members)


def resident_bytes(pids: list[int]) -> int:
    """Return the resident memory of several processes; pages they share are counted for each."""
    return sum(s.resident_bytes for pid in pids if (s := read_stat(pid)))


def proportional_bytes(pids: list[int]) -> int:
    """Return the resident memory of several processes with shared pages divided among their users (PSS).

    Slow for large processes, so it only settles what the sum of resident sizes leaves open.
    """
    total = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def peak_bytes(pid: int) -> int:
    """Return the highest resident size of one process since its start or the last `reset_peak`; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def reset_peak(pid: int) -> bool:
    """Start a new count of the highest resident size; False where the system does not permit it."""
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def folder_usage(folder: Path, *, max_files: int) -> tuple[int, int]:
    """Return (bytes allocated, files) under a folder, without following links; stops counting above `max_files`."""
    total = files = 0
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # removed meanwhile
        for entry in entries:
            files += 1
            if files > max_files:
                return total, files
            with suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total, files


def machine_busy_s() -> float:
    """Return the CPU seconds all processes of the machine have used since boot (/proc/stat: user to steal)."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[:8])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def oom_kills() -> int | None:
    """Return how often the kernel has killed for memory in this control group (v2, else v1), or None if unreadable."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    for _, controllers, path in groups:
        if controllers == "":
            file = Path("/sys/fs/cgroup", path.lstrip("/"), "memory.events")
        elif "memory" in controllers.split(","):
            file = Path("/sys/fs/cgroup/memory", path.lstrip("/"), "memory.oom_control")
        else:
            continue
        with suppress(OSError):
            for line in file.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return None


def kill_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a candidate's whole group. The fork server has not reaped it, so the id is still its own."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


class Paced:
    """A costly reading taken at most every `interval_s`, and so rarely that it uses below 1 % of one core."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._next = 0.0

    def due(self) -> bool:
        return time.monotonic() >= self._next

    def took(self, seconds: float) -> None:
        self._next = time.monotonic() + max(self._interval_s, 100 * seconds)
