"""What the knowledge of the field is made of: one frozen type for each kind of row. See docs/knowledge.md.

A *method* is something the field knows how to do (GPTQ, tensor parallelism); a *technique* is our code that executes
one. `where` is the file and line an entry was read from, so that every complaint can name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from knowledge_base.types import Step

RESOURCES = ("computation", "memory", "energy", "money", "network")
EFFECTS = (*RESOURCES, "quality")  # what a method may save or spend, and what a figure may be of
# Parts of a model's life; compression belongs to inference, as in the survey.
LIFECYCLE = ("design", "pre-training", "fine-tuning", "inference", "system")
STRENGTHS = ("direct", "indirect")  # how a technique acts on a resource: bold and plain marks of the survey's Table 2
STATUSES = ("executable", "priced", "known")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """A node of the taxonomy: Figure 1 of the survey (arXiv:2401.00625) and what its sisters add.

    `effects` is the row of Table 2, empty where the table has none. `uncertain` are resources whose mark could not be
    read with certainty; `note` says how it was decided.
    """

    id: str
    parent: str | None
    name: str
    section: str
    lifecycle: str | None  # one of LIFECYCLE; None: spans several
    effects: Mapping[str, str]  # resource -> "direct" | "indirect"
    uncertain: tuple[str, ...]
    note: str
    origin: str  # "003 table 2" | "003 figure 1" | "001" | "002" | "leanplan"
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a method needs. `data` and `training` in words; "none" is an answer, an empty tuple means any."""

    data: str = "none"
    training: str = "none"
    hardware: tuple[str, ...] = ()
    architecture: tuple[str, ...] = ()
    engine: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One thing the field knows how to do. `saves` and `spends`: resource -> `table 2`, `evidence` or a link."""

    id: str
    name: str
    summary: str
    topic: str
    lifecycle: str  # one of LIFECYCLE
    stage: str | None  # its place among the steps of a plan (types.STAGES); None: not a step
    family: str | None  # alternatives of which a plan holds at most one
    provides: frozenset[str]
    knobs: Mapping[str, tuple[str | float, ...]]
    requires: Requirements
    saves: Mapping[str, str]
    spends: Mapping[str, str]
    risks: tuple[str, ...]
    sources: tuple[str, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceMetric:
    """What a published figure is a figure of."""

    name: str
    unit: str
    better: str  # "lower" | "higher"
    resource: str  # one of EFFECTS
    meaning: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRow:
    """One published figure: what `steps` did to `metric` of one model. No baseline: the source gives none."""

    steps: tuple[Step, ...]
    model: str
    params_b: float | None  # 1e9 parameters
    family: str  # of models that share a training recipe: "llama-2", "opt"
    task: str
    metric: str
    baseline: float | None
    value: float
    setting: str
    hardware: str
    title: str
    source: str
    seed_reference: bool  # the paper behind it is cited by a seed survey
    note: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One title of the seed surveys. `about` are method or topic ids; where empty, `not_yet` says why."""

    id: str
    title: str
    year: int | None
    venue: str
    links: tuple[str, ...]
    seeds: tuple[str, ...]  # "003 §6.1.2 [137]"
    about: tuple[str, ...]
    not_yet: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SurveyMetric:
    """A metric of section 9.1. `leanplan`: names in METRICS; where empty, `not_yet` says why."""

    id: str
    name: str
    section: str
    unit: str
    better: str
    resource: str
    how: str
    leanplan: tuple[str, ...]
    not_yet: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark of section 9.2 that looks at efficiency."""

    id: str
    name: str
    section: str
    what: str
    measures: tuple[str, ...]
    leanplan: str
    sources: tuple[str, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """An open challenge of section 10, what Leanplan does about it, in which files, and what it leaves open."""

    id: str
    name: str
    section: str
    question: str
    answer: str
    files: tuple[str, ...]
    left: str
    where: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCost:
    """A row of Table 1: how time and memory of attention grow with T tokens and d features (m, c: see `symbols`)."""

    id: str
    name: str
    time: str
    memory: str
    symbols: str
    reference: str
    source: str
    where: str = field(default="", compare=False)
