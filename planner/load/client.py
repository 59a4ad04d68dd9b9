"""One request to an OpenAI-compatible endpoint of this machine, streamed, and when each of its tokens came.

What a service sends is taken for what it is: text from elsewhere, cut and cleaned before anyone sees it, with bounds
on its size and time.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from knowledge_base.errors import BadInput, EnvironmentProblem

LINE_BYTES = 2**20  # of one event
ERROR_BYTES = 4000  # read of what a service says of an error
TOLD = 200  # characters of it that are shown
SPARE_EVENTS = 16  # that an answer may have beside its tokens
ASKED_S = 10.0  # for an answer about the model
REFUSALS = (429, 503)  # statuses of a service that has no room, rather than a fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A service that runs on this machine. None: it does not say."""

    url: str  # "http://127.0.0.1:8080"
    model: str  # what it calls its model
    vocabulary: int | None = None  # token ids it knows, from 0
    context_tokens: int | None = None
    pid: int | None = None  # the root of its processes


@dataclass(slots=True)
class Answer:
    """What became of one request. Times are in seconds on the load's clock, 0 where its first request may be due."""

    due_s: float
    prompt_tokens: int
    asked_tokens: int
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)  # of each event with output; an event may bring several tokens
    tokens: int = 0  # of the answer
    failure: str = ""  # why there is no answer; "": there is one
    refused: bool = False  # the failure is the service saying it has no room
    answered: bool = False

    @property
    def ttft_s(self) -> float:
        """Until the first token, from when the request was due: a late sender is no excuse for a service that waits."""
        return self.token_s[0] - self.due_s

    @property
    def latency_s(self) -> float:
        return self.token_s[-1] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """For each token after the first; None where there is none."""
        return (self.token_s[-1] - self.token_s[0]) / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def gaps_s(self) -> list[float]:
        """Between tokens that came after each other; what came together has one gap before it."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]


def library() -> Any:
    """Return the HTTP library.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import aiohttp
    except ImportError as error:
        raise EnvironmentProblem(
            "aiohttp is not installed: services cannot be driven", hint='pip install "leanplan[serve]"'
        ) from error
    return aiohttp


