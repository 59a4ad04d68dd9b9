"""All that is known of one method, gathered from every file: what `leanplan explain gptq` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_base import rules
from knowledge_base.field import Field, field
from knowledge_base.field.entries import EvidenceRow, Method, Paper
from knowledge_base.field.magnitude import Magnitude
from knowledge_base.quality import Loss, expected_loss
from knowledge_base.rules import Rule

EXAMPLES = 5  # rows of evidence shown
SIZES = (1e9, 7e9, 70e9)  # parameters for which a loss of quality is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What a method does to one resource. `strength` is empty for a price; `why`: `table 2`, `evidence` or a link."""

    resource: str
    strength: str
    why: str
    published: Magnitude | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedLoss:
    """The fitted loss of quality at one setting and size."""

    step: str
    params: float
    loss: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One method and everything that is about it."""

    method: Method
    place: tuple[str, ...]  # names from the root of the taxonomy
    status: str
    techniques: tuple[str, ...]  # of ours that execute it
    saves: tuple[Effect, ...]
    spends: tuple[Effect, ...]
    losses: tuple[ExpectedLoss, ...]
    rules: tuple[Rule, ...]
    evidence: tuple[EvidenceRow, ...]  # examples
    evidence_rows: int
    papers: tuple[Paper, ...]


def card(text: str) -> Card:
    """Return the card of a method, or of the method a technique of ours executes.

    Raises:
        BadInput: no such method or technique, with the nearest names.
    """
    known = field()
    method = known.method(_method_of(text, known))
    said = known.magnitudes_of(method.id)
    strengths = known.effects(method.id)
    rows = known.evidence_of(method.id)
    return Card(
        method=method, place=known.path(method.topic), status=known.status(method.id),
        techniques=known.implementing(method.id),
        saves=tuple(_effect(resource, strengths.get(resource, ""), why, said) for resource, why in method.saves.items()),
        spends=tuple(_effect(resource, "", why, said) for resource, why in method.spends.items()),
        losses=_losses(method), rules=rules.composition().about(method.id), evidence=_examples(rows), evidence_rows=len(rows),
        papers=known.papers_of(method.id),
    )  # fmt: skip


def _method_of(text: str, known: Field) -> str:
    from knowledge_base.registry import techniques

    if text not in known.methods and text in techniques.names():
        return next(iter(techniques.get(text).TECHNIQUE.implements), text)
    return text


def _effect(resource: str, strength: str, why: str, said: Mapping[str, Magnitude]) -> Effect:
    return Effect(resource=resource, strength=strength, why=why, published=said.get(resource))


def _losses(method: Method) -> tuple[ExpectedLoss, ...]:
    """Return the fitted losses of quality at every setting of the first knob that has a fit, for a few sizes."""
    settings = [{knob: value} for knob, values in list(method.knobs.items())[:1] for value in values] or [{}]
    found = []
    for knobs in settings:
        said = ", ".join(f"{k}={v}" for k, v in knobs.items())
        for params in SIZES:
            if (loss := expected_loss(method.id, knobs, params)) is not None:
                found.append(ExpectedLoss(step=f"{method.id}({said})" if said else method.id, params=params, loss=loss))
    return tuple(found)


def _examples(rows: tuple[EvidenceRow, ...]) -> tuple[EvidenceRow, ...]:
    """Return rows of different metrics and models, those with a baseline first."""
    ordered = sorted(rows, key=lambda row: row.baseline is None)
    first = {(row.metric, row.steps): row for row in reversed(ordered)}
    return tuple(list(reversed(first.values()))[:EXAMPLES])
