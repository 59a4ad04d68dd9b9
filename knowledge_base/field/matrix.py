"""The scarcity view: which technique acts on which resource, how strongly, and by how much in published figures.

Rows are the survey's Table 2 (arXiv:2401.00625), generated from the taxonomy and the evidence; with `topic` the methods
of one row take its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_base.field import Field, field
from knowledge_base.field.entries import RESOURCES
from knowledge_base.field.magnitude import Magnitude


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One technique and one resource. `strength`: "direct", "indirect" or empty; `uncertain`: the mark is hard to read."""

    strength: str = ""
    uncertain: bool = False
    evidence: Magnitude | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One technique: a row of Table 2, or a method below one."""

    id: str
    name: str
    group: str  # the names above it in the taxonomy
    methods: int  # known below it
    executable: int  # of those, run by Leanplan
    cells: Mapping[str, Cell]  # every resource


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Resources across, techniques down."""

    title: str
    resources: tuple[str, ...]
    rows: tuple[Row, ...]


def matrix(topic: str | None = None) -> Matrix:
    """Return the matrix of every row of Table 2, or of the methods of one topic.

    Raises:
        BadInput: no such topic.
    """
    known = field()
    if topic is not None:
        above = known.topic(topic)
        rows = tuple(_method_row(known, m.id) for m in known.below(topic))
        return Matrix(title=f"{above.name}: its methods by resource", resources=RESOURCES, rows=rows)
    rows = tuple(_topic_row(known, t.id) for t in known.topics.values() if t.effects)
    return Matrix(title="Techniques by the resource they save", resources=RESOURCES, rows=rows)


def _topic_row(known: Field, topic: str) -> Row:
    methods = [m.id for m in known.below(topic)]
    entry = known.topics[topic]
    said = known.magnitudes_of(topic)
    cells = {
        r: Cell(strength=entry.effects.get(r, ""), uncertain=r in entry.uncertain, evidence=said.get(r))
        for r in RESOURCES
    }
    return Row(
        id=topic, name=entry.name, group=" / ".join(known.path(topic)[:-1]), methods=len(methods),
        executable=sum(known.status(m) == "executable" for m in methods), cells=cells,
    )  # fmt: skip


def _method_row(known: Field, method: str) -> Row:
    entry = known.methods[method]
    effects = known.effects(method)
    said = known.magnitudes_of(method)
    cells = {r: Cell(strength=effects.get(r, ""), evidence=said.get(r)) for r in RESOURCES}
    return Row(
        id=method, name=entry.name, group=" / ".join(known.path(entry.topic)), methods=1,
        executable=int(known.status(method) == "executable"), cells=cells,
    )  # fmt: skip
