"""The nine screens, as data: what each asks and why, what it shows, and what a typed line does to the answers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput, LeanplanError
from knowledge_base.metrics import find_metric
from knowledge_base.types import Budget
from planner import spec as specs
from planner.forecast import Outlook
from planner.wizard.answers import Answers

SHOWN_MODELS = 6
PRESETS = {  # prompt tokens, output tokens, requests at once
    "chat": (512, 128, 1), "rag": (3072, 256, 1), "batch": (1024, 256, 8), "code": (2048, 128, 1), "edge": (128, 64, 1),
}  # fmt: skip
METRICS_SHOWN = (
    "ttft_p50", "tpot_p50", "latency_p50", "throughput_p50", "peak_memory", "artefact_size", "energy", "cost", "quality_loss",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All a screen may look at: the answers, what is predicted for them (or why nothing is), models found nearby."""

    answers: Answers
    outlook: Outlook | None = None
    problem: LeanplanError | None = None
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table to show; the first cell of a row is what one types to choose or change it."""

    rows: Sequence[tuple[str, ...]]
    headings: tuple[str, ...] = ()
    chosen: frozenset[int] = frozenset()  # rows that are the answer now


def _nothing(view: View) -> list[str]:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Screen:
    """One screen. `change` reads a typed line and returns the new answers, or raises BadInput."""

    name: str
    title: str
    why: str
    ask: str  # what may be typed, with an example
    more: str
    grid: Callable[[View], Grid]
    change: Callable[[View, str], Answers]
    remarks: Callable[[View], list[str]] = field(default=_nothing)
    words: tuple[str, ...] = ()  # offered by the Tab key


# ---------------------------------------------------------------- settings: screens whose rows are keys of the spec


def _setting_rows(view: View, keys: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return (word, value, what it is) for keys of the spec, as the spec's own table tells them."""
    written = specs.as_mapping(view.answers.parsed)
    rows = []
    about = {key: (meaning, absent) for key, meaning, _, absent in specs.rows()}
    for word, key in keys.items():
        value: Any = written
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        meaning, absent = about[key]
        rows.append((word, absent if value is None else _shown(value), meaning))
    return rows


def _shown(value: Any) -> str:
    return f"{value['p50']} (p95 {value['p95']})" if isinstance(value, dict) else str(value)


def _changed(view: View, text: str, keys: Mapping[str, str]) -> Answers:
    """Return the answers after a line such as `time 10 min`: a word of `keys` and a value, or `none`."""
    word, _, value = text.partition(" ")
    if word not in keys:
        raise _unknown(word, keys)
    if not value.strip():
        raise BadInput(f"`{word}` needs a value", hint=f"type for example `{word} {_example(keys[word])}`")
    return view.answers.with_key(keys[word], _value(value.strip()))


def _value(text: str) -> Any:
    if text in ("none", "default"):
        return None
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else text


def _example(key: str) -> str:
    choice = next(may_be for name, _, may_be, _ in specs.rows() if name == key)
    return choice.partition("e.g. ")[2].partition(",")[0] or {"workload.prompt_tokens": "2048"}.get(key, "8")


def _unknown(word: str, known: Sequence[str] | Mapping[str, Any]) -> BadInput:
    near = difflib.get_close_matches(word, list(known), n=1)
    guess = f"; did you mean `{near[0]}`?" if near else ""
    return BadInput(f"`{word}` is not known here{guess}", hint=f"type one of: {', '.join(known)}")


# ---------------------------------------------------------------- 1 goal

_GOALS = {
    "serve": "make the model cheaper to run: smaller, faster, within your budgets",
    "finetune": "adapt the model within budgets (not available yet)",
    "pretrain": "train the best model a budget allows (not available yet)",
    "advise": "just advise me: which resource binds, what helps; nothing is written or run",
}


def _goal_grid(view: View) -> Grid:
    now = "advise" if view.answers.then == "advise" else view.answers.spec["goal"]
    return Grid(rows=list(_GOALS.items()), chosen=frozenset(i for i, name in enumerate(_GOALS) if name == now))


def _goal_change(view: View, text: str) -> Answers:
    goal = _numbered(text, tuple(_GOALS))
    if goal not in _GOALS:
        raise _unknown(goal, _GOALS)
    if goal == "advise":
        return replace(view.answers.with_key("goal", "serve"), then="advise")
    return replace(view.answers.with_key("goal", goal), then="both")


