"""What a load showed, as a person reads it."""

from __future__ import annotations

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Figure, Workload
from planner.load.telling import PERCENTILES, Percentile, Seen
from planner.reports._table import MARKS

RATES = ("throughput_tokens_per_s", "requests_per_s", "goodput_requests_per_s", "peak_memory_bytes", "energy_j_per_token")  # fmt: skip


def as_text(service: str, workload: Workload, seen: Seen) -> str:
    """Return a load as text: what was asked, what became of it, percentiles, rates, remarks, verdicts."""
    from planner.cli.ls import table

    asked, facts = seen.requests, seen.protocol
    lines = [
        f"{service}: {in_words(workload, seen.scenario)}",
        f"{asked.counted} requests counted in {units.format(max(facts['counted_s'], 1e-9), 'time')}: {asked.answered} answered, "
        f"{asked.refused} refused, {asked.failed} failed" + ("; steady" if seen.steady else ""),
    ]
    rows = [
        {"measured": METRICS[name].label, **{p: _percentile(told[p], METRICS[name].dimension) for p in PERCENTILES}}
        for name, told in seen.percentiles.items()
    ]
    if rows:
        lines += ["", table(rows).rstrip()]
    rates = [f"{METRICS[name].label} {_figure(seen.figures[name], name)}" for name in RATES if name in seen.figures]
    if rates:
        lines += ["", *rates]
    if seen.remarks:
        lines += ["", *seen.remarks]
    if seen.verdicts:
        lines += ["", *(f"{MARKS[v.outcome]} {v.sentence}" for v in seen.verdicts)]
    return "\n".join(lines)


def in_words(workload: Workload, scenario: str) -> str:
    """Return a load in a sentence: `2 requests/s by chance; prompts of 512 tokens (p95 2048), answers of 128`."""
    rate = workload.requests_per_s
    how = {
        "arrivals": f"{units.format(rate, 'requests')} by chance" if rate else "",
        "trace": f"{workload.trace.requests:,} requests of {workload.trace.file} at their times"
        if workload.trace
        else "",
        "clients": f"{workload.concurrency} client{'s' if workload.concurrency > 1 else ''} at a time",
        "all at once": "all requests at once",
    }[scenario]
    prompts = _lengths(workload.prompt_tokens, workload.prompt_tokens_p95)
    told = (
        f"{how}; prompts of {prompts} tokens, answers of {_lengths(workload.output_tokens, workload.output_tokens_p95)}"
    )
    if workload.turns > 1:
        told += f"; {workload.turns} turns"
    if workload.shared_prefix_tokens:
        told += f"; the first {workload.shared_prefix_tokens} tokens of all prompts the same"
    return told


def _lengths(p50: int, p95: int | None) -> str:
    return f"{p50:,}" if p95 is None else f"{p50:,} (p95 {p95:,})"


def _percentile(told: Percentile, dimension: str) -> str:
    if told.value is None:
        return "not answered"
    low, high = ("?" if x is None else units.format(x, dimension) for x in (told.low, told.high))
    return f"{units.format(told.value, dimension)} [{low}, {high}]"


def _figure(figure: Figure, name: str) -> str:
    dimension = METRICS[name].dimension
    value, low, high = (units.format(x, dimension) for x in (figure.value, figure.low, figure.high))
    return value if low == high else f"{value} [{low}, {high}]"
