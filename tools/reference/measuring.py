"""The pages of what is measured: metrics and units, which plans, and by which protocol and statistics."""

from __future__ import annotations

from tools.reference.markdown import code, codes, docstring, functions, inline, page, settings, table


def metrics() -> str:
    from knowledge_base.metrics import METRICS, STATISTICS
    from knowledge_base.units import DIMENSIONS

    parts = [
        "In a spec a metric goes by its label, in code and JSON by its name, which holds the unit. A sampled metric has "
        f"the statistics {codes(STATISTICS)}.\n"
    ]
    for resource in dict.fromkeys(m.resource for m in METRICS.values()):
        rows = [
            (code(m.label), code(m.name), m.better, "yes" if m.sampled else "no", m.dimension, inline(m.summary))
            for m in METRICS.values()
            if m.resource == resource
        ]
        parts += [
            f"## {resource.capitalize()}\n",
            table(("label", "name", "better", "sampled", "unit of", "meaning"), rows),
        ]
    units = [(name, inline(d.listed), codes(d.examples)) for name, d in DIMENSIONS.items()]
    parts += ["## Units\n", table(("unit of", "units", "for example"), units)]
    return page("Metrics and units", "`knowledge_base/metrics.py` and `knowledge_base/units.py`", *parts)


def solvers() -> str:
    from planner.machine import probes
    from search import choose, effort
    from search.solvers import registry

    return page(
        "Solvers and probes", "`search/` and `planner/probes/`",
        table(("solver", "what it does"), [(code(n), inline(m.SOLVER)) for n, m in registry.all().items()]),
        "## Effort\n", docstring(effort.Effort), settings(effort.EFFORTS),
        "## Which plans are measured\n", docstring(choose.choose),
        "## Probes\n", table(("probe", "what it finds"), [(code(n), inline(m.PROBE)) for n, m in probes.all().items()]),
    )  # fmt: skip


def protocols() -> str:
    from planner import measuring, statistics
    from planner.data import WINDOWS

    windows = [(code(n), code(count), code(tokens)) for n, (count, tokens) in WINDOWS.items()]
    return page(
        "Protocols and statistics", "`planner/measuring.py`, `planner/data.py` and `planner/statistics.py`",
        docstring(measuring.Protocol), settings(measuring.PROTOCOLS), docstring(measuring.interleave),
        "## Held-out windows\n", table(("effort", "windows", "tokens of each"), windows),
        "## Statistics\n", docstring(statistics),
        *(f"### {f.__name__}\n\n{docstring(f)}" for f in functions(statistics)),
    )  # fmt: skip