def _numbered(text: str, options: Sequence[str]) -> str:
    """Return the option of that number, or the text itself."""
    return options[int(text) - 1] if re.fullmatch(r"[0-9]{1,3}", text) and 1 <= int(text) <= len(options) else text


# ---------------------------------------------------------------- 2 model


def local_models(folder: Path) -> tuple[str, ...]:
    """Return the model folders here and one or two levels below, as paths from here; those a spec can name."""
    found = [folder, *sorted(folder.glob("*")), *sorted(folder.glob("models/*"))]
    paths = [p.relative_to(folder).as_posix() for p in found if _is_model(p)]
    return tuple(path for path in paths if path.isprintable())


def _is_model(folder: Path) -> bool:
    try:
        return (folder / "config.json").is_file()
    except OSError:
        return False  # a folder we may not look into


def _model_grid(view: View) -> Grid:
    source = view.answers.spec["model"]["source"]
    names = list(view.models[:SHOWN_MODELS])
    names += [] if source in names else [source]
    return Grid(rows=[(str(i), name) for i, name in enumerate(names, 1)], chosen=frozenset({names.index(source)}))


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _model_change(view: View, text: str) -> Answers:
    source, _, revision = _numbered(text, view.models[:SHOWN_MODELS]).partition("@")
    if source.startswith("~"):
        source = str(Path(source).expanduser())
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise BadInput(
            f"{units.quote(source)} is neither a folder here nor a hub id",
            hint="type a folder with config.json, or an id such as org/name or org/name@commit",
        )
    return view.answers.with_key("model", {"source": source, **({"revision": revision} if revision else {})})


def _model_remarks(view: View) -> list[str]:
    """Return what config.json and the headers say of the model, and what is worth a warning."""
    if view.outlook is None:
        return []
    model = view.outlook.model
    experts = f", {model.experts_active} of {model.experts} experts at a time" if model.experts else ""
    return [
        f"{model.architecture}: {_parameters(model.params_total)} parameters{experts}, "
        f"{units.format(model.weight_bytes, 'bytes')} in {model.weight_dtype}",
        f"{model.layers} layers of width {model.hidden_size}, {model.heads} heads ({model.kv_heads} of keys and values); "
        f"context {model.max_context_tokens:,} tokens",
        *view.outlook.notes,
    ]


# ---------------------------------------------------------------- 3 machine

_MACHINE = {"price": "prices.machine", "electricity": "prices.electricity", "carbon": "prices.carbon"}


def _machine_grid(view: View) -> Grid:
    about = "local, a name of `leanplan ls machines`, or a profile file"
    return Grid(rows=[("machine", view.answers.parsed.hardware, about), *_setting_rows(view, _MACHINE)])


def _machine_change(view: View, text: str) -> Answers:
    word, _, rest = text.partition(" ")
    if word in _MACHINE:
        return _changed(view, text, _MACHINE)
    name = rest.strip() if word == "machine" and rest else text
    if name.endswith(".json") and not Path(name).is_file():
        raise BadInput(f"no profile {units.quote(name)}", hint="make one there: leanplan probe --json > machine.json")
    if name != "local" and not name.endswith(".json"):
        from cost_models.catalogue import find_machine

        find_machine(name)
    return view.answers.with_key("hardware", name)


def _machine_remarks(view: View) -> list[str]:
    if view.outlook is None:
        return []
    hardware = view.outlook.hardware
    device = hardware.device
    cores = f", {device.cores} cores" if device.cores else ""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in device.flop_per_s.items())
    lines = [
        f"{device.name}{cores}, {units.format(view.outlook.memory_bytes, 'bytes')} of memory read at "
        f"{device.memory_bytes_per_s / 1e9:,.0f} GB/s ({device.source})",
        f"arithmetic in Gflop/s: {rates}",
        f"energy counters: {', '.join(hardware.energy_counters) or 'none, so energy is modelled'}",
    ]
    if view.outlook.spec.hardware != "local":
        lines.append("not this machine: plans are predicted, none is measured")
    return [*lines, *view.outlook.notes]


# ---------------------------------------------------------------- 4 workload

