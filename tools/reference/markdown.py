"""Markdown, and what a module, a function or a dataclass says of itself as Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any


def inline(text: str) -> str:
    """Return text of the code's as Markdown on one line: links are links, `code` stays code, the rest is literal."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else _prose(p) for p in pieces).replace("|", "\\|")


def _prose(text: str) -> str:
    pieces = re.split(r"(https?://[^\s,;)\"]*[^\s,;)\".]|arXiv:\d{4}\.\d{4,5}|doi:[^\s,;)]*[^\s,;).])", text)
    return "".join(link(p) if i % 2 else _literal(p) for i, p in enumerate(pieces))


def link(text: str) -> str:
    if text.startswith("http"):
        host, *path = text.split("://")[1].rstrip("/").split("/")
        return f"[{_literal('/'.join([host, '…', path[-1]] if len(path) > 2 else [host, *path]))}]({text})"
    base = "https://arxiv.org/abs/" if text.startswith("arXiv:") else "https://doi.org/"
    return f"[{text}]({base}{text.partition(':')[2]})"


def _literal(text: str) -> str:
    return re.sub(r"([\\*_\[\]#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """Return text as inline code, or nothing where there is none."""
    return f"`{text}`" if str(text) else ""


def codes(texts: Iterable[object]) -> str:
    return ", ".join(code(t) for t in texts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells are Markdown, made with `inline`, `code` or `codes`."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def facts(known: Mapping[str, str]) -> str:
    """Return a list of what is known; nothing for what is empty."""
    return "\n".join(f"- **{what}**: {text}" for what, text in known.items() if text) + "\n"


def docstring(thing: object) -> str:
    """Return a docstring: its plain paragraphs as prose, formulae, arguments and examples as they stand in the code."""
    parts: list[tuple[bool, str]] = []
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        literal = bool(re.search(r"^( |>>>)", paragraph, re.MULTILINE))
        if literal and parts and parts[-1][0]:
            paragraph = f"{parts.pop()[1]}\n\n{paragraph}"
        parts.append((literal, paragraph))
    return "\n".join(f"```text\n{text}\n```\n" if literal else f"{inline(text)}\n" for literal, text in parts)


def settings(of: Mapping[str, Any]) -> str:
    """Return dataclass values as a table: a row for each field, a column for each value's name."""
    fields = [f.name for f in dataclasses.fields(next(iter(of.values())))]
    return table(("", *of), [(name, *(code(getattr(value, name)) for value in of.values())) for name in fields])


def functions(module: ModuleType) -> list[Callable[..., Any]]:
    """Return the public functions of a module that have a docstring."""
    return [
        f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_") and f.__doc__
    ]


def page(title: str, source: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", f"*Generated from {source}.*\n", *parts])
