"""The planner's side: fork servers, and candidates that are asked, watched, limited and stopped."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import FAILURE_KINDS, CandidateFailed, EnvironmentProblem
from knowledge_base.field import overlay
from planner import environments
from planner.isolation import watching
from planner.isolation.environment import clean_environment
from planner.scrubbing import scrub, scrub_bytes

GRACE_S = 5.0  # from the decision to stop a candidate to SIGKILL
PRELOAD_S = 180.0  # importing torch and transformers on a slow, busy machine
FORK_S = 30.0
MAX_REPLY_BYTES = 1 << 20
LOG_RESERVE_BYTES = 256 << 10  # kept free for the stack of a candidate that is stopped

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one candidate may use, all its processes together."""

    memory_bytes: int
    time_s: float  # whole life of the candidate
    disk_bytes: int  # in its folder
    processes: int = 256
    files: int = 100_000
    log_bytes: int = 10 << 20


class Servers:
    """Keeps one fork server for each set of preloaded modules; stops them, and all candidates, on exit.

    Modules of an engine that lives in an environment of its own are imported by that environment's interpreter, which
    finds Leanplan's packages and nothing else of ours.

        with Servers() as servers:
            with servers.start(engine.preload, folder=run / "work", limits=limits, log=run / "log.txt") as candidate:
                reply = candidate.call("open", {...}, timeout_s=60)

    Args:
        extra_ops: name of a module whose `OPS` are added to the worker's. Calibration brings its own; the tests provoke faults with it.

    Raises:
        EnvironmentProblem: not Linux; process limits and memory readings rest on /proc.
    """

    def __init__(self, *, extra_ops: str | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise EnvironmentProblem(
                f"candidates can only be run on Linux, this is {sys.platform}",
                hint="predict instead of measuring: leanplan plan --predict",
            )
        self._extra_ops = extra_ops
        self._home = Path(tempfile.mkdtemp(prefix="leanplan-servers-"))
        self._servers: dict[tuple[str, ...], _Server] = {}
        self._lock = threading.Lock()
        self.stop_at: float | None = None  # monotonic; see hurry

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, preload: tuple[str, ...]) -> None:
        """Start the server of these modules without waiting for its imports."""
        self._server(preload)

    def start(self, preload: tuple[str, ...], *, folder: Path, limits: Limits, log: Path) -> Candidate:
        """Fork a candidate that works in `folder` and writes what it prints to `log`.

        Raises:
            CandidateFailed: `engine_missing` when a module to preload cannot be imported (with the first cause).
        """
        return Candidate(self, self._server(preload), folder=folder, limits=limits, log=log)

    def hurry(self, seconds: float) -> None:
        """Give calls in progress, and later ones, this long in all; then they raise KeyboardInterrupt.

        Only sets a number, so a signal handler may call it. `hurry(0)` stops at once.
        """
        self.stop_at = time.monotonic() + seconds

    def close(self) -> None:
        """Stop every server and with it every candidate."""
        with self._lock:
            for server in self._servers.values():
                server.close()
            self._servers.clear()
        shutil.rmtree(self._home, ignore_errors=True)

    def _server(self, preload: tuple[str, ...]) -> _Server:
        with self._lock:
            server = self._servers.get(preload)
            if server is None or not server.alive:
                server = self._servers[preload] = _Server(preload, self._extra_ops, self._home)
            return server


