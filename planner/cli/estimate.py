"""`leanplan estimate MODEL --on HARDWARE`: what is predicted of a plan, and where it goes; nothing is run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput, ExitCode
from planner.cli import _finetune

if TYPE_CHECKING:
    from collections.abc import Callable

    from knowledge_base.types import Model, Step, Workload
    from planner.estimating.asking import Asked

HELP = "predicted figures of one plan on one machine, with intervals and reasons; nothing is run"
# Of serving, where they are not given; as defaults of the parser, a flag with --finetune could not be told from none.
USUAL = {"engine": "transformers", "prompt_tokens": 128, "output_tokens": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model folder, a config.json, or a hub id; weights are not needed")
    parser.add_argument(
        "--draft", metavar="SOURCE", help="a smaller model that drafts, as `model`, for --step draft_model",
    )  # fmt: skip
    parser.add_argument(
        "--on",
        default="local",
        metavar="HARDWARE",
        help="local, a machine file, a saved profile, or a name of: leanplan ls machines",
    )
    parser.add_argument(
        "--engine",
        help="a name of: leanplan ls engines (default transformers), or one known by its law: vllm, sglang, tensorrt_llm, mlx, exllama, ...",
    )  # fmt: skip
    parser.add_argument(
        "--weights", metavar="KIND", help="how an engine known by its law stores weights: bf16, fp8, int8, int4 or fp4"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="equal devices, as `--on '4x h100-sxm'`: engines known by laws split the model, others copy it",
    )  # fmt: skip
    parser.add_argument(
        "--step", action="append", default=[], metavar="TECHNIQUE[:KNOB=VALUE,...]",
        help="a technique of the plan, e.g. weight_gguf:type=q4_k; may be repeated; knobs not given take their default",
    )  # fmt: skip
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="length of a prompt (default 128)")
    parser.add_argument("--output-tokens", type=int, metavar="N", help="length of an answer (default 64)")
    parser.add_argument(
        "--concurrency", type=int, metavar="N",
        help="clients at a time, each waiting for its last answer (default 1); batch_size serves several together",
    )  # fmt: skip
    parser.add_argument(
        "--requests-per-s", type=float, metavar="RATE", help="requests that arrive by chance, instead of clients"
    )
    parser.add_argument(
        "--compare", metavar="PLAN",
        help="beside another plan: its steps joined by +, `unchanged`, `ENGINE: STEPS`, or `vllm: fp8`",
    )  # fmt: skip
    parser.add_argument("--compare-on", metavar="HARDWARE", help="beside the same plan, or that of --compare, there")
    parser.add_argument(
        "--sweep", metavar="KEY=A..B",
        help="batch, concurrency, requests_per_s, devices, context or output from A to B, doubling, or KEY=A,B,C: a table and a plot",
    )  # fmt: skip
    parser.add_argument(
        "--roofline", action="store_true", help="the machine's roofline with the plan's operators on it"
    )
    parser.add_argument(
        "--format", choices=("text", "svg"), default="text", help="of --sweep and --roofline: text (default) or an SVG"
    )
    _finetune.add_arguments(parser)


def output() -> Any:
    from planner.estimating.comparing import SideBySide
    from planner.estimating.roofline_picture import Roofline
    from planner.estimating.sweeping import Sweep
    from planner.estimating.telling import Estimated

    return Estimated | SideBySide | Sweep | Roofline | _finetune.output()


def run(options: argparse.Namespace) -> int:
    from planner.cli._talk import emit

    if options.finetune is not None:
        _finetune.refuse_with(options)
        return _trained(options)
    _finetune.refuse_without(options)
    for name, usual in USUAL.items():
        if getattr(options, name) is None:
            setattr(options, name, usual)
    kind = _kind(options)
    asked = _asked(options)
    data, text = SHOWN[kind](options, asked)
    emit(options, data, text)
    return ExitCode.DONE


def _trained(options: argparse.Namespace) -> int:
    from planner.cli._talk import emit
    from planner.estimating.asking import with_devices

    facts, text = _finetune.told(
        options, _model(options), lambda name: with_devices(_machine(options, name), options.devices)
    )
    emit(options, facts, _told(text))
    return ExitCode.DONE


def _kind(options: argparse.Namespace) -> str:
    """Return which of SHOWN is asked for; refuse flags that ask for two things at once."""
    given = {
        "--compare": options.compare is not None or options.compare_on is not None,
        "--sweep": options.sweep is not None,
        "--roofline": options.roofline,
    }
    kinds = [flag for flag, there in given.items() if there]
    if len(kinds) > 1:
        raise BadInput(f"{' and '.join(kinds)} show different things", hint="give one of them", where=kinds[-1])
    kind = kinds[0] if kinds else ""
    if options.format == "svg" and kind not in ("--sweep", "--roofline"):
        raise BadInput(
            "only a sweep and a roofline are pictures", hint="add --roofline or --sweep batch=1..32", where="--format svg"
        )  # fmt: skip
    return kind


def _asked(options: argparse.Namespace) -> Asked:
    from planner.estimating.asking import Asked, find_engine, read_step, with_devices

    find_engine(options.engine)
    steps = tuple(read_step(text) for text in options.step)
    workload = _workload(options, steps)
    asked = Asked(
        model=_model(options),
        engine=options.engine,
        steps=steps,
        workload=workload,
        hardware=with_devices(_machine(options, options.on), options.devices),
        weights=options.weights,
    )
    asked.check()
    return asked


def _model(options: argparse.Namespace) -> Model:
    from planner.cli._talk import say
    from planner.reading import read_model

    read = read_model(
        options.model, offline=options.offline, trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle, weights="optional", draft=options.draft,
    )  # fmt: skip
    for note in read.notes:
        say(note, quiet=options.quiet)
    return read.model


def _workload(options: argparse.Namespace, steps: tuple[Step, ...]) -> Workload:
    """Return the workload the flags describe.

    Raises:
        BadInput: counts below 1, or two loads at once; what else nobody has, `Asked.check` refuses.
    """
    from knowledge_base.types import Workload
    from planner.estimating.asking import positive

    rate, clients = options.requests_per_s, options.concurrency
    counts = {name: getattr(options, name) for name in ("prompt_tokens", "output_tokens", "concurrency", "devices")}
    positive({name: count for name, count in counts.items() if count is not None})
    if rate is not None and clients is not None:
        raise BadInput(
            "clients at a time and requests that arrive are two loads", hint="give one of --concurrency and --requests-per-s",
            where="--requests-per-s",
        )  # fmt: skip
    arriving = rate is not None or (options.sweep or "").strip().startswith("requests_per_s")
    batch = max((step.knobs["count"] for step in steps if step.technique == "batch_size"), default=1)
    return Workload(
        prompt_tokens=options.prompt_tokens, output_tokens=options.output_tokens, requests_per_s=rate,
        concurrency=clients or (batch if arriving else 1),  # arrivals can fill any batch
    )  # fmt: skip


def _machine(options: argparse.Namespace, name: str) -> Any:
    from pathlib import Path

    from planner.cli._talk import say
    from planner.machine import find

    return find(name, Path(options.store or ".leanplan"), tell=lambda text: say(text, quiet=options.quiet))


def _told(text: Callable[[bool], str]) -> str:
    """Return text made with or without ASCII alone, as stdout takes it."""
    import sys

    from planner.reports.terminal import ascii_only, in_ascii

    plain = ascii_only(sys.stdout)
    return in_ascii(text(plain)) if plain else text(plain)


def _estimate(options: argparse.Namespace, asked: Asked) -> tuple[Any, str]:
    from planner.estimating import telling
    from planner.estimating.pricing import price

    priced = price(asked)
    facts = telling.estimated(priced)
    return facts, _told(lambda plain: telling.as_text(facts, priced, ascii_only=plain))


def _compare(options: argparse.Namespace, asked: Asked) -> tuple[Any, str]:
    from dataclasses import replace

    from planner.estimating import comparing
    from planner.estimating.asking import read_other, with_devices
    from planner.estimating.pricing import price

    other = asked if options.compare is None else read_other(options.compare, asked)
    if options.compare_on is not None:
        other = replace(other, hardware=with_devices(_machine(options, options.compare_on), None))
    other.check(steps_from="--compare")
    a, b = price(asked), price(other)
    facts = comparing.compared(a, b)
    return facts, _told(lambda plain: comparing.as_text(facts, a, b))


def _sweep(options: argparse.Namespace, asked: Asked) -> tuple[Any, str]:
    from planner.estimating import sweeping

    facts = sweeping.swept(asked, *sweeping.read_sweep(options.sweep))
    if options.format == "svg":
        return facts, sweeping.as_svg(facts)
    return facts, _told(lambda plain: sweeping.as_text(facts, ascii_only=plain))


def _roofline(options: argparse.Namespace, asked: Asked) -> tuple[Any, str]:
    from planner.estimating import roofline_picture
    from planner.estimating.pricing import price

    facts = roofline_picture.roofline(price(asked))
    if options.format == "svg":
        return facts, roofline_picture.as_svg(facts)
    return facts, _told(lambda plain: roofline_picture.as_text(facts, ascii_only=plain))


SHOWN = {"": _estimate, "--compare": _compare, "--sweep": _sweep, "--roofline": _roofline}
