"""JSON Schemas of what leanplan writes and prints, made from the very types that are written.

A file format is a row of WRITTEN; what a command prints with --json is what its `output()` returns: a dataclass, a
TypedDict, a container or union of these, a mapping from names to such types, or a list of alternatives. What a schema
says of a field is the comment beside it in the code, and the unit in its name.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

Parts = dict[str, dict[str, Any]]  # name of a class with fields -> its schema
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Path: "string"}
_SYMBOLS = {  # a part of a field's name that is a unit -> how it is written
    "bits": "bits", "bytes": "bytes", "flop": "flop", "gco2e": "gCO2e", "h": "h", "j": "J", "kwh": "kWh", "nats": "nats",
    "params": "parameters", "requests": "requests", "s": "s", "tokens": "tokens", "usd": "USD", "w": "W",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Given:
    """In `Annotated[T, Given(schema)]`: a schema that is made elsewhere."""

    schema: Callable[[], Mapping[str, Any]]


class Beside:
    """In `Annotated[T, Beside("Name", more=str)]`: these fields, and those of T beside them, under a name of its own."""

    def __init__(self, title: str, **kinds: Any) -> None:
        self.title, self.kinds = title, kinds


# ---------------------------------------------------------------- what there is a schema of


def result() -> Any:
    """Return the type of a result.json, which `plan --json` prints as well."""
    from planner.results import ParetoSet

    return Annotated[ParetoSet, Beside("Result", schema=int)]


def lock() -> Any:
    from planner.lock import Lock

    return Annotated[Lock, Beside("LockFile", schema=int, content=str)]


def advice() -> Any:
    from planner.advising import Advice

    return Advice


def error() -> Any:
    from planner.cli import Fault

    return {"error": Fault}


def spec() -> Any:
    from planner import spec as specs

    return Annotated[dict[str, Any], Given(specs.schema)]


def machine() -> Any:
    from planner import machine_file

    return Annotated[dict[str, Any], Given(machine_file.schema)]


WRITTEN: dict[str, Callable[[], Any]] = {
    "spec": spec, "machine": machine, "result": result, "lock": lock, "advice": advice, "error": error,
}  # fmt: skip


def names() -> tuple[str, ...]:
    """Return what there is a schema of: what is written, then every command."""
    from planner.cli import commands

    return (*WRITTEN, *commands.names())


def schema(name: str) -> dict[str, Any]:
    """Return the schema of one of `names()`."""
    from planner.cli import commands

    found: Parts = {}
    body = _of((WRITTEN[name] if name in WRITTEN else commands.get(name).output)(), found)
    return {"$schema": DIALECT, "title": f"leanplan {name}", **body, **({"$defs": found} if found else {})}


# ---------------------------------------------------------------- from types to schemas


def _of(kind: Any, found: Parts) -> dict[str, Any]:
    """Return the schema of a type, as `knowledge_base.serde.plain` writes it; classes with fields are put into `found`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if isinstance(kind, list):
        return {"anyOf": [_of(one, found) for one in kind]}
    if isinstance(kind, Mapping):
        return _object(kind, {}, list(kind), found)
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is Annotated and isinstance(args[1], Given):
        return {name: value for name, value in args[1].schema().items() if name != "$schema"}
    if origin is Annotated and isinstance(args[1], Beside):
        return _part(args[1].title, args[0], args[1].kinds, found)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_of(a, found) for a in args]}
    if origin in (list, frozenset) or (origin is tuple and args[1:] == (...,)):
        return {"type": "array", "items": _of(args[0], found)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(args[1], found)}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.value for member in kind]}
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _part(kind.__name__, kind, {}, found)
    raise TypeError(f"no JSON Schema for {kind}")


def _part(name: str, cls: Any, more: Mapping[str, Any], found: Parts) -> dict[str, Any]:
    """Put the schema of a class with fields, and more beside them, into `found`, and return the way there."""
    if name not in found:
        found[name] = {}  # a type may hold itself
        kinds, must = _fields(cls)
        shape = _object({**more, **kinds}, _remarks(cls), [*more, *must], found)
        found[name] = {"description": inspect.cleandoc(cls.__doc__ or ""), **shape}
    return {"$ref": f"#/$defs/{name}"}


def _object(kinds: Mapping[str, Any], remarks: Mapping[str, str], must: Sequence[str], found: Parts) -> dict[str, Any]:
    properties = {}
    for name, kind in kinds.items():
        told = "; ".join(filter(None, (_unit(name), remarks.get(name))))
        properties[name] = {**_of(kind, found), **({"description": told} if told else {})}
    return {"type": "object", "properties": properties, "required": list(must), "additionalProperties": False}


def _fields(cls: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a class's fields, and which must be there: those without a default."""
    kinds = typing.get_type_hints(cls, include_extras=True)
    if typing.is_typeddict(cls):
        must = [name for name in kinds if name in cls.__required_keys__]
    else:
        nothing = dataclasses.MISSING
        must = [f.name for f in dataclasses.fields(cls) if f.default is nothing and f.default_factory is nothing]
    return kinds, must


@functools.cache
def _remarks(cls: type) -> dict[str, str]:
    """Return the comment beside each field in the source of a class."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {
        token.start[0]: token.string.strip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not re.match("# (fmt|noqa|type):", token.string)
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: comments[node.end_lineno]
        for node in body.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in comments
    }


def _unit(name: str) -> str | None:
    """Return the unit a field's name tells: `in bytes/s` for memory_bytes_per_s."""
    unit = re.search(rf"(?:^|_)((?:{'|'.join(_SYMBOLS)})(?:_per_[a-z0-9]+)?)(?:_|$)", name)
    return "in " + "/".join(_SYMBOLS.get(part, part) for part in unit[1].split("_per_")) if unit else None
