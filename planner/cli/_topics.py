"""The texts of `leanplan help TOPIC`, made from the code they describe."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def table(rows: Sequence[Sequence[str]], *, widths: Sequence[int]) -> str:
    """Return rows as aligned columns; the last one is wrapped to fit 100 columns."""
    import textwrap

    indent = sum(widths)
    lines = []
    for row in rows:
        first = "".join(cell.ljust(width - 1) + " " for cell, width in zip(row[:-1], widths))
        wrapped = textwrap.wrap(row[-1], max(30, 100 - indent)) or [""]
        lines += [(first + wrapped[0]).rstrip(), *(" " * indent + more for more in wrapped[1:])]
    return "\n".join(lines)


def exit_codes() -> str:
    from knowledge_base.errors import EXIT_CODE_MEANING

    rows = [(str(int(code)), meaning) for code, meaning in EXIT_CODE_MEANING.items()]
    return table(rows, widths=(6,)) + "\n\n--exit-zero of `leanplan check` turns 1 and 5 into 0, never 2, 3 or 4."


def units() -> str:
    from knowledge_base.metrics import METRICS
    from knowledge_base.units import DIMENSIONS

    rows = []
    for name, dimension in DIMENSIONS.items():
        used = ", ".join(m.label for m in METRICS.values() if m.dimension == name)
        examples = f"e.g. {', '.join(dimension.examples)}"
        rows.append((name, f"{dimension.listed} ({examples}){f'; for {used}' if used else ''}"))
    return (
        "A quantity is a number, an optional space and a unit: 8 GiB, 50 ms, 2 %, $0.10/1M tokens.\n"
        "Numbers use a point and no marks between thousands. A unit is never guessed.\n"
        "1 GB = 10^9 bytes, 1 GiB = 2^30 bytes. Prices are in US dollars: $5/h, or 5 USD/h.\n"
        "A limit told from the unchanged model's figure is written 0.8x baseline.\n\n" + table(rows, widths=(16,))
    )


def spec() -> str:
    from knowledge_base.metrics import METRICS
    from planner import spec as specs

    keys = [
        (name, f"{about}: {words} ({absent if absent == 'required' else f'default: {absent}'})")
        for name, about, words, absent in specs.rows()
    ]
    limits = [
        (
            m.label + (" *" if m.sampled else ""),
            f"{'max' if m.better == 'lower' else 'min'}: {specs.example_limit(m)}",
            m.summary,
        )
        for m in METRICS.values()
    ]
    return (
        "A spec is YAML, TOML with the same keys, or the table [tool.leanplan] of pyproject.toml; `-` reads YAML from\n"
        "standard input. Relative paths are told from the spec's folder. `model: PATH` and one budget are enough.\n\n"
        + table(keys, widths=(27,))
        + "\n\nBudgets are keyed by metric; * takes _p50 (the default), _p95, _p99 or _mean behind its name. A limit is a mapping\n"
        'with max or min, level (error: default, warn, "off") and source (measured: default; any: a modelled figure\n'
        "counts), or the value alone. cost takes `at`, an hourly price; quality metrics take `data`, held-out text.\n"
        "`0.8x baseline` is a limit told from the unchanged model's figure; quality_loss, agreement and kl_divergence\n"
        "are told from it anyway.\n\n"
        + table(limits, widths=(18, 28))
        + "\n\nA whole, commented spec is written by `leanplan init`; its JSON Schema by `leanplan schema`."
    )


def machine() -> str:
    from planner import machine_file

    return (
        "A machine is `local`, a name of `leanplan ls machines`, several of them (`4x rtx-4090`), or a file: what\n"
        "`leanplan probe --json` wrote, or a description in YAML or JSON:\n\n"
        + machine_file.EXAMPLE
        + "\nA figure is a text with its unit, or a plain number in the unit its key ends in. What is left out is unknown,\n"
        "never guessed; `leanplan validate FILE` says what cannot be predicted without it.\n\n"
        + table(machine_file.rows(), widths=(28,))
        + "\n\nIts JSON Schema: leanplan schema machine. To change or add rows of the catalogue, and what engines reach of a\n"
        "machine, lay a folder with devices.csv, efficiencies.csv or engine_overheads.csv over it: --knowledge FOLDER."
    )


def environment() -> str:
    from planner.cli import GLOBAL_FLAGS

    rows = [
        (f"LEANPLAN_{flag[2:].replace('-', '_').upper()}", flag, str(settings.get("help", "")))
        for flag, settings in GLOBAL_FLAGS
    ]
    rows.append(("NO_COLOR", "", "any value: no colour, unless --color always"))
    return (
        "Each global flag can be set in the environment; a flag wins over it. For flags without a value, 0, false and\n"
        "nothing at all mean no.\n\n" + table(rows, widths=(29, 22))
    )


def security() -> str:
    from planner._yaml import DEEPEST, LARGEST_BYTES

    return f"""\
A spec, a model folder and texts may come from somebody else. What leanplan does about it:

- A spec cannot name code: no import paths, no flag that lets a model run its own code. At most
  {LARGEST_BYTES // 1024} KiB and {DEEPEST} levels; no aliases, anchors, tags or keys given twice.
- A model that brings its own code is refused, unless the command line says --trust-remote-code ORG/NAME@SHA.
- Weights are read from safetensors; .bin files, which can hold code, only with --allow-pickle.
- Models are loaded in processes of their own, with limits on memory, time and disk, and without the planner's
  secrets in their environment. The planner reads sizes and shapes from headers and loads nothing itself.
- Names in a spec never become paths outside the run folder; `check.against` stays beside or below the spec.
- --offline makes any network access an error. Nothing is sent anywhere.
- Text from specs, models and libraries is shown, not obeyed: control characters are escaped, and anything shaped
  like a credential is left out."""


TOPICS: dict[str, Callable[[], str]] = {
    "exit-codes": exit_codes,
    "units": units,
    "spec": spec,
    "machine": machine,
    "environment": environment,
    "security": security,
}
