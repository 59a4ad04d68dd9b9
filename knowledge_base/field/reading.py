"""The files of the knowledge of the field as entries: what each kind is called, which keys it has, how it is built.

Folders are read one over the other: ours, then a person's. A later folder adds entries; one that takes the place of
another must say so with `replaces: yes` (in CSV a column `replaces`), and only what is there can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.field import OURS
from knowledge_base.field.entries import (
    EFFECTS,
    LIFECYCLE,
    RESOURCES,
    STRENGTHS,
    AttentionCost,
    Benchmark,
    Challenge,
    EvidenceMetric,
    EvidenceRow,
    Method,
    Paper,
    Requirements,
    SurveyMetric,
    Topic,
)
from knowledge_base.field.records import REPLACES, Record, lay, mappings, parse_steps, rows, value
from knowledge_base.types import STAGES
from knowledge_base.units import quote

ORIGINS = ("003 table 2", "003 figure 1", "001", "002", "leanplan")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of entry: its files, its keys and how a record becomes an entry. Without `id` entries are only added."""

    files: str  # glob
    build: Callable[[Record], Any]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()  # keys a YAML mapping may leave out
    id: str | None = "id"


def read(kind: Kind, folders: Sequence[Path]) -> Any:
    """Return the entries of one kind, a mapping by id where they have one, else a tuple, in the order of the files.

    The first folder is the ground; those after it are laid over it.

    Raises:
        BadInput: with the file and line that is wrong.
    """
    layers = [_records(kind, folder, (REPLACES,) if kind.id and place else ()) for place, folder in enumerate(folders)]
    if kind.id is None:
        return tuple(kind.build(record) for layer in layers for record in layer)
    return {name: kind.build(record) for name, record in lay(layers, key=kind.id).items()}


def _records(kind: Kind, folder: Path, more: tuple[str, ...]) -> Iterator[Record]:
    for path in sorted(folder.glob(kind.files)):
        name = path.relative_to(OURS.parents[2]).as_posix() if folder == OURS else str(path)
        if path.suffix == ".csv":
            yield from rows(path, name, kind.required, more)
        else:
            for record in mappings(path, name):
                yield record.only(kind.required, (*kind.optional, *more))


# ---------------------------------------------------------------- records to entries


def _topic(record: Record) -> Topic:
    uncertain = tuple(record.check("uncertain", r, RESOURCES) for r in record.maybe("uncertain").split())
    return Topic(
        id=record.name("id"), parent=record.maybe("parent") or None, name=record.text("name"),
        section=record.maybe("section"), lifecycle=_maybe_one_of(record, "lifecycle", LIFECYCLE),
        effects={r: record.word(r, STRENGTHS) for r in RESOURCES if record.maybe(r)}, uncertain=uncertain,
        note=record.maybe("note"), origin=record.word("origin", ORIGINS), where=record.where(),
    )  # fmt: skip


def _method(record: Record) -> Method:
    return Method(
        id=record.name("id"), name=record.text("name"), summary=record.text("summary"), topic=record.text("topic"),
        lifecycle=record.word("lifecycle", LIFECYCLE), stage=_maybe_one_of(record, "stage", STAGES),
        family=record.maybe("family") or None, provides=frozenset(record.texts("provides")), knobs=_knobs(record),
        requires=_requirements(record.record("requires")), saves=_acts_on(record, "saves"),
        spends=_acts_on(record, "spends"), risks=record.texts("risks"),
        sources=record.links("sources"), where=record.where(),
    )  # fmt: skip


def _knobs(record: Record) -> dict[str, tuple[str | float, ...]]:
    knobs = record.record("knobs")
    return {knobs.id(knob, knob): tuple(value(text) for text in knobs.texts(knob)) for knob in knobs.cells}


def _requirements(record: Record) -> Requirements:
    record.only((), ("data", "training", "hardware", "architecture", "engine"))
    return Requirements(
        data=record.maybe("data") or "none", training=record.maybe("training") or "none",
        hardware=record.texts("hardware"), architecture=record.texts("architecture"), engine=record.texts("engine"),
    )  # fmt: skip


def _acts_on(record: Record, key: str) -> dict[str, str]:
    said = record.record(key).only((), EFFECTS)
    return {resource: said.text(resource) for resource in said.cells}


