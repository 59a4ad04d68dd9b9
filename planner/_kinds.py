"""The kinds of value a spec can hold. Each kind reads, writes and describes its value, and gives its JSON Schema.

One description, four uses: the parser, `leanplan schema`, the template of `leanplan init`, `leanplan help spec`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.units import quote
from planner._yaml import Node

UNSET: Any = object()


class Kind(Protocol):
    """What a value may be. `words` says it in a few words, with an example."""

    @property
    def words(self) -> str: ...

    def read(self, node: Node) -> Any:
        """Return the value, or raise BadInput with its place."""
        ...

    def write(self, value: Any) -> Any:
        """Return what `read` turns back into `value`: text, whole numbers, lists and mappings."""
        ...

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema of what `read` accepts, as far as a schema can say it."""
        ...


def wrong(node: Node, kind: Kind) -> BadInput:
    """Return the error for a value of another type than the key needs."""
    return node.error(
        f"{node.name} must be {kind.words}, got {node.found}",
        hint=f"every key is explained by: leanplan help {node.about}",
    )


@dataclass(frozen=True)
class Text:
    """Text of a given shape."""

    words: str
    shape: str = r"^[^\x00-\x1f\x7f-\x9f]{1,500}$"

    def read(self, node: Node) -> str:
        if node.type in ("number", "boolean"):
            raise node.error(
                f"{node.name} must be text, got {node.content}", hint=f'put it in quotes: "{node.content}"'
            )
        if node.type != "string" or not re.search(self.shape, node.content) or node.content.endswith("\n"):
            raise wrong(node, self)
        if any(0xD800 <= ord(c) < 0xE000 for c in node.content):
            raise wrong(node, self)
        return str(node.content)

    def write(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": self.shape}


_RESERVED = ("con", "prn", "aux", "nul", *(f"{port}[0-9]" for port in ("com", "lpt")))
_CASELESS = "|".join(re.sub("[a-z]", lambda m: f"[{m[0]}{m[0].upper()}]", name) for name in _RESERVED)
NAME = Text(
    words="letters, digits, . _ - (at most 64, no . or - at the ends, no name Windows reserves)",
    shape=rf"^(?!(?:{_CASELESS})(?:\.|$))[A-Za-z0-9_](?:[A-Za-z0-9._-]{{0,62}}[A-Za-z0-9_])?$",
)


@dataclass(frozen=True)
class FilePath:
    """A path; relative ones are told from the spec's own folder. `inside` forbids leaving that folder."""

    words: str
    inside: bool = False

    def read(self, node: Node) -> Path:
        path = Path(Text(self.words).read(node))
        if self.inside and (path.is_absolute() or ".." in path.parts or "\\" in str(path)):
            raise node.error(
                f"{node.name}: {quote(str(path))} leaves the spec's folder", hint="name a file beside or below the spec"
            )
        return path

    def write(self, value: Path) -> str:
        return str(value)

    def schema(self) -> dict[str, Any]:
        return Text(self.words).schema()


@dataclass(frozen=True)
class Choice:
    """One of a few words. `refused` maps words that are known but cannot be used to the reason."""

    options: tuple[str, ...]
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> str:
        return " or ".join([", ".join(self.options[:-1]), self.options[-1]] if len(self.options) > 1 else self.options)

    def read(self, node: Node) -> str:
        if node.type == "string" and node.content in self.options:
            return str(node.content)
        if node.type == "string" and node.content in self.refused:
            raise node.error(f"{node.name}: {self.refused[node.content]}", hint=f"write {self.words}")
        near = difflib.get_close_matches(node.content, self.options, n=1) if node.type == "string" else []
        guess = f"; did you mean {quote(near[0])}?" if near else ""
        raise node.error(f"{node.name} must be {self.words}, got {node.found}{guess}", hint=f"write {self.words}")

    def write(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.options)}


