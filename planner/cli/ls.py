"""`leanplan ls runs|plans|techniques|engines|machines|metrics|solvers|topics|benchmarks|challenges`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Union, get_type_hints

if TYPE_CHECKING:
    from knowledge_base.field.entries import Method

HELP = "list runs, plans, techniques, engines, machines, metrics, solvers, topics, benchmarks or challenges"
FILTERS = ("saves", "stage", "needs", "status", "topic")  # of techniques


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=tuple(LISTS))
    group = parser.add_argument_group("of techniques")
    group.add_argument(
        "--saves", metavar="RESOURCE", help="those that save it: computation, memory, energy, money, network"
    )
    group.add_argument(
        "--stage", help="of a model's life (design, pre-training, fine-tuning, inference, system) or of a plan"
    )
    group.add_argument(
        "--needs", metavar="WORD", help="no-training, no-data, no-hardware, or what it must need: gpu, moe"
    )
    group.add_argument("--status", help="executable, priced or known")
    group.add_argument("--topic", metavar="ID", help="at or below this topic of the taxonomy")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json is the same as --json")


def output() -> Any:
    return Union[tuple(get_type_hints(rows)["return"] for rows in LISTS.values())]  # noqa: UP007


def run(options: argparse.Namespace) -> int:
    from knowledge_base.errors import BadInput
    from planner.cli._talk import emit

    given = [f"--{name}" for name in FILTERS if getattr(options, name) is not None]
    if given and options.what != "techniques":
        raise BadInput(
            f"{', '.join(given)} chooses among techniques", hint="leanplan ls techniques …", where="command line"
        )
    options.json = options.json or options.format == "json"
    rows = LISTS[options.what](options)
    emit(options, rows, table(rows))
    return 0


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as aligned columns; a tab-separated table suits a pipe no better than this does."""
    if not rows:
        return "none"
    names = list(rows[0])
    cells = [[str(row[name]) if row[name] is not None else "" for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, *cells]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


class Run(TypedDict):
    """A run folder."""

    run: str
    state: str
    measured: int  # plans


def _runs(options: Any) -> list[Run]:
    from planner.finding import runs, runs_root

    return [
        Run(run=e.name, state="finished" if e.finished else "unfinished (the same plan command resumes it)", measured=e.plans)
        for e in runs(runs_root(options))
    ]  # fmt: skip


class Found(TypedDict):
    """A plan of a finished run."""

    id: str
    mark: str  # as the legend of leanplan report says
    plan: str
    run: str


def _plans(options: Any) -> list[Found]:
    from planner.finding import runs, runs_root
    from planner.reports._table import mark
    from planner.results import load

    rows = []
    for entry in runs(runs_root(options)):
        if entry.finished:
            answer = load(entry.path)
            rows += [
                Found(id=r.plan.id, mark=mark(r, answer), plan=r.plan.words, run=entry.name) for r in answer.results
            ]
    return rows


class KnownTechnique(TypedDict):
    """A technique of the field; `leanplan explain` tells all that is known of it."""

    technique: str
    name: str
    stage: str  # of a model's life
    saves: str  # resources, those it acts on indirectly in brackets
    costs: str  # resources, quality
    needs: str
    status: str  # "executable" | "priced" | "known"
    plans: str  # what plans call it, where Leanplan executes it


def _techniques(options: Any) -> list[KnownTechnique]:
    from knowledge_base.field import field

    known = field()
    asked = {name: getattr(options, name) for name in FILTERS}
    rows = []
    for method in known.select(**asked):
        strengths = known.effects(method.id)
        indirect = [r for r in method.saves if strengths.get(r) == "indirect"]
        saves = ", ".join(r for r in method.saves if r not in indirect) + (
            f" ({', '.join(indirect)})" if indirect else ""
        )
        rows.append(
            KnownTechnique(
                technique=method.id, name=method.name, stage=method.lifecycle, saves=saves.strip(),
                costs=", ".join(method.spends), needs=_needs(method), status=known.status(method.id),
                plans=", ".join(known.implementing(method.id)),
            )
        )  # fmt: skip
    return rows


def _needs(method: Method) -> str:
    """Return what a technique needs in a few words: `calibration data, fine-tuning, gpu`."""
    needs = method.requires
    said = [needs.data and f"{needs.data} data", needs.training, *needs.hardware]
    return ", ".join(word for word in said if not word.startswith("none")) or "nothing"


class KnownEngine(TypedDict):
    """An engine, and whether it is ready here."""

    engine: str
    state: str  # "ready", or what is missing
    offers: str  # capability tags
    summary: str


def _engines(options: Any) -> list[KnownEngine]:
    from knowledge_base.registry import engines

    return [
        KnownEngine(
            engine=name,
            state=module.find() or "ready",
            offers=", ".join(sorted(module.ENGINE.offers)),
            summary=module.ENGINE.summary,
        )
        for name, module in engines.all().items()
    ]


class KnownMachine(TypedDict):
    """A machine plans can be predicted for."""

    machine: str
    kind: str
    memory: str  # with its unit
    bandwidth: str  # with its unit
    source: str


def _machines(options: Any) -> list[KnownMachine]:
    from cost_models.efficiency import read_rows

    rows = [KnownMachine(machine="local", kind="", memory="", bandwidth="", source="leanplan probe")]
    for row in read_rows("devices.csv"):
        memory = (
            f"{int(row['memory_bytes']) / 2**30:.0f} GiB"
            if row["memory_bytes"]
            else f"{row['memory_choices'] or 'unknown'} GB"
        )
        bandwidth = (
            f"{float(row['memory_bytes_per_s']) / 1e9:.0f} GB/s"
            if row["memory_bytes_per_s"]
            else "unknown: not predictable"
        )
        rows.append(
            KnownMachine(
                machine=row["name"],
                kind=row["kind"],
                memory=memory,
                bandwidth=bandwidth,
                source=row["source"].split(" ")[0],
            )
        )
    return rows


class KnownMetric(TypedDict):
    """A quantity plans are measured, predicted or limited by."""

    metric: str  # as a spec names it
    name: str  # as code and JSON name it, with its unit
    better: str  # "lower" | "higher"
    resource: str
    meaning: str


def _metrics(options: Any) -> list[KnownMetric]:
    from knowledge_base.metrics import METRICS

    return [
        KnownMetric(metric=m.label, name=m.name, better=m.better, resource=m.resource, meaning=m.summary)
        for m in METRICS.values()
    ]


class KnownSolver(TypedDict):
    """A way to search for plans."""

    solver: str
    summary: str


def _solvers(options: Any) -> list[KnownSolver]:
    from search.solvers import registry

    return [KnownSolver(solver=name, summary=module.SOLVER) for name, module in registry.all().items()]


class KnownTopic(TypedDict):
    """A node of the taxonomy."""

    topic: str
    place: str  # names from the root
    section: str  # of the survey
    direct: str  # resources it acts on directly, as Table 2 marks it
    indirect: str
    techniques: int  # known at or below it


def _topics(options: Any) -> list[KnownTopic]:
    from knowledge_base.field import field

    known = field()

    def marked(effects: Mapping[str, str], strength: str) -> str:
        return ", ".join(resource for resource, mark in effects.items() if mark == strength)

    return [
        KnownTopic(
            topic=t.id, place=" / ".join(known.path(t.id)), section=t.section, direct=marked(t.effects, "direct"),
            indirect=marked(t.effects, "indirect"), techniques=len(known.below(t.id)),
        )
        for t in known.topics.values()
    ]  # fmt: skip


class KnownBenchmark(TypedDict):
    """A benchmark that looks at efficiency."""

    benchmark: str
    measures: str
    what: str
    leanplan: str  # what Leanplan has of it


def _benchmarks(options: Any) -> list[KnownBenchmark]:
    from knowledge_base.field import field

    return [
        KnownBenchmark(benchmark=b.name, measures=", ".join(b.measures), what=b.what, leanplan=b.leanplan)
        for b in field().benchmarks.values()
    ]


class OpenChallenge(TypedDict):
    """An open challenge of the field, and what Leanplan does about it."""

    challenge: str
    answer: str
    where: str  # files of the project
    left: str  # what is open


def _challenges(options: Any) -> list[OpenChallenge]:
    from knowledge_base.field import field

    return [
        OpenChallenge(challenge=c.name, answer=c.answer, where=", ".join(c.files), left=c.left)
        for c in field().challenges.values()
    ]


LISTS: dict[str, Callable[[Any], Sequence[Mapping[str, object]]]] = {
    "runs": _runs, "plans": _plans, "techniques": _techniques, "engines": _engines, "machines": _machines,
    "metrics": _metrics, "solvers": _solvers, "topics": _topics, "benchmarks": _benchmarks, "challenges": _challenges,
}  # fmt: skip