def _evidence(record: Record) -> EvidenceRow:
    try:
        steps = parse_steps(record.text("steps"))
    except ValueError as error:
        raise record.error(
            f"cannot read the step {quote(str(error))}",
            hint="write for example: gptq(bits=4, group_size=128) + kivi(bits=2)",
        ) from error
    amount = record.number("value")
    if amount is None:
        raise record.error("`value` is empty", hint="write the figure; a row without one is no evidence")
    return EvidenceRow(
        steps=steps, model=record.text("model"), params_b=record.number("params_b"), family=record.maybe("family"),
        task=record.maybe("task"), metric=record.text("metric"), baseline=record.number("baseline"), value=amount,
        setting=record.maybe("setting"), hardware=record.maybe("hardware"), title=record.text("title"),
        source=record.link("source"), seed_reference=record.word("seed_reference", ("yes", "no")) == "yes",
        note=record.maybe("note"), where=record.where(),
    )  # fmt: skip


def _evidence_metric(record: Record) -> EvidenceMetric:
    return EvidenceMetric(
        name=record.name("metric"), unit=record.maybe("unit"), better=record.word("better", ("lower", "higher")),
        resource=record.word("resource", EFFECTS), meaning=record.text("meaning"), where=record.where(),
    )  # fmt: skip


def _paper(record: Record) -> Paper:
    year = record.number("year")
    return Paper(
        id=record.text("id"), title=record.text("title"), year=int(year) if year is not None else None,
        venue=record.maybe("venue"), links=record.links("links"), seeds=record.texts("seeds"),
        about=record.texts("about"), not_yet=record.maybe("not_yet"), where=record.where(),
    )  # fmt: skip


def _survey_metric(record: Record) -> SurveyMetric:
    known = record.cells["leanplan"]
    return SurveyMetric(
        id=record.name("id"), name=record.text("name"), section=record.text("section"), unit=record.text("unit"),
        better=record.word("better", ("lower", "higher")), resource=record.word("resource", EFFECTS),
        how=record.text("how"), leanplan=record.texts("leanplan") if isinstance(known, list) else (),
        not_yet="" if isinstance(known, list) else record.text("leanplan"), where=record.where(),
    )  # fmt: skip


def _benchmark(record: Record) -> Benchmark:
    return Benchmark(
        id=record.name("id"), name=record.text("name"), section=record.text("section"), what=record.text("what"),
        measures=record.texts("measures"), leanplan=record.text("leanplan"), sources=record.links("sources"),
        where=record.where(),
    )  # fmt: skip


def _challenge(record: Record) -> Challenge:
    return Challenge(
        id=record.name("id"), name=record.text("name"), section=record.text("section"),
        question=record.text("question"), answer=record.text("answer"), files=record.texts("where"),
        left=record.text("left"), where=record.where(),
    )  # fmt: skip


def _attention(record: Record) -> AttentionCost:
    return AttentionCost(
        id=record.name("id"), name=record.text("name"), time=record.text("time"), memory=record.text("memory"),
        symbols=record.maybe("symbols"), reference=record.maybe("reference"), source=record.link("source"),
        where=record.where(),
    )  # fmt: skip


def _maybe_one_of(record: Record, key: str, allowed: Sequence[str]) -> str | None:
    return record.word(key, allowed) if record.maybe(key) else None


KINDS = {  # by the name the Field has for it
    "topics": Kind("taxonomy.csv", _topic, (
        "id", "parent", "name", "section", "lifecycle", *RESOURCES, "uncertain", "note", "origin",
    )),
    "methods": Kind("methods/*.yaml", _method, (
        "id", "name", "summary", "topic", "lifecycle", "sources",
    ), ("stage", "family", "provides", "knobs", "requires", "saves", "spends", "risks")),
    "evidence_metrics": Kind("evidence_metrics.csv", _evidence_metric, (
        "metric", "unit", "better", "resource", "meaning",
    ), id="metric"),
    "evidence": Kind("evidence.csv", _evidence, (
        "steps", "model", "params_b", "family", "task", "metric", "baseline", "value", "setting", "hardware", "title",
        "source", "seed_reference", "note",
    ), id=None),
    "papers": Kind("papers.csv", _paper, ("id", "title", "year", "venue", "links", "seeds", "about", "not_yet")),
    "survey_metrics": Kind("metrics.yaml", _survey_metric, (
        "id", "name", "section", "unit", "better", "resource", "how", "leanplan",
    )),
    "benchmarks": Kind("benchmarks.yaml", _benchmark, (
        "id", "name", "section", "what", "measures", "leanplan", "sources",
    )),
    "challenges": Kind("challenges.yaml", _challenge, (
        "id", "name", "section", "question", "answer", "where", "left",
    )),
    "attention": Kind("attention.csv", _attention, (
        "id", "name", "time", "memory", "symbols", "reference", "source",
    )),
}  # fmt: skip
