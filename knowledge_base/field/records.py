"""CSV rows and YAML mappings as records: cells of text, each with its file and line, so that every error names them.

A CSV file has exactly its kind's columns; lists in a cell are separated by ` | `. A YAML file is one mapping of ids;
its scalars stay text, and anchors, aliases, tags, duplicate keys and a second document are refused.
"""

from __future__ import annotations

import csv
import io
import math
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.types import Step
from knowledge_base.units import quote

BETWEEN = "|"  # the texts of a list in a cell
REPLACES = "replaces"  # the key with which an entry says that it takes another's place
DEEPEST = 5
LONGEST = 5_000  # characters of one text
_ID = re.compile(r"[a-z][a-z0-9_]*")
_LINK = re.compile(r"https://[A-Za-z0-9.-]+\.[a-z]+(/[^\s<>\"`{}|\\^]*)?|arXiv:[0-9]{4}\.[0-9]{4,5}")
_STEP = re.compile(r"([a-z][a-z0-9_]*)(?:\(([^()]*)\))?")
_KNOB = re.compile(r"([a-z][a-z0-9_]*)=([\w.:-]+)")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# What a terminal obeys rather than shows: controls, separators of lines, what turns the direction of text around.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True)
class Record:
    """A CSV row or a YAML mapping before it is an entry: cells as written, and the line of each."""

    file: str
    line: int
    cells: dict[str, Any]  # text, a list of texts, or a Record
    lines: dict[str, int] = field(default_factory=dict)

    def where(self, key: str | None = None) -> str:
        """Return `papers.csv:12`, of one key where the file has a line for each."""
        return f"{self.file}:{self.lines.get(key or '', self.line)}"

    def error(self, message: str, *, hint: str, key: str | None = None) -> BadInput:
        """Return the error that says something about this record, or one of its keys."""
        return BadInput(message, hint=hint, where=self.where(key))

    def only(self, required: Sequence[str], optional: Sequence[str] = ()) -> Record:
        """Return the record itself.

        Raises:
            BadInput: a key is unknown or missing.
        """
        said = (("it has", required), ("it may have", optional))
        wanted = "; ".join(f"{words} {', '.join(keys)}" for words, keys in said if keys)
        for key in self.cells:
            if key not in required and key not in optional:
                raise self.error(f"unknown key {quote(key)}", hint=wanted, key=key)
        for key in required:
            if key not in self.cells:
                raise self.error(f"`{key}` is missing", hint=wanted)
        return self

    def text(self, key: str) -> str:
        """Return a text that must be there."""
        if not (text := self.maybe(key)):
            raise self.error(f"`{key}` is empty", hint="write it", key=key)
        return text

    def maybe(self, key: str) -> str:
        """Return a text, empty where the key or its text is not there."""
        value = self.cells.get(key, "")
        if not isinstance(value, str):
            raise self.error(f"`{key}` must be a text", hint=f"write `{key}: words`", key=key)
        return value.strip()

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty where the key is not there."""
        value = self.cells.get(key, [])
        if isinstance(value, str) and not self.lines:  # a CSV cell
            value = [part.strip() for part in value.split(BETWEEN)] if value.strip() else []
        if not isinstance(value, list) or not all(isinstance(v, str) and v.strip() for v in value):
            raise self.error(f"`{key}` must be a list of texts", hint="separate them: [a, b] or a | b", key=key)
        return tuple(value)

    def record(self, key: str) -> Record:
        """Return a mapping, empty where the key is not there."""
        value = self.cells.get(key, Record(self.file, self.line, {}))
        if not isinstance(value, Record):
            raise self.error(f"`{key}` must be a mapping", hint=f"write `{key}: {{name: value}}`", key=key)
        return value

    def word(self, key: str, allowed: Sequence[str]) -> str:
        """Return a text that is one of the allowed."""
        return self.check(key, self.text(key), allowed)

    def check(self, key: str, word: str, allowed: Sequence[str]) -> str:
        """Return a word that must be one of the allowed."""
        if word not in allowed:
            raise self.error(f"`{key}` cannot be {quote(word)}", hint=f"one of: {', '.join(allowed)}", key=key)
        return word

    def number(self, key: str) -> float | None:
        """Return a finite number, None where the text is empty."""
        text = self.maybe(key)
        if text and not is_number(text):
            raise self.error(f"`{key}` must be a number, got {quote(text)}", hint="digits and a point", key=key)
        return float(text) if text else None

    def link(self, key: str) -> str:
        """Return a link that must be there."""
        return self._link(key, self.text(key))

    def links(self, key: str) -> tuple[str, ...]:
        """Return a list of links."""
        return tuple(self._link(key, text) for text in self.texts(key))

    def _link(self, key: str, text: str) -> str:
        if not is_link(text):
            raise self.error(f"{quote(text)} is not a link", hint="write https://… or arXiv:NNNN.NNNNN", key=key)
        return text

    def name(self, key: str) -> str:
        """Return an id: small letters, digits and underscores."""
        return self.id(self.text(key), key)

    def id(self, text: str, key: str) -> str:
        """Return a text that must be an id."""
        if not _ID.fullmatch(text):
            raise self.error(f"{quote(text)} is not an id", hint="small letters, digits and `_`: weight_only", key=key)
        return text


def is_number(text: str) -> bool:
    """Return whether a text is a finite decimal number."""
    return bool(_NUMBER.fullmatch(text)) and math.isfinite(float(text))


def is_link(text: str) -> bool:
    """Return whether a text is a link as the data writes them: `https://…` or `arXiv:NNNN.NNNNN`."""
    return bool(_LINK.fullmatch(text))


def value(text: str) -> float | int | str:
    """Return a knob's setting as written: a number where it looks like one, else a word.

    >>> value("128"), value("0.5"), value("q4_k")
    (128, 0.5, 'q4_k')
    """
    if not is_number(text):
        return text
    return float(text) if re.search(r"[.eE]", text) else int(text)


@lru_cache(maxsize=4096)
def parse_steps(text: str) -> tuple[Step, ...]:
    """Return steps written in a plan's words: `sparsegpt(sparsity=0.5) + gptq(bits=4)`.

    Raises:
        ValueError: not such a text; says which part.
    """
    return tuple(_step(part) for part in text.split(" + "))


def _step(text: str) -> Step:
    found = _STEP.fullmatch(text.strip())
    knobs = [_KNOB.fullmatch(part) for part in found[2].split(", ")] if found and found[2] is not None else []
    if not found or None in knobs:
        raise ValueError(text)
    return Step(found[1], {knob[1]: value(knob[2]) for knob in knobs if knob})


# ---------------------------------------------------------------- files


def read_text(path: Path, name: str) -> str:
    """Return a file's text: UTF-8, no control characters.

    Raises:
        BadInput: it cannot be read, or is a folder, a pipe or a device, which may never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInput("not a plain file", hint="put a text file in its place", where=name)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadInput("not UTF-8", hint="save the file as UTF-8", where=f"{name}:{line}") from error
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", hint="check its permissions", where=name) from error
    if bad := _CONTROL.search(text):
        raise _controlled(name, text.count("\n", 0, bad.start()) + 1)
    return text


