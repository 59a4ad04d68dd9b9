"""Screen 9: the spec as it will be written, and what to do with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from knowledge_base import units
from knowledge_base.errors import BadInput
from planner.run_forecast import in_short
from planner.wizard.answers import Answers
from planner.wizard.screens import model
from planner.wizard.screens._screen import Grid, Screen, View
from planner.wizard.screens._typed import is_file, is_folder, numbered, path_of, unknown
from planner.wizard.screens.budgets import contradictions

LONGEST_NAME = 100  # characters of a spec file's name
THEN = {
    "both": "write the file and run it now",
    "save": "write the file only",
    "run": "run it now, write no file",
}


def _grid(view: View) -> Grid:
    rows: list[tuple[str, ...]] = list(THEN.items())
    there = " (there already: you will be asked)" if is_file(Path(view.answers.file)) else ""
    return Grid(
        rows=[*rows, ("file", view.answers.file + there)],
        chosen=frozenset(i for i, name in enumerate(THEN) if name == view.answers.then),
    )


def _change(view: View, text: str) -> Answers:
    word, _, value = text.partition(" ")
    if word == "file" and value.strip():
        path = path_of(value.strip())
        if path.suffix not in (".yaml", ".yml") or len(path.name) > LONGEST_NAME:
            raise BadInput(
                "a spec file's name is short and ends in .yaml", hint="type for example `file leanplan.yaml`"
            )
        if not is_folder(path.parent):
            raise BadInput(f"no folder {units.quote(str(path.parent))}", hint="name one that is there")
        return replace(view.answers, file=str(path))
    word = numbered(text, tuple(THEN))
    if word not in THEN:
        raise unknown(word, [*THEN, "file"])
    return replace(view.answers, then=word)


def as_yaml(answers: Answers) -> str:
    """Return the spec as it is written: what was answered, and nothing that is a default anyway."""
    from planner import _yaml

    origin = f"# workload fitted to {answers.origin}\n" if answers.origin else ""
    return origin + _yaml.write_yaml(dict(answers.spec))


def _expected(view: View) -> list[str]:
    """Return what the run will take, where there is to be one here."""
    there = view.outlook is not None and view.outlook.spec.hardware == "local" and view.outlook.weights_here
    return [in_short(view.outlook.run)] if view.outlook and there else []


SCREEN = Screen(
    name="review",
    title="Is this right?",
    why="This is the spec; the same file works in CI and from Python.",
    ask="`both`, `save`, `run`, or `file NAME`",
    grid=_grid,
    change=_change,
    words=(*THEN, "file"),
    remarks=lambda view: [
        *model.warnings(view),
        *contradictions(view),
        *_expected(view),
        *as_yaml(view.answers).splitlines(),
    ],
    more="`leanplan plan FILE` runs it at any time, `leanplan check FILE` judges it in CI, "
    "`leanplan help spec` explains every key. `b` goes back to change an answer.",
)
