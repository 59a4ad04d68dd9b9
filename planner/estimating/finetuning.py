"""What fine-tuning a model takes: memory of a rank and time of a step by part, bytes over the links, energy and money.

Training from scratch is the same arithmetic over more tokens. Several machines, or unequal devices in one, are a pipeline
of unequal stages; equal devices of one machine are laid out as asked.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypedDict

from cost_models.distributed import (
    Cluster,
    Layout,
    Link,
    Traffic,
    check_layout,
    distributed_time,
    moved_bytes,
    rank_memory,
    step_traffic,
    unequal_pipeline,
)
from cost_models.distributed.links import ETHERNET
from cost_models.training import (
    OPTIMISERS,
    WHOLE,
    TrainingCost,
    TrainingMemory,
    TrainingSetup,
    TrainingTime,
    bill,
    check_model,
    state_bytes,
    trained_params,
    training_memory,
    training_time,
)
from cost_models.training.named import (
    ALL_PARAMETERS,
    LONG_NAMES,
    METHOD_SETTINGS,
    RANKED,
    TECHNIQUE_SETTINGS,
    method_of,
    setup_of,
)
from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem, LeanplanError
from knowledge_base.types import Hardware, Model, Value
from knowledge_base.units import quote

LATENCY_S = 5e-6  # of a message between devices of a machine: NCCL's base latencies are 3 to 8 microseconds
PCIE_BYTES_PER_S = 25e9  # PCIe 4.0 x16 in one direction, what of its 31.5 GB/s arrives
MOST_REMEDIES = 3
FLAGS = {  # what a setting is called on the command line
    "sequence_tokens": "--sequence-tokens", "gradient_accumulation": "--accumulation", "targets": "--finetune",
    "base_format": "--finetune", "optimiser": "--optimizer",
    **dict.fromkeys(("data", "tensor", "pipeline", "sequence", "expert", "zero_stage", "tensor x sequence"), "--parallel"),
}  # fmt: skip
KINDS = ("data", "tensor", "pipeline", "sequence", "expert", "zero")


# ---------------------------------------------------------------- what is asked


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One way of training in one place. `names`: a method and what goes with it, by the knowledge base's names."""

    model: Model
    machines: tuple[Hardware, ...]  # several, or one of unequal devices: a pipeline through all of them
    names: tuple[str, ...] = (ALL_PARAMETERS,)
    optimiser: str | None = None
    batch: int = 1
    sequence_tokens: int = 512
    accumulation: int = 1
    rank: int | None = None  # None: 16
    parallel: Mapping[str, int] | None = None  # KINDS -> ways; None: data parallel over all devices
    link_bytes_per_s: float | None = None  # inside a machine; None: the devices' own
    network_bytes_per_s: float | None = None  # between machines
    tokens: float = 1e6

    @property
    def words(self) -> str:
        """`qlora + gradient_checkpointing`."""
        return " + ".join(self.names)

    @cached_property
    def devices(self) -> tuple[Hardware, ...]:
        """Each device as a machine of its own, with its part of the price: GPUs, or the CPU where there are none."""
        found: list[Hardware] = []
        for machine in self.machines:
            alike = [device for device in machine.devices if device.kind == machine.device.kind]
            price = None if machine.price_usd_per_h is None else machine.price_usd_per_h / len(alike)
            unequal = any(device != machine.device for device in alike)
            for device in alike:
                if device.kind == "cpu":
                    device = replace(device, memory_bytes=machine.memory_limit_bytes)
                name = device.name if unequal else machine.name
                found.append(replace(machine, name=name, devices=(device,), price_usd_per_h=price))
        return tuple(found)

    @property
    def staged(self) -> bool:
        """Whether its devices are one pipeline, a stage each: several machines, or one of unequal devices."""
        return len(self.machines) > 1 or any(one.device != self.devices[0].device for one in self.devices)

    @property
    def limit_bytes(self) -> int:
        """Memory of one rank's device."""
        return self.devices[0].device.memory_bytes

    @property
    def layout(self) -> Layout:
        if self.staged:
            return Layout(pipeline=len(self.devices))
        ways = {"data": len(self.devices)} if self.parallel is None else dict(self.parallel)
        zero = ways.pop("zero", 0)
        return Layout(**ways, zero_stage=zero)

    @property
    def cluster(self) -> Cluster:
        """What joins the devices: their own links inside a machine, or PCIe; the network, or Ethernet, beyond."""
        links = [one.device.link_bytes_per_s for one in self.devices]
        own = self.link_bytes_per_s or min(link or 0.0 for link in links)
        inside = Link(
            name="its own" if own else "PCIe 4.0 x16", bytes_per_s=own or PCIE_BYTES_PER_S, latency_s=LATENCY_S
        )
        between, network = ETHERNET, self.network_bytes_per_s or self.machines[0].network_bytes_per_s
        if network is not None:
            between = Link(name="the network", bytes_per_s=network, latency_s=ETHERNET.latency_s)
        together = 1 if len(self.machines) > 1 else self.machines[0].devices_per_machine
        return Cluster(devices_per_machine=together, inside=inside, between=between)

    @property
    def dtype(self) -> str:
        """The dtype of weights and activations: the best that every device has a rate for."""
        known = [device.device.flop_per_s for device in self.devices]
        return next((d for d in ("bfloat16", "float16") if all(d in rates for rates in known)), "float32")

    @cached_property
    def setup(self) -> TrainingSetup:
        settings = {} if self.optimiser is None else {"optimiser": self.optimiser}
        setup = setup_of(
            self.model, self.names, weight_dtype=self.dtype, batch=self.batch, sequence_tokens=self.sequence_tokens,
            gradient_accumulation=self.accumulation, rank=16 if self.rank is None else self.rank, **settings,
        )  # fmt: skip
        return replace(setup, gradient_buckets=setup.gradient_buckets or self.layout.data > 1)

    def check(self) -> None:
        """Refuse what cannot be: a setting nothing uses, a layout that does not fit the devices, a device without a feature.

        Raises:
            BadInput: says why and names the flag.
        """
        try:
            self._check_names()
            if self.staged:
                self._check_pipeline()
            else:
                self._check_layout()
        except BadInput as error:
            raise BadInput(error.message, hint=error.hint, where=FLAGS.get(error.where or "", error.where)) from error

    def _check_pipeline(self) -> None:
        if self.parallel is not None:
            raise BadInput(
                "several machines, or unequal devices in one, are one pipeline, a stage for each device",
                hint="leave --parallel out, or name one machine of equal devices", where="--parallel",
            )  # fmt: skip
        check_model(self.model, self.setup)

    def _check_layout(self) -> None:
        check_layout(self.model, self.setup, self.layout)
        needed, there = self.layout.ranks, len(self.devices)
        if needed != there:
            raise BadInput(
                f"the layout is for {devices(needed)}, the machine has {there}",
                hint=f"data x tensor x pipeline x sequence must be the number of devices; or --devices {needed}",
                where="--parallel",
            )  # fmt: skip

    def _check_names(self) -> None:
        from knowledge_base.field import field

        method = method_of(self.names)
        for name in (method, *self.names):
            for lacking in self._lacking(field().method(name).requires.hardware):
                raise BadInput(
                    f"`{name}` needs {lacking}", hint="leave it out, or name another machine: leanplan ls machines",
                    where="--finetune",
                )  # fmt: skip
        if self.rank is not None and method not in RANKED:
            raise BadInput(f"`{method}` has no rank", hint="leave --rank out", where="--rank")
        if self.rank is not None and self.rank > self.model.hidden_size:
            raise BadInput(
                f"a rank of {self.rank} is more than the matrices' {self.model.hidden_size}: nothing would be saved",
                hint="ranks are mostly from 4 to 256", where="--rank",
            )  # fmt: skip
        if self.optimiser is not None and any("optimiser" in TECHNIQUE_SETTINGS.get(name, {}) for name in self.names):
            raise BadInput(
                f"`{self.words}` names an optimiser already", hint="leave --optimizer out", where="--optimizer"
            )
        adapter_only = [
            n for n in ("pure_bf16", "mixed_precision") if n in self.names and self.setup.method not in WHOLE
        ]
        if adapter_only:
            raise BadInput(
                f"`{adapter_only[0]}` is a way of training all parameters, `{method}` does not",
                hint="leave it out", where="--finetune",
            )  # fmt: skip

    def _lacking(self, needs: Sequence[str]) -> Iterator[str]:
        for machine in self.devices:
            device = machine.device
            if "gpu" in needs and device.kind != "gpu":
                yield f"a GPU, and {quote(device.name)} is none"
            elif "bf16" in needs and "bfloat16" not in device.flop_per_s:
                yield f"bfloat16, of which {quote(device.name)} has no known rate"


