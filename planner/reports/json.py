"""The whole answer as JSON: what result.json holds."""

from __future__ import annotations

from planner.results import ParetoSet

REPORT = "JSON, everything"
SUFFIX = ".json"


def render(answer: ParetoSet) -> str:
    """Return the answer as JSON; `planner.results.load` reads it back."""
    import json

    from planner.results import as_mapping
    from planner.scrubbing import scrub

    return scrub(json.dumps(as_mapping(answer), indent=1, allow_nan=False, ensure_ascii=False)) + "\n"
