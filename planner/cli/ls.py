"""`leanplan ls runs|plans|techniques|engines|machines|regions|metrics|solvers|topics|benchmarks|challenges`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Union, get_type_hints

if TYPE_CHECKING:
    from knowledge_base.field.entries import Method

HELP = "list runs, plans, techniques, engines, machines, regions, metrics, solvers, topics, benchmarks or challenges"
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
    parser.add_argument(
        "--kind", metavar="WORD", help="of machines: cpu, gpu, or how they are programmed: cuda, rocm, metal, xpu"
    )
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
    if options.kind is not None:
        _check_kind(options)
    options.json = options.json or options.format == "json"
    rows = LISTS[options.what](options)
    emit(options, rows, blocks(rows) if options.what == "engines" else table(rows))
    return 0


def _check_kind(options: argparse.Namespace) -> None:
    from cost_models.efficiency import read_rows
    from knowledge_base.errors import BadInput
    from knowledge_base.units import quote

    if options.what != "machines":
        raise BadInput("--kind chooses among machines", hint="leanplan ls machines --kind cpu", where="command line")
    kinds = sorted({row[column] for row in read_rows("devices.csv") for column in ("kind", "family")})
    if options.kind not in kinds:
        raise BadInput(f"no machines of kind {quote(options.kind)}", hint=f"one of: {', '.join(kinds)}", where="--kind")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as aligned columns; a tab-separated table suits a pipe no better than this does."""
    if not rows:
        return "none"
    names = list(rows[0])
    cells = [[str(row[name]) if row[name] is not None else "" for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, *cells]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def blocks(rows: Sequence[Mapping[str, object]], columns: int | None = None) -> str:
    """Return each engine as a few lines that fit the terminal: a table of all they offer would fit none.

    Args:
        columns: None: those of the terminal, 100 where there is none.
    """
    import shutil
    import textwrap

    columns = max(40, columns or shutil.get_terminal_size((100, 24)).columns)
    longest = max((len(str(row["engine"])) for row in rows), default=0)

    def wrapped(text: str, first: str, later: str) -> str:
        # Tags and package names are copied from here: they are not broken at their dashes.
        return textwrap.fill(text, columns, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)

    lines = []
    for row in rows:
        name = str(row["engine"]).ljust(longest)
        lines += [
            wrapped(str(row["state"]), f"{name}  ", " " * (longest + 2)),
            wrapped(str(row["summary"]), "    ", "    "),
            wrapped(str(row["offers"]), "    offers ", "           "),
        ]
    return "\n".join(lines) or "none"


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
    rates: str  # of dense matrix products in Tera operations/s, the widest type first
    power: str  # idle if known, and busy
    price: str
    date: str  # when the figures were looked up
    source: str
    price_source: str


def _machines(options: Any) -> list[KnownMachine]:
    from cost_models.efficiency import read_rows

    here = KnownMachine(
        machine="local",
        kind="",
        memory="",
        bandwidth="",
        rates="",
        power="",
        price="",
        date="",
        source="leanplan probe",
        price_source="",
    )
    known = [_machine(row) for row in read_rows("devices.csv") if options.kind in (None, row["kind"], row["family"])]
    return [here, *known] if options.kind is None else known


def _machine(row: Mapping[str, str]) -> KnownMachine:
    from cost_models.catalogue import rates

    watts = [_shown(row, column, "power") for column in ("idle_w", "tdp_w") if row[column]]
    return KnownMachine(
        machine=row["name"],
        kind=row["family"],
        memory=_shown(row, "memory_bytes", "bytes") or f"{row['memory_choices'] or 'any'} GB: say which",
        bandwidth=_shown(row, "memory_bytes_per_s", "bandwidth") or "unknown: not predictable",
        rates=", ".join(f"{dtype} {_three_digits(rate / 1e12)}" for dtype, rate in rates(row).items()),
        power=" to ".join(watts),
        price=_shown(row, "price_usd_per_h", "price_per_hour"),
        date=row["as_of"],
        source=row["source"].split(" ")[0],
        price_source=row["price_source"],
    )


def _shown(row: Mapping[str, str], column: str, dimension: str) -> str:
    from knowledge_base import units

    return units.format(float(row[column]), dimension) if row[column] else ""


def _three_digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


class KnownRegion(TypedDict):
    """A region with what its electricity costs or emits."""

    region: str
    electricity: str  # price for businesses
    carbon: str
    source: str  # with the year or quarter


def _regions(options: Any) -> list[KnownRegion]:
    from cost_models.catalogue import electricity_price, grid_carbon
    from cost_models.efficiency import read_rows
    from knowledge_base import units

    found: dict[str, KnownRegion] = {}
    for row in (*read_rows("electricity_prices.csv"), *read_rows("grid_carbon.csv")):
        region = found.setdefault(
            row["region"], KnownRegion(region=row["region"], electricity="", carbon="", source="")
        )
        if "usd_per_kwh" in row:
            price, source = electricity_price(row["region"])
            region["electricity"] = units.format(price, "price_per_kwh")
        else:
            carbon, source = grid_carbon(row["region"])
            region["carbon"] = units.format(carbon, "carbon_per_kwh")
        region["source"] = "; ".join(filter(None, (region["source"], source)))
    return list(found.values())


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
    "runs": _runs, "plans": _plans, "techniques": _techniques, "engines": _engines, "machines": _machines, "regions": _regions,
    "metrics": _metrics, "solvers": _solvers, "topics": _topics, "benchmarks": _benchmarks, "challenges": _challenges,
}  # fmt: skip
