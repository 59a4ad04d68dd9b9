"""What a run hands back: every plan it looked at, judged, and the Pareto set among the measured ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knowledge_base.types import Budget, Estimate, Figure, Hardware, Measurement, Model, Plan, Value, Workload
from planner.run_forecast import RunForecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One budget judged for one plan. Exactly one of `figure` (observed) and `value` (predicted) is set, or none."""

    budget: Budget
    outcome: str  # "met" | "not met" | "inconclusive" | "not judged"
    limit: float  # the bound in SI units; relative budgets resolved against the baseline
    figure: Figure | None = None
    value: Value | None = None
    sentence: str = ""  # "ttft_p95 41 ms [39, 44] is at most 50 ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """One plan with all that is known of it. `ratios` are paired with the baseline, from interleaved blocks."""

    plan: Plan
    estimate: Estimate | None = None
    measurement: Measurement | None = None
    verdicts: tuple[Verdict, ...] = ()
    on_front: bool = False
    finalist: bool = False
    ratios: Mapping[str, Figure] = field(default_factory=dict)
    allocation: Mapping[str, str] | None = None  # module -> its option, where the plan has a per-layer step
    artefact: str | None = None  # folder, relative to the run folder
    why: tuple[str, ...] = ()  # what each step bought and cost, and why it is or is not chosen

    @property
    def feasible(self) -> bool:
        """Every budget of level error is met (measured plans) or predicted to be met."""
        return all(v.outcome == "met" for v in self.verdicts if v.budget.level == "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Something that was not chosen, and why. `kind`: rule, engine, predicted, failed or measured."""

    what: str
    why: str
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoSet:
    """The answer of `plan(...)`. Iterating gives the members of the Pareto front, recommended first.

    `measured` tells whether members carry measurements; a predicted-only set never mixes in measured figures.
    """

    run_id: str
    model: Model
    hardware: Hardware
    workload: Workload
    budgets: tuple[Budget, ...]
    objectives: tuple[str, ...]
    results: tuple[PlanResult, ...]  # every plan measured (or, predicted only, the best predicted), baseline first
    recommended_id: str | None
    rejected: tuple[Rejection, ...] = ()
    measured: bool = True
    sentence: str = ""  # the answer in one sentence
    conflicts: tuple[str, ...] = ()  # when nothing fits: which budgets conflict, nearest plans
    prediction_errors: Mapping[str, Mapping[str, float]] = field(
        default_factory=dict
    )  # metric -> median_ratio, coverage, n
    search: Mapping[str, Any] = field(
        default_factory=dict
    )  # solver, seed, plans legal / priced / measured, seconds by stage
    provenance: Mapping[str, Any] = field(default_factory=dict)  # versions, data hashes, machine state, warnings
    forecast: RunForecast | None = None  # what the run was expected to take, beside what it took
    unmeasured: tuple[PlanResult, ...] = ()  # replanned: worth measuring, because predicted to be better
    folder: str | None = None

    def __iter__(self) -> Iterator[PlanResult]:
        front = [r for r in self.results if r.on_front]
        return iter(sorted(front, key=lambda r: r.plan.id != self.recommended_id))

    def __len__(self) -> int:
        return sum(r.on_front for r in self.results)

    @property
    def baseline(self) -> PlanResult | None:
        """The unchanged model: always the first result."""
        return self.results[0] if self.results else None

    @property
    def recommended(self) -> PlanResult | None:
        """The plan that meets every error budget and is best on the first objective; None when nothing fits."""
        return next((r for r in self.results if r.plan.id == self.recommended_id), None)

    def save(self, folder: str | Path) -> Path:
        """Write result.json, summary.md and report.html into `folder` and return the folder."""
        from knowledge_base.serde import write_atomic
        from planner.reports import html, json, markdown

        folder = Path(folder)
        write_atomic(folder / "result.json", json.render(self))
        write_atomic(folder / "summary.md", markdown.render(self))
        write_atomic(folder / "report.html", html.render(self))
        return folder

    def __repr__(self) -> str:
        """The sentence and the table of plans: what a person wants to see at a prompt."""
        from planner.reports import terminal

        return terminal.render(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The same, as wide as a rich console is."""
        from rich.text import Text

        from planner.reports import terminal

        yield Text(terminal.render(self, width=options.max_width), end="")

    def _repr_html_(self) -> str:
        from planner.reports.html import notebook

        return notebook.render(self)

    def to_dataframe(self) -> Any:
        """Return one row for each result as a pandas DataFrame: plan, id, and a column for each metric.

        Raises:
            EnvironmentProblem: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            from knowledge_base.errors import EnvironmentProblem

            raise EnvironmentProblem("pandas is not installed", hint="pip install 'leanplan[pandas]'") from error
        rows = []
        for result in self.results:
            row: dict[str, Any] = {"id": result.plan.id, "plan": result.plan.words, "on_front": result.on_front}
            row |= {"recommended": result.plan.id == self.recommended_id, "feasible": result.feasible}
            if result.measurement:
                row |= {f"measured.{k}": f.value for k, f in result.measurement.figures.items()}
            if result.estimate:
                row |= {f"predicted.{k}": v.mid for k, v in result.estimate.values.items()}
            rows.append(row)
        return pandas.DataFrame(rows)


def as_mapping(answer: ParetoSet) -> dict[str, Any]:
    """Return an answer as result.json holds it."""
    from knowledge_base.serde import plain

    return {"schema": 1, **plain(answer)}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def load(place: str | Path) -> ParetoSet:
    """Return the ParetoSet saved in a run folder, or in a file as `plan --json --output-file FILE` writes it.

    `folder` is where the run lies now, should it have been moved.

    Raises:
        BadInput: no result.json there, or it was made by a newer schema or is damaged.
    """
    import json

    from knowledge_base.errors import BadInput
    from knowledge_base.serde import restore

    path = Path(place) if Path(place).is_file() else Path(place) / "result.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if data.pop("schema", 1) != 1:
            raise BadInput(
                "result.json has another schema than 1", where=str(path), hint="open it with the version that wrote it"
            )
        answer = restore(ParetoSet, data)
        return replace(answer, folder=str(path.parent)) if answer.folder else answer
    except FileNotFoundError as error:
        raise BadInput("no result.json here", where=str(place), hint="list runs with: leanplan ls runs") from error
    except (ValueError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise BadInput(
            f"result.json is damaged: {error}", where=str(path), hint="resume the run: leanplan plan"
        ) from error
