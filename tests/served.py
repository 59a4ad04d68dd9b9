"""Artefacts to serve, the command that serves them, and a client that needs nothing but the standard library."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import psutil
from worlds import ROOT, command, environment

from knowledge_base.engines._serving import Piece, Server, Wanted
from knowledge_base.registry import engines
from knowledge_base.types import Plan, Session
from planner import building

_FOLDERS = TemporaryDirectory(prefix="served-")
TINY = ROOT / "models" / "tiny-lm"
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@cache
def artefact(engine: str, **runtime: Any) -> Path:
    """Return an artefact of the shipped model for an engine, with a chat template; made once for all tests."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(_FOLDERS.name) / "-".join([engine, *map(str, runtime.values())])
    model = AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY, local_files_only=True)
    tokenizer.chat_template = TEMPLATE
    session = Session(model=model, tokenizer=tokenizer, facts=None, calibration=None, seed=0, workspace=folder)
    module = engines.get(engine)
    module.export(session, folder)
    plan = Plan(model_digest="tiny-lm", engine=engine)
    building.seal(folder, plan, allocation=None, runtime=runtime, notes={}, versions=module.versions())
    return folder


class Numbers:
    """Texts of a server: tells tokens as their numbers, so that a text says which they were."""

    def __init__(self, *end: int) -> None:
        self.end = frozenset(end)

    def reading(self) -> Callable[[int], str]:
        return lambda token: f"{token} "


def told(server: Server, prompt: Iterable[int], new_tokens: int = 24, **more: Any) -> tuple[list[int], int, str]:
    """Return the tokens that a server of `Numbers` told, how many were counted, and why the answer ended."""
    pieces: list[Piece] = []

    def hear(piece: Piece) -> bool:
        pieces.append(piece)
        return True

    ended = server.answer(Wanted(prompt=tuple(prompt), new_tokens=new_tokens, **more), hear)
    return [int(n) for piece in pieces for n in piece.text.split()], sum(p.tokens for p in pieces), ended


class Served:
    """`leanplan serve` as a process, and what it said when it was ready."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any], home: Path) -> None:
        self.process, self.ready, self.home = process, ready, home
        self.host = urlsplit(ready["url"]).netloc
        self.family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]

    def ask(self, body: Any, path: str = "/v1/completions", timeout_s: float = 120.0) -> http.client.HTTPResponse:
        """Send a request; bytes go as they are. The response is read by the caller."""
        connection = http.client.HTTPConnection(self.host, timeout=timeout_s)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request("GET", path, headers={"Connection": "close"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def answer(self, body: Any, path: str = "/v1/completions") -> dict[str, Any]:
        """Return the answer to a request that is to be served."""
        response = self.ask(body, path)
        text = response.read().decode()
        assert response.status == 200, text
        return json.loads(text)

    def count(self, name: str) -> float:
        """Return one of its metrics."""
        (line,) = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"{name} ")] or [
            f"{name} 0"
        ]
        return float(line.rpartition(" ")[2])

    def end(self, timeout_s: float = 120.0) -> tuple[int, str]:
        """Wait for the process to end; return its exit code and what it said on stderr."""
        said = self.process.communicate(timeout=timeout_s)[1]
        return self.process.returncode, said

    def left(self) -> list[str]:
        """Return what is left of it: processes, and files in its folder for temporary ones."""
        _, alive = psutil.wait_procs(self.family, timeout=20)
        return [*map(str, alive), *(path.name for path in self.home.iterdir())]


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """Yield the events of a stream as they come: what is in them, "[DONE]" as it is."""
    for line in response:
        if line.startswith(b"data: "):
            data = line[len(b"data: ") :].decode().strip()
            yield data if data == "[DONE]" else json.loads(data)


@contextlib.contextmanager
def serving(what: Path | str, *flags: str, cwd: Path) -> Iterator[Served]:
    """Run `leanplan serve` on a free port until the test is over."""
    home = cwd / "temporary"
    home.mkdir(exist_ok=True)
    process = subprocess.Popen(
        command("serve", str(what), "--port", "0", "--json", *flags), cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(TMPDIR=str(home), OMP_NUM_THREADS="1"), start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    while not lines or lines[-1].rstrip() not in ("}", ""):
        lines.append(process.stdout.readline())
    served = None
    try:
        ready = json.loads("".join(lines) or "null")
        assert ready and "url" in ready, f"{''.join(lines)}{process.communicate(timeout=60)[1]}"
        served = Served(process, ready, home)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
        for one in served.family if served else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def is_free(port: int) -> bool:
    """Return whether somebody could listen on a port now."""
    from planner.serving.ports import bound

    try:
        bound("127.0.0.1", port).close()
    except OSError:
        return False
    return True
