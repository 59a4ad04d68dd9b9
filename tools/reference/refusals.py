"""When a technique is refused, in the words of its file, which is read and not run."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def refusals(module: ModuleType) -> list[str]:
    """Return the sentences with which a technique's file refuses, what is filled in left as dots."""
    found: dict[str, None] = {}
    for name in ("rejects", "legal"):
        if function := getattr(module, name, None):
            found |= dict.fromkeys(_returned(function))
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CandidateFailed":
            kind, text = node.args[:2]
            if isinstance(kind, ast.Constant) and kind.value == "unsupported":
                found |= dict.fromkeys(_sentences(text))
    return [sentence for sentence in found if sentence]


def _returned(function: Callable[..., Any]) -> list[str]:
    """Return the sentences a function of the techniques returns, its own and those of the functions it asks."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    scope = dict(vars(inspect.getmodule(function) or ast))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            scope |= {alias.asname or alias.name: _found(node.module, alias.name) for alias in node.names}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            found += _sentences(node.value)
        if isinstance(node, ast.Call):
            asked = _called(node.func, scope)
            if inspect.isfunction(asked) and asked is not function and asked.__name__.startswith("why"):
                found += _returned(asked)
    return found


def _found(module: str, name: str) -> Any:
    """Return what `from module import name` binds."""
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(f"{module}.{name}")


def _called(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    return getattr(_called(node.value, scope), node.attr, None) if isinstance(node, ast.Attribute) else None


def _sentences(node: ast.expr) -> list[str]:
    """Return the texts an expression may be."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*_sentences(node.body), *_sentences(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [sentence for value in node.values for sentence in _sentences(value)]
    return []
