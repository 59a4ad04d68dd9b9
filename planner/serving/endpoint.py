"""The OpenAI-compatible endpoint: requests in, a fair queue before the engine, answers or streams of events out."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from knowledge_base.engines._serving import CANCELLED, STOP, Piece, Server, Wanted
from knowledge_base.errors import BadInput, LeanplanError
from planner.scrubbing import scrub
from planner.serving import Settings
from planner.serving.asking import Asked, Refusal, Stops, read
from planner.serving.metrics import Metrics
from planner.serving.texts import Texts

COMPLETION_TOKENS = 16  # OpenAI's default where a completion names no number; a chat's is what the context leaves
CLIENT_LEFT = 499  # nobody reads it; nginx's word for it
CUT_OFF_S = 5.0  # for the engine to notice that an answer was cut off
LOCAL_NAMES = ["localhost", "127.0.0.1", "::1", "[::1]"]  # other names for a loopback address are another site's trick


class Endpoint:
    """One model served by one engine. `app` is the ASGI application."""

    def __init__(self, server: Server, texts: Texts, model: str, settings: Settings, *, local: bool = True) -> None:
        self._server, self._texts, self._model, self._settings = server, texts, model, settings
        self.context_tokens = server.context_tokens
        self._queue = Queue(server.slots, settings.waiting)
        self._threads = ThreadPoolExecutor(server.slots, thread_name_prefix="answer")
        self._metrics = Metrics()
        self._began = int(time.time())
        self._draining = False
        self._cut = asyncio.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/health", self._health),
                Route("/metrics", self._told_metrics),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES)] if local else [],
            exception_handlers={Refusal: self._refused, 404: _not_found, 405: _not_allowed, Exception: _fault},
        )

    async def drain(self, limit_s: float) -> int:
        """Refuse new requests, wait for those there are, cut off what is left at the limit; return how many those were."""
        self._draining = True
        await self._queue.empty(limit_s)
        left = len(self._queue)
        self._cut.set()
        await self._queue.empty(CUT_OFF_S)
        return left

    def close(self) -> None:
        """Free the model, unless the engine still works on what was cut off: then the end of the process does."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if not len(self._queue):
            self._server.close()

    # ------------------------------------------------------------ what is asked often

    async def _health(self, request: Request) -> Response:
        if self._draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            raise self._no_such_model()
        return JSONResponse(self._about())

    async def _told_metrics(self, request: Request) -> Response:
        self._metrics.running.set(self._queue.running)
        self._metrics.waiting.set(len(self._queue) - self._queue.running)
        text, kind = self._metrics.text()
        return Response(text, headers={"Content-Type": kind})

    def _about(self) -> dict[str, Any]:
        limit = {"max_model_len": self.context_tokens}
        return {"id": self._model, "object": "model", "created": self._began, "owned_by": "leanplan", **limit}

    # ------------------------------------------------------------ answers

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        began = time.monotonic()
        if self._draining:
            raise _stopping()
        asked = read(await self._body(request), chat=chat)
        if asked.model not in (None, self._model):
            raise self._no_such_model()
        wanted = await self._wanted(asked)
        answer = Answer(self, asked, wanted, began, self._queue.enter())
        if asked.stream:
            return Events(answer, chat)
        try:
            return await _unless_left(request, answer.whole(chat))
        finally:
            answer.place.leave()

    async def _body(self, request: Request) -> bytes:
        limit = self._settings.body_bytes
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise Refusal(413, f"the body is larger than {limit} bytes")
                parts.append(part)
        except ClientDisconnect:
            raise Refusal(CLIENT_LEFT, "the client left") from None
        return b"".join(parts)

    async def _wanted(self, asked: Asked) -> Wanted:
        """Return what the engine is asked for: tokens, as many as fit."""
        param = "messages" if asked.messages else "prompt"
        try:
            if asked.tokens is not None:
                prompt = asked.tokens
            elif asked.messages is not None:
                prompt = await asyncio.to_thread(self._texts.chat, asked.messages)
            else:
                prompt = await asyncio.to_thread(self._texts.tokens, str(asked.text))
        except ValueError as error:
            raise Refusal(400, scrub(str(error))[:500], param=param) from None
        if not prompt:
            raise Refusal(400, "the prompt has no tokens", param=param)
        room = math.inf if self.context_tokens is None else self.context_tokens - len(prompt)
        most = min(room, self._settings.output_tokens or math.inf)
        usual = COMPLETION_TOKENS if asked.messages is None else self._settings.context_tokens
        new = min(most, usual) if asked.max_tokens is None else asked.max_tokens
        if new > room or room < 1:
            raise Refusal(
                400, f"this model's context is {self.context_tokens} tokens; {len(prompt)} of prompt and "
                f"{max(new, 1)} of output were asked for",
                param=param, code="context_length_exceeded",
            )  # fmt: skip
        if new > most:
            raise Refusal(400, f"`max_tokens`: at most {most} are given to one request here", param="max_tokens")
        return Wanted(prompt=prompt, new_tokens=int(new), sampling=asked.sampling, ignore_eos=asked.ignore_eos)

    async def pieces(self, answer: Answer) -> AsyncGenerator[Piece, None]:
        """Yield an answer's pieces in its turn; `answer.ended` says why it ended. Closing it stops the engine's work on it."""
        await answer.place.turn()
        if self._cut.is_set():
            raise _stopping()
        heard: asyncio.Queue[Piece | None] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def told(piece: Piece) -> bool:
            self._metrics.output_tokens.inc(piece.tokens)
            loop.call_soon_threadsafe(heard.put_nowait, piece)
            return not gone.is_set()

        def work() -> str:
            return CANCELLED if gone.is_set() else self._server.answer(answer.wanted, told)

        def over(task: asyncio.Future[Any]) -> None:
            task.cancelled() or task.exception()  # seen, should nobody ask any more
            heard.put_nowait(None)

        cut = asyncio.create_task(self._cut.wait())
        cut.add_done_callback(over)
        done = answer.place.work = loop.run_in_executor(self._threads, work)
        done.add_done_callback(over)
        self._metrics.prompt_tokens.inc(len(answer.wanted.prompt))
        try:
            while (piece := await heard.get()) is not None:
                self._count(answer, piece)
                yield piece
            if not done.done():
                raise _stopping()
            answer.ended = done.result()
        except BadInput as error:
            raise Refusal(400, scrub(error.message)[:500]) from None
        except LeanplanError as error:
            raise Refusal(500, scrub(error.message)[:500]) from None
        finally:
            gone.set()
            cut.cancel()

    def _count(self, answer: Answer, piece: Piece) -> None:
        now = time.monotonic()
        if answer.last is None:
            self._metrics.first_s.observe(now - answer.began)
        else:
            self._metrics.between_s.observe(now - answer.last)
        answer.last = now
        answer.tokens += piece.tokens

    def ended(self, answer: Answer, outcome: str) -> None:
        """Count how an answer ended."""
        self._metrics.requests.labels(outcome).inc()
        if answer.last is not None:
            self._metrics.whole_s.observe(answer.last - answer.began)

    # ------------------------------------------------------------ refusals

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        if request.method == "POST":
            self._metrics.requests.labels("refused").inc()
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        return JSONResponse(error.body, error.status, headers)

    def _no_such_model(self) -> Refusal:
        return Refusal(404, f"this service has the model `{self._model}`", param="model", code="model_not_found")

    @property
    def model(self) -> str:
        return self._model


