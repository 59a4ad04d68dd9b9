"""The spec: what to fit to which budgets, on which machine, and how hard to try.

One table (`SPEC`, at the end of the first half) describes every key. The parser, the JSON Schema, the template of
`leanplan init` and `leanplan help spec` are all made from it.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from knowledge_base import registry, units
from knowledge_base.errors import BadInput
from knowledge_base.metrics import METRICS, STATISTICS, Metric, find_metric
from knowledge_base.types import Budget, Workload
from planner import _yaml
from planner._kinds import (
    NAME,
    UNSET,
    Choice,
    Entry,
    FilePath,
    Key,
    Kind,
    ListOf,
    Number,
    Quantity,
    Section,
    Text,
    Whole,
    flow,
    in_place,
    unknown_key,
    wrong,
)
from planner._yaml import Node

_WORKLOAD = Workload(prompt_tokens=512, output_tokens=128)  # where a spec says nothing
DEFAULT_OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
MOST_OBJECTIVES = 3


# ---------------------------------------------------------------- the values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """A model as a spec names it: a folder (relative to the spec's) or a hub id; `revision` is a commit of the hub."""

    source: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextData:
    """A text file; `data` is joined to the spec's folder. None: the planner decides."""

    data: Path | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TechniqueFilter:
    """Which techniques a plan may use: only these, all but those."""

    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


# Wall time and number of measured plans of each effort, where the spec does not say.
_EFFORT_TIME_S = {"quick": 360.0, "normal": 1800.0, "thorough": 7200.0}
_EFFORT_MEASURED = {"quick": 10, "normal": 16, "thorough": 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEffort:
    """How long to search. A time limit or count left as None becomes that of the effort."""

    effort: str = "normal"
    time_limit_s: float = None  # type: ignore[assignment]
    max_measured: int = None  # type: ignore[assignment]
    seed: int = 0
    solver: str = "auto"

    def __post_init__(self) -> None:
        if self.time_limit_s is None:
            object.__setattr__(self, "time_limit_s", _EFFORT_TIME_S[self.effort])
        if self.max_measured is None:
            object.__setattr__(self, "max_measured", _EFFORT_MEASURED[self.effort])


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one candidate may use. Memory None: all the machine allows."""

    memory_bytes: int | None = None
    time_per_candidate_s: float = 600.0
    disk_bytes: int = 20 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How `leanplan check` compares with the committed lock file."""

    regression_ratio: float = 0.03
    runs: int = 9
    against: Path = Path("leanplan.lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What running costs. None: the catalogue's figure for the machine, where it has one."""

    usd_per_h: float | None = None
    electricity_usd_per_kwh: float | None = None
    grid_gco2e_per_kwh: float | None = None
    pue: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """A whole spec with every default filled in. Equal for the same spec from a file and from Python.

    `folder` is absolute once read; `model.source` and `check.against` are told from it, text files are joined to it.
    """

    version: int = 1
    name: str | None = None
    goal: str = "serve"
    model: ModelRef
    hardware: str = "local"
    workload: Workload = _WORKLOAD
    budgets: tuple[Budget, ...] = ()
    objectives: tuple[str, ...] = DEFAULT_OBJECTIVES
    quality: TextData = TextData()
    calibration: TextData | None = None
    engines: tuple[str, ...] | None = None
    techniques: TechniqueFilter = TechniqueFilter()
    search: SearchEffort = field(default_factory=SearchEffort)
    limits: Limits = Limits()
    check: Check = Check()
    prices: Prices = Prices()
    folder: Path = Path()

    def path(self, written: str | Path) -> Path:
        """Return a path of the spec joined to the spec's folder."""
        return self.folder / written


# ---------------------------------------------------------------- kinds only the spec has


@functools.cache
def labels() -> dict[str, tuple[Metric, str]]:
    """Return every way to name a metric in a spec: `ttft`, `ttft_p50`, `ttft_p95`, `peak_memory`, ..."""
    found = {}
    for metric in METRICS.values():
        for name in (metric.label, *(f"{metric.label}_{s}" for s in STATISTICS if metric.sampled)):
            found[name] = find_metric(name)
    return found


def _metric(node: Node, name: str, *, at_key: bool) -> tuple[Metric, str]:
    if name in labels():
        return labels()[name]
    near = difflib.get_close_matches(name, labels(), n=1)
    guess = f"; did you mean {units.quote(near[0])}?" if near else ""
    label, _, statistic = name.rpartition("_")
    if label in labels() and statistic in STATISTICS:
        raise node.error(f"{label} is one number, it has no {statistic}", hint=f"write {label}", at_key=at_key)
    known = ", ".join(f"{m.label}_p50" if m.sampled else m.label for m in METRICS.values())
    raise node.error(
        f"unknown metric {units.quote(name)}{guess}",
        hint=f"metrics: {known}; also _p95 and _mean for _p50 (leanplan ls metrics)",
        at_key=at_key,
    )


def _label(metric: Metric, statistic: str) -> str:
    return f"{metric.label}_{statistic}" if metric.sampled else metric.label


@dataclass(frozen=True)
class ObjectiveKind:
    """The name of a metric, with the statistic written out."""

    words: str = "a metric, e.g. tpot_p50"

    def read(self, node: Node) -> str:
        if node.type != "string":
            raise wrong(node, self)
        return _label(*_metric(node, node.content, at_key=False))

    def write(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(labels())}


_LENGTH = Whole()


@dataclass(frozen=True)
class PromptKind:
    """One prompt length, or its median and 95th percentile. The value is (p50, p95 or None)."""

    words: str = "a whole number, or {p50: 512, p95: 2048}"

    def read(self, node: Node) -> tuple[int, int | None]:
        if node.type != "mapping":
            return _LENGTH.read(node), None
        for name, child in node.content.items():
            if name not in ("p50", "p95"):
                raise unknown_key(child, ("p50", "p95"))
        if "p50" not in node.content or "p95" not in node.content:
            raise node.error(
                f"{node.name} needs both p50 and p95", hint="write {p50: 512, p95: 2048}, or one whole number"
            )
        p50, p95 = (_LENGTH.read(node.content[n]) for n in ("p50", "p95"))
        if p95 < p50:
            raise node.content["p95"].error(
                f"p95 ({p95}) is below p50 ({p50})", hint="p95 is the longer: exchange the two"
            )
        return p50, p95

    def write(self, value: tuple[int, int | None]) -> Any:
        p50, p95 = value
        return p50 if p95 is None else {"p50": p50, "p95": p95}

    def schema(self) -> dict[str, Any]:
        pair = {name: _LENGTH.schema() for name in ("p50", "p95")}
        mapping = {"type": "object", "properties": pair, "required": ["p50", "p95"], "additionalProperties": False}
        return {"anyOf": [_LENGTH.schema(), mapping]}


_RELATIVE = re.compile(rf"\s*({units.NUMBER})\s*x\s+baseline\s*")
_RELATIVE_SCHEMA = rf"^\s*(?=[0.]*[1-9]){units.NUMBER}\s*x\s+baseline\s*$"
_ALREADY_RELATIVE = ("quality_loss", "agreement", "kl_divergence")  # told against the unchanged model by definition


@dataclass(frozen=True)
class LimitKind:
    """A limit on one metric: a quantity, or `0.8x baseline`. The value is (number, relative)."""

    metric: Metric

    @property
    def relative(self) -> bool:
        return self.metric.label not in _ALREADY_RELATIVE

    @property
    def words(self) -> str:
        return Quantity(self.metric.dimension).words + (", or 0.8x baseline" if self.relative else "")

    def read(self, node: Node) -> tuple[float, bool]:
        field = ".".join(node.path[1:2]) or node.name
        if node.type == "string" and "baseline" in node.content:
            match = _RELATIVE.fullmatch(node.content)
            if not self.relative:
                raise node.error(
                    f"{self.metric.label} is told against the unchanged model already", hint=f"expected {self.words}"
                )
            if not match:
                raise node.error(f"{node.found} is not a share of the baseline", hint="write 0.8x baseline")
            return in_place(node, lambda: units.parse(match[1], "number", field=field)), True
        if node.type == "string" and "%" in node.content and self.metric.dimension != "ratio":
            raise node.error(
                f"{node.found} of what? {field} needs {Quantity(self.metric.dimension).words}",
                hint="a share of what the unchanged model needs is written 0.5x baseline",
            )
        return Quantity(self.metric.dimension).read(node, field), False

    def write(self, value: tuple[float, bool]) -> str:
        number, relative = value
        return f"{number!r}x baseline" if relative else units.exact(number, self.metric.dimension)

    def schema(self) -> dict[str, Any]:
        plain = Quantity(self.metric.dimension).schema()
        if not self.relative:
            return plain
        return {"anyOf": [*plain.get("anyOf", [plain]), {"type": "string", "pattern": _RELATIVE_SCHEMA}]}


def example_limit(metric: Metric) -> str:
    """Return a limit of a size such a metric has: `50 ms`."""
    likely = {"latency": "5 s", "build_time": "10 min", "agreement": "95 %", "kl_divergence": "0.05"}
    return likely.get(metric.label, units.DIMENSIONS[metric.dimension].examples[0])


_LEVEL = Choice(("error", "warn", "off"))
_SOURCE = Choice(("measured", "any"))
_TEXT_FILE = FilePath("the path of a text file")
_HOURLY = Quantity("price_per_hour")


@dataclass(frozen=True)
class BudgetsRead:
    """Budgets, and what may be written beside them for convenience: an hourly price, held-out text."""

    budgets: tuple[Budget, ...] = ()
    usd_per_h: tuple[float, Node] | None = None
    heldout: tuple[Path, Node] | None = None


@dataclass(frozen=True)
class BudgetsKind:
    """Limits by metric: `{ttft_p95: {max: 50 ms}}`, or `{ttft_p95: 50 ms}` for the limit on its bad side."""

    words: str = "a mapping from metrics to limits, e.g. ttft_p95: {max: 50 ms}"

    def keys(self, metric: Metric) -> dict[str, Kind]:
        """Return the keys the limits of a metric may have."""
        more: dict[str, Kind] = {"at": _HOURLY} if metric.label == "cost" else {}
        if metric.resource == "quality":
            more["data"] = _TEXT_FILE
        if metric.label == "quality_loss":
            more["metric"] = Choice(("perplexity",))
        return {"max": LimitKind(metric), "min": LimitKind(metric), "level": _LEVEL, "source": _SOURCE, **more}

    def read(self, node: Node) -> BudgetsRead:
        if node.type == "null":
            return BudgetsRead()
        if node.type != "mapping":
            raise wrong(node, self)
        budgets: list[Budget] = []
        lines: dict[str, Node] = {}
        price: tuple[float, Node] | None = None
        heldout: tuple[Path, Node] | None = None
        for name, child in node.content.items():
            metric, statistic = _metric(child, name, at_key=True)
            label = _label(metric, statistic)
            if before := lines.get(label):
                at = f" on line {before.line}" if before.line else ""
                raise child.error(
                    f"{name} is the same as {before.path[-1]}, given{at}", hint="keep one of the two", at_key=True
                )
            lines[label] = child
            budgets += self._limits(child, metric, statistic)
            if child.type == "mapping" and (at_node := child.content.get("at")):
                price = _HOURLY.read(at_node), at_node
            if child.type == "mapping" and (data := child.content.get("data")):
                path = _TEXT_FILE.read(data)
                if heldout and heldout[0] != path:
                    raise data.error(
                        f"held-out text is {units.quote(str(heldout[0]))} in another budget already",
                        hint="give it once: quality.data",
                    )
                heldout = path, data
        return BudgetsRead(tuple(budgets), price, heldout)

    def _limits(self, node: Node, metric: Metric, statistic: str) -> list[Budget]:
        good = "max" if metric.better == "lower" else "min"
        if node.type in ("string", "number"):
            value, relative = LimitKind(metric).read(node)
            text, line = str(node.content).strip(), node.line
            return [
                Budget(
                    metric=metric.name,
                    statistic=statistic,
                    bound=good,
                    value=value,
                    relative=relative,
                    text=text,
                    line=line,
                )
            ]
        example = f"{node.path[-1]}: {{{good}: {example_limit(metric)}}}"
        if node.type != "mapping":
            raise node.error(f"{node.path[-1]} needs a limit, got {node.found}", hint=f"write {example}")
        kinds = self.keys(metric)
        read: dict[str, Any] = {}
        for name, child in node.content.items():
            if name not in kinds:
                raise unknown_key(child, list(kinds))
            read[name] = kinds[name].read(child)
        bounds = {bound: read[bound] for bound in ("max", "min") if bound in read}
        if not bounds:
            raise node.error(f"{node.path[-1]} has neither max nor min", hint=f"write {example}")
        if len(bounds) == 2 and bounds["min"][1] == bounds["max"][1] and bounds["min"][0] > bounds["max"][0]:
            raise node.error(f"{node.path[-1]}: min is above max", hint="exchange the two, or keep one")
        return [
            Budget(
                metric=metric.name, statistic=statistic, bound=bound, value=value, relative=relative,
                level=read.get("level", "error"), source=read.get("source", "measured"),
                text=str(node.content[bound].content).strip(), line=node.line,
            )
            for bound, (value, relative) in bounds.items()
        ]  # fmt: skip

    def write(self, value: BudgetsRead) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for budget in value.budgets:
            entry = written.setdefault(budget.label, {})
            entry[budget.bound] = LimitKind(METRICS[budget.metric]).write((budget.value, budget.relative))
            entry |= {} if budget.level == "error" else {"level": budget.level}
            entry |= {} if budget.source == "measured" else {"source": budget.source}
        return written

    def schema(self) -> dict[str, Any]:
        properties = {}
        for name, (metric, _) in labels().items():
            kinds = self.keys(metric)
            mapping = {
                "type": "object", "properties": {key: kind.schema() for key, kind in kinds.items()},
                "additionalProperties": False, "anyOf": [{"required": ["max"]}, {"required": ["min"]}],
            }  # fmt: skip
            good = "max" if metric.better == "lower" else "min"
            properties[name] = {
                "description": f"{metric.summary}. Alone, a value is a {good}. {LimitKind(metric).words}",
                "anyOf": [LimitKind(metric).schema(), mapping],
            }
        return {"type": "object", "properties": properties, "additionalProperties": False}


# ---------------------------------------------------------------- how keys are checked against each other


def _gather_workload(values: dict[str, Any], node: Node) -> dict[str, Any]:
    p50, p95 = values.pop("prompt_tokens")
    return {**values, "prompt_tokens": p50, "prompt_tokens_p95": p95}


def _spread_workload(workload: Workload) -> dict[str, Any]:
    return {
        "prompt_tokens": (workload.prompt_tokens, workload.prompt_tokens_p95), "output_tokens": workload.output_tokens,
        "concurrency": workload.concurrency, "requests_per_s": workload.requests_per_s,
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


# ---------------------------------------------------------------- the table


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
WORKLOAD = Section(
    Workload,
    (
        Key("prompt_tokens", PromptKind(), "tokens of a prompt", default=(_WORKLOAD.prompt_tokens, None)),
        Key("output_tokens", Whole(), "tokens generated for each request", default=_WORKLOAD.output_tokens),
        Key("concurrency", Whole(most=4096), "requests served at once"),
        Key(
            "arrival_rate",
            Quantity("requests"),
            "requests that arrive",
            attribute="requests_per_s",
            absent="back to back",
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
            _TEXT_FILE,
            "held-out text that quality is measured on",
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
            _TEXT_FILE,
            "text for calibration and recovery; must not overlap the held-out text",
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
        Key("effort", Choice(tuple(_EFFORT_TIME_S)), "how hard to try"),
        Key("time_limit", Quantity("time"), "wall time of everything", attribute="time_limit_s", example="10 min",
            absent="by effort: " + ", ".join(f"{e} {units.format(s, 'time')}" for e, s in _EFFORT_TIME_S.items())),
        Key("max_measured", Whole(most=100_000), "plans to measure at most", example="12",
            absent="by effort: " + ", ".join(f"{e} {n}" for e, n in _EFFORT_MEASURED.items())),
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
        Key("machine", _HOURLY, "price of the machine", attribute="usd_per_h", absent="the catalogue's"),
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
        Key("hardware", Text("local, or a name of `leanplan ls machines`"),
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


# ---------------------------------------------------------------- in and out


def load(source: str | Path, *, stdin: BinaryIO | None = None) -> Spec:
    """Return the spec of a file (.yaml, .toml, pyproject.toml with [tool.leanplan]) or of standard input (`-`).

    Raises:
        BadInput: it cannot be read, is malformed, or says something a spec cannot; with file, line and column.
    """
    return spec_of(read(source, stdin=stdin), folder_of(source))


def folder_of(source: str | Path) -> Path:
    """Return the folder a spec's relative paths are told from: its own; for standard input the current one."""
    return Path.cwd() if str(source) == "-" else Path(source).resolve().parent


def read(source: str | Path, *, stdin: BinaryIO | None = None) -> Node:
    """Return a spec file as nodes that know their places; see `load`."""
    data, name = _yaml.read_bytes(source, stdin)
    text = _yaml.decode(data, name)
    if Path(name).name == "pyproject.toml":
        return _yaml.parse_toml(text, name, table=("tool", "leanplan"))
    return _yaml.parse_toml(text, name) if name.endswith(".toml") else _yaml.parse_yaml(text, name)


def from_mapping(data: Mapping[str, Any], folder: str | Path | None = None) -> Spec:
    """Return the spec of a Python mapping with a spec file's keys: quantities as text, counts as numbers.

    Args:
        folder: what relative paths are told from; the current folder if None.

    Raises:
        BadInput: as `load`, with the key in place of the line.

    >>> from_mapping({"model": "models/tiny-lm", "budgets": {"ttft_p95": "50 ms"}}).budgets[0].value
    0.05
    """
    return spec_of(_yaml.from_python(data), Path(folder or ".").resolve())


def spec_of(node: Node, folder: Path) -> Spec:
    """Return the spec that nodes describe; `folder` is absolute."""
    version = _at(node, "version")
    if version is not node and re.fullmatch(r"[0-9]+", str(version.content)) and version.content != "1":
        raise version.error(
            f"version {version.content} of the spec format is not known here",
            hint="write version: 1, or upgrade leanplan",
        )
    spec: Spec = SPEC.read(node)

    def placed(text: TextData) -> TextData:
        return replace(text, data=folder / text.data) if text.data else text

    calibration = placed(spec.calibration) if spec.calibration else None
    return replace(spec, folder=folder, quality=placed(spec.quality), calibration=calibration)


def as_mapping(spec: Spec) -> dict[str, Any]:
    """Return a spec as a mapping that `from_mapping` turns back into the same spec, every default written out."""

    def near(text: TextData | None) -> TextData | None:
        if text is None or text.data is None or not text.data.is_relative_to(spec.folder):
            return text
        return replace(text, data=text.data.relative_to(spec.folder))

    values = {key.target: getattr(spec, key.target) for key in SPEC.keys}
    values |= {
        "budgets": BudgetsRead(spec.budgets),
        "quality": near(spec.quality),
        "calibration": near(spec.calibration),
    }
    written = {
        key.name: key.kind.write(values[key.target]) for key in SPEC.keys if values[key.target] not in (None, ())
    }
    return {name: value for name, value in written.items() if value != {}}


def as_yaml(spec: Spec) -> str:
    """Return a spec as YAML with every default written out; `load` of it, in the same folder, gives the same spec."""
    return _yaml.write_yaml(as_mapping(spec))


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a spec, for editors and for checking specs without leanplan."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "leanplan spec", **SPEC.schema()}


def check_files(spec: Spec, node: Node) -> list[str]:
    """Return remarks on what a spec refers to, without running anything or touching the network.

    Raises:
        BadInput: the model folder has no config.json, the source is neither a folder nor a hub id, a text file is
            missing, or the machine is not in the catalogue; with the place in the spec.
    """
    remarks = [_check_model(spec, _at(node, "model", "source"))]
    for name, text in (("quality", spec.quality), ("calibration", spec.calibration)):
        if text is None or text.data is None:
            continue
        at = _at(node, name, "data")
        if at is node:  # written beside a budget
            at = next((d for b in _at(node, "budgets").content.values() if (d := _at(b, "data")) is not b), node)
        if not text.data.is_file():
            what = "is a folder" if text.data.is_dir() else "not found"
            raise at.error(
                f"{name}.data: {units.quote(str(text.data), 400)} {what}",
                hint="give the path of a text file, from the spec's folder",
            )
        remarks.append(f"{name} text: {text.data}")
    if spec.hardware != "local":
        from cost_models.catalogue import find_machine

        try:
            find_machine(spec.hardware)
        except BadInput as error:
            raise _at(node, "hardware").error(error.message, hint=error.hint) from error
        remarks.append(f"hardware: {spec.hardware}, from the catalogue: plans are predicted, not measured")
    return remarks


def _check_model(spec: Spec, at: Node) -> str:
    source = spec.model.source
    for folder in (spec.path(source), Path(source)):
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise at.error(
                    f"no config.json in {units.quote(source, 400)}",
                    hint="a model folder has config.json, *.safetensors, tokenizer.json",
                )
            return f"model: folder {folder}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?", source):
        raise at.error(
            f"{units.quote(source)} is not a folder here, nor a hub id",
            hint="give a folder with config.json, or an id like org/name",
        )
    return f"model: hub id {source} (no such folder beside the spec), fetched when it is needed"


def _at(node: Node, *path: str) -> Node:
    """Return the node of a path, or the nearest above it that there is."""
    for step in path:
        if node.type != "mapping" or step not in node.content:
            return node
        node = node.content[step]
    return node


def rows() -> list[tuple[str, str, str, str]]:
    """Return (key, what it is, what it may be, what leaving it out means) for every key, sections dotted."""
    return list(_rows(SPEC, ""))


def _rows(section: Section, above: str) -> Iterator[tuple[str, str, str, str]]:
    for key in section.keys:
        name = above + key.name
        if isinstance(key.kind, Section):
            yield from _rows(key.kind, f"{name}.")
        else:
            yield name, key.about, key.kind.words, section.default_text(key)


def template(model: str) -> str:
    """Return a commented spec for a model: every key, those that may be left out commented out with their meaning."""
    lines = [
        "# What this file may say: leanplan help spec. Whether it is right: leanplan validate. Run it: leanplan plan.",
        "# yaml-language-server: $schema=.leanplan/spec.schema.json",
    ]
    for key in SPEC.keys:
        active = key.name in ("version", "model", "budgets")
        if key.name == "budgets":
            lines += _budget_lines()
        elif isinstance(key.kind, Section):
            lines.append(_line(f"{key.name}:", key.about, active=active))
            for inner in key.kind.keys:
                given = key.kind.default(inner) is UNSET
                value = model if (key.name, inner.name) == ("model", "source") else _template_value(key.kind, inner)
                lines.append(_line(f"  {inner.name}: {value}", _meaning(key.kind, inner), active=active and given))
        else:
            lines.append(_line(f"{key.name}: {_template_value(SPEC, key)}", _meaning(SPEC, key), active=active))
    return "\n".join(lines) + "\n"


def _budget_lines() -> list[str]:
    lines = [
        _line(
            "budgets:",
            'max or min; level: error (default), warn or "off"; 0.8x baseline: a share of the unchanged model\'s',
            active=True,
        )
    ]
    for metric in METRICS.values():
        bound = "max" if metric.better == "lower" else "min"
        value = "5 %" if metric.label == "quality_loss" else example_limit(metric)
        label = _label(metric, "p50")
        lines.append(_line(f"  {label}: {{{bound}: {value}}}", metric.summary, active=metric.label == "quality_loss"))
    return lines


def _template_value(section: Section, key: Key) -> str:
    if key.example:
        return key.example
    default = section.default(key)
    if default not in (UNSET, None, ()):
        return flow(key.kind.write(default))
    return units.DIMENSIONS[key.kind.dimension].examples[0] if isinstance(key.kind, Quantity) else ""


def _meaning(section: Section, key: Key) -> str:
    choices = f": {key.kind.words}" if isinstance(key.kind, Choice | Text) and key.name != "name" else ""
    absent = "" if section.default(key) is UNSET else f" (default: {section.default_text(key)})"
    return f"{key.about}{choices}{absent}"


def _line(text: str, comment: str, *, active: bool) -> str:
    return f"{'' if active else '# '}{text}".ljust(44) + f" # {comment}"
