"""The whole answer as JSON: what result.json holds."""

from __future__ import annotations

from planner.results import ParetoSet

REPORT = "JSON, everything"
SUFFIX = ".json"


def render(answer: ParetoSet) -> str:
    """Return the answer as JSON; `planner.results.load` reads it back."""
    import json

    from knowledge_base.serde import plain

    return json.dumps({"schema": 1, **plain(answer)}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