def base_of(url: str) -> str:
    """Return the root of an endpoint's URL, without /v1.

    Raises:
        BadInput: it is no http URL, or not of this machine.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, parts, port = "", urlsplit(""), None
    if parts.scheme != "http" or not host or parts.username or parts.query or parts.fragment:
        raise BadInput("not the URL of a service", hint="for example http://127.0.0.1:8080", where=url[:200])
    if not _loopback(host):
        raise BadInput(
            "only a service of this machine is put under load", where=url[:200],
            hint=f"forward its port and give that: ssh -L 8080:127.0.0.1:{port or 80} HOST",
        )  # fmt: skip
    path = parts.path.rstrip("/").removesuffix("/completions").removesuffix("/v1")
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port or 80}{path}"


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def find(url: str, model: str | None = None) -> Endpoint:
    """Return what an endpoint says of itself.

    Raises:
        EnvironmentProblem: nothing answers there, or it is no OpenAI-compatible service.
    """
    aiohttp = library()
    base = base_of(url)
    try:
        async with session(ASKED_S) as talk, talk.get(f"{base}/v1/models") as reply:
            body = await reply.content.read(LINE_BYTES)
            if reply.status != 200:
                raise EnvironmentProblem(
                    f"/v1/models answers HTTP {reply.status}: {_said(body)}",
                    where=base,
                    hint="is it a completions service?",
                )
            listed = json.loads(body)["data"]
            known = next((m for m in listed if m.get("id") == model), listed[0])
            facts = known.get("meta") if isinstance(known.get("meta"), dict) else {}
            return Endpoint(
                url=base, model=model or str(known["id"])[:TOLD], vocabulary=_count(facts.get("n_vocab")),
                context_tokens=_count(known.get("max_model_len")) or _count(facts.get("n_ctx")) or _count(facts.get("n_ctx_train")),
            )  # fmt: skip
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise EnvironmentProblem(
            f"no answer: {_why(error)}", where=base, hint="start a service: leanplan serve PLAN"
        ) from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise EnvironmentProblem(
            "/v1/models does not list a model", where=base, hint="give the URL of an OpenAI-compatible service"
        ) from error


def session(longest_s: float) -> Any:
    """Return a session of a connection for each request; no proxies, no cookies.

    None is used again: a service may close one that waits in the moment it is taken, which is no failure of a request.
    """
    aiohttp = library()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True), cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=longest_s), read_bufsize=LINE_BYTES,
    )  # fmt: skip


def payload(endpoint: Endpoint, prompt: Sequence[int], output_tokens: int) -> bytes:
    """Return the body of a request for exactly so many tokens, past any end-of-text token, greedily."""
    return json.dumps(
        {
            "model": endpoint.model, "prompt": list(prompt), "max_tokens": output_tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip


async def ask(talk: Any, endpoint: Endpoint, body: bytes, answer: Answer, began: float) -> None:
    """Send a request and fill in its answer; whatever goes wrong is written into it.

    Args:
        talk: of `session`.
        began: `time.perf_counter` where the load's clock is 0.
    """
    aiohttp = library()
    usage = None
    answer.sent_s = time.perf_counter() - began
    try:
        async with talk.post(
            f"{endpoint.url}/v1/completions", data=body, headers={"Content-Type": "application/json"}, allow_redirects=False,
        ) as reply:  # fmt: skip
            if reply.status != 200:
                answer.refused = reply.status in REFUSALS
                answer.failure = f"HTTP {reply.status}: {_said(await reply.content.read(ERROR_BYTES))}"
                return
            async for line in reply.content:
                at_s = time.perf_counter() - began
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    break
                event = json.loads(text)
                if "error" in event:
                    answer.failure = f"error in the stream: {_said(text)}"
                    return
                usage = event.get("usage") or usage
                if _brought(event):
                    answer.token_s.append(at_s)
                    if len(answer.token_s) > 2 * answer.asked_tokens + SPARE_EVENTS:
                        answer.failure = f"a stream that goes on beyond the {answer.asked_tokens} tokens asked for"
                        return
        _count_tokens(answer, usage)
        answer.answered = not answer.failure
    except asyncio.CancelledError:
        answer.failure = answer.failure or "no answer by the end of the load"
        raise
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        answer.failure = _why(error)
    except (
        aiohttp.http.HttpProcessingError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        RecursionError,
    ):
        answer.failure = "the stream is not of OpenAI's completions"  # a line without end is one, too


def _brought(event: Mapping[str, Any]) -> bool:
    """Whether an event brings output: a text, or a token whose text is not whole yet."""
    choices = event.get("choices")
    return bool(choices and (choices[0].get("text") or choices[0].get("finish_reason") is None))


def _count_tokens(answer: Answer, usage: Any) -> None:
    """Take the service's own count, else that of its events: some bring several tokens, some none."""
    told = _count(usage.get("completion_tokens")) if isinstance(usage, dict) else None
    answer.tokens = told or min(len(answer.token_s), answer.asked_tokens)
    if not answer.token_s:
        answer.failure = "an answer without tokens"
    elif answer.tokens > answer.asked_tokens:
        answer.failure = f"gave {answer.tokens} tokens, {answer.asked_tokens} were asked for"


def _said(body: bytes) -> str:
    """Return what a service says of an error, on one line and short."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
        inner = found.get("error", found) if isinstance(found, dict) else found
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, RecursionError):
        pass
    return _short(text) or "it does not say why"


def _why(error: BaseException) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else _short(str(error)) or type(error).__name__


def _short(text: str) -> str:
    """Return foreign text on one line, cut, with what a terminal would obey shown instead."""
    from planner.reports._text import literal

    shown = literal(" ".join(text.split()))
    return shown if len(shown) <= TOLD else f"{shown[: TOLD - 1]}…"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
