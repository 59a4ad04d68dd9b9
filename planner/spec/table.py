"""The one table of keys: the parser, the JSON Schema, the template and `leanplan help spec` are made from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from knowledge_base import registry, units
from knowledge_base.types import Trace, Workload
from planner._kinds import NAME, Choice, Entry, FilePath, Key, ListOf, Number, Quantity, Section, Text, Whole
from planner._owning import BOUGHT_KEY
from planner._yaml import Node
from planner.spec.kinds import HOURLY, TEXT_FILE, BudgetsKind, BudgetsRead, LengthKind, ObjectiveKind
from planner.spec.values import (
    DEFAULT_OBJECTIVES,
    DEFAULT_WORKLOAD,
    EFFORT_MEASURED,
    EFFORT_TIME_S,
    MOST_OBJECTIVES,
    Check,
    Limits,
    ModelRef,
    Prices,
    SearchEffort,
    Spec,
    TechniqueFilter,
    TextData,
)


def _gather_workload(values: dict[str, Any], node: Node) -> dict[str, Any]:
    given = dict(node.content) if node.type == "mapping" else {}
    prompt, prompt_p95 = values.pop("prompt_tokens")
    output, output_p95 = values.pop("output_tokens")
    if values["trace"] is not None:
        # Its lengths and rate take the places of the defaults when it is read: planner/spec/__init__.py.
        values["trace"] = Trace(file=str(values["trace"]), replayed=values["requests_per_s"] is None)
    if values["shared_prefix_tokens"] >= prompt and values["trace"] is None:
        raise given["shared_prefix"].error(
            f"workload.shared_prefix ({values['shared_prefix_tokens']}) is not below workload.prompt_tokens ({prompt})",
            hint="it is the part of each prompt that all prompts begin with",
        )
    return {
        **values, "prompt_tokens": prompt, "prompt_tokens_p95": prompt_p95,
        "output_tokens": output, "output_tokens_p95": output_p95,
    }  # fmt: skip


def _spread_workload(workload: Workload) -> dict[str, Any]:
    load = {"concurrency": workload.concurrency, "requests_per_s": workload.requests_per_s}
    if trace := workload.trace:
        nothing = dict.fromkeys(("prompt_tokens", "output_tokens", "shared_prefix_tokens", "turns"))
        rate = None if trace.replayed else workload.requests_per_s
        return {**nothing, **load, "requests_per_s": rate, "trace": Path(trace.file)}
    return {
        **load, "prompt_tokens": (workload.prompt_tokens, workload.prompt_tokens_p95),
        "output_tokens": (workload.output_tokens, workload.output_tokens_p95),
        "shared_prefix_tokens": workload.shared_prefix_tokens or None, "turns": workload.turns if workload.turns > 1 else None,
        "trace": None,
    }  # fmt: skip


def _gather_techniques(values: dict[str, Any], node: Node) -> dict[str, Any]:
    if both := sorted(set(values["only"]) & set(values["without"])):
        raise node.error(f"{', '.join(both)}: both in only and in without", hint="keep it in one of the two")
    return values


def _gather_model(values: dict[str, Any], node: Node) -> dict[str, Any]:
    source = values["source"]
    child = node.content["source"] if node.type == "mapping" else node
    if "://" in source or source.startswith("-") or source != source.strip():
        raise child.error(
            f"{units.quote(source)} is not a model folder or hub id",
            hint="give a folder with config.json, or an id like org/name",
        )
    return values


def _gather_spec(values: dict[str, Any], node: Node) -> dict[str, Any]:
    read: BudgetsRead = values["budgets"]
    if read.usd_per_h:
        price, at = read.usd_per_h
        if values["prices"].usd_per_h not in (None, price):
            raise at.error("another hourly price than prices.machine", hint="keep one of the two")
        values["prices"] = replace(values["prices"], usd_per_h=price)
    if read.heldout:
        path, at = read.heldout
        if values["quality"].data not in (None, path):
            raise at.error("another held-out text than quality.data", hint="keep one of the two")
        values["quality"] = replace(values["quality"], data=path)
    if values["objectives"] is None:
        if not any(budget.level != "off" for budget in read.budgets):
            raise node.error(
                "nothing to decide: the spec has no budgets and no objectives",
                hint="give at least one budget, e.g. budgets: {peak_memory: 2 GiB}, or objectives: [tpot_p50]",
            )
        values["objectives"] = DEFAULT_OBJECTIVES
    return {**values, "budgets": read.budgets}


def _solver_names() -> tuple[str, ...]:
    from search.solvers import registry as solvers

    return ("auto", *solvers.names())


_ENGINE = Entry("engine", registry.engines.names)
_TECHNIQUE = Entry("technique", registry.techniques.names)
_LATER = {goal: f"{goal} is planned, but not available yet" for goal in ("finetune", "pretrain")}

MODEL = Section(
    ModelRef,
    (
        Key("source", Text("a folder, or a hub id such as org/name"), "the model", example="models/tiny-lm"),
        Key(
            "revision",
            Text("40 hex digits", shape="^[0-9a-fA-F]{40}$"),
            "commit of the hub repository",
            absent="the newest",
            example="0123456789abcdef0123456789abcdef01234567",
        ),
    ),
    shorthand="source",
    gather=_gather_model,
)
DRAFT = replace(
    MODEL,
    keys=(
        replace(MODEL.key("source"), about="a smaller model of the same tokenizer", example="models/tiny-lm-draft"),
        MODEL.key("revision"),
    ),
)
WORKLOAD = Section(
    Workload,
    (
        Key("prompt_tokens", LengthKind(), "tokens of a prompt", default=(DEFAULT_WORKLOAD.prompt_tokens, None)),
        Key(
            "output_tokens",
            LengthKind(),
            "tokens generated for each request",
            default=(DEFAULT_WORKLOAD.output_tokens, None),
        ),
        Key("concurrency", Whole(most=4096), "requests served at once"),
        Key(
            "arrival_rate",
            Quantity("requests"),
            "requests that arrive",
            attribute="requests_per_s",
            absent="back to back",
        ),
        Key(
            "shared_prefix",
            Whole(least=0),
            "tokens that all prompts begin with, a part of prompt_tokens",
            attribute="shared_prefix_tokens",
            absent="none",
            example="256",
        ),
        Key("turns", Whole(most=1000), "requests of a conversation, each with all before it in its prompt"),
        Key(
            "trace",
            FilePath("the path of a trace: CSV or JSON lines with timestamp, prompt_tokens, output_tokens"),
            "a file of requests, replayed at its times; with arrival_rate only its lengths are taken",
            absent="none",
            example="requests.csv",
        ),
    ),
    gather=_gather_workload,
    spread=_spread_workload,
)
QUALITY = Section(
    TextData,
    (
        Key(
            "data",
            TEXT_FILE,
            "held-out text that quality is measured on, or `bundled`",
            absent="text that ships with leanplan",
            example="heldout.txt",
        ),
    ),
)
CALIBRATION = Section(
    TextData,
    (
        Key(
            "data",
            TEXT_FILE,
            "text for calibration and recovery, or `bundled`; must not overlap the held-out text",
            required=True,
            example="calib.txt",
        ),
        Key("samples", Whole(most=100_000), "windows of it to use", absent="64", example="64"),
    ),
    shorthand="data",
)
TECHNIQUES = Section(
    TechniqueFilter,
    (
        Key("only", ListOf(_TECHNIQUE), "use these alone", absent="all", example="[weight_int8, weight_int4]"),
        Key("without", ListOf(_TECHNIQUE), "do not use these", absent="none", example="[torch_compile]"),
    ),
    gather=_gather_techniques,
)
SEARCH = Section(
    SearchEffort,
    (
        Key("effort", Choice(tuple(EFFORT_TIME_S)), "how hard to try"),
        Key("time_limit", Quantity("time"), "wall time of search and measurements", attribute="time_limit_s", example="10 min",
            absent="by effort: " + ", ".join(f"{e} {units.format(s, 'time')}" for e, s in EFFORT_TIME_S.items())),
        Key("max_measured", Whole(most=100_000), "plans to measure at most", example="12",
            absent="by effort: " + ", ".join(f"{e} {n}" for e, n in EFFORT_MEASURED.items())),
        Key("max_steps", Whole(most=100), "techniques that one plan may use at most", absent="any number", example="1"),
        Key("seed", Whole(least=0), "seed of every random choice"),
        Key("solver", Entry("solver", _solver_names), "how plans are proposed"),
    ),
)  # fmt: skip
LIMITS = Section(
    Limits,
    (
        Key(
            "memory",
            Quantity("bytes", whole=True),
            "memory of one candidate",
            attribute="memory_bytes",
            absent="all this machine allows",
        ),
        Key("time_per_candidate", Quantity("time"), "wall time of one candidate", attribute="time_per_candidate_s"),
        Key("disk", Quantity("bytes", whole=True), "what one candidate may write", attribute="disk_bytes"),
    ),
)
CHECK = Section(
    Check,
    (
        Key(
            "regression",
            Quantity("ratio"),
            "how much worse than the lock file is still no regression",
            attribute="regression_ratio",
        ),
        Key("runs", Whole(most=10_000), "interleaved repetitions to judge by"),
        Key("against", FilePath("a file beside or below the spec", inside=True), "the committed lock file"),
    ),
)
PRICES = Section(
    Prices,
    (
        Key(
            "machine",
            HOURLY,
            "price of the machine: its rent, or where it was bought the room it stands in",
            attribute="usd_per_h",
            absent="the catalogue's",
        ),
        BOUGHT_KEY,
        Key(
            "electricity",
            Quantity("price_per_kwh"),
            "price of electricity",
            attribute="electricity_usd_per_kwh",
            absent="the catalogue's",
        ),
        Key(
            "carbon",
            Quantity("carbon_per_kwh"),
            "carbon intensity of the grid",
            attribute="grid_gco2e_per_kwh",
            absent="the catalogue's",
        ),
        Key(
            "pue",
            Number(1, 10),
            "power usage effectiveness of the building: total energy / computing energy",
            absent="the catalogue's",
            example="1.2",
        ),
    ),
)
SPEC = Section(
    Spec,
    (
        Key("version", Whole(most=1), "version of this format"),
        Key("name", NAME, "what to call this in reports", absent="none", example="my-plan"),
        Key("goal", Choice(("serve",), refused=_LATER), "what the model is for"),
        Key("model", MODEL, "the model to fit", example="models/tiny-lm"),
        Key("draft", DRAFT, "a model that drafts for it, whose guesses it checks several at once",
            absent="the folder NAME-draft beside the model's, if there is one"),
        Key("hardware", Text("local, a machine file, or a name of `leanplan ls machines`"),
            "the machine; anything but local is predicted, not measured"),
        Key("workload", WORKLOAD, "what the model is asked to do"),
        Key("budgets", BudgetsKind(), "limits that must hold", default=BudgetsRead(), absent="none"),
        Key("objectives", ListOf(ObjectiveKind(), most=MOST_OBJECTIVES),
            "what to be best at, the most important first", default=None,
            absent=f"[{', '.join(DEFAULT_OBJECTIVES)}]", example=f"[{', '.join(DEFAULT_OBJECTIVES)}]"),
        Key("quality", QUALITY, "how quality is measured"),
        Key("calibration", CALIBRATION, "text for techniques that calibrate",
            absent="techniques that need it are left out"),
        Key("engines", ListOf(_ENGINE), "engines to consider", absent="all that run here",
            example="[transformers, llama_cpp]"),
        Key("techniques", TECHNIQUES, "techniques to consider", absent="all"),
        Key("search", SEARCH, "how hard to try"),
        Key("limits", LIMITS, "what one candidate may use"),
        Key("check", CHECK, "how `leanplan check` judges"),
        Key("prices", PRICES, "what running costs"),
    ),
    gather=_gather_spec,
)  # fmt: skip
