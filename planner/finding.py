"""Finding runs and plans by what a person types: a folder, a run's name, a plan's id or the start of one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from planner.results import ParetoSet, PlanResult, load


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """One run folder as `ls runs` shows it."""

    name: str
    path: Path
    title: str
    finished: bool
    plans: int  # measured


def runs(root: Path) -> Iterator[RunEntry]:
    """Yield the run folders under `root`, oldest first."""
    for path in sorted(root.glob("*/run.json")):
        if path.parent.is_symlink():
            continue
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            facts = {}
        yield RunEntry(
            name=path.parent.name,
            path=path.parent,
            title=str(facts.get("title", "?")),
            finished=(path.parent / "result.json").exists(),
            plans=len(list(path.parent.glob("plans/*/measurement.json"))),
        )


def find_run(text: str | None, root: Path) -> ParetoSet:
    """Return the answer of a run given as folder, name or unique start of a name; None means the newest finished.

    Raises:
        BadInput: no such run, or several start like that.
    """
    if text and (Path(text) / "result.json").exists():
        return load(Path(text))
    entries = [e for e in runs(root) if e.finished]
    if text is None:
        if not entries:
            raise BadInput(
                f"no finished run in {root}", hint="make one: leanplan plan SPEC, or name its folder with --run-dir"
            )
        return load(max(entries, key=lambda e: (e.path / "result.json").stat().st_mtime).path)
    matches = [e for e in entries if e.name == text] or [
        e for e in entries if e.name.startswith(text) or e.name.endswith(text)
    ]
    if len(matches) != 1:
        raise BadInput(
            f"{'no' if not matches else len(matches)} finished runs match `{text}` in {root}", hint="leanplan ls runs"
        )
    return load(matches[0].path)


def find_plan(text: str, root: Path, run: str | None = None) -> tuple[ParetoSet, PlanResult]:
    """Return the plan whose id starts with `text` (or "recommended", "baseline") and the run it is in.

    Raises:
        BadInput: no such plan, or the start is not unique.
    """
    sets = [find_run(run, root)] if run else [load(e.path) for e in reversed(list(runs(root))) if e.finished]
    if text in ("recommended", "baseline") and sets:
        found = sets[0].recommended if text == "recommended" else sets[0].baseline
        if found is None:
            raise BadInput("that run recommends no plan", hint="leanplan explain shows why")
        return sets[0], found
    for answer in sets:
        matches = [r for r in answer.results if r.plan.id.startswith(text)]
        if len(matches) > 1:
            raise BadInput(
                f"`{text}` starts {len(matches)} plan ids",
                hint="give more digits: " + ", ".join(r.plan.id for r in matches),
            )
        if matches:
            return answer, matches[0]
    raise BadInput(f"no plan `{text}` in the runs of {root}", hint="leanplan ls plans")


def runs_root(options: Any) -> Path:
    """Return the folder of runs the options name."""
    return Path(options.run_dir or "runs")
