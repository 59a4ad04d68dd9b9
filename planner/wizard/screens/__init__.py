"""The nine screens, as data: one file for each."""

from __future__ import annotations

from collections.abc import Sequence

from knowledge_base.errors import LeanplanError
from planner import spec as specs
from planner.wizard.answers import Answers
from planner.wizard.screens import budgets, goal, limits, machine, model, priorities, quality, review, workload
from planner.wizard.screens._screen import Screen

SCREENS: tuple[Screen, ...] = tuple(
    file.SCREEN for file in (goal, model, machine, workload, quality, budgets, priorities, limits, review)
)


def asked(answers: Answers) -> tuple[Screen, ...]:
    """Return the screens these answers lead through: advice needs no budgets."""
    return SCREENS[:4] if answers.then == "advise" else SCREENS


def defaults(models: Sequence[str]) -> Answers:
    """Return the answers before anything was said: what was found here, and modest limits."""
    from planner.cli.init import EXAMPLE_MODEL

    return Answers(
        spec={
            "version": 1,
            "goal": "serve",
            "model": {"source": models[0] if models else EXAMPLE_MODEL},
            "hardware": "local",
            "workload": dict(workload.DEFAULT),
            "budgets": {"quality_loss": {"max": "5 %"}},
            "objectives": list(specs.DEFAULT_OBJECTIVES),
            "search": {"effort": "quick"},
        }
    )


def place_of(problem: LeanplanError) -> str:
    """Return the screen on which a problem of the outlook is mended."""
    return {"workload": "workload", "hardware": "machine"}.get((problem.where or "").partition(".")[0], "model")