_WORKLOAD = {
    "prompt": "workload.prompt_tokens",
    "output": "workload.output_tokens",
    "concurrency": "workload.concurrency",
}


def _workload_grid(view: View) -> Grid:
    workload = view.answers.parsed.workload
    now = (workload.prompt_tokens, workload.output_tokens, workload.concurrency)
    rows: list[tuple[str, ...]] = [
        (name, f"{prompt} + {output} tokens", f"{at_once} request{'s' if at_once > 1 else ''} at a time")
        for name, (prompt, output, at_once) in PRESETS.items()
    ]
    chosen = {i for i, preset in enumerate(PRESETS.values()) if preset == now}
    return Grid(rows=[*rows, ("", "", ""), *_setting_rows(view, _WORKLOAD)], chosen=frozenset(chosen))


def _workload_change(view: View, text: str) -> Answers:
    preset = PRESETS.get(_numbered(text, tuple(PRESETS)))
    if preset is None:
        if text.partition(" ")[0] not in _WORKLOAD:
            raise _unknown(text.partition(" ")[0], [*PRESETS, *_WORKLOAD])
        return _changed(view, text, _WORKLOAD)
    lengths = dict(zip(("prompt_tokens", "output_tokens", "concurrency"), preset))
    return view.answers.with_key("workload", lengths)


def is_default_workload(answers: Answers) -> bool:
    """Return whether nobody has chosen the workload yet."""
    return answers.spec["workload"] == _DEFAULT_WORKLOAD


