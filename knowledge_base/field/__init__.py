"""The knowledge of the field: taxonomy, methods, papers, evidence. `field()` is the one way in. See docs/knowledge.md."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.field.entries import (
    EFFECTS,
    LIFECYCLE,
    STATUSES,
    AttentionCost,
    Benchmark,
    Challenge,
    EvidenceMetric,
    EvidenceRow,
    Method,
    Paper,
    SurveyMetric,
    Topic,
)
from knowledge_base.field.magnitude import Magnitude, magnitudes
from knowledge_base.types import STAGES
from knowledge_base.units import quote

OURS = Path(__file__).resolve().parent.parent / "data" / "field"


@dataclass(frozen=True, kw_only=True)
class Field:
    """Everything known, by id in the order of the files, and the questions one asks of it."""

    topics: Mapping[str, Topic]
    methods: Mapping[str, Method]
    evidence_metrics: Mapping[str, EvidenceMetric]
    evidence: tuple[EvidenceRow, ...]
    papers: Mapping[str, Paper]
    survey_metrics: Mapping[str, SurveyMetric]
    benchmarks: Mapping[str, Benchmark]
    challenges: Mapping[str, Challenge]
    attention: Mapping[str, AttentionCost]

    def topic(self, id: str) -> Topic:
        """Return a topic.

        Raises:
            BadInput: no such topic, with the nearest names.
        """
        if id in self.methods:
            raise BadInput(f"`{id}` is a technique, not a topic", hint=f"leanplan explain {id}")
        return self.topics[_known(id, "topic", self.topics)]

    def method(self, id: str) -> Method:
        """Return a method.

        Raises:
            BadInput: no such technique, with the nearest names.
        """
        if id in self.topics:
            raise BadInput(f"`{id}` is a topic, not a technique", hint=f"leanplan ls techniques --topic {id}")
        return self.methods[_known(id, "technique", self.methods)]

    def upwards(self, topic: str) -> tuple[str, ...]:
        """Return a topic's id and those above it, the root last."""
        found = [topic]
        while (parent := self.topics[found[-1]].parent) is not None:
            found.append(parent)
        return tuple(found)

    def path(self, topic: str) -> tuple[str, ...]:
        """Return the names from the root of the taxonomy to a topic."""
        return tuple(self.topics[t].name for t in reversed(self.upwards(topic)))

    def below(self, topic: str) -> tuple[Method, ...]:
        """Return the methods at or below a topic."""
        return tuple(m for m in self.methods.values() if topic in self.upwards(m.topic))

    def effects(self, method: str) -> Mapping[str, str]:
        """Return what Table 2 says of a method's topic, or the nearest above it: resource -> "direct" | "indirect"."""
        rows = (self.topics[topic].effects for topic in self.upwards(self.methods[method].topic))
        return next((row for row in rows if row), {})

    def evidence_of(self, id: str) -> tuple[EvidenceRow, ...]:
        """Return the rows with a step of a method, or of any method at or below a topic."""
        found = {index for method in self._methods_of(id) for index in self._evidence_by_method.get(method, ())}
        return tuple(self.evidence[index] for index in sorted(found))

    def magnitudes_of(self, id: str) -> dict[str, Magnitude]:
        """Return what published figures say of a method or topic: resource -> its own; with others where it has none."""
        rows, own = self.evidence_of(id), self._methods_of(id)
        alone = [row for row in rows if all(step.technique in own for step in row.steps)]
        return magnitudes(rows, self.evidence_metrics) | magnitudes(alone, self.evidence_metrics)

    def _methods_of(self, id: str) -> set[str]:
        return {m.id for m in self.below(id)} if id in self.topics else {id}

    def papers_of(self, id: str) -> tuple[Paper, ...]:
        """Return the papers about a method; of a topic, those about it, topics below it, or their methods."""
        about = {id}
        if id in self.topics:
            about |= {topic for topic in self.topics if id in self.upwards(topic)} | {m.id for m in self.below(id)}
        return tuple(paper for paper in self.papers.values() if about.intersection(paper.about))

    def implementing(self, method: str) -> tuple[str, ...]:
        """Return the names of our techniques that execute a method."""
        return self._implementing.get(method, ())

    def status(self, method: str) -> str:
        """Return "executable" if a technique of ours does it, "priced" if its loss of quality is fitted, else "known"."""
        from knowledge_base import quality

        if self.implementing(method):
            return "executable"
        return "priced" if method in quality.priced_methods() else "known"

    def select(
        self,
        *,
        saves: str | None = None,
        stage: str | None = None,
        needs: str | None = None,
        status: str | None = None,
        topic: str | None = None,
    ) -> tuple[Method, ...]:
        """Return the methods that answer all that is asked.

        Args:
            saves: a resource, or quality.
            stage: a part of the life cycle ("inference") or a stage of a plan ("quantise").
            needs: `no-training`, `no-data`, `no-hardware`, … or a word it must need: `gpu`.
            status: one of STATUSES.
            topic: at or below it.

        Raises:
            BadInput: something asked that no method could ever answer.
        """
        found: Iterator[Method] = iter(self.methods.values() if topic is None else self.below(self.topic(topic).id))
        if saves is not None:
            _known(saves, "resource", EFFECTS)
            found = (m for m in found if saves in m.saves)
        if stage is not None:
            _known(stage, "stage", (*LIFECYCLE, *STAGES))
            found = (m for m in found if stage in (m.lifecycle, m.stage))
        if needs is not None:
            wanted = _known(needs, "need", self._needs)
            found = (m for m in found if wanted in _needs_of(m))
        if status is not None:
            _known(status, "status", STATUSES)
            found = (m for m in found if self.status(m.id) == status)
        return tuple(found)

    @cached_property
    def _evidence_by_method(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for index, row in enumerate(self.evidence):
            for step in row.steps:
                found.setdefault(step.technique, []).append(index)
        return found

    @cached_property
    def _implementing(self) -> dict[str, tuple[str, ...]]:
        from knowledge_base.registry import techniques

        found: dict[str, tuple[str, ...]] = {}
        for name, module in techniques.all().items():
            for method in module.TECHNIQUE.implements:
                found[method] = (*found.get(method, ()), name)
        return found

    @cached_property
    def _needs(self) -> tuple[str, ...]:
        return tuple(sorted({need for method in self.methods.values() for need in _needs_of(method)}))


def _needs_of(method: Method) -> frozenset[str]:
    """Return what a method needs in words: `gpu`, and `no-training` where it trains nothing; calibrating is not training."""
    requires = method.requires
    lists = {"hardware": requires.hardware, "architecture": requires.architecture, "engine": requires.engine}
    words = {"data": requires.data, "training": requires.training}
    none = {f"no-{kind}" for kind, word in words.items() if word.partition(":")[0] in ("none", "calibration-only")}
    return frozenset({*none, *(f"no-{kind}" for kind, listed in lists.items() if not listed)}.union(*lists.values()))


def _known(word: str, noun: str, among: Mapping[str, object] | tuple[str, ...]) -> str:
    if word not in among:
        near = difflib.get_close_matches(re.sub(r"[\W_]+", "_", word.casefold()), among, n=3)
        guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
        listed = f"leanplan ls {noun}s" if noun in ("technique", "topic") else ", ".join(among)
        raise BadInput(f"unknown {noun} {quote(word)}{guess}", hint=f"known {noun}s: {listed}")
    return word


def field() -> Field:
    """Return the knowledge of the field with everything a person laid over it, read and checked once.

    Raises:
        BadInput: an entry breaks a law; with its file and line.
    """
    from knowledge_base.field.overlay import folders

    return load((OURS, *folders()))


@lru_cache(maxsize=4)
def load(folders: tuple[Path, ...]) -> Field:
    """Return the knowledge in these folders, each laid over those before it.

    Raises:
        BadInput: an entry breaks a law; with its file and line.
    """
    from knowledge_base.field.checking import check
    from knowledge_base.field.reading import KINDS, read

    found = Field(**{name: read(kind, folders) for name, kind in KINDS.items()})
    check(found)
    return found
