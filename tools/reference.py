"""The reference pages of docs/, made from the code while mkdocs builds the site; nothing generated is committed.

mkdocs calls `on_files` (mkdocs.yml: hooks). A page is a function here that returns Markdown; what it says comes from
the parser, the table of spec keys, the registries, the data files and the docstrings, so it cannot be out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    return files


# ---------------------------------------------------------------- Markdown


def inline(text: str) -> str:
    """Return text of the code's as Markdown on one line: links are links, `code` stays code, the rest is literal."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(p if p.startswith("`") else _prose(p) for p in pieces).replace("|", "\\|")


def _prose(text: str) -> str:
    pieces = re.split(r"(https?://[^\s,;)\"]*[^\s,;)\".]|arXiv:\d{4}\.\d{4,5}|doi:[^\s,;)]*[^\s,;).])", text)
    return "".join(_link(p) if i % 2 else _literal(p) for i, p in enumerate(pieces))


def _link(text: str) -> str:
    if text.startswith("http"):
        host, *path = text.split("://")[1].rstrip("/").split("/")
        return f"[{_literal('/'.join([host, '…', path[-1]] if len(path) > 2 else [host, *path]))}]({text})"
    base = "https://arxiv.org/abs/" if text.startswith("arXiv:") else "https://doi.org/"
    return f"[{text}]({base}{text.partition(':')[2]})"


