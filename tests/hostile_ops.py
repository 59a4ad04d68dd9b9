"""Operations that misbehave in every way the planner must survive. Loaded by `Servers(extra_ops="hostile_ops")`."""

# ruff: noqa: PTH109, PTH115, PTH123, PTH208

import ctypes
import mmap
import os
import platform
import signal
import subprocess
import sys
import time


def echo(state, payload, progress):
    progress("repeating", 0.5)
    return dict(payload)


def facts(state, payload, progress):
    return {
        "environ": dict(os.environ),
        "cwd": os.getcwd(),
        "session": os.getsid(0),
        "umask": os.umask(0o077),
        "stdin": os.readlink("/proc/self/fd/0"),
        "fds": len(os.listdir("/proc/self/fd")),
        "modules": [m for m in ("torch", "numpy", "optuna") if m in sys.modules],
        "path": sys.path,
        "oom_score_adj": int(open("/proc/self/oom_score_adj").read()),
        "core": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE)[0],
    }


def segfault(state, payload, progress):
    ctypes.string_at(0)


def abort(state, payload, progress):
    os.abort()


def illegal_instruction(state, payload, progress):
    """Jump to bytes no processor knows: zeros on ARM, UD2 on x86."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x0f\x0b" if platform.machine() == "x86_64" else b"\0\0\0\0")
    ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()


def kill_myself(state, payload, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def leave(state, payload, progress):
    os._exit(payload["code"])


def hang(state, payload, progress):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    progress("pondering the question", 0.1)
    while True:
        time.sleep(1)


def hang_with_child(state, payload, progress):
    """Two descendants that ignore SIGTERM, one of them daemonised into a session of its own, and a parent that hangs."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    first = subprocess.Popen([sys.executable, "-c", code])
    starter = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=-3, start_new_session=True).pid, flush=True)"
    second = subprocess.run(
        [sys.executable, "-c", starter, sys.executable, "-c", code], stdout=subprocess.PIPE, check=False
    )
    progress(f"{first.pid} {int(second.stdout)}", 0.0)
    hang(state, payload, lambda *_: None)


def leave_child_with_socket(state, payload, progress):
    """The process ends, but a forked child keeps the socket open."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(3)


def allocate(state, payload, progress):
    progress("quantising layer 12", 0.5)
    held = []
    while True:
        held.append(bytearray(os.urandom(1)) * (32 << 20))
        time.sleep(0.01)


def allocate_in_children(state, payload, progress):
    """Each child stays below the limit; together they are above it."""
    for _ in range(6):
        if os.fork() == 0:
            held = bytearray(b"x") * (64 << 20)
            time.sleep(600)
            del held
    time.sleep(600)


def fork_many(state, payload, progress):
    for _ in range(payload["count"]):
        if os.fork() == 0:
            time.sleep(600)
    time.sleep(600)


def write_much(state, payload, progress):
    number = 0
    while True:
        number += 1
        with open(f"big{number}", "wb") as file:
            file.write(bytes(8 << 20))
        time.sleep(0.02)


def write_one_file(state, payload, progress):
    with open("big", "wb") as file:
        while True:
            file.write(bytes(8 << 20))


def write_many(state, payload, progress):
    number = 0
    while True:
        open(f"f{number}", "wb").close()
        number += 1


def _control():
    """The socket to the planner: the only one this process has."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                return int(name)
        except OSError:
            continue
    raise RuntimeError("no socket")


def raw(state, payload, progress):
    """Write given text straight to the planner, then hang."""
    data = payload["text"].encode() * payload.get("times", 1)
    while data:
        data = data[os.write(_control(), data) :]
    time.sleep(600)


def nan(state, payload, progress):
    return {"ttft_s": float("nan")}


def big_reply(state, payload, progress):
    return {"text": "x" * (2 << 20)}


def unserialisable(state, payload, progress):
    return {"value": object()}


def fail(state, payload, progress):
    raise ValueError("the first cause")


def fail_late(state, payload, progress):
    """What surfaces is not what went wrong first."""
    try:
        raise MemoryError
    except MemoryError:
        raise KeyError("output_model")  # noqa: B904 - the implicit chain is the point


def fail_disk(state, payload, progress):
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def fail_candidate(state, payload, progress):
    from knowledge_base.errors import CandidateFailed

    raise CandidateFailed(payload["kind"], payload["message"])


def torch_memory(state, payload, progress):
    import resource

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.empty(1 << 40, dtype=torch.uint8)
    return {}


def gpu_memory(state, payload, progress):
    import torch

    torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    return {}


def parallel(state, payload, progress):
    """A forked child runs torch's own thread pool."""
    import torch

    torch.set_num_threads(2)
    a = torch.ones(600, 600)
    return {"sum": float((a @ a).sum()), "threads": torch.get_num_threads()}


def chatter(state, payload, progress):
    """Print a secret and then far more than a log may hold."""
    print("token hf_abcdefghijklmnopqrstuvwxyz", flush=True)
    line = "y" * 1000
    for _ in range(payload["kilobytes"]):
        print(line)
    sys.stdout.flush()
    return {}


OPS = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == __name__
}
