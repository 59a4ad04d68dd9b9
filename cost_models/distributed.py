"""Training and inference over several devices: memory of a rank, bytes over the links, time, pipelines of unequal machines.

    layout = Layout(data=8, zero_stage=3)
    rank_memory(model, setup, layout)                      the rank that needs most
    step_traffic(model, setup, layout, cluster)            bytes a rank sends and seconds, for each kind of parallelism
    distributed_cost(model, setup, hardware, layout, cluster, tokens=1e9)

Ranks are numbered with tensor parallelism innermost, then sequence, then data (experts lie within it), then pipeline, so
the groups that talk most share a machine. `setup.batch` is what one data rank takes at once, and
`setup.gradient_accumulation` counts micro-batches.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cost_models.demand import DTYPE_BYTES
from cost_models.training import (
    BASE_BITS,
    UNTARGETED,
    TrainingCost,
    TrainingMemory,
    TrainingSetup,
    TrainingTime,
    as_time,
    assemble,
    base_bytes,
    bill,
    check_model,
    gradient_bytes,
    highest,
    matrix_shapes,
    moments,
    state_bytes,
    trained_params,
    training_time,
    utilisation_prior,
)
from knowledge_base.errors import BadInput
from knowledge_base.types import Hardware, Model

GATHERED_LAYERS = 2  # whole layers a rank holds under ZeRO-3: the one at work and the next (arXiv:2304.11277)
HIDDEN_RATIO = 0.5  # of gradient and weight traffic, behind the backward pass: a guess between none and all


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One tier of the network: what a device sends for each second, and the time before the first byte arrives."""

    name: str
    bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        if not self.bytes_per_s > 0 or not self.latency_s >= 0:
            raise BadInput(
                f"link `{self.name}` needs a bandwidth above 0 and a latency of at least 0, "
                f"got {self.bytes_per_s:g} byte/s and {self.latency_s:g} s", hint="mend the link", where="cluster",
            )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal machines: the link between the devices of one, and the link between machines."""

    devices_per_machine: int
    inside: Link
    between: Link

    def link(self, span: int) -> Link:
        """Return the slowest link a group crosses that reaches over `span` consecutive ranks."""
        return self.inside if span <= self.devices_per_machine else self.between


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ways each kind of parallelism splits. `zero_stage` 3 is what FSDP calls full sharding."""

    data: int = 1
    tensor: int = 1  # heads and feed-forward widths: arXiv:1909.08053
    pipeline: int = 1  # layers, one forward and one backward in turn: arXiv:1811.06965, 2104.04473
    sequence: int = 1  # positions, swapped for heads around attention: arXiv:2309.14509
    expert: int = 1  # experts, within the data ranks: arXiv:2006.16668
    zero_stage: int = 0  # 1: states, 2: gradients too, 3: weights too are split over data ranks: arXiv:1910.02054

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.data * self.sequence * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights before ZeRO: over these gradients are summed."""
        return self.data * self.sequence


@dataclass(frozen=True, slots=True)
class Traffic:
    """What one rank sends in a step, and the seconds it takes when nothing hides it."""

    bytes: float
    s: float

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.s + other.s)

    def times(self, count: float) -> Traffic:
        """Return that many of them."""
        return Traffic(self.bytes * count, self.s * count)


NOTHING = Traffic(0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedCost:
    """All resources of a run over several devices. `cost.memory` is that of the rank that needs most."""

    cost: TrainingCost
    traffic: Mapping[str, Traffic]
    ranks: int


# ---------------------------------------------------------------- collectives


def all_gather(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring all-gather of `size_bytes` in all: n - 1 steps of a share each, (n-1)/n of the size.

    Source: Thakur et al. 2005, "Optimization of Collective Communication Operations in MPICH".

    >>> all_gather(8e9, 4, Link(name="toy", bytes_per_s=1e9, latency_s=0.0))
    Traffic(bytes=6000000000.0, s=6.0)
    """
    sent = size_bytes * (ranks - 1) / ranks
    return Traffic(sent, (ranks - 1) * link.latency_s + sent / link.bytes_per_s)


