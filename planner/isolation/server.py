"""The fork server: imports an engine's modules once, then forks each candidate from itself in milliseconds.

Started by path with its settings as JSON in argv:
{"fd", "parent", "path", or "packages" and "knowledge", "preload", "extra_ops", "pdeathsig"}.
One request at a time over a SOCK_SEQPACKET socket; file descriptors travel beside the request:

    (at start)                          -> {"ready": pid, "threads": n} or {"error": "ImportError: ..."}
    {"fork": {"folder": ..., "file_bytes": n}} + 2 fds -> {"pid": n}      fds: control socket, log pipe
    {"end": pid}                        -> {"status": n}          kills the candidate's group, reaps it; wait status

The server stays single-threaded, so forking it is safe. When the planner is gone (end of the socket), it takes
every candidate along. It adopts orphans of its candidates (sub-reaper), so that a daemonised process does not escape.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pathlib
import random
import resource
import signal
import socket
import sys
import tempfile
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MAX_OPEN_FILES = 4096
MAX_PROCESSES = 8192  # of the whole user, root excepted; the planner's watcher bounds each candidate more tightly


def prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=settings["fd"])
    channel.set_inheritable(False)
    if settings["pdeathsig"]:  # only where the planner's spawning thread lives as long as the planner
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != settings["parent"]:
        return
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if settings["packages"]:
        sys.path.insert(0, settings["packages"])
        take_knowledge(settings["knowledge"])
    else:
        sys.path[:] = settings["path"]
    try:
        operations = preload(settings["preload"], settings["extra_ops"])
    except BaseException as error:
        send(channel, {"error": f"{type(error).__name__}: {error}"[:2000]})
        return
    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, the pages shared with candidates
    candidates: set[int] = set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        send(channel, {"ready": os.getpid(), "threads": len(os.listdir("/proc/self/task"))})  # noqa: PTH208
        serve(channel, operations, candidates)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in tuple(candidates):
            end(pid, candidates)


def take_knowledge(folders: list[str]) -> None:
    """Use people's folders of knowledge as the planner found them: checking takes packages that are not here."""
    overlay = importlib.import_module("knowledge_base.field.overlay")
    overlay.take(tuple(map(pathlib.Path, folders)))


def preload(modules: list[str], extra_ops: str | None) -> dict:
    """Import the engine's modules and the worker; torch, if among them, with one thread."""
    worker = importlib.import_module("planner.isolation.worker")
    for name in modules:
        importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # a thread pool does not survive fork; candidates set their own
    operations = dict(worker.OPS)
    if extra_ops:
        operations.update(importlib.import_module(extra_ops).OPS)
    return operations


def send(channel: socket.socket, message: dict) -> None:
    channel.send(json.dumps(message).encode())


def serve(channel: socket.socket, operations: dict, candidates: set[int]) -> None:
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(channel, 65536, 2)
        except ConnectionError:
            return
        if not data:
            return
        request = json.loads(data)
        if "fork" in request:
            control, log = fds
            server = os.getpid()
            pid = os.fork()
            if pid == 0:
                run_candidate(server, channel, control, log, operations, **request["fork"])  # never returns
            candidates.add(pid)
            os.close(control)
            os.close(log)
            reply: dict = {"pid": pid}
        else:
            reply = {"status": end(request["end"], candidates)}
        try:
            send(channel, reply)
        except ConnectionError:
            return


def end(pid: int, candidates: set[int]) -> int | None:
    """Kill what is left of a candidate's group and of adopted orphans; return its wait status.

    The candidate is not reaped before its group is killed, so its id cannot have been given to another process.
    """
    if pid not in candidates:
        return None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # no effect on one that has exited: its status stays what it was
    _, status = os.waitpid(pid, 0)
    candidates.discard(pid)
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        orphans = [child for child in children() if child not in candidates]
        if not orphans:
            break
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(orphan, 0)
    return status


def children() -> list[int]:
    """Return the ids of this process's children, adopted ones included."""
    me, found = os.getpid(), []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - start-up without pathlib
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == me:
                found.append(int(name))
    return found


def run_candidate(
    server: int, channel: socket.socket, control: int, log: int, operations: dict, folder: str, file_bytes: int
) -> None:
    """Be the candidate: shed what is the server's, take the limits on, answer requests until the socket ends."""
    code = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        channel.close()
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:
            os._exit(0)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(log)
        os.set_inheritable(control, False)
        os.umask(0o077)
        os.chdir(folder)
        os.environ.update(TMPDIR=folder, HOME=folder)
        tempfile.tempdir = None
        limit(resource.RLIMIT_CORE, 0)
        limit(resource.RLIMIT_NOFILE, MAX_OPEN_FILES)
        limit(resource.RLIMIT_FSIZE, file_bytes)  # at once, where the watcher looks once a second
        limit(resource.RLIMIT_NPROC, MAX_PROCESSES)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("500")  # under memory pressure the candidate goes first, not the planner
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)  # the planner asks for the stack before it stops one
        random.seed(0)
        worker = sys.modules["planner.isolation.worker"]
        code = worker.serve(socket.socket(fileno=control), operations)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    main()
