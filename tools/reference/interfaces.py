"""The pages of what other programs build on: files and JSON, names of the Python package."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

from tools.reference.markdown import code, codes, docstring, inline, link, page, table


def files() -> str:
    from planner import run_folder, schemas
    from planner.cli import commands

    known = {name: schemas.schema(name) for name in schemas.names()}
    shared = {part: inner for schema in known.values() for part, inner in schema.get("$defs", {}).items()}
    parts = [
        "`leanplan schema --of NAME` prints the JSON Schemas that these tables are made from. A command that fails prints "
        "an [error](#error) with `--json`, and its exit code says so.\n",
        "## The run folder\n", docstring(run_folder),
    ]  # fmt: skip
    for title, names in (("What is written", schemas.WRITTEN), ("What commands print with --json", commands.names())):
        parts += [f"## {title}\n"]
        for name in names:
            told = "See [spec](spec.md)" if name == "spec" else _type(known[name] | {"title": ""})
            parts += [f"### {name}\n", f"{told}.\n"]
    parts += ["## Parts\n"]
    for part, schema in shared.items():
        parts += [f"### {part} part\n", inline(schema["description"]) + "\n", _fields(schema)]
    return page("Files and JSON", "`planner/run_folder.py`, `planner/schemas.py` and `planner/cli/`", *parts)


def _fields(schema: dict[str, Any]) -> str:
    must = schema.get("required", ())
    rows = [
        (code(field), _type(kind), "always" if field in must else "may be missing", inline(kind.get("description", "")))
        for field, kind in schema["properties"].items()
    ]
    return table(("field", "type", "there", "meaning"), rows)


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON Schema in words."""
    if title := schema.get("title"):
        return f"[{title.split()[-1]}](#{title.split()[-1]})"
    if part := schema.get("$ref"):
        name = part.rpartition("/")[2]
        return f"[{name}](#{name.lower()}-part)" if part.startswith("#") else link(part)
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(code(json.dumps(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"object: name to {_type(inner)}"
    if "properties" in schema:
        return "object: " + ", ".join(f"`{k}` {_type(v)}" for k, v in schema["properties"].items())
    return str(schema.get("type", "anything"))


def python() -> str:
    import planner

    parts = ["`from planner import ...`; names load on first use. Anything else may change without notice.\n"]
    for name in planner.__all__:
        thing = getattr(planner, name)
        parts += [f"## {name}\n"]
        if dataclasses.is_dataclass(thing):
            parts += [docstring(thing), f"Fields: {codes(f.name for f in dataclasses.fields(thing))}.\n"]
            parts += [
                f"`{method}`: {inline((inspect.getdoc(value) or '').splitlines()[0])}\n"
                for method, value in vars(thing).items()
                if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
            ]
        elif inspect.isclass(thing):
            parts += [docstring(thing)]
        else:
            parts += [f"```text\n{name}{_signature(thing)}\n```\n", docstring(thing)]
    return page("Python", "`planner/__init__.py`", *parts)


def _signature(thing: Callable[..., Any]) -> str:
    """Return a signature with one parameter on each line."""
    shown = inspect.signature(thing)
    lines = [str(p) for p in shown.parameters.values()]
    by_name = [i for i, p in enumerate(shown.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if by_name:
        lines.insert(by_name[0], "*")
    return "(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {shown.return_annotation}"
