"""The service: an OpenAI-compatible endpoint around one artefact, in a process of its own.

    caller ──asks──► candidate process (planner/isolation): engine, queue and HTTP server on one port

`started` starts one; `leanplan serve` and the load generator call it. The process is a candidate like any other: its
memory is limited and watched, and it ends with whoever started it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import select
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knowledge_base import registry
from knowledge_base.errors import CandidateFailed, EnvironmentProblem
from planner import building
from planner.isolation import Limits, Servers
from planner.isolation.candidate import Candidate, Progress
from planner.serving import ports

OPERATIONS = "planner.serving.operations"  # what `Servers(extra_ops=...)` needs to start a service
MODULES = ("uvicorn", "starlette", "prometheus_client")
READY_S = 1800.0  # to load the largest model there is from a slow disk
CHECK_S = 5.0  # between two looks at whether it still stands
JSON = {"Content-Type": "application/json"}
STOP_S = 15.0  # from the end of the drain to the end of the process
DISK_BYTES = 1 << 30  # what compiled code may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one service grants its clients."""

    context_tokens: int = 4096  # prompt and output together, if the model has as many
    output_tokens: int | None = None  # most a request may ask for; None: what the context leaves
    waiting: int = 64  # requests that may wait for their turn; more are sent away
    body_bytes: int = 4 << 20  # of one request


class Service:
    """A service that is ready. `url` is its root: `{url}/v1/completions`."""

    def __init__(self, candidate: Candidate, servers: Servers, folder: Path, manifest: Mapping[str, Any], ready: Any):
        self._candidate, self._servers = candidate, servers
        self.folder = folder
        self.engine: str = manifest["engine"]
        self.plan_id: str = str(manifest.get("plan_id", ""))
        self.model: str = ready["model"]
        self.slots: int = ready["slots"]
        self.context_tokens: int | None = ready["context_tokens"]
        self.why_one_by_one: str = ready["why_one_by_one"]  # "": it is no wonder, or it is not so
        self.url = f"http://{ready['address']}"

    @property
    def pid(self) -> int:
        """The id of the process that holds engine and port."""
        return self._candidate.pid

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory since the start or `reset_peak`."""
        return self._candidate.peak_bytes

    @property
    def cpu_s(self) -> float:
        """CPU seconds it has used so far."""
        return self._candidate.cpu_s

    def reset_peak(self) -> bool:
        """Start a new count of the peak; False where the system does not permit it."""
        return self._candidate.reset_peak()

    def wait(self, until: Any) -> None:
        """Return when `until`, anything with a `fileno`, is readable.

        Raises:
            CandidateFailed: the process has ended meanwhile; says how.
        """
        handle = os.pidfd_open(self.pid)
        try:
            while until not in select.select([until, handle], [], [], CHECK_S)[0]:
                self.check()
        finally:
            os.close(handle)

    def check(self) -> None:
        """Make sure that the service is there.

        Raises:
            CandidateFailed: it is not; says how it ended.
        """
        self._candidate.call("serving requests", {}, timeout_s=60.0)

    def ask(self, timeout_s: float) -> None:
        """Have one short request answered.

        Raises:
            CandidateFailed: it was not.
        """
        import json
        import urllib.request

        request = {"model": self.model, "prompt": [0], "max_tokens": 2, "ignore_eos": True}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.url}/v1/completions", json.dumps(request).encode(), JSON),
                timeout=timeout_s,
            ) as answer:
                used = json.loads(answer.read())["usage"]
        except (OSError, ValueError, KeyError) as error:
            raise CandidateFailed("crashed", f"the first request was not answered: {error}") from error
        if used["completion_tokens"] != request["max_tokens"]:
            raise CandidateFailed(
                "output_too_short", f"the first request got {used['completion_tokens']} tokens, not 2"
            )

    def drain(self, limit_s: float) -> int:
        """Refuse new requests, let those it has end within the limit, stop; return how many were cut off.

        Raises:
            CandidateFailed: the process ended meanwhile.
        """
        timeout_s = limit_s + STOP_S
        return int(self._candidate.call("draining", {"limit_s": limit_s}, timeout_s=timeout_s)["cut_off"])

    def hurry(self) -> None:
        """Make a drain in progress end at once with KeyboardInterrupt; may be called from a signal handler."""
        self._servers.hurry(0)


@contextlib.contextmanager
def started(
    artefact: Path,
    *,
    runtime: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str | None = None,
    settings: Settings | None = None,
    limits: Limits | None = None,
    log: Path | None = None,
    servers: Servers | None = None,
    progress: Progress | None = None,
) -> Iterator[Service]:
    """Serve an artefact folder for the time of the context, in the engine it was built for.

        with started(folder) as service:
            requests.post(f"{service.url}/v1/completions", json={"prompt": [1, 2, 3], "max_tokens": 8})

    Args:
        artefact: as `building.build` or `leanplan build` leaves it.
        runtime: serving choices in place of the artefact's own.
        port: 0 chooses a free one.
        name: of the model, for /v1/models; None: the folder's.
        limits: on the process; None: the memory of the machine.
        log: what the process prints; None: forgotten.
        servers: made with `Servers(extra_ops=OPERATIONS)`, to fork from one that has loaded its modules already.

    Raises:
        EnvironmentProblem: the port is taken or not ours to take, or a package is missing.
        CandidateFailed: the engine cannot open the artefact, or needs more than the limits.
    """
    manifest = building.read_manifest(artefact)
    engine = registry.engines.get(manifest["engine"]).ENGINE
    if engine.environment is None and (missing := missing_modules()):
        raise EnvironmentProblem(f"{', '.join(missing)} not installed", hint="pip install 'leanplan[serve]'")
    payload = {
        "folder": str(artefact.resolve()),
        "engine": manifest["engine"],
        "runtime": dict(manifest["runtime"] if runtime is None else runtime),
        "host": host,
        "port": port,
        "name": name or artefact.resolve().name,
        "settings": asdict(settings or Settings()),
    }
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leanplan-serve-")))
        servers = servers or stack.enter_context(Servers(extra_ops=OPERATIONS))
        candidate = stack.enter_context(
            servers.start(
                engine.preload, folder=work / "process", limits=limits or _whole_machine(), log=log or work / "log.txt"
            )
        )
        ready = candidate.call("serve", payload, timeout_s=READY_S, progress=progress)
        if "refused" in ready:
            raise ports.refused(host, port, str(ready["refused"]))
        for field, kind in (("address", str), ("model", str), ("slots", int), ("why_one_by_one", str)):
            if not isinstance(ready.get(field), kind):
                raise CandidateFailed("invalid_result", f"the service did not say its {field}")
        yield Service(candidate, servers, artefact, manifest, ready)


def missing_modules() -> list[str]:
    """Return what the endpoint needs and this environment lacks."""
    return [module for module in MODULES if importlib.util.find_spec(module) is None]


def _whole_machine() -> Limits:
    import psutil

    return Limits(memory_bytes=psutil.virtual_memory().total, time_s=math.inf, disk_bytes=DISK_BYTES)
