"""Screen 8: what the search may use of this machine, and what it will do there."""

from __future__ import annotations

import shutil

from knowledge_base import units
from knowledge_base.registry import engines
from planner.run_forecast import in_short
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import changed, setting_rows

KEYS = {
    "effort": "search.effort", "time": "search.time_limit", "plans": "search.max_measured", "memory": "limits.memory",
    "candidate": "limits.time_per_candidate", "disk": "limits.disk",
}  # fmt: skip


def _grid(view: View) -> Grid:
    return Grid(rows=[(word, value, meaning + _there(view, word)) for word, value, meaning in setting_rows(view, KEYS)])


def _there(view: View, word: str) -> str:
    """Return what this machine has of a thing."""
    if word == "disk":
        return f" ({units.format(shutil.disk_usage('.').free, 'bytes', digits=2)} free here)"
    if word == "memory" and view.outlook:
        return f" ({units.format(view.outlook.hardware.memory_limit_bytes, 'bytes', digits=2)} there)"
    return ""


def _remarks(view: View) -> list[str]:
    if view.outlook is None:
        return []
    space = view.outlook.space
    lines = [f"engines found: {', '.join(space.options)}"]
    kind = view.outlook.hardware.device.kind
    of_no_use = {name for name, module in engines.all().items() if kind not in module.ENGINE.devices}
    left_out = [r for r in view.outlook.refused if r.kind == "engine" and r.what not in of_no_use]
    lines += [f"left out: {r.what}: {r.why}" for r in left_out]
    if view.outlook.spec.hardware != "local":
        return [*lines, "another machine: plans are priced in seconds, nothing is built or run"]
    return [
        *lines,
        f"will build and run some of up to {space.count():,} plans here; {in_short(view.outlook.run)}",
        "each in a process of its own; no network, no code of the model's own, no pickle files",
    ]


SCREEN = Screen(
    name="limits",
    title="What may the search use?",
    why="Plans are really built and run here: this is what they may take.",
    ask="e.g. `effort thorough`, `time 20 min`, `plans 16`, `memory 8 GiB`",
    grid=_grid,
    change=lambda view, text: changed(view, text, KEYS),
    remarks=_remarks,
    words=tuple(KEYS),
    more="`time` and `plans` follow from `effort` unless you give them. A candidate that exceeds its memory, time or disk "
    "is stopped and recorded; the search goes on. Ctrl-C during the run loses nothing. Code of the model's own and pickle "
    "files stay refused unless leanplan was started with --trust-remote-code or --allow-pickle.",
)