def _controlled(name: str, line: int) -> BadInput:
    return _refusal("a control character", "save the file as plain text", name, line)


def _one_line(text: str, name: str, line: int) -> str:
    """Return a text as one line, however many it was written on."""
    if len(text) > LONGEST:
        raise _refusal(f"a text of {len(text):,} characters", f"at most {LONGEST:,}", name, line)
    return " ".join(text.split()) if any(c in text for c in "\n\r\t") else text


def lay(layers: Iterable[Iterable[Record]], *, key: str, beside: Sequence[str] = ()) -> dict[str, Record]:
    """Return the records of layers by their key, those of later layers over those before.

    Args:
        beside: further columns that together with the key tell two records apart, which may be empty.

    Raises:
        BadInput: one has the key of another and does not say that it replaces it, or there is nothing to replace.
    """
    found: dict[str, Record] = {}
    for layer in layers:
        here: set[str] = set()
        for record in layer:
            name = ", ".join((record.text(key), *filter(None, map(record.maybe, beside))))
            replaces = record.maybe(REPLACES) and record.word(REPLACES, ("yes",))
            if name in here or (name in found and not replaces):
                raise record.error(
                    f"{quote(name)} is there twice",
                    hint=f"the other: {found[name].where()}; a folder of your own may replace it: `{REPLACES}: yes`",
                    key=key,
                )
            if replaces and name not in found:
                raise record.error(f"there is no {quote(name)} to replace", hint=f"remove `{REPLACES}`", key=REPLACES)
            here.add(name)
            found[name] = record
    return found


