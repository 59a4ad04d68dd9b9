"""What a screen is: what it asks and why, what it shows, and what a typed line does to the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from knowledge_base.errors import LeanplanError
from planner.forecast import Forecast, Outlook
from planner.wizard.answers import Answers

Tell = Callable[[str], None]
Deed = Callable[[Forecast, Tell], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All a screen may look at: the answers, what is predicted for them (or why nothing is), models found nearby."""

    answers: Answers
    outlook: Outlook | None = None
    problem: LeanplanError | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table to show; the first cell of a row is what one types to choose or change it."""

    rows: Sequence[tuple[str, ...]]
    headings: tuple[str, ...] = ()
    chosen: frozenset[int] = frozenset()  # rows that are the answer now


def _nothing(view: View) -> list[str]:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """One screen. `change` reads a typed line and returns the new answers, or raises BadInput.

    `deeds` are words that do something instead: each returns what to say of it.
    """

    name: str
    title: str
    why: str
    ask: str  # what may be typed, with an example
    more: str
    grid: Callable[[View], Grid]
    change: Callable[[View, str], Answers]
    remarks: Callable[[View], list[str]] = field(default=_nothing)  # a line that starts with ✗ is a warning
    words: tuple[str, ...] = ()  # offered by the Tab key
    deeds: Mapping[str, Deed] = field(default_factory=dict)


def told(error: LeanplanError) -> str:
    """Return an error as a note: the file it is about, what is wrong, and what to do next."""
    where = error.where or ""
    place = f"{where}: " if "/" in where or re.search(r":[0-9]+$", where) else ""
    return f"{place}{error.message}\n{error.hint}"
