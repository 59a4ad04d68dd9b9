"""Which artefact a person means: a folder, a plan.json, or a plan of a run by its id; built where it is not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput
from knowledge_base.serde import restore
from knowledge_base.types import Figure, Plan
from planner import building
from planner.recipe import Recipe, read_recipe

if TYPE_CHECKING:
    from planner.progress import Progress

BUILT = "serving"  # folder in the store of what was built to be served
PEAK = "peak_memory_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """An artefact that is whole, and what is known of it."""

    folder: Path
    model: str  # name, for clients
    plan: Plan
    manifest: dict[str, Any] = field(repr=False)
    peak_bytes: int | None = None  # as it was measured; None: it was not


def choose(text: str, *, runs: Path, store: Path, progress: Progress, offline: bool = False) -> Chosen:
    """Return the artefact that a folder, a plan.json or a plan's id names, built into the store where it must be.

    Raises:
        BadInput: there is no such thing, or it is damaged; CandidateFailed: it could not be built.
    """
    path = Path(text)
    if path.is_dir():
        if problems := building.verify(path):
            hint = "give an artefact folder (leanplan build PLAN -o DIR), a plan.json or a plan id (leanplan ls plans)"
            raise BadInput("; ".join(problems[:3]), where=str(path), hint=hint)
        return _chosen(path, path.resolve().name)
    if not path.is_file():
        from planner.finding import find_plan

        answer, result = find_plan(text, runs)
        path = Path(answer.folder or ".") / "plans" / result.plan.id / "plan.json"
    recipe = read_recipe(path)
    name = Path(recipe.model).name
    peak_bytes = _measured_peak(path.parent / "measurement.json")
    out = store / BUILT / recipe.plan.id
    for place in (*_beside(path, recipe.plan), out):
        if _is(place, recipe):
            return _chosen(place, name, peak_bytes)
    from planner.validation import rebuild

    if not out.is_dir() or any(out.iterdir()):
        _clear(out)
    rebuild(recipe, out, store=store, progress=progress, offline=offline)
    return _chosen(out, name, peak_bytes)


def _chosen(folder: Path, model: str, peak_bytes: int | None = None) -> Chosen:
    manifest = building.read_manifest(folder)
    plan = restore(Plan, manifest["plan"])
    return Chosen(folder=folder, model=model, plan=plan, manifest=manifest, peak_bytes=peak_bytes)


def _beside(path: Path, plan: Plan) -> Iterator[Path]:
    """Yield where a run keeps the artefact of a plan.json in it: plans/<id>/plan.json, artefacts/<id>."""
    if path.resolve().parent.name == plan.id:
        yield path.resolve().parents[2] / "artefacts" / plan.id


def _is(folder: Path, recipe: Recipe) -> bool:
    """Return whether a folder holds the recipe's artefact, whole; where no digest is known, one of the same plan."""
    if folder.is_symlink() or not (folder / building.MANIFEST).is_file() or building.verify(folder):
        return False
    manifest = building.read_manifest(folder)
    wanted = recipe.artefact_digest
    return manifest["digest"] == wanted if wanted else manifest.get("plan_id") == recipe.plan.id


def _clear(folder: Path) -> None:
    """Make room for a folder that is ours: what lies there is damaged or of another build."""
    import shutil

    if folder.is_symlink():
        raise BadInput("refusing to follow a link out of the store", where=str(folder), hint="remove the link")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)


def _measured_peak(path: Path) -> int | None:
    """Return the peak memory a run measured; None where it did not."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return round(restore(Figure, figures[PEAK]).value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