def with_workload_within(answers: Answers, context_tokens: int) -> Answers:
    """Return the answers with a workload that a model of a short context can take."""
    lengths = {
        "prompt_tokens": max(1, context_tokens // 2),
        "output_tokens": max(1, context_tokens // 8),
        "concurrency": 1,
    }
    return answers.with_key("workload", lengths)


_DEFAULT_WORKLOAD = dict(zip(("prompt_tokens", "output_tokens", "concurrency"), PRESETS["chat"]))


# ---------------------------------------------------------------- 5 quality

_TEXTS = {"text": "quality.data", "calibration": "calibration.data"}
_BUNDLED = {"text": "heldout", "calibration": "calib"}


def _quality_grid(view: View) -> Grid:
    spec = view.answers.parsed
    loss = next((b for b in spec.budgets if b.metric == "quality_loss_ratio"), None)
    rows = [
        (
            "loss",
            f"at most {loss.text}" if loss else "any",
            "perplexity lost against the unchanged model, on held-out text",
        )
    ]
    text, calibration = _setting_rows(view, _TEXTS)
    if spec.calibration is None:
        calibration = (calibration[0], "none", "techniques that calibrate or recover are left out")
    return Grid(rows=[*rows, text, calibration])


def _quality_change(view: View, text: str) -> Answers:
    word, _, value = text.partition(" ")
    value = value.strip()
    if word not in ("loss", *_TEXTS):
        raise _unknown(word, ("loss", *_TEXTS))
    if not value:
        raise BadInput(f"`{word}` needs a value", hint="type for example `loss 2 %`, or `calibration bundled`")
    if word == "loss":
        limit = {"any": None, "none": {"max": "0 %"}}.get(value, {"max": value})
        return view.answers.with_key("budgets.quality_loss", limit)
    if value == "none" or (word, value) == ("text", "bundled"):
        return view.answers.with_key(_TEXTS[word] if word == "text" else "calibration", None)
    if value == "bundled":
        from planner.data import bundled

        value = str(bundled(_BUNDLED[word]))
    if not Path(value).expanduser().is_file():
        raise BadInput(f"{units.quote(value)} is not a file", hint="type the path of a text file, or `bundled`")
    return view.answers.with_key(_TEXTS[word], str(Path(value).expanduser()))


# ---------------------------------------------------------------- 6 budgets


def _budget_grid(view: View) -> Grid:
    budgets = {b.label: b for b in view.answers.parsed.budgets}
    rows: list[tuple[str, ...]] = []
    chosen = set()
    for label in dict.fromkeys((*METRICS_SHOWN, *budgets)):
        metric, _ = find_metric(label)
        budget, outlook = budgets.get(label), view.outlook
        limit = f"{'≤' if budget.bound == 'max' else '≥'} {budget.text}" if budget else "–"
        if budget:
            chosen.add(len(rows))
        if outlook is None or metric.name not in outlook.unchanged.values:
            rows.append((label, "?", limit, "?", ""))
            continue
        reach = outlook.reach(metric.name)
        rows.append(
            (
                label,
                units.format(outlook.unchanged.values[metric.name].mid, metric.dimension, digits=2),
                limit,
                units.format(reach.value, metric.dimension, digits=2) if reach else "nothing",
                light(outlook, budget) if budget else "",
            )
        )
    return Grid(headings=("metric", "unchanged", "your limit", "reachable", ""), rows=rows, chosen=frozenset(chosen))


def light(outlook: Outlook, budget: Budget) -> str:
    """Return ✓ where some plan is predicted to keep the budget beside the others, ? where only its interval tells, ✗."""
    limit, reach = outlook.limit(budget), outlook.reach(budget.metric)
    if limit is None or budget.metric not in outlook.priced.figures:
        return "?"
    if reach is None:
        return "✗"
    sign = 1 if budget.bound == "max" else -1
    ends = sorted(sign * end for end in (reach.low, reach.high))
    if ends[1] <= sign * limit:
        return "✓"
    return "?" if sign * reach.value <= sign * limit else "✗"


def _budget_change(view: View, text: str) -> Answers:
    label, _, value = text.replace("<=", " ").replace(">=", " ").replace(":", " ").partition(" ")
    if label not in specs.labels():
        raise _unknown(label, [*METRICS_SHOWN])
    metric, statistic = find_metric(label)
    bound = "max" if metric.better == "lower" else "min"
    label = Budget(metric=metric.name, statistic=statistic, bound=bound, value=0.0).label
    value, warn = re.subn(r"\s+warn$", "", " ".join(value.split()))
    value = value.removeprefix(f"{bound} ")
    if not value:
        raise BadInput(
            f"`{label}` needs a limit", hint=f"type `{label} {specs.example_limit(metric)}`, or `{label} none`"
        )
    if value == "none":
        return view.answers.with_key(f"budgets.{label}", None)
    if value == "tightest":
        value = _tightest(view, metric.name, label)
    limit: dict[str, Any] = {bound: value}
    if warn:
        limit["level"] = "warn"
    if metric.resource in ("energy", "money") and view.outlook and not view.outlook.hardware.energy_counters:
        limit["source"] = "any"  # nothing measures energy there: the modelled figure has to count
    return view.answers.with_key(f"budgets.{label}", limit)


def _tightest(view: View, metric: str, label: str) -> str:
    budget = Budget(metric=metric, statistic="mean", bound="max", value=0.0)
    found = view.outlook.tightest(budget) if view.outlook else None
    if found is None:
        raise BadInput(f"nothing is predicted for {label} beside the other limits", hint="loosen one of them first")
    return found


def contradictions(view: View) -> list[str]:
    """Return what cannot hold together, each with the tightest limit that could."""
    if view.outlook is None:
        return []
    lines = []
    for budget in view.outlook.contradictions():
        limit = f"{budget.label} {'≤' if budget.bound == 'max' else '≥'} {budget.text}"
        tightest = view.outlook.tightest(budget)
        why = "is out of reach" if budget in view.outlook.impossible else "clashes with your other limits"
        lines.append(f"✗ {limit} {why}" + (f"; tightest: `{budget.label} {tightest}`" if tightest else ""))
    if not lines and view.outlook.best is None:
        lines.append(f"✗ no plan is predicted to fit {units.format(view.outlook.memory_bytes, 'bytes')} of memory")
    return lines


# ---------------------------------------------------------------- 7 priorities


def _priority_grid(view: View) -> Grid:
    objectives = view.answers.parsed.objectives
    labels = list(dict.fromkeys((*METRICS_SHOWN, *objectives)))
    places = {label: f"{place}." for place, label in enumerate(objectives, 1)}
    rows = [(label, places.get(label, ""), find_metric(label)[0].summary.partition(":")[0]) for label in labels]
    return Grid(rows=rows, chosen=frozenset(i for i, label in enumerate(labels) if label in places))


def _priority_change(view: View, text: str) -> Answers:
    labels = [_numbered(word, METRICS_SHOWN) for word in re.split(r"[\s,]+", text) if word]
    for label in labels:
        if label not in specs.labels():
            raise _unknown(label, METRICS_SHOWN)
    return view.answers.with_key("objectives", labels)


# ---------------------------------------------------------------- 8 limits and consent

_LIMITS = {
    "effort": "search.effort", "time": "search.time_limit", "plans": "search.max_measured", "memory": "limits.memory",
    "candidate": "limits.time_per_candidate", "disk": "limits.disk",
}  # fmt: skip


def _limits_remarks(view: View) -> list[str]:
    search = view.answers.parsed.search
    if view.outlook is None:
        return []
    space = view.outlook.space
    lines = [f"engines found: {', '.join(space.options)}"]
    lines += [f"left out: {r.what}: {r.why}" for r in view.outlook.refused if r.kind == "engine"]
    if view.outlook.spec.hardware == "local":
        lines.append(
            f"will build and run at most {search.max_measured} of up to {space.count():,} plans on this machine, "
            f"within {units.format(search.time_limit_s, 'time')}"
        )
        lines.append("each in a process of its own; no network, no code of the model's own, no pickle files")
    return lines


# ---------------------------------------------------------------- 9 review

_THEN = {
    "both": "write the file and run it now",
    "save": "write the file only",
    "run": "run it now, write no file",
}


def _review_grid(view: View) -> Grid:
    rows: list[tuple[str, ...]] = list(_THEN.items())
    there = " (there already: you will be asked)" if Path(view.answers.file).exists() else ""
    return Grid(
        rows=[*rows, ("file", view.answers.file + there)],
        chosen=frozenset(i for i, name in enumerate(_THEN) if name == view.answers.then),
    )


def _review_change(view: View, text: str) -> Answers:
    word, _, value = text.partition(" ")
    if word == "file" and value.strip():
        if Path(value.strip()).suffix not in (".yaml", ".yml"):
            raise BadInput("a spec file's name ends in .yaml", hint="type for example `file leanplan.yaml`")
        if not Path(value.strip()).parent.is_dir():
            raise BadInput(f"no folder {units.quote(str(Path(value.strip()).parent))}", hint="name one that is there")
        return replace(view.answers, file=value.strip())
    word = _numbered(text, tuple(_THEN))
    if word not in _THEN:
        raise _unknown(word, [*_THEN, "file"])
    return replace(view.answers, then=word)


def as_yaml(answers: Answers) -> str:
    """Return the spec as it is written: what was answered, and nothing that is a default anyway."""
    from planner import _yaml

    return _yaml.write_yaml(dict(answers.spec))


# ---------------------------------------------------------------- all of them

SCREENS: tuple[Screen, ...] = (
    Screen(
        name="goal", title="What is it for?",
        why="The goal decides which techniques can help and what is measured.",
        ask="a word or its number", grid=_goal_grid, change=_goal_change, words=tuple(_GOALS),
        more="Leanplan takes a model as it is and looks for compositions of techniques (quantisation, pruning, faster "
        "engines ...) that keep to your budgets. `advise` ends after the fourth screen with what is predicted.",
    ),
    Screen(
        name="model", title="Which model?",
        why="Its shapes decide what it costs; only config.json and the headers of its weights are read.",
        ask="a number, a folder, or a hub id such as org/name", grid=_model_grid, change=_model_change,
        remarks=_model_remarks,
        more="A folder holds config.json, *.safetensors and tokenizer.json. A hub id is fetched when it is needed; "
        "`org/name@commit` pins it. A model that brings its own code, or weights as pickle files, is refused unless "
        "leanplan was started with --trust-remote-code or --allow-pickle.",
    ),
    Screen(
        name="machine", title="Which machine will it run on?",
        why="Memory, bandwidth and arithmetic decide what is fast there.",
        ask="`local`, a name such as h100-sxm, a profile, or e.g. `price $0.35/h`", grid=_machine_grid, change=_machine_change,
        remarks=_machine_remarks, words=("local", "price", "electricity", "carbon"),
        more="On this machine plans are measured; on any other they are predicted. `leanplan ls machines` lists the "
        "catalogue; `leanplan probe --json > machine.json` makes a profile there. Prices turn time and energy into money "
        "and carbon.",
    ),
    Screen(
        name="workload", title="What will it be asked to do?",
        why="Long prompts cost arithmetic, long answers cost memory bandwidth, many requests cost both.",
        ask="a preset, or e.g. `prompt 2048`", grid=_workload_grid, change=_workload_change,
        words=(*PRESETS, *_WORKLOAD),
        more="Lengths are counted in tokens, about four letters each. Requests at a time are served back to back unless a "
        "plan batches them.",
    ),
    Screen(
        name="quality", title="How much quality may it lose?",
        why="Every compression loses something; it is measured on text the model was not tuned on.",
        ask="e.g. `loss 2 %`, `loss any`, `text FILE`, `calibration FILE` or `calibration bundled`",
        grid=_quality_grid, change=_quality_change, words=("loss", "text", "calibration", "bundled"),
        more="The loss is perplexity against the unchanged model's, less one. The bundled held-out text is source code of "
        "the Python library: give text of your own domain if that is not what the model writes. Calibration text lets "
        "more techniques take part; it must not overlap the held-out text.",
    ),
    Screen(
        name="budgets", title="What must hold?",
        why="Only what you type becomes a budget; a plan has to keep all of them.",
        ask="e.g. `ttft_p95 200 ms`, `tpot 0.5x baseline`, `tpot tightest`, `tpot none`",
        grid=_budget_grid, change=_budget_change, remarks=contradictions, words=tuple(specs.labels()),
        more="`reachable` is the best predicted figure of any plan that keeps your other limits. ✓ predicted to hold, "
        "? too close to tell before measuring, ✗ beyond every plan. Add `warn` to a limit that should only warn. "
        "Statistics: ttft_p95, ttft_mean. `leanplan ls metrics` explains every metric.",
    ),
    Screen(
        name="priorities", title="What should it be best at?",
        why="Among plans that keep the budgets, these decide; the first counts most.",
        ask="up to three names or numbers, e.g. `tpot_p50 energy`", grid=_priority_grid, change=_priority_change,
        words=METRICS_SHOWN,
        more="The answer is a Pareto set of these objectives: no member can be better at one without being worse at "
        "another. The recommended plan is best at the first; near-ties are settled by the next.",
    ),
    Screen(
        name="limits", title="What may the search use?",
        why="Plans are really built and run here: this is what they may take.",
        ask="e.g. `effort thorough`, `time 20 min`, `plans 16`, `memory 8 GiB`",
        grid=lambda view: Grid(rows=_setting_rows(view, _LIMITS)),
        change=lambda view, text: _changed(view, text, _LIMITS), remarks=_limits_remarks, words=tuple(_LIMITS),
        more="`time` and `plans` follow from `effort` unless you give them. A candidate that exceeds its memory, time or disk "
        "is stopped and recorded; the search goes on. Ctrl-C during the run loses nothing.",
    ),
    Screen(
        name="review", title="Is this right?",
        why="This is the spec; the same file works in CI and from Python.",
        ask="`both`, `save`, `run`, or `file NAME`", grid=_review_grid, change=_review_change, words=(*_THEN, "file"),
        remarks=lambda view: [*as_yaml(view.answers).splitlines(), "", *contradictions(view)],
        more="`leanplan plan FILE` runs it at any time, `leanplan check FILE` judges it in CI, "
        "`leanplan help spec` explains every key. `b` goes back to change an answer.",
    ),
)  # fmt: skip


def asked(answers: Answers) -> tuple[Screen, ...]:
    """Return the screens these answers lead through: advice needs no budgets."""
    return SCREENS[:4] if answers.then == "advise" else SCREENS


def defaults(models: Sequence[str]) -> Answers:
    """Return the answers before anything was said: what was found here, and modest limits."""
    from planner.cli.init import EXAMPLE_MODEL

    return Answers(
        spec={
            "version": 1,
            "goal": "serve",
            "model": {"source": models[0] if models else EXAMPLE_MODEL},
            "hardware": "local",
            "workload": dict(_DEFAULT_WORKLOAD),
            "budgets": {"quality_loss": {"max": "5 %"}},
            "objectives": list(specs.DEFAULT_OBJECTIVES),
            "search": {"effort": "quick"},
        }
    )


def place_of(problem: LeanplanError) -> str:
    """Return the screen on which a problem of the outlook is mended."""
    return {"workload": "workload", "hardware": "machine"}.get((problem.where or "").partition(".")[0], "model")
