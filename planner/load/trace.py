"""A trace file: one request a row, with the time it came and the lengths of its prompt and its answer.

CSV with a heading, or JSON lines; columns may be called what public traces and servers call them. Nothing is guessed
and nothing is left out: a row that cannot be used is told with its place, and the trace is not.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.serde import digest

LONGEST_BYTES = 128 * 2**20
MOST_ROWS = 1_000_000
MOST_TOKENS = 2**31 - 1
LONGEST_S = 366 * 86400.0
# Names by which traces give these: ours, OpenAI's usage, Azure's and BurstGPT's traces, Mooncake's.
PROMPT = ("prompt_tokens", "input_tokens", "num_prompt_tokens", "input_length", "prompt_len", "ContextTokens", "Request tokens")  # fmt: skip
OUTPUT = ("output_tokens", "completion_tokens", "generated_tokens", "output_length", "output_len", "GeneratedTokens", "Response tokens")  # fmt: skip
TIME = ("timestamp", "arrival_time", "start_time", "time", "TIMESTAMP", "Timestamp")
TIME_MS = ("timestamp_ms", "arrival_ms")
HINT = "a row is timestamp, prompt_tokens, output_tokens: CSV with a heading, or JSON lines"


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace."""

    line: int  # of the file
    at_s: float | None  # since the first request; None where the trace has no times
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path) -> tuple[Row, ...]:
    """Return the requests of a trace in the order they came, times from the first.

    Raises:
        BadInput: the file cannot be read or is empty, or a row cannot be used; with file and line.
    """
    try:
        facts = path.stat()
        if not path.is_file():
            raise BadInput("not a file", where=str(path)[:200], hint="give a .csv or .jsonl file")
        if facts.st_size > LONGEST_BYTES:
            raise BadInput(
                f"{units.format(facts.st_size, 'bytes')}; the limit is {units.format(LONGEST_BYTES, 'bytes')}",
                where=str(path), hint="a part will do: head -n 100000",
            )  # fmt: skip
        return _read(str(path), (facts.st_mtime_ns, facts.st_size))
    except OSError as error:
        raise BadInput(
            f"cannot be read: {error.strerror}", where=str(path)[:200], hint="give the path of a trace file"
        ) from error


@functools.lru_cache(maxsize=4)
def _read(path: str, version: tuple[int, int]) -> tuple[Row, ...]:
    rows: list[tuple[int, float | None, int, int]] = []
    bad: list[tuple[int, str]] = []
    for line, fields in _fields(path):
        if len(rows) + len(bad) >= MOST_ROWS:
            raise BadInput(f"more than {MOST_ROWS:,} rows", where=f"{path}:{line}", hint="give a part of it")
        try:
            rows.append((line, _moment(fields), _tokens(fields, PROMPT), _tokens(fields, OUTPUT)))
        except ValueError as error:
            bad.append((line, str(error)))
    if bad:
        line, what = bad[0]
        more = f"; {len(bad):,} of {len(bad) + len(rows):,} rows cannot be used" if len(bad) > 1 else ""
        raise BadInput(what + more, where=f"{path}:{line}", hint=HINT)
    if not rows:
        raise BadInput("no requests in it", where=path, hint=HINT)
    times = [at for _, at, _, _ in rows if at is not None]
    if times and len(times) < len(rows):
        line = next(line for line, at, _, _ in rows if at is None)
        raise BadInput("no timestamp, and other rows have one", where=f"{path}:{line}", hint=HINT)
    if not times:
        return tuple(Row(*row) for row in rows)
    first = min(times)
    if max(times) - first > LONGEST_S:
        raise BadInput(
            "the requests lie more than a year apart", where=path, hint="timestamps are seconds, or dates; timestamp_ms"
        )
    return tuple(sorted((Row(line, (at or 0.0) - first, p, o) for line, at, p, o in rows), key=lambda r: r.at_s or 0.0))


def content_of(rows: Sequence[Row]) -> str:
    """Return the digest of what a trace asks for, whatever the file looks like."""
    return digest([[r.at_s, r.prompt_tokens, r.output_tokens] for r in rows])


def quantile(lengths: Sequence[int], share: float) -> int:
    """Return the smallest length that at least this share of them does not exceed."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def rate_of(rows: Sequence[Row]) -> float | None:
    """Return the requests of a trace for each second from its first to its last; None where it has no times."""
    last = rows[-1].at_s
    return (len(rows) - 1) / last if last else None


def _fields(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line, fields) of each row that is not blank."""
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        start = file.read(1)
        while start and start.isspace():
            start = file.read(1)
        file.seek(0)
        yield from _json_lines(path, file) if start == "{" else _csv(path, file)


def _json_lines(path: str, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput("not JSON", where=f"{path}:{number}", hint=HINT) from error
        if not isinstance(row, dict):
            raise BadInput("not a JSON object", where=f"{path}:{number}", hint=HINT)
        yield number, row


def _csv(path: str, file: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.reader(file, strict=True)
    try:
        heading = [name.strip() for name in next(reader, [])]
        missing = [names[0] for names in (PROMPT, OUTPUT) if not set(names) & set(heading)]
        if missing:
            raise BadInput(f"the heading has no column {' and '.join(missing)}", where=f"{path}:1", hint=HINT)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(heading):
                message = f"{len(cells)} cells, the heading has {len(heading)}"
                raise BadInput(message, where=f"{path}:{reader.line_num}", hint=HINT)
            yield reader.line_num, {name: cell.strip() or None for name, cell in zip(heading, cells, strict=True)}
    except csv.Error as error:
        raise BadInput(f"not CSV: {error}", where=f"{path}:{reader.line_num}", hint=HINT) from error


def _tokens(fields: Mapping[str, Any], names: Sequence[str]) -> int:
    """Return a length, of the first of the names that is there.

    Raises:
        ValueError: none is, or it is no whole number of tokens above 0.
    """
    name = next((n for n in names if fields.get(n) is not None), None)
    if name is None:
        raise ValueError(f"no {names[0]}")
    value = fields[name]
    try:
        count = int(value) if isinstance(value, str) and value.isascii() else value
    except ValueError:
        count = None
    if type(count) is not int or not 1 <= count <= MOST_TOKENS:
        raise ValueError(f"{name} must be a whole number of tokens, at least 1, got {units.quote(str(value), 40)}")
    return count


def _moment(fields: Mapping[str, Any]) -> float | None:
    """Return a point in time in seconds; None where the row has none.

    Raises:
        ValueError: it is neither a number of seconds nor a date.
    """
    name = next((n for n in (*TIME, *TIME_MS) if fields.get(n) is not None), None)
    if name is None:
        return None
    value = fields[name]
    try:
        if isinstance(value, bool):
            raise ValueError
        at = float(value)
    except (ValueError, TypeError, OverflowError):
        try:
            at = datetime.fromisoformat(value).timestamp()
        except (ValueError, TypeError, OverflowError, OSError):
            told = units.quote(str(value), 40)
            raise ValueError(f"{name} must be seconds or a date, got {told}") from None
    if not math.isfinite(at):
        raise ValueError(f"{name} must be finite, got {units.quote(str(value), 40)}")
    return at / 1000 if name in TIME_MS else at
