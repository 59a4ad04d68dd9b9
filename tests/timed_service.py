"""A small HTTP service with known delays: the instrument that the load generator is held against. No engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timed:
    """What it does to each request, and what it saw. Times in seconds."""

    first_s: float = 0.02  # to the first token
    each_s: float = 0.005  # to each token after it
    slots: int = 1000  # requests served at a time; the others wait in line
    waiting: int = 10_000  # that may wait; more are refused with 429
    fails_every: int = 0  # each so manieth request is HTTP 500
    ends_early: int = 0  # tokens fewer than asked
    says: bytes = b""  # in place of an answer, raw
    busy: int = 0
    busiest: int = 0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    came_s: list[float] = field(default_factory=list)


@contextmanager
def timed_service(timed: Timed) -> Iterator[Timed]:
    """Serve on a free port of loopback from a thread of its own until the context is left."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        line = asyncio.Semaphore(timed.slots)
        server = await asyncio.start_server(lambda r, w: _connection(timed, line, r, w), "127.0.0.1", 0, limit=2**24)
        timed.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield timed
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


async def _connection(timed: Timed, line: asyncio.Semaphore, reader: Any, writer: Any) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(h.split(":")[1]) for h in head.split("\r\n") if h.lower().startswith("content-length")), 0
            )
            body = await reader.readexactly(length)
            if head.startswith("GET /v1/models "):
                await _whole(writer, 200, {"data": [{"id": "timed", "max_model_len": 100_000}]})
            else:
                await _complete(timed, line, writer, json.loads(body))
    with suppress(Exception):
        writer.close()


async def _complete(timed: Timed, line: asyncio.Semaphore, writer: Any, body: dict[str, Any]) -> None:
    timed.came_s.append(asyncio.get_running_loop().time())
    timed.bodies.append(body)
    if timed.says:
        writer.write(timed.says)
        await writer.drain()
        writer.close()
        return
    if timed.fails_every and len(timed.bodies) % timed.fails_every == 0:
        await _whole(writer, 500, {"error": {"message": "a fault \x1b[31m on purpose"}})
        return
    if timed.busy >= timed.slots + timed.waiting:
        await _whole(writer, 429, {"error": {"message": "no room"}})
        return
    timed.busy += 1
    timed.busiest = max(timed.busiest, timed.busy)
    try:
        async with line:
            await _stream(timed, writer, body["max_tokens"] - timed.ends_early)
    finally:
        timed.busy -= 1


async def _stream(timed: Timed, writer: Any, tokens: int) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    loop = asyncio.get_running_loop()
    due = loop.time() + timed.first_s
    for number in range(tokens):
        await asyncio.sleep(due - loop.time())
        due += timed.each_s
        end = "length" if number == tokens - 1 else None
        await _event(writer, {"choices": [{"index": 0, "text": "a", "finish_reason": end}]})
    await _event(writer, {"choices": [], "usage": {"completion_tokens": tokens}})
    writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    await writer.drain()


async def _event(writer: Any, data: dict[str, Any]) -> None:
    writer.write(_chunk(b"data: " + json.dumps(data).encode() + b"\n\n"))
    await writer.drain()


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def _whole(writer: Any, status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    await writer.drain()
