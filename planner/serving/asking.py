"""What a client asks for: OpenAI's requests, read field by field. Whatever cannot be honoured is refused, never dropped.

Beside OpenAI's own fields, `ignore_eos` is known, as llama.cpp and vLLM know it. Where nothing is said an answer is
greedy: that is how its quality was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from knowledge_base.engines._running import Sampling

MOST_STOPS, MOST_STOP_CHARACTERS = 4, 200
MOST_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that change nothing in an answer, or ask for what is done anyway.
HARMLESS = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # values that ask for nothing special
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],), "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False), "top_k": (0, -1), "min_p": (0,),
    "repetition_penalty": (1,), "min_tokens": (0,), "modalities": (["text"],),
}  # fmt: skip


class Refusal(Exception):
    """A request that is not served: HTTP status, and the error as OpenAI writes it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = (
            "invalid_request_error"
            if self.status < 429
            else "rate_limit_error"
            if self.status == 429
            else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request, its fields known to be good. Exactly one of text, tokens and messages is set."""

    model: str | None
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    max_tokens: int | None  # None: as many as is usual
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    stream: bool
    usage: bool  # a last event of a stream tells what was used


def read(body: bytes, *, chat: bool) -> Asked:
    """Return what a request body asks for.

    Raises:
        Refusal: 400, with what is wrong and where.
    """
    data = _object(body)
    allowed = {
        "model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "ignore_eos",
        *(("messages", "max_completion_tokens") if chat else ("prompt",)),
    }  # fmt: skip
    for name, value in data.items():
        if name in allowed or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise _wrong(_shown(name), "this field is not known here")
        if value is not None and value not in NEUTRAL[name]:
            raise _wrong(name, "this service cannot do what it asks for; leave it out")
    options = _field(
        data, "stream_options", dict, {}, lambda v: not set(v) - {"include_usage"}, '{"include_usage": ...}'
    )
    limits = [
        _field(data, name, int, None, lambda v: v >= 1, "a whole number of at least 1")
        for name in ("max_completion_tokens", "max_tokens")
    ]
    asked = {
        "model": _field(data, "model", str, None, lambda v: len(v) <= 1000, "a name"),
        "max_tokens": next((n for n in limits if n is not None), None),
        "sampling": Sampling(
            temperature=float(_field(data, "temperature", float, 0.0, lambda v: 0 <= v <= 2, "a number from 0 to 2")),
            top_p=float(_field(data, "top_p", float, 1.0, lambda v: 0 < v <= 1, "a number above 0, at most 1")),
            seed=_field(data, "seed", int, None, lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63"),
        ),
        "stop": _stops(data.get("stop")),
        "ignore_eos": _field(data, "ignore_eos", bool, False),
        "stream": _field(data, "stream", bool, False),
        "usage": _field(options, "include_usage", bool, False),
    }
    return Asked(**asked, messages=_messages(data)) if chat else Asked(**asked, **_prompt(data))


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise Refusal(400, "the body is not a JSON object")
    return data


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _field(
    data: Mapping[str, Any], name: str, kind: type, default: Any,
    good: Callable[[Any], bool] = lambda value: True, words: str = "true or false",
) -> Any:  # fmt: skip
    """Return a field's value, or the default where it is absent or null."""
    value = data.get(name)
    if value is None:
        return default
    fits = type(value) in ((int, float) if kind is float else (kind,))
    if not fits or not good(value):
        raise _wrong(name, f"expected {words}")
    return value


def _prompt(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the one prompt as text or as tokens."""
    given = data.get("prompt")
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list):
        given = given[0]
    if isinstance(given, str) and given:
        return {"text": _text(given, "prompt")}
    if isinstance(given, list) and given and all(type(token) is int and 0 <= token < 2**31 for token in given):
        return {"tokens": tuple(given)}
    if isinstance(given, list) and len(given) > 1 and all(isinstance(each, str | list) for each in given):
        raise _wrong("prompt", "one prompt a request; send several requests")
    raise _wrong("prompt", "expected a text that is not empty, or a list of token ids")


def _messages(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    given = data.get("messages")
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_MESSAGES:
        raise _wrong("messages", f"expected a list of 1 to {MOST_MESSAGES} messages")
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(given))


def _message(message: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise _wrong(f"{where}.role", f"expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):  # parts; only text is understood
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise _wrong(f"{where}.content", "only text is understood")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", "expected a text")
    if message.get("tool_calls"):
        raise _wrong(f"{where}.tool_calls", "this service calls no tools")
    return {"role": message["role"], "content": _text(content, f"{where}.content")}


def _stops(given: Any) -> tuple[str, ...]:
    stops = [] if given is None else [given] if isinstance(given, str) else given
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= MOST_STOP_CHARACTERS for stop in stops):
        raise _wrong("stop", f"expected at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters")
    return tuple(stops)


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _wrong(where, "not a valid text: it holds half a character") from None
    return text


def _wrong(param: str, what: str) -> Refusal:
    return Refusal(400, f"`{param}`: {what}", param=param)


def _shown(name: str) -> str:
    return name[:100].encode(errors="replace").decode()


class Stops:
    """Cuts an answer before the stop text that is complete first; keeps back what may be the start of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._kept = ""
        self.met = False

    def pass_on(self, text: str) -> str:
        """Return what of the text so far can be told; nothing more once a stop was met."""
        if self.met or not self._stops:
            return "" if self.met else text
        self._kept += text
        if found := [(at + len(stop), at) for stop in self._stops if (at := self._kept.find(stop)) >= 0]:
            self.met = True
            return self._kept[: min(found)[1]]
        held = max((n for stop in self._stops for n in range(1, len(stop)) if self._kept.endswith(stop[:n])), default=0)
        cut = len(self._kept) - held
        told, self._kept = self._kept[:cut], self._kept[cut:]
        return told

    def rest(self) -> str:
        """Return what was kept back, at the end of an answer that met no stop."""
        return "" if self.met else self._kept