@dataclass(frozen=True)
class Entry:
    """A name from a registry, looked up when needed so that a new file is known at once."""

    noun: str
    names: Callable[[], Sequence[str]]

    @property
    def words(self) -> str:
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}: {', '.join(self.names())}"

    def read(self, node: Node) -> str:
        names = self.names()
        if node.type == "string" and node.content in names:
            return str(node.content)
        near = difflib.get_close_matches(node.content, names, n=2) if node.type == "string" else []
        guess = f"; did you mean {' or '.join(quote(n) for n in near)}?" if near else ""
        raise node.error(
            f"unknown {self.noun} {node.found}{guess}", hint=f"known: {', '.join(names)} (leanplan ls {self.noun}s)"
        )

    def write(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.names())}


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    least: int = 1
    most: int = 2**31 - 1

    @property
    def words(self) -> str:
        if self.least == self.most:
            return str(self.least)
        return f"a whole number, at least {self.least}" + (f" and at most {self.most}" if self.most < 2**31 - 1 else "")

    def read(self, node: Node) -> int:
        if node.type == "number":
            number = _finite(node.content)
            if number is not None and number.is_integer() and self.least <= number <= self.most:
                return int(number)
        quoted = node.type == "string" and re.fullmatch(r"[0-9]+", node.content)
        again = re.fullmatch(r"[0-9]+([,_'][0-9]+)+", node.content) if node.type == "string" else None
        if node.type == "number" and number is not None and number > self.most:
            raise node.error(
                f"{node.name} must be at most {self.most:,}, got {node.found}", hint=f"expected {self.words}"
            )
        hint = f"write {node.content} without quotes" if quoted else f"expected {self.words}"
        raise node.error(
            f"{node.name} must be {self.words}, got {node.found}",
            hint=f"write {re.sub(r'[^0-9]', '', node.content)}" if again else hint,
        )

    def write(self, value: int) -> int:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Number:
    """A plain number within bounds; it has no unit."""

    least: float
    most: float

    @property
    def words(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"

    def read(self, node: Node) -> float:
        number = _finite(node.content) if node.type == "number" else None
        if number is None or not self.least <= number <= self.most:
            raise wrong(node, self)
        return number

    def write(self, value: float) -> float:
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.least, "maximum": self.most}


def _finite(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:  # .inf and .nan
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True)
class Quantity:
    """A number with a unit of one dimension; `whole` rounds to whole base units (bytes)."""

    dimension: str
    whole: bool = False

    @property
    def words(self) -> str:
        return units.DIMENSIONS[self.dimension].wanted

    def read(self, node: Node, field: str = "") -> float:
        if node.type not in ("string", "number"):
            raise wrong(node, self)
        value = in_place(node, lambda: units.parse(node.content, self.dimension, field=field or node.name))
        return max(1, round(value)) if self.whole else value

    def write(self, value: float) -> str:
        return units.exact(float(value), self.dimension)

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "pattern": units.pattern(self.dimension)}
        if "" not in units.DIMENSIONS[self.dimension].units:
            return text
        if self.dimension == "ratio":
            return {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, text]}
        return {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, text]}


def in_place(node: Node, call: Callable[[], Any]) -> Any:
    """Run something that may raise BadInput without a place, and give the error this node's place."""
    try:
        return call()
    except BadInput as error:
        raise node.error(error.message, hint=error.hint) from error


@dataclass(frozen=True)
class ListOf:
    """A list of distinct values of one kind."""

    kind: Kind
    most: int | None = None

    @property
    def words(self) -> str:
        return f"a list{f' of at most {self.most}' if self.most else ''}, each {self.kind.words}"

    def read(self, node: Node) -> tuple[Any, ...]:
        if node.type != "sequence":
            raise wrong(node, self)
        if not node.content:
            raise node.error(f"{node.name} is an empty list", hint="name at least one, or leave the key out")
        values: list[Any] = []
        for item in node.content:
            value = self.kind.read(item)
            if value in values:
                raise item.error(f"{item.found} is given twice in {node.name}", hint="keep one of the two")
            values.append(value)
        if self.most and len(values) > self.most:
            raise node.error(
                f"{node.name} has {len(values)} entries, at most {self.most} are allowed",
                hint="keep the most important",
            )
        return tuple(values)

    def write(self, value: Sequence[Any]) -> list[Any]:
        return [self.kind.write(v) for v in value]

    def schema(self) -> dict[str, Any]:
        most = {"maxItems": self.most} if self.most else {}
        return {"type": "array", "items": self.kind.schema(), "minItems": 1, "uniqueItems": True, **most}


@dataclass(frozen=True)
class Key:
    """One key of a section: its name in the spec, what it holds, what it means, what leaving it out means."""

    name: str
    kind: Kind
    about: str
    attribute: str = ""  # of the section's class; the name if empty
    absent: str = ""  # what happens without it, where the default value does not say it
    example: str = ""  # a YAML value, where the kind's own example would not do
    default: Any = UNSET  # where the section's class has none
    required: bool = False  # although the section's class has a default

    @property
    def target(self) -> str:
        return self.attribute or self.name