def rows(path: Path, name: str, columns: Sequence[str] = (), optional: Sequence[str] = ()) -> Iterator[Record]:
    """Yield the rows of a CSV file that has these columns; without, whichever it has.

    Raises:
        BadInput: a column is unknown, missing or twice there, a row has another number of cells, or bad quotes.
    """
    reader = csv.reader(io.StringIO(read_text(path, name), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise BadInput("a column is there twice", hint="remove one of them", where=f"{name}:1")
        Record(name, 1, dict.fromkeys(header, "")).only(columns or header, optional)
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) != len(header):
                raise BadInput(
                    f"{len(cells)} cells in a table of {len(header)} columns",
                    hint="quote cells that hold commas", where=f"{name}:{line}",
                )  # fmt: skip
            yield Record(name, line, {key: _one_line(cell, name, line) for key, cell in zip(header, cells)})
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"malformed CSV: {error}", hint="check the quotes", where=f"{name}:{reader.line_num}") from error


def mappings(path: Path, name: str) -> Iterator[Record]:
    """Yield the mappings of a YAML file, each with its key as `id`.

    Raises:
        BadInput: malformed, not a mapping of mappings, or one of the things this module refuses.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        whole = _document(yaml.parse(read_text(path, name), Loader=loader), name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadInput(
            f"malformed YAML: {error.problem or error.context}",
            hint="check indentation, quotes and colons near this line",
            where=f"{name}:{mark.line + 1 if mark else 1}",
        ) from error
    except yaml.YAMLError as error:
        raise BadInput(f"malformed YAML: {error}", hint="save the file as plain text", where=name) from error
    for key, record in whole.cells.items():
        if not isinstance(record, Record):
            raise whole.error(f"{quote(key)} must be a mapping", hint=f"write `{key}:` and its keys below", key=key)
        if "id" in record.cells:
            raise record.error("`id` is given by the mapping's key", hint="remove it", key="id")
        line = whole.lines[key]
        yield Record(name, line, {"id": key, **record.cells}, {"id": line, **record.lines})


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read yet: a list, or a mapping with the key that waits for its value."""

    content: Any
    lines: dict[str, int]
    key: str | None = None


def _document(events: Iterable[Any], name: str) -> Record:
    """Assemble the records of the one document, with a stack of our own so that depth is ours to limit."""
    import yaml

    documents: list[Any] = []
    stack = [_Open(documents, {})]
    for event in events:
        line = event.start_mark.line + 1
        value: Any
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal("aliases and anchors are not allowed", "write the value out", name, line)
        if getattr(event, "tag", None):
            raise _refusal("tags are not allowed", "write plain values without `!`", name, line)
        if isinstance(event, yaml.CollectionEndEvent):
            stack.pop()
            continue
        if isinstance(event, yaml.ScalarEvent):
            if _CONTROL.search(event.value):  # written as an escape: "\e"
                raise _controlled(name, line)
            value = _one_line(event.value, name, line)
        elif isinstance(event, yaml.MappingStartEvent):
            value = Record(name, line, {}, {})
        elif isinstance(event, yaml.SequenceStartEvent):
            value = []
        else:
            continue
        if _attach(stack[-1], value, name, line) and not isinstance(value, str):
            if len(stack) > DEEPEST:
                raise _refusal(f"nested deeper than {DEEPEST} levels", "an entry needs three", name, line)
            stack.append(_Open(value.cells, value.lines) if isinstance(value, Record) else _Open(value, {}))
    if len(documents) != 1 or not isinstance(documents[0], Record):
        raise _refusal("not one mapping of ids", "write `id:` and its keys below, in one document", name, 1)
    return documents[0]


def _attach(parent: _Open, value: Any, name: str, line: int) -> bool:
    """Put a value where it belongs; False when it was a key, which only waits for its value."""
    if isinstance(parent.content, list):
        parent.content.append(value)
        return True
    if parent.key is not None:
        parent.content[parent.key], parent.key = value, None
        return True
    if not isinstance(value, str):
        raise _refusal("a key must be plain text", "write `key: value`", name, line)
    if value in parent.lines:
        raise _refusal(f"{quote(value)} is there twice", f"the other is on line {parent.lines[value]}", name, line)
    parent.lines[value], parent.key = line, value
    return False


def _refusal(message: str, hint: str, name: str, line: int) -> BadInput:
    return BadInput(message, hint=hint, where=f"{name}:{line}")
