"""A workload from a log of real requests: JSON lines with token counts, or with texts that are counted here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput

LONGEST_BYTES = 128 * 2**20
BAD_SHARE = 0.05  # of lines that may be skipped; more and the file is not what it should be
MOST_COUNTED = 2_000  # requests whose texts are counted, spread evenly over the log
MOST_TOKENS = 2**31
MOST_AT_ONCE = 4096  # as in a spec

# Names that servers, proxies and published traces give these.
PROMPT_TOKENS = ("prompt_tokens", "input_tokens", "num_prompt_tokens", "input_length", "prompt_len", "ContextTokens")
OUTPUT_TOKENS = (
    "completion_tokens", "output_tokens", "generated_tokens", "num_generated_tokens", "output_length", "output_len",
    "GeneratedTokens",
)  # fmt: skip
PROMPTS = ("messages", "conversations", "prompt", "input", "question", "instruction")
OUTPUTS = ("completion", "output", "response", "answer", "generated_text", "choices")
STARTS = ("start_time", "started_at", "timestamp", "created_at", "arrival_time", "time", "TIMESTAMP")
ENDS = ("end_time", "finished_at", "completed_at")
DURATIONS = {"latency_s": 1.0, "duration_s": 1.0, "latency_ms": 1e-3, "duration_ms": 1e-3}
NESTS = ("usage", "request", "response", "body")  # objects that may hold any of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A workload as a spec writes it, and what it was fitted to in words."""

    workload: Mapping[str, Any]
    words: str


@dataclass(frozen=True, slots=True)
class Request:
    """What one line says: a length is a count or the text to count."""

    prompt: int | str
    output: int | str | None
    start_s: float | None
    end_s: float | None


def fit(path: Path, model_folder: Path) -> Fitted:
    """Return the workload of a log: median and 95th percentile of prompts, median of answers, requests at a time.

    Args:
        model_folder: its tokenizer.json counts texts, without a chat template.

    Raises:
        BadInput: the file cannot be read, too many lines are no requests (named with their place), or it holds texts
            and there is no tokenizer.
    """
    requests, skipped = _requests(path)
    if any(isinstance(length, str) for r in requests for length in (r.prompt, r.output)):
        requests = requests[:: math.ceil(len(requests) / MOST_COUNTED)]
    count = _counter(model_folder)
    prompts = sorted(max(1, count(r.prompt)) for r in requests)
    outputs = sorted(max(1, count(r.output)) for r in requests if r.output is not None)
    if not outputs:
        raise BadInput(
            f"{path.name} says nothing of the answers",
            hint=f"give each line one of: {', '.join((*OUTPUT_TOKENS, *OUTPUTS))}", where=str(path),
        )  # fmt: skip
    middle, high = _quantile(prompts, 0.5), _quantile(prompts, 0.95)
    at_once = _at_once(requests)
    told = f"{path.name}: {len(requests):,} requests; answers p50 {_quantile(outputs, 0.5)}, p95 {_quantile(outputs, 0.95)}"
    told += "" if at_once else "; no start times with durations, so one at a time is assumed"
    return Fitted(
        workload={
            "prompt_tokens": {"p50": middle, "p95": high} if high > middle else middle,
            "output_tokens": _quantile(outputs, 0.5),
            "concurrency": at_once or 1,
        },
        words="; ".join([told, *skipped]),
    )


def _requests(path: Path) -> tuple[list[Request], list[str]]:
    """Return the requests of a log, and a sentence on the lines that are none."""
    found, bad, lines = [], [], 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        lines += 1
        try:
            found.append(_request(json.loads(line)))
        except (ValueError, OverflowError, RecursionError) as error:
            what = (
                "not JSON"
                if isinstance(error, json.JSONDecodeError | RecursionError | UnicodeDecodeError)
                else str(error)
            )
            bad.append((number, what))
    if bad and (not found or len(bad) > BAD_SHARE * lines):
        number, what = bad[0]
        more = f"; {len(bad):,} of {lines:,} lines cannot be used" if len(bad) > 1 else ""
        raise BadInput(what + more, hint="one JSON object a line; `?` lists its fields", where=f"{path}:{number}")
    if not found:
        raise BadInput("the log is empty", hint="one JSON object a line; `?` lists its fields", where=str(path))
    skipped = f"{len(bad)} line{'s' if len(bad) > 1 else ''} skipped"
    return found, [f"{skipped}, first {path.name}:{bad[0][0]}: {bad[0][1]}"] if bad else []