class _Server:
    """One fork server process and the channel to it."""

    def __init__(self, preload: tuple[str, ...], extra_ops: str | None, home: Path) -> None:
        self.preload = preload
        self._lock = threading.Lock()
        self._hello: dict[str, Any] | None = None
        python = environments.interpreter(preload)
        if not python.exists():
            raise CandidateFailed(
                "engine_missing", f"no interpreter at {python}", hint="leanplan doctor shows what is installed"
            )
        ours = python == Path(sys.executable)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {
            "fd": theirs.fileno(),
            "parent": os.getpid(),
            # Ours finds the very modules the planner would; another environment's, its own and the four packages.
            "path": [str(Path(p).resolve()) for p in sys.path if p] if ours else None,
            "packages": None if ours else str(_packages(home)),
            "knowledge": None if ours else [str(folder) for folder in overlay.folders()],
            "preload": list(preload),
            "extra_ops": extra_ops,
            "pdeathsig": threading.current_thread() is threading.main_thread(),
        }
        self._log = home / f"server-{len(list(home.iterdir()))}.log"
        with theirs, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(python), "-E", "-P", "-u", str(Path(__file__).with_name("server.py")), json.dumps(settings)],
                env=clean_environment(home),
                cwd=home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C in the terminal is the planner's to handle
            )

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def request(self, message: Mapping[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        """Send one request and return the reply.

        Raises:
            CandidateFailed: the modules could not be imported, or the server is gone.
        """
        with self._lock:
            if self._hello is None:
                self._hello = self._receive(PRELOAD_S)
            if "error" in self._hello:
                what = " ".join(self.preload)
                raise CandidateFailed(
                    "engine_missing",
                    f"cannot import {what}: {self._hello['error']}",
                    hint="leanplan doctor shows what is installed",
                )
            try:
                socket.send_fds(self.channel, [json.dumps(message).encode()], list(fds))
            except OSError as error:
                raise self._gone() from error
            return self._receive(FORK_S)

    @property
    def threads(self) -> int:
        """Threads the server had when it was ready to fork; more than one would make forking unsafe."""
        return int((self._hello or {}).get("threads", 0))

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self.channel.settimeout(timeout_s)
        try:
            data = self.channel.recv(65536)
        except TimeoutError as error:
            self.close()
            raise CandidateFailed("timeout", f"the fork server gave no answer in {timeout_s:.0f} s") from error
        except OSError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        return json.loads(data)

    def _gone(self) -> CandidateFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        status = self.process.returncode
        said = self._log.read_bytes() if self._log.exists() else b""
        last = said[-500:].decode(errors="replace").strip().rpartition("\n")[2]
        how = signal.Signals(-status).name if status and status < 0 else f"exit {status}"
        return CandidateFailed("killed", f"the fork server ended ({how}){': ' + last if last else ''}")

    def close(self) -> None:
        """End the server; it kills and reaps its candidates first."""
        self.channel.close()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGTERM)  # still importing: it has no candidates yet
            try:
                self.process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def _packages(home: Path) -> Path:
    """Return a folder that holds Leanplan's packages and nothing that is installed beside them."""
    folder = home / "packages"
    folder.mkdir(exist_ok=True)
    root = Path(__file__).resolve().parents[2]
    for name in ("knowledge_base", "cost_models", "search", "planner"):
        with suppress(FileExistsError):
            (folder / name).symlink_to(root / name)
    return folder


class Candidate:
    """One process that builds or measures one plan. Use as a context manager; leaving it stops the whole group.

    `call` asks it for one operation. Whatever goes wrong becomes `CandidateFailed` and ends the candidate, except an
    error the operation itself reported: after that it can be asked again.
    """

    def __init__(self, servers: Servers, server: _Server, *, folder: Path, limits: Limits, log: Path) -> None:
        began = time.monotonic()
        self.folder, self.limits, self.log = folder.resolve(), limits, log
        self.failure: CandidateFailed | None = None
        self.group_peak_bytes = 0  # highest sum over its processes that the watcher saw
        self._servers, self._server = servers, server
        self._deadline = began + limits.time_s
        self._number = 0
        self._stage = "starting"
        self._verdict: tuple[str, str] | None = None  # set by the watcher just before it kills
        self._ended = False
        self._pending = b""
        self._kills_before = watching.oom_kills()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = log.open("ab", buffering=0)
        self._control, theirs = socket.socketpair()
        read_log, write_log = os.pipe()
        try:
            order = {"folder": str(self.folder), "file_bytes": limits.disk_bytes}
            self.pid: int = server.request({"fork": order}, (theirs.fileno(), write_log))["pid"]
        except BaseException:
            os.close(read_log)
            self._log_file.close()
            self._control.close()
            raise
        finally:
            theirs.close()
            os.close(write_log)
        self._pidfd = os.pidfd_open(self.pid)
        self._control.setblocking(False)
        self._over = threading.Event()
        self._members = [self.pid]
        self._watcher = threading.Thread(target=self._watch, args=(read_log,), name=f"watch-{self.pid}", daemon=True)
        self._watcher.start()
        try:
            if self._next_message(time.monotonic() + FORK_S, "starting") != {"ready": True}:
                raise self._fail("invalid_result", "the candidate did not start as agreed")
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(
        self, op: str, payload: Mapping[str, Any], *, timeout_s: float, progress: Progress | None = None
    ) -> dict[str, Any]:
        """Ask for one operation and return its reply: a dict of JSON values whose numbers are all finite.

        The caller checks that the reply has what it needs; nothing a candidate says is trusted here beyond its form.

        Raises:
            CandidateFailed: with a kind from the closed list.
            KeyboardInterrupt: `Servers.hurry` was called and its time is over.
        """
        if self._ended:
            raise self.failure or CandidateFailed("killed", "the candidate was already stopped")
        self._number += 1
        self._stage = op
        now = time.monotonic()
        deadline = min(now + timeout_s, self._deadline)
        request = json.dumps({"id": self._number, "op": op, "payload": payload}, allow_nan=False)
        self._send(request.encode() + b"\n", deadline)
        while True:
            message = self._next_message(deadline, op)
            told = message.get("progress")
            if told is not None and len(message) == 1:
                if not (isinstance(told, list) and len(told) == 2 and isinstance(told[0], str)):
                    raise self._fail("invalid_result", f"malformed progress from `{op}`")
                self._stage = told[0][:200] or op
                if progress and isinstance(told[1], int | float):
                    progress(self._stage, float(told[1]))
                continue
            if message.get("id") != self._number or not ({"ok", "error"} & set(message)):
                raise self._fail("invalid_result", f"a reply that answers no question, during `{op}`")
            if isinstance(reply := message.get("ok"), dict):
                return reply
            error = message.get("error")
            if isinstance(error, dict) and error.get("kind") in FAILURE_KINDS and isinstance(error.get("message"), str):
                text = scrub(error["message"])
                raise CandidateFailed(error["kind"], text, hint=f"see {self.log}")
            raise self._fail("invalid_result", f"malformed reply to `{op}`")

    def grant(self, seconds: float) -> None:
        """Make its life this much longer: it was kept waiting, by no fault of its own."""
        self._deadline += seconds

    @property
    def cpu_s(self) -> float:
        """CPU seconds its processes have used so far."""
        return sum(s.cpu_s for pid in self._members if (s := watching.read_stat(pid)))

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory since the start or `reset_peak`: the process's own mark, and the watched group's."""
        return max(watching.peak_bytes(self.pid), self.group_peak_bytes)

    def reset_peak(self) -> bool:
        """Start a new count of the peak; False where the system does not permit it."""
        self.group_peak_bytes = 0
        return watching.reset_peak(self.pid)

    def stop(self) -> None:
        """End the whole group: SIGTERM, up to five seconds, SIGKILL; then reap it. May be called twice."""
        if self._ended:
            return
        self._terminate(GRACE_S)
        self._end()

    # ------------------------------------------------------------ talking

    def _send(self, line: bytes, deadline: float) -> None:
        view = memoryview(line)
        while view:
            self._check_time(deadline, "accepting a request")
            try:
                view = view[self._control.send(view) :]
            except BlockingIOError:
                _wait(0.05, self._control, events=select.POLLOUT)
            except OSError:
                raise self._died() from None

    def _next_message(self, deadline: float, op: str) -> dict[str, Any]:
        while b"\n" not in self._pending:
            if len(self._pending) > MAX_REPLY_BYTES:
                raise self._fail("invalid_result", f"`{op}` sent more than {MAX_REPLY_BYTES >> 20} MiB in one line")
            self._check_time(deadline, op)
            left = max(0.0, min(0.25, deadline - time.monotonic()))
            ready = _wait(left, self._control, self._pidfd)
            try:
                data = self._control.recv(1 << 16) if ready else None
            except BlockingIOError:  # only the process ended; a child of it may still hold the socket
                data = b"" if self._pidfd in ready else None
            except OSError:
                data = b""
            if data == b"":
                raise self._died()
            self._pending += data or b""
        line, _, self._pending = self._pending.partition(b"\n")
        if len(line) > MAX_REPLY_BYTES:
            raise self._fail("invalid_result", f"`{op}` sent more than {MAX_REPLY_BYTES >> 20} MiB in one line")
        try:
            message = json.loads(line, parse_constant=_refuse, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise self._fail("invalid_result", f"`{op}` sent what is not a result: {error}"[:300]) from None
        if not isinstance(message, dict):
            raise self._fail("invalid_result", f"`{op}` sent what is not a result: {type(message).__name__}")
        return message

    def _check_time(self, deadline: float, op: str) -> None:
        now = time.monotonic()
        if self._servers.stop_at is not None and now >= self._servers.stop_at:
            self.stop()
            raise KeyboardInterrupt
        if now >= deadline:
            limit = "its time limit" if deadline == self._deadline else "the limit of this operation"
            self._verdict = ("timeout", f"stopped at {limit} while {_doing(self._stage)}")
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)  # faulthandler writes the last stack to the log
            time.sleep(0.2)
            raise self._fail(*self._verdict, grace_s=GRACE_S - 0.2)

    # ------------------------------------------------------------ ending

    def _fail(self, kind: str, message: str, grace_s: float = 0.5) -> CandidateFailed:
        """Stop the candidate and return the failure to raise."""
        if not self._ended:
            self._verdict = self._verdict or (kind, message)
            self._terminate(grace_s)
            self._end()
        self.failure = CandidateFailed(kind, message, hint=f"see {self.log}")
        return self.failure

    def _died(self) -> CandidateFailed:
        """Return the failure of a candidate that ended by itself, or by the watcher's hand."""
        if self._ended:
            return self.failure or CandidateFailed("killed", "the candidate was already stopped")
        _wait(1.0, self._pidfd)  # its socket closes a moment before it has ended
        status = self._end()
        kind, message = self._verdict or self._explain(status)
        self.failure = CandidateFailed(kind, message, hint=f"see {self.log}")
        return self.failure

    def _explain(self, status: int | None) -> tuple[str, str]:
        while_ = f"while {_doing(self._stage)}"
        if status is None:
            return "killed", f"the candidate and its fork server ended {while_}"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGKILL:
                before, after = self._kills_before, watching.oom_kills()
                if before is not None and after is not None and after > before:
                    return "oom_host", f"killed by the system for memory (oom_kill {before} -> {after}) {while_}"
                guess = "probably out of memory (SIGKILL not sent by leanplan)"
                return "killed", f"killed by the system, {guess}, {while_}"
            name = signal.Signals(number).name
            faults = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
            kind = "crashed" if number in faults else "killed"
            return kind, f"{kind} ({name}) {while_}"
        code = os.WEXITSTATUS(status)
        if code == 0:
            return "invalid_result", f"ended without a result (exit 0) {while_}"
        return "crashed", f"ended without a result (exit {code}) {while_}"

    def _terminate(self, grace_s: float) -> None:
        watching.kill_group(self.pid, signal.SIGTERM)
        _wait(grace_s, self._pidfd)

    def _end(self) -> int | None:
        """Have the group killed and the process reaped; return its wait status, or None if the server is gone too."""
        if self._ended:
            return None
        self._ended = True
        try:
            status = self._server.request({"end": self.pid}).get("status")
        except CandidateFailed:
            watching.kill_group(self.pid, signal.SIGKILL)
            status = None
        self._over.set()
        self._watcher.join(GRACE_S)
        self._control.close()
        os.close(self._pidfd)
        return status

    # ------------------------------------------------------------ watching (in a thread of the planner)

    def _watch(self, pipe: int) -> None:
        os.set_blocking(pipe, False)
        scan, disk = watching.Paced(0.25), watching.Paced(1.0)
        written, interval, next_check, tail = 0, 0.25, 0.0, b""
        open_ = True
        with self._log_file as log, os.fdopen(pipe, "rb", buffering=0) as source:
            while True:
                over = self._over.is_set()
                if open_:
                    if not over:
                        _wait(max(0.0, next_check - time.monotonic()), source)
                    chunk = source.read(1 << 16)
                    open_ = chunk != b""
                    tail += chunk or b""
                elif not over:
                    self._over.wait(max(0.0, next_check - time.monotonic()))
                cut = len(tail) if (over and not open_) or len(tail) > 1 << 16 else tail.rfind(b"\n") + 1
                if cut:  # whole lines, so that no secret is split over two writes
                    room = self.limits.log_bytes - (0 if self._verdict else LOG_RESERVE_BYTES) - written
                    lines, tail = scrub_bytes(tail[:cut]), tail[cut:]
                    with suppress(OSError):  # a full disk costs the log, never the watch
                        log.write(lines[: max(0, room)])
                    written += min(len(lines), max(0, room))
                if over and not (open_ and chunk):
                    with suppress(OSError):
                        log.write(scrub_bytes(tail))
                    return
                if not over and time.monotonic() >= next_check:
                    used = self._check_usage(scan, disk)
                    # memory fills at some GiB a second: look more often when little is left
                    interval = 0.25 if used < self.limits.memory_bytes / 2 else 0.02
                    next_check = time.monotonic() + interval

    def _check_usage(self, scan: watching.Paced, disk: watching.Paced) -> int:
        """Kill the candidate if it is over a limit; return its resident memory."""
        began = time.monotonic()
        if scan.due():
            self._members = watching.group_of(self.pid)
            scan.took(time.monotonic() - began)
        used = watching.resident_bytes(self._members)
        if len(self._members) > 1 and used > self.limits.memory_bytes:
            used = watching.proportional_bytes(self._members)
        self.group_peak_bytes = max(self.group_peak_bytes, used)
        limit = self.limits.memory_bytes
        if used > limit:
            reached, allowed = units.format(used, "bytes"), units.format(limit, "bytes")
            self._execute("oom_host", f"reached {reached} of the {allowed} limit while {_doing(self._stage)}")
        elif len(self._members) > self.limits.processes:
            count = f"{len(self._members)} processes, {self.limits.processes} are allowed"
            self._execute("killed", f"started {count}, while {_doing(self._stage)}")
        elif disk.due():
            began = time.monotonic()
            written, files = watching.folder_usage(self.folder, max_files=self.limits.files)
            disk.took(time.monotonic() - began)
            if written > self.limits.disk_bytes:
                allowed = units.format(self.limits.disk_bytes, "bytes")
                text = f"wrote {units.format(written, 'bytes')}, the limit is {allowed}"
                self._execute("disk_full", f"{text}, while {_doing(self._stage)}")
            elif files > self.limits.files:
                self._execute("disk_full", f"wrote more than {self.limits.files} files while {_doing(self._stage)}")
        return used

    def _execute(self, kind: str, message: str) -> None:
        self._verdict = self._verdict or (kind, message)
        watching.kill_group(self.pid, signal.SIGKILL)


def _wait(seconds: float, *files: Any, events: int = select.POLLIN) -> set[int]:
    """Wait until one of the files is ready (or closed by the other side); return the descriptors that are."""
    poller = select.poll()
    for file in files:
        poller.register(file, events)
    return {handle for handle, _ in poller.poll(math.ceil(seconds * 1000))}


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _doing(stage: str) -> str:
    """`building`, `gptq layer 12`: what a candidate was at, as a phrase that follows "while"."""
    return {"build": "building", "open": "loading the artefact", "block": "generating", "starting": "starting"}.get(
        stage, f"at {stage}" if " " not in stage else stage
    )
