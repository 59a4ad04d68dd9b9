"""What an operator deploys: one file for each target, named as `leanplan export --to` names it, `_` for a dot.

Each defines SUMMARY, `refuses(deployment)`, why this plan cannot be run there as a sentence, or None, `copies(deployment)`,
the files of the artefact that go along by the folder they go to, and `files(deployment)`, the texts it writes by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.registry import Folder, techniques
from knowledge_base.types import Plan, Step

targets = Folder(__name__, "target", ("SUMMARY", "refuses", "copies", "files"))

ARTEFACT = "artefact"  # folder of the whole artefact, manifest included
HEADROOM = 1.25  # of the measured peak: requests longer than the measured ones need more
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One artefact and how it is to be served."""

    folder: Path  # of the artefact
    out: Path  # absolute; where the files go
    model: str
    plan: Plan
    manifest: Mapping[str, Any]
    peak_bytes: int | None
    host: str
    port: int
    drain_s: float
    context_tokens: int

    @property
    def runtime(self) -> Mapping[str, Any]:
        """The artefact's serving choices."""
        return self.manifest["runtime"]

    @property
    def slots(self) -> int:
        """Requests that are answered at once."""
        return int(self.runtime.get("batch", 1))

    @property
    def memory_limit_bytes(self) -> int | None:
        """The measured peak with headroom, in whole MiB; None: it was not measured."""
        return None if self.peak_bytes is None else -int(-self.peak_bytes * HEADROOM // MIB) * MIB

    @property
    def about(self) -> list[str]:
        """Lines that say what this is."""
        memory = (
            "memory limit: none, because this plan's peak memory was not measured"
            if self.peak_bytes is None
            else f"memory limit: the measured peak of {-(-self.peak_bytes // MIB)} MiB and a quarter more"
        )
        return [
            f"{line_of(self.model)} as leanplan fitted it: plan {self.plan.id}",
            line_of(self.plan.words),
            f"artefact sha256 {self.manifest['digest']}",
            memory,
        ]


def target(name: str) -> Any:
    """Return the module of a target as a person names it: llama.cpp is in llama_cpp.py."""
    return targets.get(name.replace(".", "_"))


def names() -> tuple[str, ...]:
    """Return the targets as a person names them."""
    return tuple(name.replace("llama_cpp", "llama.cpp") for name in targets.names())


def line_of(text: str) -> str:
    """Return text fit for one line of a comment."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "?", text)


def step_that_needs(plan: Plan, known: frozenset[str]) -> Step | None:
    """Return the first step that asks more of an engine than the known capabilities."""
    return next((step for step in plan.steps if techniques.get(step.technique).TECHNIQUE.needs - known), None)


def require_plain(text: str, what: str) -> None:
    """Refuse a name that no file can quote.

    Raises:
        BadInput: it holds control characters.
    """
    if text != line_of(text) or not text.isprintable():
        raise BadInput(f"{what} holds a control character", hint="choose another name", where=repr(text)[:200])
