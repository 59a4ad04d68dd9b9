"""Laws between the files of the knowledge of the field: every id leads somewhere, every claim has its ground."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING

from knowledge_base.errors import BadInput
from knowledge_base.field.entries import EFFECTS
from knowledge_base.field.records import is_link
from knowledge_base.metrics import METRICS
from knowledge_base.units import quote

if TYPE_CHECKING:
    from knowledge_base.field import Field
    from knowledge_base.field.entries import EvidenceRow, Method, Paper, Topic

_ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|vs|cf|et al|approx)\.")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ARXIV = re.compile(r"(?:arXiv:|arxiv\.org/(?:abs|pdf)/)(\d{4}\.\d{4,5})")


def check(field: Field) -> None:
    """Refuse knowledge that breaks a law.

    Raises:
        BadInput: the first that does, with its file and line.
    """
    for problem in problems(field):
        raise problem


def problems(field: Field) -> Iterator[BadInput]:
    """Yield everything that breaks a law, each with its file and line."""
    for law in _LAWS:
        yield from law(field)


def techniques_of(field: Field) -> Iterator[BadInput]:
    """Yield every technique of our code that says it implements what the field does not know, or hides what it is not."""
    from knowledge_base.registry import techniques

    for name, module in techniques.all().items():
        implements = module.TECHNIQUE.implements
        for method in implements:
            if method not in field.methods:
                yield _unknown("method", method, str(module.__file__))
        if name in field.topics or (name in field.methods and name not in implements):
            yield BadInput(
                f"technique `{name}` has the id of something it does not implement", hint="give one another name",
                where=str(module.__file__),
            )  # fmt: skip


def _topics(field: Field) -> Iterator[BadInput]:
    for topic in field.topics.values():
        if topic.parent is not None and topic.parent not in field.topics:
            yield _unknown("topic", topic.parent, topic.where)
            return  # what follows walks upwards
    for topic in field.topics.values():
        seen = [topic.id]
        while (parent := field.topics[seen[-1]].parent) is not None:
            if parent in seen:
                yield BadInput(
                    f"the topics above `{topic.id}` go round in a circle", hint="correct `parent`", where=topic.where
                )
                return
            seen.append(parent)
        if topic.id in field.methods:
            yield BadInput(
                f"`{topic.id}` is a topic and a method", hint="give the method its own id",
                where=field.methods[topic.id].where,
            )  # fmt: skip


def _methods(field: Field) -> Iterator[BadInput]:
    # Methods lie under leaves and rows of Table 2. A person may add topics below ours without moving our methods, so
    # only topics of the parent's own file count.
    inner = {
        topic.parent
        for topic in field.topics.values()
        if (above := field.topics.get(topic.parent or "")) and not above.effects and _file(topic) == _file(above)
    }
    for method in field.methods.values():
        if method.topic not in field.topics:
            yield _unknown("topic", method.topic, method.where)
        elif method.topic in inner:
            yield BadInput(
                f"`{method.id}` lies under `{method.topic}`, which has topics below it",
                hint="name the topic it belongs to most closely", where=method.where,
            )  # fmt: skip
        if (count := _sentences(method.summary)) != 2:
            yield BadInput(
                f"the summary of `{method.id}` has {count} sentences", hint="write two: what it does, and what it is for",
                where=method.where,
            )  # fmt: skip


def _claims(field: Field) -> Iterator[BadInput]:
    for method in field.methods.values():
        about = {field.evidence_metrics[row.metric].resource for row in _known_rows(field, method)}
        marked = field.effects(method.id) if method.topic in field.topics else EFFECTS
        for resource, why in method.saves.items():
            if why == "table 2" and resource not in marked:
                yield _claim(method, resource, f"Table 2 does not mark it for `{method.topic}`", "give other ground")
            elif why != "table 2":
                yield from _grounds(method, resource, why, about)
        for resource, why in method.spends.items():
            yield from _grounds(method, resource, why, about)


def _known_rows(field: Field, method: Method) -> Iterator[EvidenceRow]:
    return (row for row in field.evidence_of(method.id) if row.metric in field.evidence_metrics)


def _grounds(method: Method, resource: str, why: str, about: Set[str]) -> Iterator[BadInput]:
    if why == "evidence":
        if resource not in about:
            yield _claim(method, resource, "no row of evidence is about it", "add a row, or give a link")
    elif not all(is_link(part) for part in why.split()):
        yield _claim(method, resource, f"{quote(why)} is no ground", "write `evidence` or a link; a saving: `table 2`")


def _claim(method: Method, resource: str, message: str, hint: str) -> BadInput:
    return BadInput(f"`{method.id}` and {resource}: {message}", hint=hint, where=method.where)


def _evidence(field: Field) -> Iterator[BadInput]:
    for row in field.evidence:
        if row.metric not in field.evidence_metrics:
            yield _unknown("metric", row.metric, row.where)
        for step in row.steps:
            if (method := field.methods.get(step.technique)) is None:
                yield _unknown("method", step.technique, row.where)
                continue
            for knob in step.knobs:
                if knob not in method.knobs:
                    yield BadInput(
                        f"`{method.id}` has no knob {quote(knob)}",
                        hint=f"its knobs: {', '.join(method.knobs) or 'none'}", where=row.where,
                    )  # fmt: skip


def _papers(field: Field) -> Iterator[BadInput]:
    known = field.topics.keys() | field.methods.keys()
    titles: dict[str, Paper] = {}
    numbers: dict[str, Paper] = {}
    for paper in field.papers.values():
        for about in paper.about:
            if about not in known:
                yield _unknown("method or topic", about, paper.where)
        if bool(paper.about) == bool(paper.not_yet):
            both = "both `about` and `not_yet`" if paper.about else "neither `about` nor `not_yet`"
            yield BadInput(
                f"{quote(paper.title)} has {both}", hint="say what it is about, or why that is not yet known here",
                where=paper.where,
            )  # fmt: skip
        yield from _twice(re.sub(r"\W+", "", paper.title.casefold()), titles, paper)
        for link in paper.links:
            if found := _ARXIV.search(link):
                yield from _twice(found[1], numbers, paper)


def _twice(key: str, seen: dict[str, Paper], paper: Paper) -> Iterator[BadInput]:
    if (other := seen.setdefault(key, paper)) is not paper:
        yield BadInput(
            f"{quote(paper.title)} is there twice", hint=f"merge it with {other.where}: {quote(other.title)}",
            where=paper.where,
        )  # fmt: skip


def _survey_metrics(field: Field) -> Iterator[BadInput]:
    for metric in field.survey_metrics.values():
        for name in metric.leanplan:
            if name not in METRICS:
                yield _unknown("metric of Leanplan", name, metric.where)


def _file(topic: Topic) -> str:
    return topic.where.rpartition(":")[0]


def _sentences(text: str) -> int:
    return len(_SENTENCE_END.findall(_ABBREVIATIONS.sub("", text)))


def _unknown(noun: str, id: str, where: str) -> BadInput:
    return BadInput(f"unknown {noun} {quote(id)}", hint="correct the id, or add the entry", where=where)


_LAWS: tuple[Callable[[Field], Iterator[BadInput]], ...] = (
    _topics, _methods, _claims, _evidence, _papers, _survey_metrics,
)  # fmt: skip
