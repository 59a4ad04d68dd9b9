"""JSON Schemas of what leanplan writes and prints, made from the very types that are written."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Path: "string"}


def names() -> tuple[str, ...]:
    """Return what there is a schema of."""
    return ("spec", "check", "result", "lock", "advice", "error")


def schema(name: str) -> dict[str, Any]:
    """Return the schema of one of `names()`: the spec file, `check --json`, result.json, the lock file, `advise --json`, an error."""
    from planner import spec
    from planner.advising import Advice
    from planner.lock import Lock
    from planner.reports.check.json import FIELDS
    from planner.results import ParetoSet

    if name == "spec":
        return spec.schema()
    shapes: dict[str, tuple[Mapping[str, Any], type | None]] = {
        "check": (FIELDS, None),
        "result": ({"schema": int}, ParetoSet),
        "advice": ({}, Advice),
        "lock": ({"schema": int, "content": str}, Lock),
        "error": ({"error": {"message": str, "where": str | None, "hint": str, "exit_code": int}}, None),
    }
    found: dict[str, Any] = {}
    body = _object(*shapes[name], found)
    return {"$schema": DIALECT, "title": f"leanplan {name}", **body, **({"$defs": found} if found else {})}


def _object(more: Mapping[str, Any], cls: type | None, found: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with the fields of a dataclass, and more. What has a default may be missing."""
    hints = typing.get_type_hints(cls) if cls else {}
    must = [f.name for f in dataclasses.fields(cls) if _no_default(f)] if cls else []
    properties = {name: _of(kind, found) for name, kind in (*more.items(), *hints.items())}
    return {"type": "object", "properties": properties, "required": [*more, *must], "additionalProperties": False}


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _of(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type, as `knowledge_base.serde.plain` writes it; dataclasses are put into `found`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return {}
    if isinstance(kind, Mapping):
        return _object(kind, None, found)
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in found:
            found[kind.__name__] = {}  # a type may hold itself
            found[kind.__name__] = _object({}, kind, found)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [_of(a, found) for a in args]}
    if origin in (tuple, frozenset):
        return {"type": "array", "items": _of(args[0], found)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _of(args[1], found)}
    raise TypeError(f"no JSON Schema for {kind}")
