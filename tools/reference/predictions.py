"""The pages of what is predicted: cost terms, the catalogue they read, and how far off they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tools.reference.markdown import codes, docstring, functions, inline, page, table


def cost_terms() -> str:
    from cost_models import calibrate, calibration, efficiency, roofline
    from cost_models.terms import in_order

    terms = in_order()
    entries = terms.items() if isinstance(terms, dict) else ((t.QUANTITY, t) for t in terms)
    parts = ["Each term after those it uses. How they are corrected: [what is predicted](../concepts/predicting.md).\n"]
    for name, term in entries:
        uses = f"Uses {codes(term.USES)}.\n" if term.USES else ""
        parts += [f"## {name}\n", docstring(term), docstring(term.predict), uses]
    parts += ["## The physics\n", docstring(roofline), *(docstring(f) for f in functions(roofline))]
    parts += [
        "## Priors\n",
        docstring(efficiency),
        *(_data(n) for n in ("efficiencies.csv", "engine_overheads.csv", "engine_memory.csv", "host_links.csv")),
    ]
    parts += ["## Corrections\n", docstring(calibration), docstring(calibrate), docstring(calibrate.conformal_quantile)]
    return page("Cost terms", "`cost_models/`", *parts)


def catalogue() -> str:
    return page(
        "Catalogue", "`knowledge_base/data/`",
        "Machines that are not here, prices and carbon intensities, each row with its source. `hardware: NAME` in a spec or "
        "`--on NAME` predicts for a machine; an empty cell is unknown and is never guessed.\n",
        "## Machines\n", "The file has more columns: rates of other data types, links between devices, idle power.\n",
        _data("devices.csv", ("name", "device", "memory_bytes", "memory_bytes_per_s", "bfloat16_flop_per_s", "tdp_w", "source")),
        "## Electricity prices\n", _data("electricity_prices.csv"),
        "## Carbon intensity\n", _data("grid_carbon.csv"),
    )  # fmt: skip


def _data(name: str, columns: Sequence[str] = ()) -> str:
    """Return a data file as a table: the columns named, else all that hold something."""
    from cost_models.efficiency import read_rows

    rows = read_rows(name)
    columns = columns or [c for c in rows[0] if any(row[c] for row in rows)]
    return f"`knowledge_base/data/{name}`\n\n" + table(columns, [[inline(row[c]) for c in columns] for row in rows])


def accuracy() -> str:
    from benchmarks import prediction_error
    from tools import error_tables

    home = prediction_error.HERE
    known, machine = (
        json.loads((home / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("prediction_error", "calibration_error")
    )
    parts = []
    for title in ("committed rows", "all rows"):
        missed = [tuple(map(inline, miss.cells)) for miss in error_tables.missed(known[title])]
        parts += [
            f"## {title.capitalize()}\n", f"{known[title]['rows']} measurements.\n",
            "### Targets missed, and the term to blame\n",
            table(error_tables.HEADS, missed) if missed else "None.\n",
            prediction_error.as_markdown(known[title]),
        ]  # fmt: skip
    heads = ("quantity", "n", *error_tables.MACHINE_KNOWS.values(), "target", "missed by", "term to blame")
    trained = ("figure", "n", "median error", "quartiles", "80 % intervals hold", "target", "missed by", "term to blame")  # fmt: skip
    return page(
        "Errors of predictions", "`benchmarks/prediction_error.json`", docstring(prediction_error),
        "Committed rows are those under open licences; all rows are with those that may not be shipped. More on what is "
        "missed: `benchmarks/README.md`.\n",
        *parts,
        "## This machine, after a calibration of a minute\n",
        "Median errors of `benchmarks/calibration_error.json`: random models of 20, 60 and 150 million parameters, never the "
        "one that is judged. The target is that of a calibration.\n",
        table(heads, error_tables.on_this_machine(machine)),
        "## Fine-tuning\n",
        "Published runs against what is predicted of them now (`benchmarks/training_error.py`).\n",
        table(trained, error_tables.of_finetuning()),
    )  # fmt: skip
