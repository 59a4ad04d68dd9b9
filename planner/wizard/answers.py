"""What a person has said so far, and the file it is kept in between two sittings."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner import spec as specs
from planner.spec import Spec

SCHEMA = 2
FILE = "wizard.json"  # in the store
RECENT = "recent_models.json"  # in the store
MOST_RECENT = 5
_WORDS = ("file", "then", "training", "origin")  # of Answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A spec as the mapping a spec file holds, the file to write it to, and what to do then."""

    spec: Mapping[str, Any]
    file: str = "leanplan.yaml"
    then: str = "both"  # "run" | "save" | "both" | "advise"
    training: str = ""  # "finetune" | "pretrain": a goal that cannot be run yet, so that advice is given
    origin: str = ""  # what the workload was fitted to, in words; empty where a person chose it

    @property
    def parsed(self) -> Spec:
        """The spec, with every default filled in.

        Raises:
            BadInput: it says something a spec cannot.
        """
        return specs.from_mapping(self.spec)

    def with_key(self, dotted: str, value: Any) -> Answers:
        """Return the answers with one key of the spec set, or left out where `value` is None; checked as a spec file is.

        Raises:
            BadInput: the spec cannot say that.
        """
        mapping = copy.deepcopy(dict(self.spec))
        *above, last = dotted.split(".")
        section = mapping
        for name in above:
            section = section.setdefault(name, {})
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
        if above and not section:
            mapping.pop(above[0], None)
        changed = replace(
            self, spec=mapping, origin="" if above[:1] == ["workload"] or last == "workload" else self.origin
        )
        changed.parsed  # noqa: B018  # refused here, where the person can still mend it
        return changed


def keep(store: Path, answers: Answers, screen: str) -> Path:
    """Write the answers and the screen they stopped at into the store; return the file."""
    from knowledge_base.serde import write_json

    path = store / FILE
    write_json(path, {"schema": SCHEMA, "screen": screen, "answers": answers})
    return path


def kept(store: Path) -> tuple[Answers, str] | None:
    """Return the answers kept earlier and their screen; None where there are none that can still be used."""
    try:
        data = json.loads((store / FILE).read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            return None
        said = data["answers"]
        answers = Answers(spec=dict(said["spec"]), **{name: str(said[name]) for name in _WORDS})
        answers.parsed  # noqa: B018  # a spec that is refused today is no start
        return answers, str(data["screen"])
    except (OSError, ValueError, KeyError, TypeError, specs.BadInput):
        return None


def forget(store: Path) -> None:
    """Remove what was kept: it has become a spec."""
    (store / FILE).unlink(missing_ok=True)


# ---------------------------------------------------------------- models planned before


def remember(store: Path, source: str) -> None:
    """Put a model first among those planned before."""
    from knowledge_base.serde import write_json

    models = [source, *(known for known in recent(store) if known != source)]
    write_json(store / RECENT, models[:MOST_RECENT])


def recent(store: Path) -> tuple[str, ...]:
    """Return the models planned before, the newest first."""
    try:
        found = json.loads((store / RECENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    models = found if isinstance(found, list) else []
    return tuple(m for m in models if isinstance(m, str) and m.isprintable())[:MOST_RECENT]
