"""`leanplan ls runs|plans|techniques|engines|machines|metrics|solvers`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

HELP = "list runs, plans, techniques, engines, machines, metrics or solvers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=tuple(LISTS))


def run(options: argparse.Namespace) -> int:
    from planner.cli._talk import emit

    rows = LISTS[options.what](options)
    emit(options, rows, table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Return rows as aligned columns; a tab-separated table suits a pipe no better than this does."""
    if not rows:
        return "none"
    names = list(rows[0])
    cells = [[str(row[name]) if row[name] is not None else "" for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, *cells]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in lines)


def _runs(options: Any) -> list[dict[str, Any]]:
    from planner.finding import runs, runs_root

    return [
        {
            "run": e.name,
            "state": "finished" if e.finished else "unfinished (the same plan command resumes it)",
            "measured": e.plans,
        }
        for e in runs(runs_root(options))
    ]


def _plans(options: Any) -> list[dict[str, Any]]:
    from planner.finding import runs, runs_root
    from planner.reports._table import mark
    from planner.results import load

    rows = []
    for entry in runs(runs_root(options)):
        if entry.finished:
            answer = load(entry.path)
            rows += [
                {"id": r.plan.id, "": mark(r, answer), "plan": r.plan.words, "run": entry.name} for r in answer.results
            ]
    return rows


def _techniques(options: Any) -> list[dict[str, Any]]:
    from knowledge_base.metrics import METRICS
    from knowledge_base.registry import techniques

    def labels(names: tuple[str, ...]) -> str:
        return ", ".join(METRICS[n].label for n in names)

    return [
        {
            "technique": name,
            "stage": t.stage,
            "saves": labels(t.saves),
            "spends": labels(t.spends),
            "summary": t.summary,
        }
        for name, module in techniques.all().items()
        for t in [module.TECHNIQUE]
    ]


def _engines(options: Any) -> list[dict[str, Any]]:
    from knowledge_base.registry import engines

    return [
        {
            "engine": name,
            "state": module.find() or "ready",
            "offers": ", ".join(sorted(module.ENGINE.offers)),
            "summary": module.ENGINE.summary,
        }
        for name, module in engines.all().items()
    ]


def _machines(options: Any) -> list[dict[str, Any]]:
    from cost_models.efficiency import read_rows

    rows = [{"machine": "local", "kind": "", "memory": "", "bandwidth": "", "source": "leanplan probe"}]
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
            {
                "machine": row["name"],
                "kind": row["kind"],
                "memory": memory,
                "bandwidth": bandwidth,
                "source": row["source"].split(" ")[0],
            }
        )
    return rows


def _metrics(options: Any) -> list[dict[str, Any]]:
    from knowledge_base.metrics import METRICS

    return [
        {"metric": m.label, "name": m.name, "better": m.better, "resource": m.resource, "meaning": m.summary}
        for m in METRICS.values()
    ]


def _solvers(options: Any) -> list[dict[str, Any]]:
    from search.solvers import registry

    return [{"solver": name, "summary": module.SOLVER} for name, module in registry.all().items()]


LISTS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "runs": _runs, "plans": _plans, "techniques": _techniques, "engines": _engines, "machines": _machines,
    "metrics": _metrics, "solvers": _solvers,
}  # fmt: skip
