"""`leanplan.lock`: the chosen plan and its measured figures, committed beside the spec as the baseline of `check`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.registry import require_standing
from knowledge_base.serde import digest, plain, restore, write_json
from knowledge_base.types import Figure, Plan, Workload

NAME = "leanplan.lock"
SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """One plan with what was measured of it. `allocation` rebuilds per-layer choices without measuring again.

    `baseline`: the unchanged model's figures of the same run, which tell a slower day of the machine from a slower plan.
    """

    plan: Plan
    artefact_digest: str
    hardware_name: str
    hardware_fingerprint: str
    workload: Workload
    figures: Mapping[str, Figure]
    baseline: Mapping[str, Figure] = field(default_factory=dict)
    allocation: Mapping[str, str] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


def write_lock(path: Path, lock: Lock) -> None:
    """Write a lock file, with a digest over its content so that an edited one is noticed. Raw samples stay out."""
    bare = [{name: replace(f, samples=()) for name, f in some.items()} for some in (lock.figures, lock.baseline)]
    body = plain(replace(lock, figures=bare[0], baseline=bare[1]))
    write_json(path, {"schema": SCHEMA, "content": digest(body), **body})


def read_lock(path: Path) -> Lock:
    """Return a lock file's content.

    Raises:
        BadInput: it is missing, damaged, edited by hand, of another schema, or of a plan that is no longer possible.
    """
    remake = "make it again: leanplan plan SPEC --lock, or restore it from version control"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        schema, content = data.pop("schema"), data.pop("content")
    except FileNotFoundError as error:
        raise BadInput("no such lock file", where=str(path), hint="make one: leanplan plan SPEC --lock") from error
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise BadInput(f"damaged lock file: {error}", where=str(path), hint=remake) from error
    if schema != SCHEMA:
        raise BadInput(f"made by another version (schema {schema}, this is {SCHEMA})", where=str(path), hint=remake)
    if digest(data) != content:
        raise BadInput("digest mismatch: the file was edited after it was written", where=str(path), hint=remake)
    try:
        plan = restore(Plan, data["plan"])  # first: another version's settings explain whatever else is unlike today's
        require_standing(plan.steps, where=str(path), hint=remake)
        return restore(Lock, data)
    except (ValueError, KeyError) as error:
        raise BadInput(f"damaged lock file: {error}", where=str(path), hint=remake) from error
