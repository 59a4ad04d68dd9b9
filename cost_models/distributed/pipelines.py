"""Layers in turn on several machines: how many each takes, how long a step is, what each holds."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.demand import DTYPE_BYTES
from cost_models.distributed.links import Link, Traffic, send
from cost_models.distributed.ranks import Layout, moved_bytes, stage
from cost_models.training import (
    TrainingMemory,
    TrainingSetup,
    TrainingTime,
    as_time,
    assemble,
    check_model,
    highest,
    moments,
    packed_bits,
    training_time,
    utilisation_prior,
)
from knowledge_base.errors import BadInput
from knowledge_base.types import Hardware, Model


def bubble_ratio(stages: int, micro_batches: int) -> float:
    """Return the share of a pipeline's time in which a stage idles: (p - 1) / (m + p - 1). Source: arXiv:1811.06965.

    >>> bubble_ratio(4, 12)
    0.2
    """
    return (stages - 1) / (micro_batches + stages - 1)


def place_layers(
    layers: int, layer_s: Sequence[float], most_layers: Sequence[int], other_s: Sequence[float] = ()
) -> tuple[int, ...]:
    """Return how many equal layers each machine of a pipeline takes, so that the slowest stage is as quick as can be.

    Each layer in turn goes to the machine that would then be done soonest among those with room; for equal layers no
    placement has a smaller largest stage, since a layer moved elsewhere could only end later.

    Args:
        layers: to place.
        layer_s: seconds one layer takes on each machine.
        most_layers: that fit in each machine's memory.
        other_s: seconds each machine takes besides its layers, as the last one does for the head; none if empty.

    Raises:
        BadInput: they do not all fit, or a machine has no speed.

    >>> place_layers(8, (1.0, 3.0), (8, 8)), place_layers(8, (1.0, 3.0), (4, 8))
    ((6, 2), (4, 4))
    """
    if len(layer_s) != len(most_layers) or not layer_s:
        raise BadInput("each machine needs a speed and a capacity", hint="give both for each", where="layer_s")
    if not all(0 < s < math.inf for s in layer_s):
        raise BadInput(
            "a layer must take a time above 0 on every machine", hint="leave the machine out", where="layer_s"
        )
    if sum(most_layers) < layers:
        raise BadInput(
            f"{layers} layers do not fit: the machines hold {sum(most_layers)}",
            hint="add a machine, or compress the weights", where="most_layers",
        )  # fmt: skip
    placed, other = [0] * len(layer_s), other_s or [0.0] * len(layer_s)
    for _ in range(layers):
        free = [i for i, count in enumerate(placed) if count < most_layers[i]]
        placed[min(free, key=lambda i: (other[i] + (placed[i] + 1) * layer_s[i], i))] += 1
    return tuple(placed)


def pipeline_s(stage_s: Sequence[float], micro_batches: int) -> float:
    """Return the seconds of a step through unequal stages: the first micro-batch passes all, the slowest sets the pace.

        sum of stages + (m - 1) largest stage

    >>> pipeline_s((1.0, 2.0, 1.0), 5)
    12.0
    """
    return sum(stage_s) + (micro_batches - 1) * max(stage_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One machine's part of a pipeline of unequal machines. `time` is the whole run's, with the work of this machine."""

    hardware: Hardware
    layers: int
    memory: TrainingMemory
    time: TrainingTime
    moved_bytes: float  # of weights and states in a step


@dataclass(frozen=True, slots=True, kw_only=True)
class UnequalPipeline:
    """A run through unequal machines; machines too slow or too small to be given a layer are left out."""

    stages: tuple[Stage, ...]
    time: TrainingTime
    traffic: Mapping[str, Traffic]


def unequal_pipeline(
    model: Model, setup: TrainingSetup, machines: Sequence[Hardware], link: Link, *, tokens: float
) -> UnequalPipeline:
    """Return the run through machines of one device each, in the order given, layers placed by speed and memory.

        step = the slowest stage's micro-batches, the others' first one, sending on and back, the longest optimiser pass

    Raises:
        BadInput: the model does not fit.
        EnvironmentProblem: a device lacks the rate of the weights' dtype.
    """
    check_model(model, setup)
    micro = replace(setup, gradient_accumulation=1)
    count, last = len(machines), len(machines) - 1
    one = stage(model, 1, first=False, last=False)
    head = replace(one, vocab_size=model.vocab_size)
    layer_s = [_work_s(one, micro, machine) for machine in machines]
    other_s = [0.0] * last + [_work_s(head, micro, machines[last]) - layer_s[last]]
    room = [_most_layers(model, setup, machine, i, count) for i, machine in enumerate(machines)]
    placed = place_layers(model.layers, layer_s, room, other_s)
    if 0 in placed:
        used = [machine for machine, layers in zip(machines, placed) if layers]
        return unequal_pipeline(model, setup, used, link, tokens=tokens)
    parts = [stage(model, n, first=i == 0, last=i == last) for i, n in enumerate(placed)]
    alone = [training_time(part, micro, machine) for part, machine in zip(parts, machines)]
    work = [time.step.mid - time.parts["optimiser"] for time in alone]
    slowest = alone[work.index(max(work))]
    hidden = setup.tokens * model.hidden_size * DTYPE_BYTES[setup.weight_dtype]
    sent = send(hidden, link).times(setup.gradient_accumulation * min(2, last))
    times = {name: s * setup.gradient_accumulation for name, s in slowest.parts.items()}
    times["optimiser"] = max(time.parts["optimiser"] for time in alone)
    times["bubbles"] = pipeline_s(work, setup.gradient_accumulation) - setup.gradient_accumulation * max(work)
    times["pipeline"] = sent.s

    def told(flop: float) -> TrainingTime:
        return as_time(
            times,
            flop,
            setup,
            tokens=tokens,
            why="a pipeline" if last else utilisation_prior(setup, machines[0].device),
        )

    stages = [
        Stage(
            hardware=machine, layers=layers,
            memory=stage_memory(part, setup, in_flight=min(count - i, setup.gradient_accumulation)),
            time=told(time.flop * setup.gradient_accumulation), moved_bytes=moved_bytes(part, setup, Layout()),
        )
        for i, (machine, layers, part, time) in enumerate(zip(machines, placed, parts, alone))
    ]  # fmt: skip
    total_flop = sum(time.flop for time in alone) * setup.gradient_accumulation
    return UnequalPipeline(stages=tuple(stages), time=told(total_flop), traffic={"pipeline": sent} if last else {})


def stage_memory(part: Model, setup: TrainingSetup, *, in_flight: int) -> TrainingMemory:
    """Return the memory of one stage, which holds the activations of `in_flight` micro-batches."""
    found = moments(part, setup, in_flight=in_flight)
    moment = highest(found)
    return assemble(found[moment], setup, moment, bits=packed_bits(part, setup))


def _work_s(part: Model, setup: TrainingSetup, machine: Hardware) -> float:
    time = training_time(part, setup, machine)
    return time.step.mid - time.parts["optimiser"]


def _most_layers(model: Model, setup: TrainingSetup, machine: Hardware, place: int, machines: int) -> int:
    """Return how many layers fit; memory rises with them."""
    in_flight = min(machines - place, setup.gradient_accumulation)

    def needs(layers: int) -> float:
        part = stage(model, layers, first=place == 0, last=place == machines - 1)
        return stage_memory(part, setup, in_flight=in_flight).total.mid

    return bisect.bisect_right(range(1, model.layers + 1), float(machine.device.memory_bytes), key=needs)