class Answer:
    """One request on its way, and how it is told."""

    def __init__(self, endpoint: Endpoint, asked: Asked, wanted: Wanted, began: float, place: Place) -> None:
        self._endpoint, self._asked = endpoint, asked
        self.wanted, self.began, self.place = wanted, began, place
        self.ended = CANCELLED
        self.tokens = 0
        self.last: float | None = None  # monotonic, of the last piece
        self._id = secrets.token_hex(12)
        self._created = int(time.time())

    async def whole(self, chat: bool) -> Response:
        """Return the answer in one piece."""
        text = "".join([part async for part in self._texts()])
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": self.ended}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({**self._head(chat, ""), "choices": [choice], "usage": self._usage()})

    async def events(self, chat: bool) -> AsyncGenerator[str, None]:
        """Yield the answer as server-sent events: one for each piece, one for the end, one for the usage if asked for."""
        head = self._head(chat, ".chunk")
        usage = {"usage": None} if self._asked.usage else {}

        def event(choice: dict[str, Any], finish: str | None = None) -> str:
            whole = {"index": 0, **choice, "logprobs": None, "finish_reason": finish}
            return _event({**head, "choices": [whole], **usage})

        try:
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}})
            async with aclosing(self._texts()) as texts:
                async for text in texts:
                    yield event({"delta": {"content": text}} if chat else {"text": text})
            yield event({"delta": {}} if chat else {"text": ""}, self.ended)
            if self._asked.usage:
                yield _event({**head, "choices": [], "usage": self._usage()})
        except Refusal as error:  # the status is long sent
            yield _event(error.body)
        yield "data: [DONE]\n\n"

    async def _texts(self) -> AsyncGenerator[str, None]:
        """Yield what is told of each piece, up to a stop text."""
        stops = Stops(self._asked.stop)
        outcome = CANCELLED
        try:
            async with aclosing(self._endpoint.pieces(self)) as pieces:
                async for piece in pieces:
                    yield stops.pass_on(piece.text)
                    if stops.met:
                        self.ended = STOP
                        break
            if rest := stops.rest():
                yield rest
            outcome = self.ended
        except Refusal:
            outcome = "failed"
            raise
        finally:
            self._endpoint.ended(self, outcome)
            self.place.leave()

    def _head(self, chat: bool, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{self._id}"
        return {"id": name, "object": kind, "created": self._created, "model": self._endpoint.model}

    def _usage(self) -> dict[str, int]:
        prompt = len(self.wanted.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}


class Events(StreamingResponse):
    """A stream of events that leaves its place in the queue however it ends, even before its first event."""

    def __init__(self, answer: Answer, chat: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(chat), media_type="text/event-stream", headers=headers)
        self._place = answer.place

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with suppress(RuntimeError):
                await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self._place.leave()


class Queue:
    """Who is being answered and who waits, first come first served."""

    def __init__(self, slots: int, waiting: int) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._most = slots + waiting
        self._places: set[Place] = set()
        self._changed = asyncio.Event()
        self._pace = Pace(slots)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def running(self) -> int:
        return sum(place.began is not None for place in self._places)

    def enter(self) -> Place:
        """Return the last place of the queue.

        Raises:
            Refusal: 429, the queue is full.
        """
        if len(self._places) >= self._most:
            seconds = self._pace.until_next()
            raise Refusal(
                429, "too many requests wait already", code="rate_limit_exceeded", retry_after_s=seconds
            )  # fmt: skip
        place = Place(self)
        self._places.add(place)
        return place

    async def empty(self, limit_s: float) -> None:
        """Return when nobody is left, or after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._places:
                    self._changed.clear()
                    await self._changed.wait()

    async def take(self) -> None:
        await self._slots.acquire()

    def left(self, place: Place) -> None:
        self._places.discard(place)
        if place.began is not None:
            self._slots.release()
            self._pace.took(time.monotonic() - place.began)
        self._changed.set()


class Place:
    """One request's place in the queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.began: float | None = None  # monotonic: when its turn came
        self.work: asyncio.Future[Any] | None = None  # the engine's, which goes on a while after nobody waits for it
        self._gone = False

    async def turn(self) -> None:
        """Return when it is this request's turn."""
        await self._queue.take()
        self.began = time.monotonic()

    def leave(self) -> None:
        """Make room for the next, as soon as the engine is done with this one; may be called twice."""
        if self._gone:
            return
        self._gone = True
        if self.work is None or self.work.done():
            self._queue.left(self)
        else:
            self.work.add_done_callback(lambda _: self._queue.left(self))


class Pace:
    """How long requests take, the latest counting most: when to come back."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._each_s = 1.0

    def took(self, seconds: float) -> None:
        self._each_s += 0.2 * (seconds - self._each_s)

    def until_next(self) -> int:
        """Return whole seconds until a place is likely to be free."""
        return max(1, min(60, math.ceil(self._each_s / self._slots)))


async def _unless_left(request: Request, coroutine: Any) -> Response:
    """Return a response, or stop working on it when the client leaves."""
    work = asyncio.ensure_future(coroutine)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else Response(status_code=CLIENT_LEFT)
    finally:
        for task in (work, left):
            task.cancel()
        with suppress(asyncio.CancelledError, Refusal):
            await work


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _stopping() -> Refusal:
    return Refusal(503, "the service is stopping", code="stopping", retry_after_s=30)


async def _not_found(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(404, "there is no such place here").body, 404)


async def _not_allowed(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(405, f"{request.method} is not answered here").body, 405)


async def _fault(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, f"the service failed: {type(error).__name__}").body, 500)
