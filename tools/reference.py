"""The reference pages of docs/, made from the code while mkdocs builds the site; nothing generated is committed.

mkdocs calls `on_files` (mkdocs.yml: hooks). A page is a function here that returns Markdown; what it says comes from
the parser, the table of spec keys, the registries, the data files and the docstrings, so it cannot be out of date.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowledge_base.types import Model, Plan, Workload


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to mkdocs' files; those of single techniques are found through the page of all."""
    from mkdocs.structure.files import File, InclusionLevel

    for name, page in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page()))
    for name, text in technique_pages().items():
        path = f"reference/techniques/{name}.md"
        files.append(File.generated(config, path, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
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
        "A budget's key is a metric, with `_p50` (the default), `_p95`, `_p99` or `_mean` behind it where the metric is sampled.\n",
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
    from knowledge_base.registry import techniques as registry

    entries = {name: module.TECHNIQUE for name, module in registry.all().items()}
    overview = [
        (f'<a id="{name}"></a>[`{name}`](techniques/{name}.md)', t.stage, t.family, inline(t.summary))
        for name, t in entries.items()
    ]
    return page(
        "Techniques", "`knowledge_base/techniques/`",
        "A plan holds at most one technique of a family and executes its steps in the order of the stages. Each has a page: "
        "what it does, its settings, what it needs and refuses, what it changes, what was published and what was measured.\n",
        table(("technique", "stage", "family", "what it does"), overview),
    )  # fmt: skip


def technique_pages() -> dict[str, str]:
    """Return a page for each technique there is, by name."""
    from benchmarks import techniques as measured
    from benchmarks.readme_tables import figures
    from knowledge_base.registry import techniques as registry

    kept = figures(measured.RESULTS)
    plans = _legal_plans()
    return {name: _technique(name, module, plans.get(name, []), kept) for name, module in registry.all().items()}


def _technique(
    name: str, module: ModuleType, plans: Sequence[tuple[Model, Sequence[Plan]]], kept: Mapping[str, Any]
) -> str:
    from knowledge_base import rules
    from knowledge_base.metrics import METRICS
    from knowledge_base.registry import engines as engine_registry

    t = module.TECHNIQUE
    offering = [e for e, engine in engine_registry.all().items() if t.needs <= engine.ENGINE.offers]
    about = rules.composition().about(name)
    does = {
        "in short": inline(t.summary), "stage, family": f"{t.stage}, {t.family}", "executes": codes(t.implements),
        "place in the survey": inline("; ".join(_place(m) for m in t.implements)),
        "saves": codes(METRICS[m].label for m in t.saves), "spends": codes(METRICS[m].label for m in t.spends),
        "output": "the unchanged model's, token for token" if t.lossless else "may differ from the unchanged model's",
        "sources": ", ".join(inline(s) for s in t.sources),
    }  # fmt: skip
    needs = {
        "engines": codes(offering) or "none here offers what it needs", "needs of an engine": codes(sorted(t.needs)),
        "provides for other steps": codes(sorted(t.provides)),
        "calibration text": "needed" if t.needs_calibration else "not needed", "Python modules": codes(t.modules),
        "composition rules": ", ".join(f"[{r.id}](../composition.md#{r.id})" for r in about),
    }  # fmt: skip
    knobs = [(code(knob), codes(choice.options), code(choice.default)) for knob, choice in t.knobs.items()]
    refusals = [f"- {inline(sentence)}" for sentence in _refusals(module)]
    return page(
        name, f"`knowledge_base/techniques/{name}.py`", docstring(module), facts(does),
        "## Settings\n", table(("knob", "may be", "when left out"), knobs) if knobs else "It has none.\n",
        "## What it needs\n", facts(needs),
        "## When it is refused\n", "\n".join(["In the words of its file, … for what depends on model and setting:\n", *refusals, ""]) if refusals else "No model and no setting is refused.\n",
        "## What it changes\n", _demands(name, plans),
        "## What was published\n", _published(module),
        "## What was measured\n", _measured(name, kept),
    )  # fmt: skip


def _refusals(module: ModuleType) -> list[str]:
    """Return the sentences with which a technique's file refuses, what is filled in left as dots."""
    found: dict[str, None] = {}
    for name in ("rejects", "legal"):
        if function := getattr(module, name, None):
            found |= dict.fromkeys(_returned(function))
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CandidateFailed":
            kind, text = node.args[:2]
            if isinstance(kind, ast.Constant) and kind.value == "unsupported":
                found |= dict.fromkeys(_sentences(text))
    return [sentence for sentence in found if sentence]


def _returned(function: Callable[..., Any]) -> list[str]:
    """Return the sentences a function of the techniques returns, its own and those of the functions it asks."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    scope = dict(vars(inspect.getmodule(function) or ast))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            scope |= {alias.asname or alias.name: _found(node.module, alias.name) for alias in node.names}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Return) and node.value is not None:
            found += _sentences(node.value)
        if isinstance(node, ast.Call):
            asked = _called(node.func, scope)
            if inspect.isfunction(asked) and asked is not function and asked.__name__.startswith("why"):
                found += _returned(asked)
    return found


def _found(module: str, name: str) -> Any:
    """Return what `from module import name` binds."""
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(f"{module}.{name}")


def _called(node: ast.expr, scope: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return scope.get(node.id)
    return getattr(_called(node.value, scope), node.attr, None) if isinstance(node, ast.Attribute) else None


def _sentences(node: ast.expr) -> list[str]:
    """Return the texts an expression may be."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
    if isinstance(node, ast.IfExp):
        return [*_sentences(node.body), *_sentences(node.orelse)]
    if isinstance(node, ast.BoolOp):
        return [sentence for value in node.values for sentence in _sentences(value)]
    return []


# Sizes as the models' config.json have them.
_DENSE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_SHAPES = {
    "a Llama of 8 B parameters": _DENSE,
    "a Llama of 1 B parameters, tied embeddings, float32": _DENSE | {
        "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "a Mixtral of 8 experts, 47 B parameters": _DENSE | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip


def _legal_plans() -> dict[str, list[tuple[Model, Workload, list[Plan]]]]:
    """Return some settings of each technique as legal plans, on each of the shapes it can be used on, and for what load."""
    from benchmarks import techniques as measured
    from cost_models.catalogue import find_machine
    from knowledge_base.registry import engines as engine_registry
    from knowledge_base.types import Workload
    from planner.reading import read_model
    from search.space import build_space

    found: dict[str, list[tuple[Model, Workload, list[Plan]]]] = {}
    alone = Workload(prompt_tokens=512, output_tokens=128, concurrency=32)
    loaded = Workload(prompt_tokens=512, output_tokens=128, requests_per_s=1.0, shared_prefix_tokens=256, turns=2)
    processor = dataclasses.replace(find_machine("epyc-9554:384GB"), disk_bytes_per_s=3e9)
    models = []
    for title, config in _SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            models.append(dataclasses.replace(read_model(str(path), weights="optional").model, name=title))
    models.append(
        read_model(str(Path(__file__).resolve().parents[1] / "models" / "tiny-lm")).model
    )  # the one with a draft beside it
    for machine, workload in ((processor, alone), (find_machine("h100-sxm"), alone), (processor, loaded)):
        for model in models:
            space = build_space(model, workload, machine, engine_names=engine_registry.names(), executable=False)
            for name, plans in measured.plans_of(space, space.refused)[0].items():
                if (machine, workload) == (processor, alone) or name not in found:
                    found.setdefault(name, []).append((model, dataclasses.replace(workload, concurrency=1), plans))
    return found


def _demands(name: str, plans: Sequence[tuple[Model, Workload, Sequence[Plan]]]) -> str:
    """Return what a technique makes of the demand of the first of the models on which it changes anything."""
    told = next(filter(None, (_demand(name, *found) for found in plans)), None)
    return told or "Nothing in what the models tried here ask of a machine.\n"


def _demand(name: str, model: Model, workload: Workload, plans: Sequence[Plan]) -> str | None:
    """Return as a table what a technique makes of a model's demand, from which everything is predicted; None: nothing."""
    from cost_models.demand import demand_chain
    from knowledge_base.types import Demand
    from planner.schemas import _remarks

    columns, told = {}, {}
    for plan in plans:
        number = next(i for i, step in enumerate(plan.steps) if step.technique == name)
        before, after = (demand for _, demand in demand_chain(plan, model, workload)[number : number + 2])
        setting = ", ".join(f"{k}={v}" for k, v in plan.steps[number].knobs.items()) or name
        columns[setting] = (before, after)
        told[setting] = "; ".join(after.because[len(before.because) :])
    beside = " + ".join(str(step) for step in plans[0].steps if step.technique != name)
    rows = []
    for field in (f.name for f in dataclasses.fields(Demand)):
        pairs = [(getattr(b, field), getattr(a, field)) for b, a in columns.values()]
        if isinstance(pairs[0][1], float | int | str) and any(b != a for b, a in pairs):
            changes = [_change(field, *pair) for pair in pairs]
            rows.append((code(field), inline(_remarks(Demand).get(field, "")), _amount(field, pairs[0][0]), *changes))
    if not rows:
        return None
    heads = ("demand", "meaning", "before", *(inline(setting) for setting in columns))
    of = f"Of what {inline(model.name)} asks of any machine ([what is predicted](../../concepts/predicting.md))"
    lines = [f"- {inline(setting)}: {inline(why)}" for setting, why in told.items() if why]
    return f"{of}{f', beside {code(beside)}' if beside else ''}:\n\n{table(heads, rows)}\n" + "\n".join([*lines, ""])


def _amount(field: str, value: Any) -> str:
    from knowledge_base import units

    if value is None or isinstance(value, str):
        return code(value or "none")
    return units.format(value, "bytes") if "bytes" in field else f"{value:.3g}"


def _change(field: str, before: Any, after: Any) -> str:
    if before == after:
        return "="
    if isinstance(before, float | int) and isinstance(after, float | int) and before:
        ratio = f"{after / before:.3g}"
        return "=" if ratio == "1" else f"×{ratio}"
    return _amount(field, after)


def _published(module: ModuleType) -> str:
    from knowledge_base.field import field

    known = field()
    rows = [
        (
            inline(e.model),
            inline(e.setting),
            inline(e.quantity),
            _number(e.baseline),
            _number(e.value),
            inline(e.source),
        )
        for e in getattr(module, "EVIDENCE", ())
    ]
    more = []
    for method in module.TECHNIQUE.implements:
        link = f"[{inline(known.method(method).name)}](../knowledge.md#{method})"
        if count := len(known.evidence_of(method)):
            more.append(f"Figures of {link} in the knowledge base: {count}, told by `leanplan explain {method}`.\n")
        else:
            more.append(f"No figure of {link} in the knowledge base.\n")
    heads = ("model", "setting", "quantity", "before", "after", "source")
    stand = "As their source gives them, for the source's model and setting:\n"
    return "\n".join([*([stand, table(heads, rows)] if rows else []), *more])


def _measured(name: str, kept: Mapping[str, Any]) -> str:
    """Return the rows of benchmarks/techniques.json that are of one technique."""
    from benchmarks import techniques as measured

    parts = []
    for model, found in kept.items():
        if name in found["rows"]:
            shown = measured.as_markdown(found, quality=measured.SUBJECTS[model].quality, only=name)
            note = f" ({inline(found['note'])})" if found["note"] else ""
            parts.append(f"On {inline(found['model'])}{note}, {inline(found['machine'])}, {found['date']}:\n\n{shown}")
        elif why := found["left_out"].get(name):
            parts.append(f"Not on {inline(found['model'])}: {inline(why)}.\n")
    here = f"On a machine of one's own: `leanplan explain {name}`, once a run has measured it.\n"
    return "\n".join([*(parts or ["Not by `benchmarks/techniques.py` yet.\n"]), here])


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
    parts += [
        "## Priors\n",
        docstring(efficiency),
        *(_data(n) for n in ("efficiencies.csv", "engine_overheads.csv", "engine_memory.csv", "host_links.csv")),
    ]
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


PAGES: dict[str, Callable[[], str]] = {
    "commands": commands, "spec": spec, "exit-codes": exit_codes, "metrics": metrics, "techniques": techniques,
    "composition": composition, "engines": engines, "cost-terms": cost_terms, "protocols": protocols,
    "solvers": solvers, "catalogue": catalogue, "knowledge": knowledge, "survey": survey, "papers": papers,
    "environment": environment, "files": files, "python": python, "accuracy": accuracy,
}  # fmt: skip
