"""What people read of the table of keys: the commented spec of `leanplan init`, the rows of `leanplan help spec`."""

from __future__ import annotations

from collections.abc import Iterator

from knowledge_base import units
from knowledge_base.metrics import METRICS
from planner._kinds import UNSET, Choice, Key, Quantity, Section, Text, flow
from planner.spec.kinds import example_limit, label_of
from planner.spec.table import SPEC


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
        label = label_of(metric, "p50")
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
