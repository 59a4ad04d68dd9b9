"""Strict reading of YAML and TOML: every scalar as the text that was written, with its line and column.

YAML 1.1 would turn `12:30` into 750 and `off` into False; here nothing is converted, so that typing can be done by
what a key needs, and refused with the place. Aliases, anchors, tags, duplicate keys, a second document, more than
20 levels, 2000 values or 256 KiB are refused while reading, before anything is built from them.
"""

from __future__ import annotations

import datetime
import re
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from knowledge_base.errors import BadInput
from knowledge_base.units import quote

LARGEST_BYTES = 256 * 1024
DEEPEST = 20
MOST_VALUES = 2000
_PLAIN_TYPES = (  # YAML 1.2 core schema: what a plain scalar is; everything else is text
    ("null", re.compile(r"(?:~|null|Null|NULL)?")),
    ("boolean", re.compile(r"true|True|TRUE|false|False|FALSE")),
    (
        "number",
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
    ),
)
_BREAKS = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")
_TOML_ASIDE = re.compile(r"""\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*""", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: 1-based line and column, and the column after its end on that line."""

    line: int
    column: int
    end: int


@dataclass(frozen=True, slots=True)
class Source:
    """A text that was read: its name for messages, its lines, and what it describes, a topic of `leanplan help`."""

    name: str
    lines: tuple[str, ...]
    about: str = "spec"

    def where(self, place: Place) -> str:
        """Return `leanplan.yaml:14:22`."""
        return f"{self.name}:{place.line}:{place.column}"

    def excerpt(self, place: Place) -> str | None:
        """Return the line with carets under the place; long lines are cut around it."""
        if not 1 <= place.line <= len(self.lines) or not self.lines[place.line - 1].strip():
            return None
        shown = "".join(c if c.isprintable() else " " for c in self.lines[place.line - 1])
        first = max(0, place.column - 60)
        carets = max(1, min(place.end, first + 100, len(shown) + 1) - place.column)
        margin = f"{place.line:>5} | "
        return f"{margin}{shown[first : first + 100]}\n{' ' * (len(margin) + place.column - 1 - first)}{'^' * carets}"


@dataclass(slots=True)
class Node:
    """One value of a document. `type` is string, number, boolean, null, mapping or sequence (YAML 1.2 core schema).

    A scalar's `content` is its text as written; a mapping's a dict of nodes; a sequence's a list of nodes.
    `source` and the places are None for values that came from Python.
    """

    path: tuple[str, ...]
    type: str
    content: Any
    source: Source | None = None
    place: Place | None = None
    key_place: Place | None = None

    @property
    def name(self) -> str:
        """`search.time_limit`, or "the spec" for the whole."""
        return ".".join(self.path) or f"the {self.about}"

    @property
    def about(self) -> str:
        """What the whole describes: "spec", "machine"."""
        return self.source.about if self.source else "spec"

    @property
    def found(self) -> str:
        """What this is, for messages: "a list", "'abc'", "nothing"."""
        if self.type in ("mapping", "sequence"):
            return "a list" if self.type == "sequence" else "a mapping"
        return "nothing" if self.type == "null" else quote(self.content)

    @property
    def line(self) -> int | None:
        """The 1-based line, where known."""
        place = self.key_place or self.place
        return place.line if place else None

    def error(self, message: str, *, hint: str, at_key: bool = False) -> BadInput:
        """Return the error that says something about this value (or its key), with its place."""
        place = self.key_place if at_key and self.key_place else self.place
        if self.source is None or place is None:
            return BadInput(message, hint=hint, where=self.name)
        return BadInput(message, hint=hint, where=self.source.where(place), excerpt=self.source.excerpt(place))


@dataclass(slots=True)
class _Open:
    """A collection whose end has not been read yet."""

    node: Node
    flow: bool = False
    key: tuple[str, Place] | None = None
    order: list[str] = field(default_factory=list)


def read_bytes(source: str | Path, stdin: BinaryIO | None = None) -> tuple[bytes, str]:
    """Return a spec's bytes and its name for messages; `-` reads standard input.

    Raises:
        BadInput: not found, a folder, not a regular file, unreadable, or larger than 256 KiB.
    """
    make = "create one: leanplan init"
    if str(source) == "-":
        data, name = (stdin or sys.stdin.buffer).read(LARGEST_BYTES + 1), "<stdin>"
    else:
        path, name = Path(source), str(source)
        if "\0" in name or not name:
            raise BadInput("not a path", hint="give the path of a spec file", where=quote(name))
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise BadInput("a folder, not a spec file", hint=f"give the file in it, or {make}", where=name)
            if not stat.S_ISREG(mode):
                raise BadInput("not a regular file", hint="give a file, or - to read standard input", where=name)
            with path.open("rb") as file:
                data = file.read(LARGEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadInput("not found", hint=make, where=name) from error
        except OSError as error:
            raise BadInput(
                f"cannot be read: {error.strerror}", hint="check the path and its permissions", where=name
            ) from error
    if len(data) > LARGEST_BYTES:
        raise BadInput(
            "larger than 256 KiB, which is not allowed",
            hint="a spec is a page of text; is this another file?",
            where=name,
        )
    return data, name


def decode(data: bytes, name: str) -> str:
    """Return bytes as text: UTF-8 with or without a byte order mark, any line ends.

    Raises:
        BadInput: not UTF-8 (with the byte), or a NUL or other control character (with the line).
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data[:start].count(b"\n") + 1
        raise BadInput(
            f"not UTF-8 at byte {start} (counted from 0, line {line})", hint="save the file as UTF-8", where=name
        ) from error
    if bad := _CONTROL.search(text):
        line = len(_BREAKS.findall(text[: bad.start()])) + 1
        what = "NUL byte" if bad[0] == "\0" else f"control character U+{ord(bad[0]):04X}"
        raise BadInput(f"{what} in the text", hint="save the file as plain UTF-8 text", where=f"{name}:{line}")
    return text


def parse_yaml(text: str, name: str, about: str = "spec") -> Node:
    """Return the one document of a YAML text; an empty text is a null node.

    Raises:
        BadInput: malformed, or one of the things this module refuses; with line, column and the line itself.
    """
    import yaml

    source = Source(name, tuple(_BREAKS.split(text)), about)
    try:
        return _build(yaml.parse(text, Loader=yaml.SafeLoader), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(mark.line + 1, mark.column + 1, mark.column + 2) if mark else Place(1, 1, 2)
        problem = f"{error.problem or error.context or 'malformed'}".replace("<stream end>", "the end of the file")
        hint = (
            "limits are written `max: 50 ms` or `min: 5 tokens/s`, without `>=`"
            if "chomping" in problem
            else _yaml_hint(problem)
        )
        raise _refusal(source, _within(place, source), f"malformed YAML: {problem}", hint) from error
    except yaml.YAMLError as error:  # the reader's: a character YAML has no place for
        raise BadInput(
            f"malformed YAML: {' '.join(str(error).split())[:120]}",
            hint="save the file as plain UTF-8 text",
            where=name,
        ) from error


def _yaml_hint(problem: str) -> str:
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    return "check brackets, quotes and indentation near this line; leanplan help spec shows a whole spec"


def _within(place: Place, source: Source) -> Place:
    # An error at the end of the file is marked on a line that is empty or does not exist: show the last written one.
    line = min(place.line, len(source.lines))
    while line > 1 and not source.lines[line - 1].strip():
        line -= 1
    if line == place.line:
        return place
    end = len(source.lines[line - 1]) + 1
    return Place(line, end, end + 1)


def _build(events: Any, source: Source) -> Node:
    """Assemble nodes from parser events with a stack of our own, so that depth is ours to limit."""
    import yaml

    root: Node | None = None
    stack: list[_Open] = []
    for count, event in enumerate(events):
        place = _place(event)
        if count > 2 * MOST_VALUES:
            raise _refusal(
                source, place, f"more than {MOST_VALUES} values, which is not allowed", "a spec has a hundred at most"
            )
        if isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise _refusal(source, place, "a second document", "keep one document in the file: remove the `---`")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refusal(source, place, "aliases and anchors are not allowed", "write the value out")
        if getattr(event, "tag", None) is not None:
            raise _refusal(
                source, place, f"tags are not allowed ({quote(event.tag)})", "write plain values without `!`"
            )
        if isinstance(event, yaml.ScalarEvent):
            node = Node((), _type_of(event), event.value, source, place)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(stack) >= DEEPEST:
                raise _refusal(
                    source, place, f"nested deeper than {DEEPEST} levels, which is not allowed", "a spec needs four"
                )
            kind = "mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence"
            node = Node((), kind, {} if kind == "mapping" else [], source, place)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            if closed.flow and closed.node.place and event.end_mark.line + 1 == closed.node.place.line:
                closed.node.place = Place(closed.node.place.line, closed.node.place.column, event.end_mark.column + 1)
            continue
        else:
            continue
        if stack:
            attached = _attach(stack[-1], node, source)
            if not attached:
                continue
        else:
            root = node
        if node.type in ("mapping", "sequence"):
            stack.append(_Open(node, flow=bool(event.flow_style)))
    return root or Node((), "null", "", source, Place(1, 1, 2))


def _attach(parent: _Open, node: Node, source: Source) -> bool:
    """Put a node into its parent; False when the node was a key, which only waits for its value."""
    assert node.place
    if parent.node.type == "sequence":
        node.path = (*parent.node.path, str(len(parent.node.content)))
        parent.node.content.append(node)
        return True
    if parent.key is None:
        if node.type in ("mapping", "sequence"):
            raise node.error("a key must be plain text", hint="write `key: value`")
        parent.key = (node.content, node.place)
        if before := parent.node.content.get(node.content):
            raise _refusal(
                source, node.place, f"{quote(node.content)} already given on line {before.line}", "keep one of the two"
            )
        return False
    (key, key_place), parent.key = parent.key, None
    if parent.flow and node.type == "null" and parent.order:
        _refuse_comma(parent.node.content[parent.order[-1]], key, key_place, source)
    node.path, node.key_place = (*parent.node.path, key), key_place
    parent.node.content[key] = node
    parent.order.append(key)
    return True


def _refuse_comma(before: Node, key: str, place: Place, source: Source) -> None:
    """Catch `{max: 1,5 ms}`, which YAML reads as {max: 1, "5 ms": nothing}."""
    if before.type in ("string", "number") and re.fullmatch(r".*[0-9]", before.content) and re.match(r"[0-9]", key):
        raise _refusal(
            source, place, f"a comma inside a number splits it here; write {before.content}.{key}",
            f"without marks between thousands it would be {before.content}{key}",
        )  # fmt: skip


def _type_of(event: Any) -> str:
    if event.style is not None:  # quoted, | or >
        return "string"
    return next((name for name, shape in _PLAIN_TYPES if shape.fullmatch(event.value)), "string")


def _place(event: Any) -> Place:
    start, end = event.start_mark, event.end_mark
    last = end.column + 1 if end.line == start.line else start.column + 2
    return Place(start.line + 1, start.column + 1, max(last, start.column + 2))


def _refusal(source: Source, place: Place, message: str, hint: str) -> BadInput:
    return BadInput(message, hint=hint, where=source.where(place), excerpt=source.excerpt(place))


# ---------------------------------------------------------------- TOML and Python values


def parse_toml(text: str, name: str, *, table: tuple[str, ...] = ()) -> Node:
    """Return a TOML text, or one table of it, as a node; places are those of the keys.

    Raises:
        BadInput: malformed, nested too deep, or the table is not there.
    """
    import tomllib

    source = Source(name, tuple(_BREAKS.split(text)))
    try:
        if _toml_depth(text) > DEEPEST:
            raise BadInput(
                f"nested deeper than {DEEPEST} levels, which is not allowed", hint="a spec needs four", where=name
            )
        data: Any = tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:
        at = re.search(r" \(at line (\d+), column (\d+)\)", str(error))
        place = Place(int(at[1]), int(at[2]), int(at[2]) + 1) if at else None
        raise BadInput(
            f"malformed TOML: {re.sub(r' [(]at .*[)]$', '', str(error))}", hint="check the line against https://toml.io",
            where=source.where(place) if place else name, excerpt=source.excerpt(place) if place else None,
        ) from error  # fmt: skip
    for step in table:
        data = data.get(step) if isinstance(data, Mapping) else None
    if data is None:
        raise BadInput(
            f"no table [{'.'.join(table)}]", hint="add the table, or give another file: leanplan init", where=name
        )
    return from_python(data, source=source, places=_toml_places(source, table))


def _toml_depth(text: str) -> int:
    """Return how deep brackets and dotted keys nest at most, strings and comments aside."""
    depth = deepest = 0
    for piece in re.finditer(r"[\[{]|[\]}]|[^\s=\[\]{},]*\.[^\s=\[\]{},]*", _TOML_ASIDE.sub('""', text)):
        if piece[0] in "[{":
            depth += 1
        elif piece[0] in "]}":
            depth = max(0, depth - 1)
        deepest = max(deepest, depth, piece[0].count("."))
    return deepest


def _toml_places(source: Source, table: tuple[str, ...]) -> dict[tuple[str, ...], Place]:
    """Return where each key stands, found by searching the lines; keys of inline tables at their own column."""
    places: dict[tuple[str, ...], Place] = {}
    current: tuple[str, ...] = ()
    for number, line in enumerate(source.lines, 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            current = _toml_key(header[1])
            where = Place(number, header.start(1) + 1, header.end(1) + 1)
            places.setdefault(current[len(table) :], where)
        elif pair := re.match(r"\s*([A-Za-z0-9_.\"' -]+?)\s*=", line):
            path = (*current, *_toml_key(pair[1]))
            if path[: len(table)] != table:
                continue
            path = path[len(table) :]
            places[path] = Place(number, pair.start(1) + 1, len(line.rstrip()) + 1)
            for inner in re.finditer(
                r"[{,]\s*([A-Za-z0-9_-]+)\s*=\s*(\"[^\"]*\"|'[^']*'|[^,}\s]+)", line[pair.end() :]
            ):
                places.setdefault(
                    (*path, inner[1]), Place(number, pair.end() + inner.start(1) + 1, pair.end() + inner.end(2) + 1)
                )
    return places


def _toml_key(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))


def from_python(
    data: Any, *, source: Source | None = None, places: Mapping[tuple[str, ...], Place] | None = None
) -> Node:
    """Return Python values as nodes: numbers as their text, None as null, paths as text.

    Raises:
        BadInput: a value no spec can hold, a key that is not text, or more than 20 levels (which ends cycles too).
    """
    return _from_python(data, (), source, places or {})


def _from_python(
    data: Any, path: tuple[str, ...], source: Source | None, places: Mapping[tuple[str, ...], Place]
) -> Node:
    place = next((places[path[:i]] for i in range(len(path), -1, -1) if path[:i] in places), None)
    node = Node(path, "null", "", source, place or (Place(1, 1, 2) if source else None), place)
    if len(path) > DEEPEST:
        raise node.error(f"nested deeper than {DEEPEST} levels, which is not allowed", hint="a spec needs four")
    if isinstance(data, Mapping):
        if odd := next((key for key in data if not isinstance(key, str)), None):
            raise node.error(f"a key must be text, got {quote(str(odd))}", hint="use the names of leanplan help spec")
        node.type = "mapping"
        node.content = {key: _from_python(value, (*path, key), source, places) for key, value in data.items()}
    elif isinstance(data, list | tuple):
        node.type = "sequence"
        node.content = [_from_python(value, (*path, str(i)), source, places) for i, value in enumerate(data)]
    elif isinstance(data, bool):
        node.type, node.content = "boolean", str(data).lower()
    elif isinstance(data, int):
        node.type, node.content = "number", str(data) if data.bit_length() < 1024 else "1e400"
    elif isinstance(data, float):
        node.type, node.content = "number", repr(float(data))
    elif isinstance(data, str | Path | datetime.date | datetime.time):
        node.type, node.content = "string", str(data)
    elif data is not None:
        raise node.error(
            f"{node.name} cannot be {quote(type(data).__name__)}", hint='write text, e.g. "50 ms", or a whole number'
        )
    return node


def write_yaml(value: Any) -> str:
    """Return a value as YAML that `parse_yaml` reads back as it was.

    PyYAML quotes text that YAML 1.1 would take for something else; ours is YAML 1.2, so what looks like a number,
    boolean or nothing there is quoted as well.
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
        looks_other = any(pattern.fullmatch(data) for _, pattern in _PLAIN_TYPES)
        return dumper.represent_scalar("tag:yaml.org,2002:str", data, style="'" if looks_other else None)

    Dumper.add_representer(str, text)
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=10**6)
