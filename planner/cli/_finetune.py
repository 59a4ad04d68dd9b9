"""The flags of `leanplan estimate --finetune`, and what they ask for."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from knowledge_base.types import Hardware, Model
    from planner.estimating.finetuning import Tuning

COUNTS = {"batch": 1, "sequence_tokens": 512, "accumulation": 1}  # flag -> value where it is not given
AMOUNT = 1e6  # tokens of a run whose length nobody gives
LARGEST = 10**9
_MULTIPLES = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "fine-tuning", "with --finetune the model is trained instead of served; --compare METHOD and --sweep "
        "batch|sequence|rank|devices=A..B work here too; several machines (--on A,B) are one pipeline"
    )  # fmt: skip
    group.add_argument(
        "--finetune", metavar="METHOD[+TECHNIQUE...]",
        help="names of: leanplan ls techniques, e.g. full, lora, qlora+gradient_checkpointing, galore, low_bit_adam",
    )  # fmt: skip
    group.add_argument(
        "--tokens", metavar="AMOUNT", help="of the whole run, e.g. 10M; 20x is 20 for each parameter (default 1M)"
    )
    group.add_argument("--samples", type=int, metavar="N", help="of --sequence-tokens each, instead of --tokens")
    group.add_argument("--epochs", type=int, metavar="N", help="times the samples are gone through (default 1)")
    group.add_argument("--batch", type=int, metavar="N", help="sequences a device takes at once (default 1)")
    group.add_argument("--sequence-tokens", type=int, metavar="N", help="length of a sequence (default 512)")
    group.add_argument("--accumulation", type=int, metavar="N", help="batches for each step (default 1)")
    group.add_argument("--rank", type=int, metavar="N", help="of low-rank methods (default 16)")
    group.add_argument("--optimizer", metavar="NAME", help="adamw (default), adam_8bit, adafactor, lion, sgd, ...")
    group.add_argument("--checkpointing", action="store_true", help="the same as +gradient_checkpointing")
    group.add_argument(
        "--parallel", metavar="KIND=N,...",
        help="data, tensor, pipeline, sequence, expert and zero, e.g. data=4,tensor=2,zero=3 (default: data over all devices)",
    )  # fmt: skip
    group.add_argument(
        "--link",
        metavar="BANDWIDTH",
        help="inside a machine in one direction, e.g. '25 GB/s' (default: the device's own)",
    )
    group.add_argument(
        "--network",
        metavar="BANDWIDTH",
        help="between machines, which have at most 8 devices (default 10 Gbit/s Ethernet)",
    )


FLAGS = (
    "tokens", "samples", "epochs", "batch", "sequence_tokens", "accumulation", "rank", "optimizer", "checkpointing", "parallel",
    "link", "network",
)  # fmt: skip
SERVING = (
    "step", "roofline", "compare_on", "weights", "concurrency", "requests_per_s", "engine", "prompt_tokens", "output_tokens", "draft",
)  # fmt: skip


def output() -> Any:
    from planner.estimating.finetuning import FineTuned
    from planner.estimating.finetuning_sides import FineTunedSides, FineTunedSweep

    return FineTuned | FineTunedSides | FineTunedSweep


def refuse_without(options: argparse.Namespace) -> None:
    """Refuse flags of fine-tuning where nothing is fine-tuned.

    Raises:
        BadInput: names the first.
    """
    for name in FLAGS:
        if getattr(options, name):
            raise BadInput(
                f"--{name.replace('_', '-')} is of training", hint="say how: --finetune lora", where=f"--{name.replace('_', '-')}"
            )  # fmt: skip


def refuse_with(options: argparse.Namespace) -> None:
    """Refuse flags of serving where a model is fine-tuned.

    Raises:
        BadInput: names the first.
    """
    for name in SERVING:
        given = getattr(options, name)
        if given or (given == 0 and given is not False):  # a count of 0 is given too
            raise BadInput(
                f"--{name.replace('_', '-')} is of serving, not of training", hint="leave it or --finetune out",
                where=f"--{name.replace('_', '-')}",
            )  # fmt: skip


def told(
    options: argparse.Namespace, model: Model, machine: Callable[[str], Hardware]
) -> tuple[Any, Callable[[bool], str]]:
    """Return the data that is asked for, and its text with or without ASCII alone.

    Raises:
        BadInput: what is asked cannot be, or flags ask for two things at once.
    """
    from planner.estimating import finetuning, finetuning_sides, finetuning_told

    if options.format == "svg":
        raise BadInput("of training there are no pictures yet", hint="leave --format out", where="--format svg")
    if options.compare is not None and options.sweep is not None:
        raise BadInput("--compare and --sweep show different things", hint="give one of them", where="--sweep")
    tuning = _asked(options, model, machine)
    tuning.check()
    _refuse_links(options, tuning)
    if options.compare is not None:
        other = replace(tuning, names=finetuning.read_names(options.compare, "--compare"))
        other.check()
        sides = finetuning_sides.compared(tuning, other)
        return sides, lambda plain: finetuning_sides.sides_as_text(sides)
    if options.sweep is not None:
        sweep = finetuning_sides.swept(tuning, *finetuning_sides.read_sweep(options.sweep))
        return sweep, lambda plain: finetuning_sides.sweep_as_text(sweep)
    facts = finetuning.finetuned(tuning)
    return facts, lambda plain: finetuning_told.as_text(facts, ascii_only=plain)


def _asked(options: argparse.Namespace, model: Model, machine: Callable[[str], Hardware]) -> Tuning:
    from cost_models.training import OPTIMISERS
    from knowledge_base.units import quote
    from planner.estimating.finetuning import Tuning, read_names, read_parallel

    for name in ("samples", "epochs", "rank", "devices", *COUNTS):
        count = getattr(options, name)
        if count is not None and not 1 <= count <= LARGEST:
            raise BadInput(
                f"must be from 1 to {LARGEST:,}, got {count}", hint="give a count", where=f"--{name.replace('_', '-')}"
            )
    if options.optimizer is not None and options.optimizer not in OPTIMISERS:
        raise BadInput(
            f"unknown optimiser {quote(options.optimizer)}", hint=f"known: {', '.join(OPTIMISERS)}", where="--optimizer"
        )
    names = read_names(options.finetune)
    if options.checkpointing and "gradient_checkpointing" not in names:
        names = (*names, "gradient_checkpointing")
    counts = {name: getattr(options, name) or usual for name, usual in COUNTS.items()}
    return Tuning(
        model=model, machines=tuple(machine(name.strip()) for name in options.on.split(",")), names=names,
        optimiser=options.optimizer, rank=options.rank, tokens=_tokens(options, model, counts["sequence_tokens"]),
        parallel=read_parallel(options.parallel) if options.parallel is not None else None,
        link_bytes_per_s=_bandwidth(options, "link"), network_bytes_per_s=_bandwidth(options, "network"), **counts,
    )  # fmt: skip


def _refuse_links(options: argparse.Namespace, tuning: Tuning) -> None:
    """Refuse the rate of a link that joins none of the devices, unless their number is swept.

    Raises:
        BadInput: names the flag.
    """
    count, together = len(tuning.devices), tuning.cluster.devices_per_machine
    unused = {
        "--link": (options.link, min(count, together) == 1, "no two devices are in one machine"),
        "--network": (options.network, count <= together, "all devices are in one machine"),
    }
    for flag, (given, idle, why) in unused.items():
        if given is not None and idle and not (options.sweep or "").strip().startswith("devices"):
            raise BadInput(f"{why}, so {flag} has no effect", hint="leave it out, or add --devices", where=flag)


def _tokens(options: argparse.Namespace, model: Model, sequence_tokens: int) -> float:
    if options.samples is not None:
        if options.tokens is not None:
            raise BadInput("--samples and --tokens both say how long the run is", hint="give one", where="--samples")
        return float(options.samples * (options.epochs or 1) * sequence_tokens)
    if options.epochs is not None:
        raise BadInput("epochs of how many samples?", hint="add --samples", where="--epochs")
    if options.tokens is None:
        return AMOUNT
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kMBTx]?)", options.tokens.strip())
    if not found or not float(found[1]) > 0:
        raise BadInput(
            f"cannot read {options.tokens[:60]!a} as an amount of tokens", hint="write for example 500k, 10M, 1.5B, or 20x for each parameter",
            where="--tokens",
        )  # fmt: skip
    return float(found[1]) * (model.params_active if found[2] == "x" else _MULTIPLES[found[2]])


def _bandwidth(options: argparse.Namespace, name: str) -> float | None:
    """Return a link's bytes for each second: written so, or in bits as networks are sold: `10 Gbit/s`."""
    from knowledge_base import units

    text, where = getattr(options, name), f"--{name}"
    if text is None:
        return None
    in_bytes, bits = re.subn(r"([kMGT])bit/s$", r"\1B/s", text.strip())
    try:
        return units.parse(in_bytes, "bandwidth", field=where) / (8 if bits else 1)
    except BadInput as error:
        raise BadInput(error.message, hint="write for example '25 GB/s' or '10 Gbit/s'", where=where) from error