def devices(count: int) -> str:
    """Return `1 device`, `2 devices`."""
    return "1 device" if count == 1 else f"{count} devices"


def read_names(text: str, flag: str = "--finetune") -> tuple[str, ...]:
    """Return the names of a way of training as written: `qlora+gradient_checkpointing`.

    Raises:
        BadInput: an unknown name, with the nearest, or one whose cost has no formula.
    """
    from knowledge_base.field import field

    known = {**METHOD_SETTINGS, **TECHNIQUE_SETTINGS}
    found: list[str] = []
    for part in text.split("+"):
        name = LONG_NAMES.get(part.strip(), part.strip())
        if name in OPTIMISERS:
            raise BadInput(f"`{name}` is an optimiser", hint=f"--optimizer {name}", where=f"{flag} {text}")
        if name not in known:
            near = difflib.get_close_matches(name.casefold(), known, n=3)
            guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
            there = name in field().methods
            said = (
                f"what `{name}` takes has no formula here" if there else f"unknown way of training {quote(name)}{guess}"
            )
            raise BadInput(said, hint=f"one of {', '.join(METHOD_SETTINGS)}; with any of {', '.join(TECHNIQUE_SETTINGS)}", where=flag)  # fmt: skip
        if name not in found:
            found.append(name)
    method = method_of(tuple(found))
    return (method, *(name for name in found if name != method))


