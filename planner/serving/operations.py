"""What a service's process does, beside what every candidate does: start, stand, drain."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knowledge_base import registry
from knowledge_base.engines._serving import OneByOneOnly, Server, Wanted
from knowledge_base.errors import CandidateFailed
from planner.isolation.worker import Progress
from planner.serving import Settings, missing_modules, ports
from planner.serving.texts import Texts

STARTUP_S = 30.0
CLOSING_S = 3.0  # for connections to end after the last answer
MOST_CONNECTIONS = 1024
WARM_UP_TOKENS = 4
SIDE_BY_SIDE = ("prefix_cache", "prefill_chunk")  # runtime keys that mean something where requests meet


def serve(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Open an artefact and serve it. Payload: folder, engine, runtime, host, port, name, settings (see `started`).

    Returns address, model, slots, context_tokens and why_one_by_one, or {"refused": why} where the port cannot be had.
    The port is taken before the artefact is loaded, and connections are accepted after.
    """
    if missing := missing_modules():  # an engine's own environment need not have them
        raise CandidateFailed("engine_missing", f"{', '.join(missing)} not installed where this engine lives")
    from planner.serving.endpoint import Endpoint

    settings = Settings(**payload["settings"])
    try:
        listener = ports.bound(payload["host"], payload["port"])
    except OSError as error:
        return {"refused": ports.why_not(error)}
    engine = registry.engines.get(payload["engine"])
    if why := engine.find():
        raise CandidateFailed("engine_missing", why)
    progress("loading the artefact", 0.0)
    folder, runtime = Path(payload["folder"]), payload["runtime"]
    texts = Texts(folder)
    server, why_one_by_one = _opened(engine, folder, runtime, texts, settings)
    progress(
        "answering a first request", 0.5
    )  # what is prepared on first use is, and an engine that cannot serve says so
    server.answer(Wanted(prompt=(0,) * WARM_UP_TOKENS, new_tokens=WARM_UP_TOKENS, ignore_eos=True), lambda piece: True)
    endpoint = Endpoint(server, texts, payload["name"], settings, local=_is_loopback(listener))
    state["service"], state["server"] = Listening(endpoint, listener), server
    progress("serving requests", 1.0)
    host, port = listener.getsockname()[:2]
    return {
        "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "model": payload["name"],
        "slots": server.slots,
        "why_one_by_one": why_one_by_one,
        "context_tokens": endpoint.context_tokens,
    }


def stand(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Say that it is there, and that its engine answers."""
    progress("serving requests", 1.0)
    if fault := getattr(state["server"], "fault", None):
        raise fault
    if not state["service"].alive:
        raise CandidateFailed("crashed", "the HTTP server has ended")
    return {}


def drain(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Refuse new requests, answer those there are within `limit_s`, stop. Returns how many were cut_off."""
    return {"cut_off": state.pop("service").drain(payload["limit_s"])}


OPS: dict[str, Callable[..., dict]] = {"serve": serve, "serving requests": stand, "draining": drain}


def _opened(
    engine: Any, folder: Path, runtime: Mapping[str, Any], texts: Texts, settings: Settings
) -> tuple[Server, str]:
    """Return the engine's own server, or one that answers one request after another, and why where that is worth telling.

    Raises:
        CandidateFailed: among others "unsupported", where the artefact was made to be served side by side and cannot be.
    """
    from planner.serving.one_by_one import OneByOne

    why = ""
    if open_server := getattr(engine, "open_server", None):
        try:
            return open_server(folder, runtime, settings.context_tokens, texts), why
        except OneByOneOnly as reason:
            why = str(reason)
        if asked := [key for key in SIDE_BY_SIDE if key in runtime]:
            raise CandidateFailed(
                "unsupported", f"requests can only be answered one after another ({why}), which leaves `{asked[0]}` out",
                hint="leave that step out of the plan",
            )  # fmt: skip
    return OneByOne(engine.open_artefact(folder, runtime), texts, settings.context_tokens), why


def _is_loopback(listener: socket.socket) -> bool:
    import ipaddress

    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class Listening:
    """The HTTP server in a thread of its own, so that the process goes on answering whoever started it."""

    def __init__(self, endpoint: Any, listener: socket.socket) -> None:
        import uvicorn

        self._endpoint = endpoint
        self._loop = asyncio.new_event_loop()
        self._server = uvicorn.Server(
            uvicorn.Config(
                endpoint.app,
                log_level="warning",
                access_log=False,
                lifespan="off",
                loop="none",
                http="h11",
                ws="none",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=int(CLOSING_S),
                server_header=False,
            )
        )
        self._thread = threading.Thread(target=self._run, args=(listener,), name="http", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + STARTUP_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise CandidateFailed("crashed", "the HTTP server did not start")
            time.sleep(0.01)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def drain(self, limit_s: float) -> int:
        cut_off = asyncio.run_coroutine_threadsafe(self._endpoint.drain(limit_s), self._loop).result()
        self._server.should_exit = True
        self._thread.join(2 * CLOSING_S)
        self._endpoint.close()
        return cut_off

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve(sockets=[listener]))
