"""The table of a comment: each budget's limit, the main branch's figure, today's, and what became of it; failures first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Figure
from planner.checking import CheckResult
from planner.lock import Lock
from planner.reports import _table
from planner.reports.check._findings import severity
from planner.reports.markdown import cut, escape
from planner.results import Verdict

STATUS = {"met": "✅ met", "not met": "❌ not met", "inconclusive": "❔ inconclusive", "not judged": "❔ not judged"}
WARNS = {"met": "✅ met", "not met": "⚠️ not met, warns only", "inconclusive": "ℹ️ inconclusive, warns only",
         "not judged": "ℹ️ not judged, warns only"}  # fmt: skip
WORSE = "❌ worse than the lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One budget, or a metric without one that got worse, as Markdown cells."""

    label: str
    limit: str
    main: str
    now: str
    interval: str
    change: str
    status: str
    rank: tuple[int, float]

    @property
    def brief(self) -> str:
        """The row as half a sentence: `peak_memory 2.36 GiB, limit 2 GiB, +18.0% against main`."""
        parts = [f"{self.label} {self.now}"]
        parts += [f"limit {self.limit[2:]}"] if self.limit != "–" else []
        parts += [f"{self.change.partition(' (')[0]} against main"] if self.change[0] in "+-" else []
        return ", ".join(parts)

    @property
    def cells(self) -> str:
        """The row of the table; a failed figure in bold."""
        now = f"**{self.now}**" if self.status.startswith("❌") else self.now
        return f"| {self.label} | {self.limit} | {self.main} | {now}{self.interval} | {self.change} | {self.status} |"


def rows(check: CheckResult) -> list[Row]:
    """Return every budget, and every metric without one that is worse than the lock; failures first."""
    worse = [r.metric for r in check.regressions if r.outcome == "worse"]
    limited = {v.budget.metric for v in check.verdicts}
    found = [_row(check, v.budget.metric, v, worse=v.budget.metric in worse) for v in check.verdicts]
    found += [_row(check, metric, None, worse=True) for metric in worse if metric not in limited]
    return sorted(found, key=lambda row: row.rank)


def table(check: CheckResult, some: Sequence[Row]) -> str:
    """Return rows as a Markdown table. Its figures of today are all measured, or all predicted."""
    kind = "measured" if check.measured else "predicted"
    head = [f"| budget | limit | main (lock) | this PR ({kind}) | change | |", "|---|--:|--:|--:|--:|---|"]
    return "\n".join([*head, *(row.cells for row in some)])


def _row(check: CheckResult, metric: str, verdict: Verdict | None, *, worse: bool) -> Row:
    budget = verdict.budget if verdict else None
    label = budget.label if budget else METRICS[metric].label
    rank, status = (0, 0.0), WORSE
    if verdict and budget and (not worse or (verdict.outcome == "not met" and budget.level == "error")):
        rank, status = severity(verdict), (WARNS if budget.level == "warn" else STATUS)[verdict.outcome]
    # A relative budget that was judged by a paired ratio is told in ratios, on both sides.
    as_ratio = bool(budget and verdict and budget.relative and verdict.limit == budget.value)
    main, was = _of_lock(check.main, metric, budget.statistic if budget else None, as_ratio)
    now, interval, is_now = _of_today(check, metric, verdict, as_ratio)
    return Row(
        label=label, limit=_limit(verdict) if verdict else "–", main=main, now=now, interval=interval,
        change=_change(check, metric, was, is_now), status=status, rank=rank,
    )  # fmt: skip


def _limit(verdict: Verdict) -> str:
    budget = verdict.budget
    dimension = METRICS[budget.metric].dimension
    text = f"{'≤' if budget.bound == 'max' else '≥'} {cut(budget.text or units.format(budget.value, dimension))}"
    resolved = budget.relative and verdict.limit not in (0.0, budget.value)
    return f"{text} ({escape(units.format(verdict.limit, dimension))})" if resolved else text


def _of_lock(lock: Lock | None, metric: str, statistic: str | None, as_ratio: bool) -> tuple[str, float | None]:
    """Return a lock's figure as text and value. A lock keeps no samples, so not every statistic is there."""
    figure = lock.figures.get(metric) if lock else None
    if lock is None or figure is None:
        return "–", None
    if as_ratio:
        reference = lock.baseline.get(metric)
        ratio = figure.value / reference.value if reference and reference.value else None
        return (f"{ratio:.3g}× baseline", ratio) if ratio else ("–", None)
    value = figure.value if statistic in (None, figure.statistic) else figure.p95 if statistic == "p95" else None
    return (_named(units.format(value, METRICS[metric].dimension), figure), value) if value is not None else ("–", None)


def _of_today(
    check: CheckResult, metric: str, verdict: Verdict | None, as_ratio: bool
) -> tuple[str, str, float | None]:
    """Return today's figure, its interval, and the value where it was measured."""
    dimension = METRICS[metric].dimension
    if not check.measured:
        predicted = _table.value_text(verdict.value, metric) if verdict and verdict.value else "–"
        mid, bracket, ends = predicted.partition(" [")
        return escape(mid), escape(bracket + ends), None
    if as_ratio and verdict and (ratio := verdict.figure):
        ends = f" [{ratio.low:.3g}, {ratio.high:.3g}]" if ratio.low < ratio.high else ""
        return f"{ratio.value:.3g}× baseline", escape(ends), ratio.value
    figure = check.result.measurement.figures.get(metric) if check.result.measurement else None
    if figure is None:
        return "–", "", None
    from planner import statistics  # needs numpy

    statistic = verdict.budget.statistic if verdict else figure.statistic
    middle = statistics.point(figure, statistic)
    if middle is None:
        return "–", "", None
    text = units.format(middle, dimension)
    low, high = (
        "?" if end is None else units.format(end, dimension) for end in statistics.bounds_of(figure, statistic)
    )
    interval = f" [{low}, {high}]" if {low, high} != {text} else ""
    return _named(text, figure), escape(interval), middle


def _named(text: str, figure: Figure) -> str:
    return escape(text if figure.source == "measured" else f"{text} ({figure.source})")


def _change(check: CheckResult, metric: str, was: float | None, is_now: float | None) -> str:
    if was is None or is_now is None:
        return "–"
    # Regressions are told against the lock they are judged by; main's may be another.
    outcomes = {r.metric: r.outcome for r in check.regressions} if check.main == check.lock else {}
    outcome = outcomes.get(metric, "")
    if outcome == "not compared":
        return "not compared"
    if METRICS[metric].dimension == "ratio":
        text = f"{(is_now - was) * 100:+.2f} points"
    elif was:
        text = f"{is_now / was - 1:+.1%}"
    else:
        return "from 0"
    if text.strip("+-") in ("0.0%", "0.00 points"):
        return "unchanged"
    return text + {"same": " (no regression)", "worse": " (worse)", "better": " (better)"}.get(outcome, "")