@dataclass(frozen=True)
class Section:
    """A mapping with known keys, read into a frozen dataclass.

    `shorthand` names the key a lone scalar stands for. `gather` turns the values read, by attribute, into arguments of
    the class, and is where keys are checked against each other; `spread` does the opposite.
    """

    cls: type
    keys: tuple[Key, ...]
    shorthand: str = ""
    gather: Callable[[dict[str, Any], Node], dict[str, Any]] = lambda values, node: values
    spread: Callable[[Any], dict[str, Any]] | None = None

    @property
    def words(self) -> str:
        names = ", ".join(key.name for key in self.keys)
        return f"{f'{self.key(self.shorthand).kind.words}, or ' if self.shorthand else ''}a mapping with {names}"

    def key(self, name: str) -> Key:
        return next(key for key in self.keys if key.name == name)

    def default(self, key: Key) -> Any:
        """Return the value of a key that is left out; UNSET if it must be given."""
        if key.required:
            return UNSET
        if key.default is not UNSET:
            return key.default
        field = next((f for f in dataclasses.fields(self.cls) if f.name == key.target), None)
        if field is None:
            return UNSET
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
        return UNSET if field.default is dataclasses.MISSING else field.default

    def default_text(self, key: Key) -> str:
        """Return what leaving a key out means, in YAML or words: "required", "normal", "by effort: ..."."""
        default = self.default(key)
        if default is UNSET:
            return "required"
        if key.absent or default in (None, ()) or isinstance(key.kind, Section):
            return key.absent or "its defaults"
        return flow(key.kind.write(default))

    def read(self, node: Node) -> Any:
        if self.shorthand and node.type in ("string", "number", "boolean"):
            key = self.key(self.shorthand)
            return self._make({key.target: key.kind.read(node)}, node)
        if node.type == "null" and node.path:
            return self._make({}, node)
        if node.type != "mapping":
            raise wrong(node, self)
        values = {}
        for name, child in node.content.items():
            if name not in (key.name for key in self.keys):
                raise unknown_key(child, [key.name for key in self.keys])
            key = self.key(name)
            if child.type == "null" and self.default(key) is not UNSET:
                continue  # `data:` with nothing behind it is a key left out
            values[key.target] = key.kind.read(child)
        return self._make(values, node)

    def _make(self, values: dict[str, Any], node: Node) -> Any:
        for key in self.keys:
            if key.target not in values:
                default = self.default(key)
                if default is UNSET:
                    raise node.error(
                        f"missing key '{key.name}' in {node.name}",
                        hint=f"{key.name}: {key.about}; expected {key.kind.words}",
                    )
                values[key.target] = default
        return self.cls(**self.gather(values, node))

    def write(self, value: Any) -> dict[str, Any]:
        values = self.spread(value) if self.spread else {key.target: getattr(value, key.target) for key in self.keys}
        return {
            key.name: key.kind.write(values[key.target]) for key in self.keys if values[key.target] not in (None, ())
        }

    def schema(self) -> dict[str, Any]:
        required = [key.name for key in self.keys if self.default(key) is UNSET]
        mapping: dict[str, Any] = {
            "type": "object",
            "properties": {key.name: self._property(key) for key in self.keys},
            "additionalProperties": False,
        }
        if required:
            mapping["required"] = required
        return {"anyOf": [self.key(self.shorthand).kind.schema(), mapping]} if self.shorthand else mapping

    def _property(self, key: Key) -> dict[str, Any]:
        inner = key.kind.schema()
        default = self.default(key)
        if default is not UNSET:
            inner = {"anyOf": [inner, {"type": "null"}]}
        shown = default not in (UNSET, None, ()) and not isinstance(key.kind, Section)
        described = {
            "description": f"{key.about}. {key.kind.words}" if not isinstance(key.kind, Section) else key.about
        }
        if key.example:
            described["description"] += f". Example: {key.example}"
        return {**described, **inner, **({"default": key.kind.write(default)} if shown else {})}


def flow(value: Any) -> str:
    """Return a written value on one line of YAML: `[a, b]`, `{max: 50 ms}`, `64`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(flow(item) for item in value)}]" if isinstance(value, list) else str(value)


def unknown_key(node: Node, known: Sequence[str]) -> BadInput:
    """Return the error for a key that does not exist, with the nearest that do."""
    name = node.path[-1]
    near = difflib.get_close_matches(name, known, n=1) or [key for key in known if key.startswith(f"{name}_")]
    guess = f"; did you mean {quote(near[0])}?" if near else ""
    inside = f" in {'.'.join(node.path[:-1])}" if node.path[:-1] else ""
    return node.error(f"unknown key {quote(name)}{inside}{guess}", hint=f"known keys: {', '.join(known)}", at_key=True)