def _literal(text: str) -> str:
    return re.sub(r"([\\*_\[\]#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """Return text as inline code, or nothing where there is none."""
    return f"`{text}`" if str(text) else ""


def codes(texts: Iterable[object]) -> str:
    return ", ".join(code(t) for t in texts)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells are Markdown, made with `inline`, `code` or `codes`."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def facts(known: Mapping[str, str]) -> str:
    """Return a list of what is known; nothing for what is empty."""
    return "\n".join(f"- **{what}**: {text}" for what, text in known.items() if text) + "\n"


def docstring(thing: object) -> str:
    """Return a docstring: its plain paragraphs as prose, formulae, arguments and examples as they stand in the code."""
    parts: list[tuple[bool, str]] = []
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        literal = bool(re.search(r"^( |>>>)", paragraph, re.MULTILINE))
        if literal and parts and parts[-1][0]:
            paragraph = f"{parts.pop()[1]}\n\n{paragraph}"
        parts.append((literal, paragraph))
    return "\n".join(f"```text\n{text}\n```\n" if literal else f"{inline(text)}\n" for literal, text in parts)


def settings(of: Mapping[str, Any]) -> str:
    """Return dataclass values as a table: a row for each field, a column for each value's name."""
    fields = [f.name for f in dataclasses.fields(next(iter(of.values())))]
    return table(("", *of), [(name, *(code(getattr(value, name)) for value in of.values())) for name in fields])


def page(title: str, source: str, *parts: str) -> str:
    return "\n".join([f"# {title}\n", f"*Generated from {source}.*\n", *parts])


# ---------------------------------------------------------------- pages


def commands() -> str:
    from planner.cli import build_parser
    from planner.reports.check import formats

    parser = build_parser()
    shared = next(group for group in parser._action_groups if group.title == "global flags")
    parts = [
        "Every command takes `-h` and the global flags; each global flag is also an "
        "[environment variable](environment.md). What the exit codes mean: [exit codes](exit-codes.md).\n",
        "## Global flags\n",
        _arguments(shared._group_actions),
    ]
    for name, command in parser.verbs.items():
        own = [a for g in command._action_groups if g.title != "global flags" for a in g._group_actions]
        own = [a for a in own if not isinstance(a, argparse._HelpAction)]
        parts += [f"## leanplan {name}\n", inline(str(command.description)) + ".\n"]
        parts += [_arguments(own)] if own else []
        parts += [f"With `--json` it prints [this](files.md#{name}).\n"]
    rows = [(code(name.replace("_", "-")), inline(module.CHECK)) for name, module in formats.all().items()]
    parts += ["## Formats of leanplan check\n", table(("format", "what it is"), rows)]
    return page("Commands", "`planner.cli.build_parser`", *parts)


def _arguments(actions: Iterable[argparse.Action]) -> str:
    rows = []
    for action in actions:
        value = action.metavar or (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
        )
        if action.option_strings:
            takes = "" if action.nargs == 0 else f" {value}"
            name = codes(f"{flag}{takes}" for flag in action.option_strings)
        else:
            name = code(f"[{value}]" if action.nargs == "?" else value)
        rows.append((name.replace("|", "\\|"), inline((action.help or "") % vars(action))))
    return table(("argument", "meaning"), rows)


def spec() -> str:
    from knowledge_base.metrics import METRICS
    from planner import spec as specs

    keys = [(code(name), inline(about), inline(words), inline(absent)) for name, about, words, absent in specs.rows()]
    limits = [
        (code(m.label), "max" if m.better == "lower" else "min", code(specs.example_limit(m)), inline(m.summary))
        for m in METRICS.values()
    ]
    return page(
        "Spec", "`planner.spec`",
        "What the words mean: [budgets, units, verdicts](../concepts/budgets.md). The JSON Schema is printed by "
        "`leanplan schema`.\n",
        "## Keys\n", table(("key", "meaning", "may be", "when left out"), keys),
        "## Budgets\n",
        "A budget's key is a metric, with `_p50` (the default), `_p95` or `_mean` behind it where the metric is sampled.\n",
        table(("metric", "limit", "for example", "meaning"), limits),
        "## The commented spec\n", "`leanplan init` writes this:\n",
        f"```yaml\n{specs.template('models/tiny-lm')}```\n",
    )  # fmt: skip


def exit_codes() -> str:
    from knowledge_base.errors import EXIT_CODE_MEANING, FAILURE_KINDS

    return page(
        "Exit codes and failures", "`knowledge_base.errors`",
        table(("code", "name", "meaning"), [(code(int(c)), code(c.name), inline(m)) for c, m in EXIT_CODE_MEANING.items()]),
        "`leanplan check --exit-zero` turns 1 and 5 into 0, never 2, 3 or 4.\n",
        "## Failures of a candidate\n",
        "A candidate that fails is a result with one of these kinds and a message, and never ends a run:\n",
        codes(FAILURE_KINDS) + ".\n",
    )  # fmt: skip


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


def techniques() -> str:
    from knowledge_base import rules
    from knowledge_base.metrics import METRICS
    from knowledge_base.registry import techniques as registry

    entries = {name: module.TECHNIQUE for name, module in registry.all().items()}
    overview = [(f"[`{name}`](#{name})", t.stage, t.family, inline(t.summary)) for name, t in entries.items()]
    parts = [
        "A plan holds at most one technique of a family and executes its steps in the order of the stages. `saves` and "
        "`spends` say which way a metric goes; by how much is predicted and then measured. Published figures stand as "
        "their source gives them, for the source's model and setting.\n",
        table(("technique", "stage", "family", "what it does"), overview),
    ]
    for name, t in entries.items():
        module = registry.get(name)
        knobs = "; ".join(f"`{k}`: {codes(c.options)} (default `{c.default}`)" for k, c in t.knobs.items())
        known = {
            "executes": codes(t.implements), "place in the survey": inline("; ".join(_place(m) for m in t.implements)),
            "stage, family": f"{t.stage}, {t.family}", "knobs": knobs or "none",
            "saves": codes(METRICS[m].label for m in t.saves), "spends": codes(METRICS[m].label for m in t.spends),
            "needs of an engine": codes(sorted(t.needs)), "provides": codes(sorted(t.provides)),
            "calibration text": "needed" if t.needs_calibration else "not needed",
            "output": "the unchanged model's, token for token" if t.lossless else "may differ from the unchanged model's",
            "Python modules": codes(t.modules), "sources": ", ".join(inline(s) for s in t.sources),
        }  # fmt: skip
        about = rules.composition().about(name)
        known["composition rules"] = ", ".join(f"[{r.id}](composition.md#{r.id})" for r in about)
        parts += [f"## {name}\n", docstring(module), facts(known)]
        if evidence := getattr(module, "EVIDENCE", ()):
            rows = [
                (inline(e.model), inline(e.setting), inline(e.quantity), _number(e.baseline), _number(e.value), inline(e.source))
                for e in evidence
            ]  # fmt: skip
            parts += [
                "Published figures:\n",
                table(("model", "setting", "quantity", "before", "after", "source"), rows),
            ]
    return page("Techniques", "`knowledge_base/techniques/`", *parts)


def _place(method: str) -> str:
    from knowledge_base.field import field

    return " / ".join(field().path(field().method(method).topic))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def composition() -> str:
    from knowledge_base import rules

    rows = [
        (f'<a id="{r.id}"></a>{r.id}', code(r.a), r.relation, code(r.b), code(r.condition), inline(r.effect), inline(r.source))
        for r in rules.load_rules()
    ]  # fmt: skip
    heads = ("rule", "a", "relation", "b", "condition", "effect", "source")
    return page(
        "How techniques compose", "`knowledge_base/rules.py` and its data", docstring(rules), table(heads, rows)
    )


def engines() -> str:
    from knowledge_base.registry import engines as registry

    parts = []
    for name, module in registry.all().items():
        e = module.ENGINE
        known = {
            "what it is": inline(e.summary), "computes on": codes(sorted(e.devices)), "offers": codes(sorted(e.offers)),
            "Python modules": codes(e.modules), "sources": ", ".join(inline(s) for s in e.sources),
        }  # fmt: skip
        parts += [f"## {name}\n", docstring(module), facts(known)]
    return page("Engines", "`knowledge_base/engines/`", *parts)


def cost_terms() -> str:
    from cost_models import calibrate, calibration, efficiency, roofline
    from cost_models.terms import in_order

    terms = in_order()
    entries = terms.items() if isinstance(terms, dict) else ((t.QUANTITY, t) for t in terms)
    parts = ["Each term after those it uses. How they are corrected: [what is predicted](../concepts/predicting.md).\n"]
    for name, term in entries:
        uses = f"Uses {codes(term.USES)}.\n" if term.USES else ""
        parts += [f"## {name}\n", docstring(term), docstring(term.predict), uses]
    parts += ["## The physics\n", docstring(roofline), *(docstring(f) for f in _functions(roofline))]
    parts += ["## Priors\n", docstring(efficiency), *(_data(n) for n in ("efficiencies.csv", "engine_overheads.csv"))]
    parts += ["## Corrections\n", docstring(calibration), docstring(calibrate), docstring(calibrate.conformal_quantile)]
    return page("Cost terms", "`cost_models/`", *parts)


def _functions(module: ModuleType) -> list[Callable[..., Any]]:
    return [
        f
        for name, f in vars(module).items()
        if inspect.isfunction(f) and f.__module__ == module.__name__ and not name.startswith("_") and f.__doc__
    ]


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
        *(f"### {f.__name__}\n\n{docstring(f)}" for f in _functions(statistics)),
    )  # fmt: skip


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