def reduce_scatter(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring reduce-scatter: the all-gather run backwards, the same bytes and steps."""
    return all_gather(size_bytes, ranks, link)


def all_reduce(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return a ring all-reduce: a reduce-scatter, then an all-gather, 2(n-1)/n of the size."""
    return reduce_scatter(size_bytes, ranks, link) + all_gather(size_bytes, ranks, link)


def all_to_all(size_bytes: float, ranks: int, link: Link) -> Traffic:
    """Return an exchange in which each rank keeps 1/n of its `size_bytes` and sends the rest, a share to each other."""
    return all_gather(size_bytes, ranks, link)


def send(size_bytes: float, link: Link) -> Traffic:
    """Return one message to a neighbour."""
    return Traffic(size_bytes, link.latency_s + size_bytes / link.bytes_per_s)


# ---------------------------------------------------------------- what a rank holds


def check_layout(model: Model, setup: TrainingSetup, layout: Layout) -> None:
    """Refuse a layout that cannot be run.

    Raises:
        BadInput: something does not divide, there are more stages than layers, or experts are split that do not exist.
    """
    check_model(model, setup)
    for name in ("data", "tensor", "pipeline", "sequence", "expert"):
        if getattr(layout, name) < 1:
            raise BadInput(f"{name} must be at least 1, got {getattr(layout, name)}", hint="mend it", where=name)
    if layout.zero_stage not in (0, 1, 2, 3):
        raise BadInput(f"zero_stage must be 0, 1, 2 or 3, got {layout.zero_stage}", hint="mend it", where="zero_stage")
    if layout.pipeline > model.layers:
        raise BadInput(
            f"{layout.pipeline} pipeline stages are more than the {model.layers} layers of `{model.name}`",
            hint="use fewer stages", where="pipeline",
        )  # fmt: skip
    if layout.expert > 1 and model.experts < 2:
        raise BadInput(f"`{model.name}` has no experts to split", hint="leave `expert` at 1", where="expert")
    _divides("tensor", layout.tensor, model.ffn_size, "feed-forward width")
    _divides("tensor x sequence", layout.tensor * layout.sequence, model.heads, "heads")
    if layout.tensor % model.kv_heads:  # fewer key-value heads than ranks are repeated, if evenly
        _divides("tensor", layout.tensor, model.kv_heads, "key-value heads")
    _divides("sequence", layout.sequence, setup.sequence_tokens, "tokens of a sequence")
    if layout.expert > 1:
        _divides("expert", layout.expert, model.experts, "experts")
        _divides("expert", layout.expert, layout.data, "data ranks")


def _divides(what: str, ways: int, size: int, of: str) -> None:
    if size % ways:
        raise BadInput(f"{what} = {ways} does not divide the {size} {of}", hint=f"use a divisor of {size}", where=what)


def stages(model: Model, layout: Layout) -> dict[str, Model]:
    """Return the part of the model one rank of the first and of the last stage works on, before ZeRO and experts.

    Heads, feed-forward width and vocabulary are split over tensor ranks; the first stage holds the embedding, the last
    the head and the loss. Layers that do not divide are rounded up.
    """
    layers = math.ceil(model.layers / layout.pipeline)
    if layout.pipeline == 1:
        return {"only": stage(model, layers, first=True, last=True, tensor=layout.tensor)}
    return {
        "first": stage(model, layers, first=True, last=False, tensor=layout.tensor),
        "last": stage(model, layers, first=False, last=True, tensor=layout.tensor),
    }


def stage(model: Model, layers: int, *, first: bool, last: bool, tensor: int = 1) -> Model:
    """Return some layers of the model as a model of its own, split `tensor` ways."""
    table, tables = model.vocab_size * model.hidden_size, model.vocabulary_tables
    linear = model.linear_params * layers // (model.layers * tensor)
    norms = max(0, model.params_total - model.linear_params - tables * table) * layers // model.layers
    held = tables if first and last else 1 if first or last else 0
    idle = (model.params_total - model.params_active) * layers // (model.layers * tensor)
    total = linear + norms + held * (table // tensor)
    return replace(
        model, layers=layers, attention_layers=layers, heads=model.heads // tensor,
        kv_heads=max(1, model.kv_heads // tensor), ffn_size=model.ffn_size // tensor, linear_params=linear,
        params_total=total, params_active=total - idle, vocab_size=math.ceil(model.vocab_size / tensor) if last else 0,
    )  # fmt: skip


def expert_share(model: Model, setup: TrainingSetup, part: str) -> float:
    """Return the share of one part of memory that lies in experts."""
    inside = {name: i * o for name, (i, o) in matrix_shapes(model).items() if name in ("gate", "up", "down")}
    if model.experts < 2:
        return 0.0
    params = model.layers * model.experts * sum(inside.values())
    if part == "weights":
        bits = BASE_BITS[setup.packed] if setup.packed else 8 * DTYPE_BYTES[setup.weight_dtype]
        return params * bits / 8 / base_bytes(model, setup)
    if setup.whole:
        return params / model.params_total
    targets = tuple(target for target in setup.targets if target in inside)
    if setup.method in UNTARGETED or not targets:
        return 0.0
    return trained_params(model, replace(setup, targets=targets)) / trained_params(model, setup)


def rank_memory(model: Model, setup: TrainingSetup, layout: Layout) -> TrainingMemory:
    """Return the memory of the rank that needs most: one of the first stage, which holds the activations of up to
    `pipeline` micro-batches, or of the last, which holds the logits.

    Under ZeRO the sharded parts are 1/n of themselves over n data and sequence ranks; stage 3 holds two gathered layers.
    One rank's share of positions is 1/sequence. Left out: buffers of the communication library.

    Raises:
        BadInput: the layout cannot be run.
    """
    check_layout(model, setup, layout)
    found = {}
    for place, part in stages(model, layout).items():
        in_flight = min(layout.pipeline, setup.gradient_accumulation) if place == "first" else 1
        for moment, sizes in moments(part, setup, in_flight=in_flight).items():
            name = moment if layout.pipeline == 1 else f"{moment}, {place} stage"
            found[name] = _sharded(sizes, part, setup, layout)
    moment = highest(found)
    return assemble(found[moment], setup, moment)


_STAGE = {"optimiser states": 1, "master copies": 1, "gradients": 2, "weights": 3, "adapters": 3}  # ZeRO's, by part


def _sharded(sizes: Mapping[str, float], part: Model, setup: TrainingSetup, layout: Layout) -> dict[str, float]:
    one_at_a_time = setup.method == "lomo" or setup.fused_optimiser  # a single gradient is not split
    result = dict(sizes)
    for name, stage in _STAGE.items():
        size = sizes.get(name, 0.0)
        if layout.zero_stage >= stage and not (name == "gradients" and one_at_a_time):
            result[name] = size / layout.replicas
        else:
            result[name] = size * (1 - expert_share(part, setup, name) * (1 - 1 / layout.expert))
    for name in ("activations", "logits"):
        result[name] = sizes.get(name, 0.0) / layout.sequence
    if layout.zero_stage == 3:  # two whole layers; a rank's own share of them is counted among the weights
        gathered = base_bytes(part, setup) * min(1.0, GATHERED_LAYERS / part.layers)
        result["workspace"] += gathered * (1 - 1 / layout.replicas)
    return result


# ---------------------------------------------------------------- what goes over the links


def step_traffic(model: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> dict[str, Traffic]:
    """Return what one rank sends in an optimiser step, by kind of parallelism. Kinds that are not used are absent.

        tensor    2 all-reduces of the hidden states for each layer forward, 2 backward      arXiv:1909.08053
        sequence  all-to-all of queries, keys, values and output, forward and backward       arXiv:2309.14509
        expert    tokens to their experts and back, forward and backward                     arXiv:2006.16668
        pipeline  hidden states on, gradients back, for each micro-batch                     arXiv:2104.04473
        data      all-reduce of gradients; ZeRO-1 and 2: reduce-scatter and all-gather, the same bytes; ZeRO-3: weights
                  gathered forward and backward besides, half as much again                  arXiv:1910.02054

    Checkpointing repeats what the forward pass sends within a layer. ZeRO-2 and 3 reduce for each micro-batch.

    Raises:
        BadInput: the layout cannot be run.
    """
    check_layout(model, setup, layout)
    part = list(stages(model, layout).values())[-1]
    a, micro = DTYPE_BYTES[setup.weight_dtype], setup.gradient_accumulation
    hidden = setup.tokens / layout.sequence * model.hidden_size * a
    passes = part.layers * micro * (3 if setup.checkpointing and setup.method != "mezo" else 2)
    t, experts = layout.tensor, cluster.link(layout.tensor * layout.sequence * layout.expert)
    found = {
        "tensor": all_reduce(hidden, t, cluster.link(t)).times(2 * passes),
        "sequence": _heads_exchange(model, setup, layout, cluster).times(passes),
        "expert": all_to_all(hidden * max(1, model.experts_active), layout.expert, experts).times(2 * passes),
        "pipeline": send(hidden, cluster.link(layout.ranks)).times(micro * min(2, layout.pipeline - 1)),
        "data": _gradient_traffic(part, setup, layout, cluster),
    }  # fmt: skip
    return {name: traffic for name, traffic in found.items() if traffic.bytes}


def _heads_exchange(model: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> Traffic:
    heads = 2 * (model.heads + model.kv_heads) * model.head_size / layout.tensor  # queries, output, keys, values
    size = setup.tokens / layout.sequence * heads * DTYPE_BYTES[setup.weight_dtype]
    return all_to_all(size, layout.sequence, cluster.link(layout.tensor * layout.sequence))


def _gradient_traffic(part: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> Traffic:
    if layout.replicas == 1:
        return NOTHING
    every = replace(setup, fused_optimiser=False, method="full" if setup.method == "lomo" else setup.method)
    link, micro = cluster.link(layout.tensor * layout.replicas), setup.gradient_accumulation
    gradients, weights = gradient_bytes(part, every), base_bytes(part, setup)
    trained = weights if setup.whole else trained_params(part, setup) * DTYPE_BYTES[setup.adapter_dtype]
    if setup.method == "mezo":  # each rank takes the step by itself from one number: arXiv:2305.17333
        trained = 0.0

    def over(ranks: int, share: Callable[[str], float]) -> Traffic:
        summed = gradients * share("gradients")
        if layout.zero_stage == 0:
            return all_reduce(summed, ranks, link)
        if layout.zero_stage == 3:
            gathered = all_gather(weights * share("weights"), ranks, link)  # forward, and again backward
            return reduce_scatter(summed, ranks, link).times(micro) + gathered.times(2 * micro)
        reduced = reduce_scatter(summed, ranks, link).times(micro if layout.zero_stage == 2 else 1)
        return reduced + all_gather(trained * share("adapters"), ranks, link)

    def inside(name: str) -> float:
        return expert_share(part, setup, name)

    if layout.expert == 1:
        return over(layout.replicas, lambda name: 1.0)
    dense = over(layout.replicas, lambda name: 1 - inside(name))
    return dense + over(layout.replicas // layout.expert, lambda name: inside(name) / layout.expert)


def decode_traffic(model: Model, *, batch: int, tensor: int, link: Link) -> Traffic:
    """Return what one rank sends for one decode step under tensor parallelism: for each token of each request
    2 all-reduces of a hidden state for each layer, and the gathering of logits. Values of 16 bits.

    Raises:
        BadInput: the ranks do not divide the heads.
    """
    _divides("tensor", tensor, model.heads, "heads")
    states = all_reduce(2.0 * batch * model.hidden_size, tensor, link).times(2 * model.layers)
    return states + all_gather(2.0 * batch * model.vocab_size, tensor, link)


# ---------------------------------------------------------------- pipelines


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
    return assemble(found[moment], setup, moment)


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


# ---------------------------------------------------------------- all of it


def distributed_cost(
    model: Model, setup: TrainingSetup, hardware: Hardware, layout: Layout, cluster: Cluster, *, tokens: float
) -> DistributedCost:
    """Return memory, time, energy, carbon and money of a run over `layout.ranks` machines of one device like `hardware`.

    Raises:
        BadInput: the layout cannot be run.
        EnvironmentProblem: the device lacks a rate, or anything to model its power from.
    """
    memory, traffic = rank_memory(model, setup, layout), step_traffic(model, setup, layout, cluster)
    time = distributed_time(model, setup, hardware, layout, traffic, tokens=tokens)
    cost = bill(
        memory,
        time,
        setup,
        hardware,
        moved_bytes=moved_bytes(model, setup, layout),
        tokens=tokens,
        machines=layout.ranks,
    )
    return DistributedCost(cost=cost, traffic=traffic, ranks=layout.ranks)


def distributed_time(
    model: Model, setup: TrainingSetup, hardware: Hardware, layout: Layout, traffic: Mapping[str, Traffic], *,
    tokens: float,
) -> TrainingTime:  # fmt: skip
    """Return a step's time on every rank, whose traffic is `step_traffic`.

        step = one device's work / (tensor x pipeline x sequence), bubbles, and traffic: half of the data traffic hides
        behind the backward pass, the rest of it and all other kinds wait

    Raises:
        BadInput: the formulas do not hold for this model.
        EnvironmentProblem: the device lacks the rate of the weights' dtype.
    """
    alone = training_time(model, setup, hardware)
    ways = layout.tensor * layout.pipeline * layout.sequence
    shares = {
        "compute": ways, "recomputation": ways, "unpacking": layout.tensor * layout.pipeline, "launches": layout.pipeline,
        "optimiser": _splits(layout),
    }  # fmt: skip
    parts = {name: s / shares[name] for name, s in alone.parts.items()}
    idle = bubble_ratio(layout.pipeline, setup.gradient_accumulation)
    parts["bubbles"] = sum(parts[name] for name in parts if name != "optimiser") * idle / (1 - idle)
    parts |= {name: t.s * (1 - HIDDEN_RATIO if name == "data" else 1) for name, t in traffic.items()}
    why = utilisation_prior(setup, hardware.device)
    if layout.ranks > 1:
        why = f"{why}; {layout.ranks} ranks; {HIDDEN_RATIO:.0%} of data traffic taken as hidden"
    return as_time(parts, alone.flop / ways, setup, tokens=tokens, why=why, replicas=layout.data)


def moved_bytes(model: Model, setup: TrainingSetup, layout: Layout) -> float:
    """Return the bytes of weights and states a rank reads and writes in a step."""
    weights = base_bytes(model, setup) * 3 * setup.gradient_accumulation
    return (weights + 2 * state_bytes(model, setup)) / _splits(layout)


def _splits(layout: Layout) -> int:
    return layout.tensor * layout.pipeline * (layout.replicas if layout.zero_stage else 1)
