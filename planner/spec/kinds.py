"""What the values of budgets, objectives and prompts may be: the kinds that only a spec has."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.metrics import METRICS, STATISTICS, Metric, find_metric
from knowledge_base.types import Budget
from planner._kinds import Choice, FilePath, Kind, Quantity, Whole, in_place, unknown_key, wrong
from planner._yaml import Node


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
        hint=f"metrics: {known}; also _p95, _p99 and _mean for _p50 (leanplan ls metrics)",
        at_key=at_key,
    )


def label_of(metric: Metric, statistic: str) -> str:
    return f"{metric.label}_{statistic}" if metric.sampled else metric.label


@dataclass(frozen=True)
class ObjectiveKind:
    """The name of a metric, with the statistic written out."""

    words: str = "a metric, e.g. tpot_p50"

    def read(self, node: Node) -> str:
        if node.type != "string":
            raise wrong(node, self)
        return label_of(*_metric(node, node.content, at_key=False))

    def write(self, value: str) -> str:
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(labels())}


_LENGTH = Whole()


@dataclass(frozen=True)
class LengthKind:
    """One length, or the median and 95th percentile of lengths. The value is (p50, p95 or None)."""

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
TEXT_FILE = FilePath("the path of a text file")
HOURLY = Quantity("price_per_hour")


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
        more: dict[str, Kind] = {"at": HOURLY} if metric.label == "cost" else {}
        if metric.resource == "quality":
            more["data"] = TEXT_FILE
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
            label = label_of(metric, statistic)
            if before := lines.get(label):
                at = f" on line {before.line}" if before.line else ""
                raise child.error(
                    f"{name} is the same as {before.path[-1]}, given{at}", hint="keep one of the two", at_key=True
                )
            lines[label] = child
            budgets += self._limits(child, metric, statistic)
            if child.type == "mapping" and (at_node := child.content.get("at")):
                price = HOURLY.read(at_node), at_node
            if child.type == "mapping" and (data := child.content.get("data")):
                path = TEXT_FILE.read(data)
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
