"""Numbers a candidate claims, taken only after a look: a missing, absurd or infinite one is the candidate's failure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from knowledge_base.errors import CandidateFailed


def number(reply: Mapping[str, Any], name: str, low: float, high: float) -> float:
    """Return a number of a reply.

    Raises:
        CandidateFailed: "invalid_result", it is missing, no number, or outside the range.
    """
    value = reply.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CandidateFailed("invalid_result", f"`{name}` is missing")
    if not low <= value <= high:
        raise CandidateFailed("invalid_result", f"`{name}` is {value:g}, outside {low:g} to {high:g}")
    return float(value)


def numbers(reply: Mapping[str, Any], name: str, count: int, low: float, high: float) -> list[float]:
    """Return `count` numbers of a reply; see `number`."""
    values: Iterable[Any] = reply.get(name) or ()
    if not isinstance(values, list) or len(values) != count:
        raise CandidateFailed("invalid_result", f"`{name}` is not {count} numbers")
    return [number({name: value}, name, low, high) for value in values]
