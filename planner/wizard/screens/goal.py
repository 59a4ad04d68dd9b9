"""Screen 1: what the model is for."""

from __future__ import annotations

from dataclasses import replace

from knowledge_base.errors import BadInput
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import numbered, unknown

GOALS = {
    "serve": "make the model cheaper to run: smaller, faster, within your budgets",
    "finetune": "adapt the model to your data",
    "pretrain": "train a model of this shape from nothing",
    "advise": "just advise me: which resource binds, what helps; nothing is written or run",
}
TRAINING = ("finetune", "pretrain")


def goal_of(answers: Answers) -> str:
    """Return the row of this screen that is the answer now."""
    return answers.training or ("advise" if answers.then == "advise" else answers.spec["goal"])


def _grid(view: View) -> Grid:
    now = goal_of(view.answers)
    return Grid(rows=list(GOALS.items()), chosen=frozenset(i for i, name in enumerate(GOALS) if name == now))


def _change(view: View, text: str) -> Answers:
    goal = numbered(text, tuple(GOALS))
    if goal not in GOALS:
        raise unknown(goal, GOALS)
    if goal == "advise":
        return replace(view.answers.with_key("goal", "serve"), then="advise", training="")
    try:
        return replace(view.answers.with_key("goal", goal), then="both", training="")
    except BadInput:  # a goal that specs do not run yet still gets what can be said of it
        return replace(view.answers, then="advise", training=goal)


def _remarks(view: View) -> list[str]:
    if not view.answers.training:
        return []
    return [
        f"✗ {view.answers.training} cannot be run yet: no spec is written and nothing is trained",
        "Go on all the same: three screens, then what the training would take on your machine (memory for each way of "
        "training, time at best), and how to serve the model afterwards.",
    ]


SCREEN = Screen(
    name="goal",
    title="What is it for?",
    why="The goal decides which techniques can help and what is measured.",
    ask="a word or its number",
    grid=_grid,
    change=_change,
    remarks=_remarks,
    words=tuple(GOALS),
    more="Leanplan takes a model as it is and looks for compositions of techniques (quantisation, pruning, faster "
    "engines ...) that keep to your budgets. `advise` ends after the fourth screen with what is predicted.",
)
