"""What rebuilds an artefact: plan.json for leanplan, recipe.yaml for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.registry import require_standing
from knowledge_base.serde import UNSAID, plain, restore, write_atomic, write_json
from knowledge_base.types import Plan

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A plan with its inputs. The same recipe gives the same artefact digest, with the same versions on one machine."""

    plan: Plan
    model: str  # folder or hub id
    revision: str | None = None
    model_digest: str
    draft: str | None = field(default=None, metadata=UNSAID)  # folder; of plans whose steps use one
    draft_digest: str | None = field(default=None, metadata=UNSAID)
    calibration: str | None = None  # text file
    calibration_samples: int | None = None
    seed: int = 0
    allocation: Mapping[str, str] | None = None
    artefact_digest: str | None = None  # None: the build failed
    versions: Mapping[str, str] | None = None


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write plan.json and recipe.yaml into `folder`."""
    import yaml

    write_json(folder / "plan.json", {"schema": SCHEMA, "words": recipe.plan.words, **plain(recipe)})
    people = {
        "plan": recipe.plan.id,
        "model": recipe.model,
        **({"draft": recipe.draft} if recipe.draft else {}),
        "engine": recipe.plan.engine,
        "steps": [{s.technique: dict(s.knobs)} for s in recipe.plan.steps],
        "calibration": recipe.calibration,
        "seed": recipe.seed,
        "artefact_sha256": recipe.artefact_digest,
        "rebuild": "leanplan build plan.json -o DIR",
    }
    write_atomic(folder / "recipe.yaml", yaml.safe_dump(people, sort_keys=False, allow_unicode=True))


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a plan.json.

    Raises:
        BadInput: missing, damaged, of another schema, or of a plan that is no longer possible.
    """
    hint = "give a plan.json of a run folder (plans/<id>/plan.json) or a plan id (leanplan ls plans)"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise BadInput(
                "plan.json has another schema than 1", where=str(path), hint="open it with the version that wrote it"
            )
        data.pop("words", None)
        plan = restore(Plan, data["plan"])  # first: another version's settings explain whatever else is unlike today's
        require_standing(plan.steps, where=str(path), hint="plan again, or open it with the version that wrote it")
        return restore(Recipe, data)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadInput("no such plan file", where=str(path), hint=hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise BadInput(f"not a plan file: {error}", where=str(path), hint=hint) from error