def environment() -> str:
    from planner.cli import GLOBAL_FLAGS
    from planner.isolation.environment import FIXED, PASSED_ON

    rows = [
        (code(f"LEANPLAN_{flag[2:].replace('-', '_').upper()}"), code(flag), inline(str(settings.get("help", ""))))
        for flag, settings in GLOBAL_FLAGS
    ]
    return page(
        "Environment variables", "`planner/cli/__init__.py` and `planner/isolation/environment.py`",
        "A flag wins over its variable. For flags without a value, `0`, `false` and nothing at all mean no. `NO_COLOR` with "
        "any value means no colour, unless `--color always`.\n",
        table(("variable", "flag", "meaning"), rows),
        "## What a candidate sees\n",
        f"Of the planner's environment a candidate gets {codes(PASSED_ON)} and nothing else; besides, these are set, and HOME "
        "and TMPDIR are a folder of its own:\n",
        table(("variable", "value"), [(code(k), code(v)) for k, v in FIXED.items()]),
    )  # fmt: skip


def files() -> str:
    from planner import run_folder, schemas
    from planner.cli import commands

    known = {name: schemas.schema(name) for name in schemas.names()}
    shared = {part: inner for schema in known.values() for part, inner in schema.get("$defs", {}).items()}
    parts = [
        "`leanplan schema --of NAME` prints the JSON Schemas that these tables are made from. A command that fails prints "
        "an [error](#error) with `--json`, and its exit code says so.\n",
        "## The run folder\n", docstring(run_folder),
    ]  # fmt: skip
    for title, names in (("What is written", schemas.WRITTEN), ("What commands print with --json", commands.names())):
        parts += [f"## {title}\n"]
        for name in names:
            told = "See [spec](spec.md)" if name == "spec" else _type(known[name] | {"title": ""})
            parts += [f"### {name}\n", f"{told}.\n"]
    parts += ["## Parts\n"]
    for part, schema in shared.items():
        parts += [f"### {part} part\n", inline(schema["description"]) + "\n", _fields(schema)]
    return page("Files and JSON", "`planner/run_folder.py`, `planner/schemas.py` and `planner/cli/`", *parts)


