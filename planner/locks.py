"""Two locks: one for the machine, held while something is timed, and one for a run folder, held by its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knowledge_base.errors import EnvironmentProblem
from knowledge_base.serde import write_json
from planner.isolation.watching import read_stat

POLL_S = 0.2


def measurement_lock_path() -> Path:
    """Return the file all users of this machine lock: in shared memory where there is such a folder."""
    shared = Path("/dev/shm")
    folder = shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    return folder / "leanplan-measurement.lock"


@contextmanager
def measurement_lock(
    *, waiting: Callable[[str], None] | None = None, path: Path | None = None, timeout_s: float | None = None
) -> Iterator[float]:
    """Hold the machine-wide measurement lock; yield the seconds it was waited for.

    Two measurements at once spoil each other, so timed parts take turns. The kernel frees the lock when its holder
    ends, however it ends. Containers with file systems of their own do not see each other's lock; the CPU time others
    used is recorded with every block for that case.

    Args:
        waiting: told once, and again every 30 s, who holds the lock.

    Raises:
        EnvironmentProblem: the file cannot be opened, or `timeout_s` is over.
    """
    path = path or measurement_lock_path()
    handle = _open(path)
    began = time.monotonic()
    told = -30.0
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - began
                if timeout_s is not None and waited >= timeout_s:
                    raise EnvironmentProblem(
                        f"another measurement ({_holder(handle)}) still runs on this machine after {waited:.0f} s",
                        hint="wait for it to end, or stop it; timings taken side by side would be wrong",
                        where=str(path),
                    ) from None
                if waiting and waited - told >= 30:
                    told = waited
                    waiting(f"waiting for another measurement on this machine ({_holder(handle)})")
                time.sleep(POLL_S)
        yield time.monotonic() - began
    finally:
        os.close(handle)  # frees the lock


def _open(path: Path) -> int:
    # Reading is enough to lock. Another user's file must not be opened with O_CREAT: sticky folders refuse that.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        for _ in range(3):
            try:
                handle = os.open(path, flags)
            except FileNotFoundError:
                with suppress(FileExistsError):
                    made = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                    os.fchmod(made, 0o644)
                    return made
                continue
            if stat.S_ISREG(os.fstat(handle).st_mode):
                return handle
            os.close(handle)
            break
    except OSError as error:
        reason = error.strerror
    else:
        reason = "not a regular file"
    raise EnvironmentProblem(f"cannot open the measurement lock: {reason}", hint="remove this file", where=str(path))


def _holder(handle: int) -> str:
    """Return `pid 4711`, from the kernel's own table of locks, or `unknown process`."""
    facts = os.fstat(handle)
    device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}:{facts.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if "FLOCK" in fields and "->" not in fields and device in fields:
                return f"pid {fields[fields.index(device) - 1]}"
    return "unknown process"


class RunLock:
    """Says that a process works in a run folder. A context manager; of two processes the second is refused.

    The holder is known by process id *and* start time, so the lock of a dead process is taken over even when its id
    has been given to another one.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock.json"
        self.taken_over = False

    def __enter__(self) -> RunLock:
        guard = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)  # nobody else looks and writes meanwhile
        try:
            fcntl.flock(guard, fcntl.LOCK_EX)
            holder = self._read()
            if holder is not None:
                if _alive(holder):
                    where = "" if holder.get("host") == socket.gethostname() else f" on {holder.get('host')}"
                    raise EnvironmentProblem(
                        f"run is in use by pid {holder.get('pid')}{where} (since {holder.get('since')})",
                        hint=f"wait for it to end, or use another --run-dir; if it is gone, remove {self.path}",
                        where=str(self.path.parent),
                    )
                self.taken_over = True
            write_json(self.path, _identity() | {"since": time.strftime("%H:%M")})
        finally:
            os.close(guard)
        return self

    def __exit__(self, *_: object) -> None:
        holder = self._read()
        if holder is not None and all(holder.get(k) == v for k, v in _identity().items()):
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict | None:
        try:
            holder = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, UnicodeDecodeError):
            return {}  # damaged: nobody can be named, so nobody holds it
        return holder if isinstance(holder, dict) else {}


def _identity() -> dict[str, object]:
    me = read_stat(os.getpid())
    return {"pid": os.getpid(), "started": me.started if me else 0, "boot": _boot(), "host": socket.gethostname()}


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _alive(holder: dict) -> bool:
    if not isinstance(holder.get("pid"), int):
        return False
    if holder.get("host") != socket.gethostname():
        return True  # cannot be looked up from here: believe it
    process = read_stat(holder["pid"])
    same_boot = holder.get("boot") == _boot()
    return same_boot and process is not None and process.state != "Z" and process.started == holder.get("started")


def in_use(folder: Path) -> bool:
    """Return whether a living process holds the lock of this run folder."""
    holder = RunLock(folder)._read()
    return holder is not None and _alive(holder)
