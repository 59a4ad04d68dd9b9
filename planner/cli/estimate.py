"""`leanplan estimate MODEL --on HARDWARE`: predicted figures of one plan; nothing is run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, ExitCode

if TYPE_CHECKING:
    from knowledge_base.types import Estimate, Hardware, Model, Plan, Step, Workload

HELP = "predicted figures of one plan on one machine, with intervals and reasons; nothing is run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a config.json, or a hub id; weights are not needed")
    parser.add_argument(
        "--on", default="local", metavar="HARDWARE", help="local, a saved profile, or a name of: leanplan ls machines"
    )
    parser.add_argument(
        "--engine", default="transformers", help="a name of: leanplan ls engines (default transformers)"
    )
    parser.add_argument(
        "--step", action="append", default=[], metavar="TECHNIQUE[:KNOB=VALUE,...]",
        help="a technique of the plan, e.g. weight_gguf:type=q4_k; may be repeated; knobs not given take their default",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N", help="length of a prompt (default 128)")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N", help="length of an answer (default 64)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=1,
        metavar="N",
        help="requests at a time (default 1); batch_size serves several together",
    )


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from cost_models.predict import estimate, estimate_many
    from knowledge_base import rules
    from knowledge_base.registry import engines
    from knowledge_base.types import Plan, Workload
    from planner.cli._talk import emit, say
    from planner.machine import find
    from planner.reading import read_model

    for flag in ("prompt_tokens", "output_tokens", "concurrency"):
        if getattr(options, flag) < 1:
            raise BadInput(
                f"must be at least 1, got {getattr(options, flag)}",
                hint="give a count",
                where=f"--{flag.replace('_', '-')}",
            )
    engine = engines.get(options.engine)
    steps = [read_step(text) for text in options.step]
    read = read_model(
        options.model, offline=options.offline, trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle, weights="optional",
    )  # fmt: skip
    model = read.model
    for note in read.notes:
        say(note, quiet=options.quiet)
    workload = Workload(
        prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens, concurrency=options.concurrency
    )
    if workload.prompt_tokens + workload.output_tokens > model.max_context_tokens:
        raise BadInput(
            f"{workload.prompt_tokens} + {workload.output_tokens} tokens are more than the model's {model.max_context_tokens}",
            hint="lower --prompt-tokens or --output-tokens", where="--prompt-tokens",
        )  # fmt: skip
    hardware = find(options.on, Path(options.store or ".leanplan"), tell=lambda text: say(text, quiet=options.quiet))
    _check(steps, engine, model, workload, hardware)
    plan = Plan(model_digest=model.digest, engine=options.engine, steps=tuple(rules.order(steps)))
    predicted = estimate(plan, model, workload, hardware)
    unknown = {
        name: problem.message for name, problem in estimate_many([plan], model, workload, hardware).prevented.items()
    }
    facts = {
        "model": model.name, "hardware": hardware.name, "plan": plan, "words": plan.words, "workload": workload,
        "predicted": predicted, "not_predicted": unknown, "steps": _effects(plan, model, workload),
        "fits": predicted.values["peak_memory_bytes"].mid <= hardware.memory_limit_bytes,
    }  # fmt: skip
    emit(options, facts, as_text(facts, plan, predicted, hardware))
    return ExitCode.DONE


def read_step(text: str) -> Step:
    """Return a step as written on the command line: `weight_int4:group_size=64`.

    Raises:
        BadInput: an unknown technique, knob or setting; says which there are.
    """
    from knowledge_base.registry import complete, techniques
    from knowledge_base.types import Step

    name, _, written = text.partition(":")
    knobs = techniques.get(name.strip()).TECHNIQUE.knobs
    chosen: dict[str, Any] = {}
    for setting in filter(None, written.split(",")):
        knob, equals, value = (part.strip() for part in setting.partition("="))
        if knob not in knobs or not equals:
            known = ", ".join(f"{k}={'|'.join(map(str, c.options))}" for k, c in knobs.items()) or "none"
            raise BadInput(f"`{name}` has no setting `{setting}`", hint=f"its knobs: {known}", where=f"--step {text}")
        options = {str(option): option for option in knobs[knob].options}
        if value not in options:
            raise BadInput(
                f"`{knob}` of `{name}` cannot be `{value}`",
                hint=f"one of: {', '.join(options)}",
                where=f"--step {text}",
            )
        chosen[knob] = options[value]
    return complete(Step(name.strip(), chosen))


def _check(steps: list[Step], engine: Any, model: Model, workload: Workload, hardware: Hardware) -> None:
    """Refuse a plan the knowledge base says cannot be: for this model, this engine, or these steps together."""
    from knowledge_base import rules
    from knowledge_base.registry import techniques

    name = engine.__name__.rpartition(".")[2]
    if why := engine.accepts(model):
        raise BadInput(
            f"{name} cannot run this model: {why}", hint="choose another engine: leanplan ls engines", where="--engine"
        )
    for step in steps:
        module = techniques.get(step.technique)
        why = module.rejects(model, workload, hardware)
        why = why or getattr(module, "legal", lambda *_: None)(step.knobs, model, workload, hardware)
        if why:
            raise BadInput(
                f"`{step}` does not apply: {why}",
                hint="leave it out or choose another setting",
                where=f"--step {step.technique}",
            )
        if missing := module.TECHNIQUE.needs - engine.ENGINE.offers:
            raise BadInput(
                f"`{step.technique}` needs an engine that offers {', '.join(sorted(missing))}; {name} does not",
                hint="leanplan ls engines", where=f"--step {step.technique}",
            )  # fmt: skip
    if why := rules.conflict(steps) or rules.missing(steps):
        raise BadInput(
            f"these steps do not go together: {getattr(why, 'effect', why)}",
            hint="leanplan ls techniques",
            where="--step",
        )


def _effects(plan: Plan, model: Model, workload: Workload) -> list[dict[str, str]]:
    import itertools

    from cost_models.demand import demand_chain

    chain = demand_chain(plan, model, workload)
    return [
        {"step": name, "effect": "; ".join(after.because[len(before.because) :])}
        for (_, before), (name, after) in itertools.pairwise(chain)
    ]


def as_text(facts: dict[str, Any], plan: Plan, predicted: Estimate, hardware: Hardware) -> str:
    """Return the figures as lines for people: value, 80 % interval, what dominates it."""
    from knowledge_base import units
    from knowledge_base.metrics import METRICS

    workload = facts["workload"]
    lines = [
        f"predicted for {facts['model']} on {facts['hardware']}  ({plan.id}, {plan.words})",
        f"{workload.prompt_tokens} prompt + {workload.output_tokens} output tokens; intervals hold 80 %",
        "",
    ]
    lines += [f"  {item['step']}: {item['effect']}" for item in facts["steps"]]
    lines += [""] if facts["steps"] else []
    for name, metric in METRICS.items():
        if (value := predicted.values.get(name)) is not None:
            mid, low, high = (units.format(v, metric.dimension) for v in (value.mid, value.low, value.high))
            lines.append(f"  {metric.label:15} {mid:>15}  {f'[{low} – {high}]':32} {value.because}".rstrip())
        elif name in facts["not_predicted"]:
            lines.append(f"  {metric.label:15} {'not predicted':>15}  {facts['not_predicted'][name]}")
    if not facts["fits"]:
        peak = predicted.values["peak_memory_bytes"].mid
        lines += [
            "",
            f"does not fit: peak memory {units.format(peak, 'bytes')} of {units.format(hardware.memory_limit_bytes, 'bytes')}; "
            "the times above hold only where it does",
        ]
    return "\n".join(lines)