def _fields(schema: dict[str, Any]) -> str:
    must = schema.get("required", ())
    rows = [
        (code(field), _type(kind), "always" if field in must else "may be missing", inline(kind.get("description", "")))
        for field, kind in schema["properties"].items()
    ]
    return table(("field", "type", "there", "meaning"), rows)


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON Schema in words."""
    if title := schema.get("title"):
        return f"[{title.split()[-1]}](#{title.split()[-1]})"
    if part := schema.get("$ref"):
        name = part.rpartition("/")[2]
        return f"[{name}](#{name.lower()}-part)" if part.startswith("#") else _link(part)
    if "anyOf" in schema:
        return " or ".join(_type(s) for s in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(code(json.dumps(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"object: name to {_type(inner)}"
    if "properties" in schema:
        return "object: " + ", ".join(f"`{k}` {_type(v)}" for k, v in schema["properties"].items())
    return str(schema.get("type", "anything"))


def python() -> str:
    import planner

    parts = ["`from planner import ...`; names load on first use. Anything else may change without notice.\n"]
    for name in planner.__all__:
        thing = getattr(planner, name)
        parts += [f"## {name}\n"]
        if dataclasses.is_dataclass(thing):
            parts += [docstring(thing), f"Fields: {codes(f.name for f in dataclasses.fields(thing))}.\n"]
            parts += [
                f"`{method}`: {inline((inspect.getdoc(value) or '').splitlines()[0])}\n"
                for method, value in vars(thing).items()
                if not method.startswith("_") and (inspect.isfunction(value) or isinstance(value, property))
            ]
        elif inspect.isclass(thing):
            parts += [docstring(thing)]
        else:
            parts += [f"```text\n{name}{_signature(thing)}\n```\n", docstring(thing)]
    return page("Python", "`planner/__init__.py`", *parts)


def _signature(thing: Callable[..., Any]) -> str:
    """Return a signature with one parameter on each line."""
    shown = inspect.signature(thing)
    lines = [str(p) for p in shown.parameters.values()]
    by_name = [i for i, p in enumerate(shown.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if by_name:
        lines.insert(by_name[0], "*")
    return "(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {shown.return_annotation}"


def knowledge() -> str:
    from knowledge_base.field import field
    from knowledge_base.field.entries import RESOURCES
    from knowledge_base.field.matrix import matrix
    from knowledge_base.pictures import picture
    from planner.reports.knowledge.matrix import as_markdown

    known = field()
    parts = [as_markdown(matrix()) + "\n", "## What saves a resource, and at what price\n"]
    parts += [
        part
        for name in RESOURCES
        for part in (f"### {name.capitalize()}\n", f"<div>{picture(f'resource:{name}')}</div>\n")
    ]
    parts += ["## Every technique\n"]
    for topic in known.topics.values():
        methods = [m for m in known.methods.values() if m.topic == topic.id]
        if methods:
            read = f"Table 2 of the survey was read so: {inline(topic.note)}\n" if topic.effects and topic.note else ""
            lines = [
                f'- <a id="{m.id}"></a>**{inline(m.name)}** {code(m.id)}, {known.status(m.id)}. {inline(m.summary)} '
                f"{inline(', '.join(m.sources[:2]))}"
                for m in methods
            ]
            parts += [f"### {' / '.join(known.path(topic.id))}\n", read, "\n".join(lines) + "\n"]
    return page("Techniques of the field", "`knowledge_base/data/field/`", *parts)


def survey() -> str:
    from knowledge_base.field import field

    known = field()
    metrics = [
        (inline(m.name), m.section, m.unit, m.better, m.resource, inline(m.how), codes(m.leanplan) or inline(m.not_yet))
        for m in known.survey_metrics.values()
    ]
    benchmarks = [
        (inline(b.name), inline(b.what), inline(b.leanplan), inline(", ".join(b.sources)))
        for b in known.benchmarks.values()
    ]
    attention = [
        (inline(a.name), code(f"O({a.time})"), code(f"O({a.memory})"), inline(a.symbols), inline(a.source))
        for a in known.attention.values()
    ]
    challenges = [
        part
        for c in known.challenges.values()
        for part in (f"### {c.name}\n", inline(c.question) + "\n", facts({"what Leanplan does": inline(c.answer), "where": codes(c.files), "what is left": inline(c.left)}))
    ]  # fmt: skip
    return page(
        "Metrics, benchmarks and challenges of the survey", "`knowledge_base/data/field/`",
        "## Metrics (section 9.1)\n",
        table(("metric", "section", "unit", "better", "resource", "how it is measured", "in Leanplan"), metrics),
        "## Attention (Table 1)\n", table(("variant", "time", "memory", "symbols", "source"), attention),
        "## Benchmarks (section 9.2)\n", table(("benchmark", "what it does", "beside Leanplan", "sources"), benchmarks),
        "## Open challenges (section 10)\n", *challenges,
    )  # fmt: skip


def papers() -> str:
    from knowledge_base.field import field

    rows = [
        (
            str(p.year or ""),
            inline(p.title),
            inline(p.venue),
            inline(" ".join(p.links[:2])),
            codes(p.about) or inline(p.not_yet),
        )
        for p in sorted(field().papers.values(), key=lambda p: (-(p.year or 0), p.title.casefold()))
    ]
    return page(
        "Papers of the surveys", "`knowledge_base/data/field/papers.csv`",
        "Every title of the four surveys Leanplan was made from, once, with what it is about.\n",
        table(("year", "title", "venue", "links", "about"), rows),
    )  # fmt: skip


def accuracy() -> str:
    from benchmarks import prediction_error

    known = json.loads((prediction_error.HERE / "prediction_error.json").read_text(encoding="utf-8"))
    parts = [
        part
        for title in ("committed rows", "all rows")
        for part in (
            f"## {title.capitalize()}\n",
            f"{known[title]['rows']} measurements.\n",
            prediction_error.as_markdown(known[title]),
        )
    ]
    return page(
        "Errors of predictions", "`benchmarks/prediction_error.json`", docstring(prediction_error),
        "Committed rows are those under open licences; all rows are with those that may not be shipped. What is missed, and "
        "which term is to blame: `benchmarks/README.md`.\n",
        *parts,
    )  # fmt: skip


PAGES: dict[str, Callable[[], str]] = {
    "commands": commands, "spec": spec, "exit-codes": exit_codes, "metrics": metrics, "techniques": techniques,
    "composition": composition, "engines": engines, "cost-terms": cost_terms, "protocols": protocols,
    "solvers": solvers, "catalogue": catalogue, "knowledge": knowledge, "survey": survey, "papers": papers,
    "environment": environment, "files": files, "python": python, "accuracy": accuracy,
}  # fmt: skip