def _lines(path: Path) -> Iterator[bytes]:
    try:
        if not path.is_file():
            raise BadInput(f"{units.quote(str(path))} is not a file", hint="type the path of a .jsonl file")
        if path.stat().st_size > LONGEST_BYTES:
            raise BadInput(
                f"{units.format(path.stat().st_size, 'bytes')}; the limit is {units.format(LONGEST_BYTES, 'bytes')}",
                hint=f"a part will do: shuf -n 10000 {path.name} > part.jsonl", where=str(path),
            )  # fmt: skip
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise BadInput(
            f"cannot be read: {error.strerror}", hint="check its permissions", where=str(path)[:200]
        ) from error


def _request(row: Any) -> Request:
    """Return one line as a request.

    Raises:
        ValueError: says what is missing or wrong.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    fields = {**_nested(row), **row}
    prompt: int | str | None = _tokens(fields, PROMPT_TOKENS)
    output: int | str | None = _tokens(fields, OUTPUT_TOKENS)
    turns: list[Any] = next(
        (fields[name] for name in ("messages", "conversations") if isinstance(fields.get(name), list)), []
    )
    answered = [
        _text(t) for t in turns if isinstance(t, dict) and (t.get("role") or t.get("from")) in ("assistant", "gpt")
    ]
    if output is None:
        output = next((text for name in OUTPUTS if (text := _text(fields.get(name)))), None)
        if output is None and answered:
            output, turns = answered[-1], turns[:-1]
    if prompt is None:
        named = {**fields, "messages": turns, "conversations": turns}
        prompt = next((text for name in PROMPTS if (text := _text(named.get(name)))), None)
    if prompt is None:
        raise ValueError("no prompt, neither its tokens nor its text")
    start_s = _moment(fields, STARTS)
    length_s = next((fields[n] * unit for n, unit in DURATIONS.items() if _is_number(fields.get(n))), None)
    end_s = start_s + length_s if start_s is not None and length_s is not None else _moment(fields, ENDS)
    return Request(prompt, output, start_s, end_s)


def _nested(row: Mapping[str, Any], depth: int = 3) -> dict[str, Any]:
    """Return the fields of the objects a line may keep its facts in, such as `response.body.usage`."""
    found: dict[str, Any] = {}
    for name in NESTS:
        inner = row.get(name)
        if isinstance(inner, dict) and depth:
            found |= {**_nested(inner, depth - 1), **{k: v for k, v in inner.items() if k not in NESTS}}
    return found


def _tokens(fields: Mapping[str, Any], names: Sequence[str]) -> int | None:
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value <= MOST_TOKENS:
            raise ValueError(f"{name} must be a whole number of tokens, got {str(value)[:40]}")
        return value
    return None


def _text(value: Any) -> str:
    """Return the text of a field: a string, or that of messages and choices put together."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    if isinstance(value, dict):
        return next((text for key in ("content", "text", "value", "message") if (text := _text(value.get(key)))), "")
    return value if isinstance(value, str) else ""


def _moment(fields: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Return a point in time in seconds: a number of seconds or milliseconds, or an ISO date."""
    for name in names:
        value = fields.get(name)
        if value is not None and _is_number(value):
            return value / 1000 if value > 1e11 else float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError as error:
                raise ValueError(f"{name} is neither a number nor a date: {value[:40]}") from error
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_once(requests: Sequence[Request]) -> int | None:
    """Return how many requests are under way while any is, on average and rounded; None where the log cannot tell."""
    spans = sorted((r.start_s, r.end_s) for r in requests if r.start_s is not None and r.end_s is not None)
    busy_s, until = 0.0, -math.inf
    for start, end in spans:
        busy_s += max(0.0, end - max(start, until))
        until = max(until, end)
    if busy_s <= 0:
        return None
    return min(MOST_AT_ONCE, max(1, round(sum(max(0.0, end - start) for start, end in spans) / busy_s)))


def _counter(model_folder: Path) -> Callable[[int | str], int]:
    """Return what turns a length into tokens; the tokenizer is loaded at the first text."""
    loaded: list[Any] = []

    def count(length: int | str) -> int:
        if isinstance(length, int):
            return length
        if not loaded:
            loaded.append(_tokenizer(model_folder))
        return len(loaded[0].encode(length, add_special_tokens=False).ids)

    return count


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            "the log has texts, and there is no tokenizer.json of the model to count them with",
            hint="give token counts, or choose a model whose tokenizer.json is here",
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exceptions
        raise BadInput("the model's tokenizer.json cannot be loaded", hint="mend it", where=str(path)) from error
    tokenizer.no_truncation()
    return tokenizer


def _quantile(values: Sequence[int], share: float) -> int:
    """Return the smallest value that at least this share of the sorted values does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)]
