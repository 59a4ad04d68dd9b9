"""Screen 7: what to be best at among the plans that keep the budgets."""

from __future__ import annotations

import re

from knowledge_base.metrics import find_metric
from planner import spec as specs
from planner.wizard.answers import Answers
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import numbered, unknown
from planner.wizard.screens.budgets import METRICS_SHOWN


def _grid(view: View) -> Grid:
    objectives = view.answers.parsed.objectives
    labels = list(dict.fromkeys((*METRICS_SHOWN, *objectives)))
    places = {label: f"{place}." for place, label in enumerate(objectives, 1)}
    rows = [(label, places.get(label, ""), find_metric(label)[0].summary.partition(":")[0]) for label in labels]
    return Grid(rows=rows, chosen=frozenset(i for i, label in enumerate(labels) if label in places))


def _change(view: View, text: str) -> Answers:
    labels = [numbered(word, METRICS_SHOWN) for word in re.split(r"[\s,]+", text) if word]
    for label in labels:
        if label not in specs.labels():
            raise unknown(label, METRICS_SHOWN)
    return view.answers.with_key("objectives", labels)


SCREEN = Screen(
    name="priorities",
    title="What should it be best at?",
    why="Among plans that keep the budgets, these decide; the first counts most.",
    ask="up to three names or numbers, e.g. `tpot_p50 energy`",
    grid=_grid,
    change=_change,
    words=METRICS_SHOWN,
    more="The answer is a Pareto set of these objectives: no member can be better at one without being worse at "
    "another. The recommended plan is best at the first; near-ties are settled by the next.",
)