def read_parallel(text: str) -> dict[str, int]:
    """Return how the devices are laid out: `data=4,tensor=2,zero=3`.

    Raises:
        BadInput: an unknown kind, one named twice, or no whole number.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        kind, _, ways = (piece.strip() for piece in part.partition("="))
        if kind not in KINDS or not ways.isascii() or not ways.isdigit() or len(ways) > 6 or kind in found:
            raise BadInput(
                f"cannot read {quote(part.strip())} of {quote(text)}",
                hint=f"write each kind once, for example data=4,tensor=2,zero=3; kinds: {', '.join(KINDS)}", where="--parallel",
            )  # fmt: skip
        found[kind] = int(ways)
    return found


# ---------------------------------------------------------------- what is predicted


class MemoryShare(TypedDict):
    """One thing in the memory of the rank that needs most."""

    name: str
    memory_bytes: Value
    share: float  # of peak memory


class StepShare(TypedDict):
    """What one thing takes of an optimiser step."""

    name: str
    time_s: float
    share: float  # of the step


class Sent(TypedDict):
    """What a rank sends in a step for one kind of parallelism."""

    kind: str
    sent_bytes: float
    time_s: float  # when nothing hides it


class PipelineStage(TypedDict):
    """What one device of a pipeline through unequal machines holds."""

    hardware: str
    layers: int
    peak_memory_bytes: Value
    memory_limit_bytes: float


class Fitting(TypedDict):
    """A change with which it fits."""

    change: str
    peak_memory_bytes: Value


class ForEachParameter(TypedDict):
    """The whole run over the parameters of the model."""

    energy_j: float
    carbon_gco2e: float
    cost_usd: float


class FineTuned(TypedDict):
    """What training a model one way takes. Times, energy and money hold only where it fits."""

    model: str
    hardware: str
    words: str  # the way of training
    setup: TrainingSetup
    layout: Layout
    devices: int
    tokens: float  # of the whole run
    trained_params: float
    peak_memory_bytes: Value  # of the rank that needs most; of unequal stages, of the one nearest its limit
    memory_limit_bytes: float  # of its device
    fits: bool
    remedies: list[Fitting]  # where it does not fit
    memory: list[MemoryShare]  # adds up to peak_memory_bytes
    step_s: Value
    step: list[StepShare]  # adds up to step_s
    sent: list[Sent]
    sent_bytes: float  # by a rank in a step
    tokens_per_s: Value
    total_s: Value
    energy_j: Value | None
    carbon_gco2e: Value | None
    cost_usd: Value | None
    for_each_parameter: ForEachParameter | None
    not_billed: str  # why the four above are not known
    stages: list[PipelineStage]  # of unequal machines
    notes: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Priced:
    memory: TrainingMemory
    time: TrainingTime
    traffic: Mapping[str, Traffic]
    costs: Sequence[TrainingCost] = ()
    not_billed: str = ""
    stages: Sequence[PipelineStage] = ()
    limit_bytes: float


def peak(tuning: Tuning) -> Value:
    """Return the memory of the rank that needs most."""
    return rank_memory(tuning.model, tuning.setup, tuning.layout).total


def finetuned(tuning: Tuning) -> FineTuned:
    """Return what `check` let pass takes.

    Raises:
        BadInput: it does not fit a pipeline of unequal machines at all.
        EnvironmentProblem: a device lacks the rate of the weights' dtype.
    """
    priced = _pipeline(tuning) if tuning.staged else _layout(tuning)
    total, step = priced.memory.total, priced.time.step
    fits = total.mid <= priced.limit_bytes
    parts = {name: s for name, s in priced.time.parts.items() if s > 0}
    energy, carbon, money = (
        _sum([getattr(cost, name) for cost in priced.costs]) for name in ("energy_j", "carbon_gco2e", "cost_usd")
    )
    each = None
    if energy and carbon and money:
        count = tuning.model.params_total
        each = ForEachParameter(
            energy_j=energy.mid / count, carbon_gco2e=carbon.mid / count, cost_usd=money.mid / count
        )
    return FineTuned(
        model=tuning.model.name, hardware=", ".join(machine.name for machine in tuning.machines), words=tuning.words,
        setup=tuning.setup, layout=Layout(pipeline=len(priced.stages)) if tuning.staged else tuning.layout,
        devices=len(priced.stages) or len(tuning.devices), tokens=tuning.tokens, trained_params=trained_params(tuning.model, tuning.setup),
        peak_memory_bytes=total, memory_limit_bytes=float(priced.limit_bytes), fits=fits,
        remedies=[] if fits else remedies(tuning),
        memory=[
            MemoryShare(name=name, memory_bytes=part, share=part.mid / total.mid)
            for name, part in priced.memory.parts.items()
        ],
        step_s=step, step=[StepShare(name=name, time_s=s, share=s / step.mid) for name, s in parts.items()],
        sent=[Sent(kind=kind, sent_bytes=t.bytes, time_s=t.s) for kind, t in priced.traffic.items()],
        sent_bytes=sum(t.bytes for t in priced.traffic.values()),
        tokens_per_s=priced.time.tokens_per_s, total_s=priced.time.total,
        energy_j=energy, carbon_gco2e=carbon, cost_usd=money, for_each_parameter=each,
        not_billed=priced.not_billed, stages=list(priced.stages), notes=[*_notes(tuning), *_pipeline_notes(tuning, priced)],
    )  # fmt: skip


def _layout(tuning: Tuning) -> _Priced:
    model, setup, layout, device = tuning.model, tuning.setup, tuning.layout, tuning.devices[0]
    memory = rank_memory(model, setup, layout)
    traffic = step_traffic(model, setup, layout, tuning.cluster)
    time = distributed_time(model, setup, device, layout, traffic, tokens=tuning.tokens)
    priced = _Priced(memory=memory, time=time, traffic=traffic, limit_bytes=tuning.limit_bytes)
    moved = moved_bytes(model, setup, layout)
    try:
        cost = bill(memory, time, setup, device, moved_bytes=moved, tokens=tuning.tokens, machines=layout.ranks)
    except EnvironmentProblem as problem:
        return replace(priced, not_billed=problem.message)
    return replace(priced, costs=[cost])


def _pipeline(tuning: Tuning) -> _Priced:
    try:
        link = tuning.cluster.link(len(tuning.devices))
        run = unequal_pipeline(tuning.model, tuning.setup, tuning.devices, link, tokens=tuning.tokens)
    except BadInput as error:
        raise BadInput(
            error.message, hint="gradient_checkpointing, qlora and --batch 1 need less; or add a machine", where="--on"
        ) from error
    fullest = max(run.stages, key=lambda s: s.memory.total.mid / s.hardware.device.memory_bytes)
    priced = _Priced(
        memory=fullest.memory, time=run.time, traffic=run.traffic,
        stages=[
            PipelineStage(
                hardware=stage.hardware.name, layers=stage.layers, peak_memory_bytes=stage.memory.total,
                memory_limit_bytes=float(stage.hardware.device.memory_bytes),
            )
            for stage in run.stages
        ],
        limit_bytes=fullest.hardware.device.memory_bytes,
    )  # fmt: skip
    try:
        costs = [
            bill(s.memory, s.time, tuning.setup, s.hardware, moved_bytes=s.moved_bytes, tokens=tuning.tokens)
            for s in run.stages
        ]
    except EnvironmentProblem as problem:
        return replace(priced, not_billed=problem.message)
    return replace(priced, costs=costs)


def _sum(values: Sequence[Value]) -> Value | None:
    """Return the sum; what the parts get wrong they get wrong together."""
    if not values:
        return None
    return Value(
        mid=sum(v.mid for v in values), low=sum(v.low for v in values), high=sum(v.high for v in values),
        source=values[0].source, because=_counted(v.because for v in values),
    )  # fmt: skip


def _counted(reasons: Iterable[str]) -> str:
    """Return reasons once each: `8 x 448 W for 1 h; 186 W for 1 h`."""
    return "; ".join(reason if count == 1 else f"{count} x {reason}" for reason, count in Counter(reasons).items())


def _notes(tuning: Tuning) -> list[str]:
    setup, said = tuning.setup, []
    if setup.offload_states:
        size = units.format(state_bytes(tuning.model, setup), "bytes")
        said.append(f"{size} of optimiser states are in the host's memory; moving them is left out of the time")
    if setup.offload_activations:
        said.append("moving activations to the host's memory and back is left out of the time")
    if (count := len(tuning.devices)) > 1:
        link = tuning.cluster.link(count)
        speed, start = units.format(link.bytes_per_s, "bytes"), units.format(link.latency_s, "time")
        said.append(f"slowest link: {link.name}, {speed}/s in one direction, {start} to begin")
    if tuning.model.quantised_format:
        kept = f"unpacked to {setup.weight_dtype}" if setup.whole else "trained on as they are stored"
        said.append(f"the file's matrices are in {tuning.model.quantised_format}; they are {kept}")
    if setup.weight_dtype == "float32":
        said.append("weights and activations in float32: a device has no known rate in 16 bits")
    return said


def _pipeline_notes(tuning: Tuning, priced: _Priced) -> Iterator[str]:
    """Yield which machines a pipeline of unequal ones leaves out, and which one alone would be quicker."""
    if not tuning.staged:
        return
    used = [stage["hardware"] for stage in priced.stages]
    for machine in {device.name: device for device in tuning.devices}.values():
        if machine.name not in used:
            yield f"{machine.name} is left out: too slow or too small for a layer"
        alone = training_time(tuning.model, tuning.setup, machine).step.mid
        needed = training_memory(tuning.model, tuning.setup).total.mid
        if needed <= machine.device.memory_bytes and alone < priced.time.step.mid:
            yield f"{machine.name} alone would be quicker: {units.format(alone, 'time')} for a step; more --accumulation fills a pipeline"


# ---------------------------------------------------------------- what would fit


def remedies(tuning: Tuning) -> list[Fitting]:
    """Return the smallest changes with which it fits: one alone where one is enough, else two, else three."""
    changes = _changes(tuning)
    for count in (1, 2, 3):
        found = [f for some in itertools.combinations(changes, count) if (f := _fitting(tuning, some))]
        if found:
            return found[:MOST_REMEDIES]
    return []


Change = tuple[str, Callable[[Tuning], Tuning]]


def _changes(tuning: Tuning) -> list[Change]:
    """Return what could be changed, what costs least first."""

    def adding(name: str) -> Change:
        return name, lambda t: replace(t, names=(*t.names, name))

    def method(name: str) -> Change:
        kept = {"pure_bf16", "mixed_precision", "fused_optimizer_backward"}
        return name, lambda t: replace(t, names=(name, *(n for n in t.names if n in TECHNIQUE_SETTINGS and n not in kept)))  # fmt: skip

    setup, found = tuning.setup, []
    if not setup.checkpointing:
        found.append(adding("gradient_checkpointing"))
    if not setup.chunked_cross_entropy:
        found.append(adding("chunked_cross_entropy"))
    if tuning.batch > 1:
        found.append(("--batch 1", lambda t: replace(t, batch=1)))
    if len(tuning.devices) > 1 and tuning.layout.zero_stage < 3:
        sharded = {"data": tuning.layout.data, **(tuning.parallel or {}), "zero": 3}
        written = ",".join(f"{kind}={ways}" for kind, ways in sharded.items())
        found.append((f"--parallel {written}", lambda t: replace(t, parallel=sharded)))
    if setup.method in ("full", "galore") and tuning.optimiser is None and setup.optimiser == "adamw":
        found.append(adding("low_bit_adam"))
    if setup.method in WHOLE:
        found.append(method("lora"))
    if setup.packed is None and not tuning.model.quantised_bytes:
        found.append(method("qlora"))
    return found


def _fitting(tuning: Tuning, changes: Sequence[Change]) -> Fitting | None:
    for _, change in changes:
        tuning = change(tuning)
    try:
        tuning.check()
        needed = peak(tuning)
    except LeanplanError:
        return None  # the change cannot be made here
    said = " + ".join(name for name, _ in changes)
    return Fitting(change=said, peak_memory_bytes=needed) if needed.mid <= tuning.limit_bytes else None
