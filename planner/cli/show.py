"""`leanplan show ID`: a run, a plan, a technique, an engine, a machine or a metric."""

from __future__ import annotations

import argparse
from typing import Annotated, Any

HELP = "show one run, plan, technique, engine, machine or metric"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", help="a name as `leanplan ls` prints it, a run folder, or the start of a plan id")


def output() -> Any:
    from knowledge_base.metrics import Metric
    from knowledge_base.types import Engine, Evidence, Hardware, Technique
    from planner import schemas
    from planner.results import PlanResult
    from planner.schemas import Beside

    technique = Annotated[Technique, Beside("TechniqueShown", name=str, evidence=tuple[Evidence, ...])]
    engine = Annotated[Engine, Beside("EngineShown", name=str, state=str, versions=dict[str, str])]
    return schemas.result() | PlanResult | technique | engine | Hardware | Metric


def run(options: argparse.Namespace) -> int:
    from knowledge_base.errors import BadInput
    from knowledge_base.metrics import LABELS, METRICS
    from knowledge_base.registry import engines, techniques
    from planner.cli._talk import emit
    from planner.finding import find_plan, find_run, runs_root
    from planner.reports import terminal
    from planner.results import as_mapping

    name = options.id
    if name in techniques.names():
        module = techniques.get(name)
        value: Any = {"name": name, **_fields(module.TECHNIQUE), "evidence": list(getattr(module, "EVIDENCE", ()))}
    elif name in engines.names():
        module = engines.get(name)
        value = {
            "name": name,
            "state": module.find() or "ready",
            "versions": module.versions(),
            **_fields(module.ENGINE),
        }
    elif name in METRICS or name in LABELS:
        value = METRICS[LABELS.get(name, name)]
    else:
        root = runs_root(options)
        try:
            answer = find_run(name, root)
        except BadInput:
            answer = None
        if answer is not None:
            emit(options, as_mapping(answer), terminal.render(answer))
            return 0
        try:
            _, value = find_plan(name, root)
        except BadInput:
            from cost_models.catalogue import find_machine, names

            if name not in names():
                raise BadInput(
                    f"nothing is called `{name}`",
                    hint="leanplan ls runs|plans|techniques|engines|machines|metrics lists names",
                ) from None
            value = find_machine(name)
    emit(options, value, outline(value))
    return 0


def _fields(value: Any) -> dict[str, Any]:
    from knowledge_base.serde import plain

    return plain(value)


def outline(value: Any) -> str:
    """Return any value as an indented outline, empty parts left out."""
    from knowledge_base.serde import plain

    lines: list[str] = []

    def walk(item: Any, depth: int) -> None:
        for key, inner in item.items() if isinstance(item, dict) else enumerate(item, 1):
            if inner in (None, "", [], {}):
                continue
            if isinstance(inner, list) and all(not isinstance(i, dict | list) for i in inner):
                inner = ", ".join(map(str, inner[:12])) + (f", … {len(inner)} in all" if len(inner) > 12 else "")
            if isinstance(inner, dict | list):
                lines.append("  " * depth + f"{key}:")
                walk(inner, depth + 1)
            else:
                lines.append("  " * depth + f"{key}: {inner}")

    walk(plain(value), 0)
    return "\n".join(lines)
