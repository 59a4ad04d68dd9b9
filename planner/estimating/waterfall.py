"""Where time and memory go: the cost terms' own parts, so that they add up to the figures printed above them.

What a part reads and computes is asked of the very term, priced on a machine that reads one byte (computes one
operation) each second and does all else at once; no formula is written here a second time. The layers' matrices are
split by their parameters where these follow from the model's shape, and stay together where they do not. An engine that
is known by its law has the law's parts.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, TypedDict

from planner.estimating.pricing import PEAK, ByLaw, ByOperators, Priced

if TYPE_CHECKING:
    from cost_models.case import Case
    from knowledge_base.types import Demand

Bound = Literal["read-bound", "arithmetic-bound", "host-bound", "link-bound", "waiting"]
PHASES = {"prefill": "ttft_s", "decode": "tpot_s"}  # phase -> the metric that is its time
LAYERS = "layers' matrices"
NAMES = {  # what a term calls a part -> what people call it
    "weights": LAYERS, "head": "output head", "attention": "attention scores",
    "engine": "engine, runtime and allocator", "waiting": "waiting for others",
}  # fmt: skip
AT_ONCE = 1e30  # a rate beside which all others are slow
KNOWN_RATIO = 0.01  # a shape explains the layers' parameters where it is off by less: biases, norms of heads


class TimePart(TypedDict):
    """What one group of operators takes of a phase."""

    name: str
    time_s: float
    share: float  # of the phase
    bound: Bound  # which of the machine's rates it waits for
    read_bytes: float | None  # weights and cache, of all devices; null where an engine's law does not tell
    flop: float | None  # in decode of a step of all that run


class MemoryPart(TypedDict):
    """What one thing takes of peak memory."""

    name: str
    memory_bytes: float
    share: float  # of peak memory


class Waterfall(TypedDict):
    """Parts of ttft_s, tpot_s and peak_memory_bytes; each list adds up to that figure."""

    prefill: list[TimePart]
    decode: list[TimePart]  # for each output token after the first
    memory: list[MemoryPart]


def waterfall(priced: Priced) -> Waterfall:
    """Return the parts of a plan's figures, in the terms' order; none of what is not predicted."""
    if isinstance(priced, ByLaw):
        return _of_law(priced)
    if not isinstance(priced, ByOperators):
        raise TypeError(type(priced))
    return Waterfall(
        prefill=_times(priced, PHASES["prefill"]), decode=_times(priced, PHASES["decode"]), memory=_memory(priced)
    )


# ---------------------------------------------------------------- time


def _times(priced: ByOperators, metric: str) -> list[TimePart]:
    if metric not in priced.figures:
        return []
    case = _prompts_alone(priced.case) if metric == PHASES["prefill"] else priced.case
    seconds = _parts(case, priced, metric)
    whole = float(priced.figures[metric].mid[0])
    waiting = whole - sum(seconds.values())
    if waiting < 0:  # in a server's steps the last answers run beside fewer others than a full step holds
        seconds = {name: time_s * whole / (whole - waiting) for name, time_s in seconds.items()}
    reading = _parts(_at(case, flop_per_s=AT_ONCE, host_s=0.0), priced, metric)
    computing = _parts(_at(case, bytes_per_s=AT_ONCE, host_s=0.0), priced, metric)
    starting = _parts(_at(case, bytes_per_s=AT_ONCE, flop_per_s=AT_ONCE), priced, metric)
    read_bytes = _parts(_at(case, bytes_per_s=1.0, flop_per_s=AT_ONCE, host_s=0.0), priced, metric)
    flop = _parts(_at(case, bytes_per_s=AT_ONCE, flop_per_s=1.0, host_s=0.0), priced, metric)
    found: list[TimePart] = []
    if waiting > 1e-9 * whole:
        found.append(TimePart(name=NAMES["waiting"], time_s=waiting, share=waiting / whole, bound="waiting", read_bytes=0.0, flop=0.0))  # fmt: skip
    for name in (name for name, time_s in seconds.items() if time_s > 0):
        alone: dict[Bound, float] = {
            "read-bound": reading[name], "arithmetic-bound": computing[name], "host-bound": starting[name]
        }  # fmt: skip
        part = TimePart(
            name=NAMES.get(name, name), time_s=seconds[name], share=seconds[name] / whole,
            bound=max(alone, key=alone.__getitem__), read_bytes=read_bytes[name], flop=flop[name],
        )  # fmt: skip
        found += _split(part, priced, metric, read_bytes[name], flop[name]) if name == "weights" else [part]
    return found


def _prompts_alone(case: Case) -> Case:
    """Return the case in which prompts are read: one at a time where answers share the steps of a server."""
    import numpy as np

    from cost_models.load import with_batch

    return with_batch(case, np.ones_like(case.demand.batch)) if np.all(case.slotted) else case


def _parts(case: Case, priced: ByOperators, metric: str) -> dict[str, float]:
    """Return the parts of a term on a changed machine, in seconds."""
    import numpy as np

    from cost_models.terms import terms

    with np.errstate(divide="ignore", invalid="ignore"):  # shares of a whole that now takes no time
        parts = terms.get(metric).predict(case, priced.figures).parts
    return {name: float(np.sum(part)) for name, part in parts.items()}


def _at(
    case: Case, *, bytes_per_s: float | None = None, flop_per_s: float | None = None, host_s: float | None = None
) -> Case:
    """Return the case on a machine with these rates, for whatever it reads, computes or starts."""
    rates = {}
    for field in (f.name for f in fields(case.rates)):
        if bytes_per_s is not None and field.endswith("bytes_per_s"):
            rates[field] = bytes_per_s
        if flop_per_s is not None and field.endswith("flop_per_s"):
            rates[field] = flop_per_s
        if flop_per_s is not None and field == "few_rows_share":
            rates[field] = 1.0
        if host_s is not None and field in ("kernel_s", "step_s"):
            rates[field] = host_s
    return replace(case, rates=replace(case.rates, **rates))


def _split(part: TimePart, priced: ByOperators, metric: str, read_bytes: float, flops: float) -> list[TimePart]:
    """Return the layers' matrices by kind: time follows bytes where reading binds, operations where arithmetic does."""
    kinds = layer_kinds(priced.demand)
    if len(kinds) == 1:
        return [part]
    # Experts are read as far as tokens wake them, all else whole: as in the model whose experts are all chosen.
    dense = replace(priced.case, model=SimpleNamespace(**vars(priced.case.model)))
    dense.model.params_active = dense.model.params_total
    all_bytes = _parts(_at(dense, bytes_per_s=1.0, flop_per_s=AT_ONCE, host_s=0.0), priced, metric)["weights"]
    model = priced.demand.model
    active = 1 - (model.params_total - model.params_active) / model.linear_params
    read: dict[str, float] = {}
    flop: dict[str, float] = {}
    for kind in kinds:  # the routed kind comes last: it is what remains
        read[kind.name] = read_bytes - sum(read.values()) if kind.routed else kind.share * all_bytes
        flop[kind.name] = flops - sum(flop.values()) if kind.routed else kind.share / active * flops
    weights = read if part["bound"] == "read-bound" else flop
    whole = sum(weights.values())
    return [
        TimePart(
            name=name, time_s=part["time_s"] * weights[name] / whole, share=part["share"] * weights[name] / whole,
            bound=part["bound"], read_bytes=read[name], flop=flop[name],
        )
        for name in weights
    ]  # fmt: skip


def _of_law(priced: ByLaw) -> Waterfall:
    """Return the law's parts, each with what it waits for."""
    served = priced.served

    def told(metric: str, name: str, time_s: float, whole: float) -> TimePart:
        read_bytes, flop = served.work[metric].get(name, (None, None))
        bound: Bound = served.bounds[metric][name]  # type: ignore[assignment]
        return TimePart(name=name, time_s=time_s, share=time_s / whole, bound=bound, read_bytes=read_bytes, flop=flop)

    times = {
        phase: [
            told(metric, name, part, sum(served.parts[metric].values()))
            for name, part in served.parts[metric].items() if part > 0
        ]
        for phase, metric in PHASES.items()
    }  # fmt: skip
    stored = served.parts[PEAK]
    return Waterfall(
        prefill=times["prefill"], decode=times["decode"],
        memory=[
            MemoryPart(name=NAMES["engine"] if n == "engine" else n, memory_bytes=size, share=size / sum(stored.values()))
            for n, size in stored.items() if size > 0
        ],
    )  # fmt: skip


# ---------------------------------------------------------------- memory


def _memory(priced: ByOperators) -> list[MemoryPart]:
    import numpy as np

    whole = priced.values[PEAK].mid
    names = {**NAMES, "KV cache": "KV cache and state"} if priced.demand.model.state_bytes else NAMES
    found: dict[str, float] = {}
    for name, part in priced.figures[PEAK].parts.items():
        if name == "weights":
            found |= _stored(priced)
        else:
            found[names.get(name, name)] = float(np.sum(part))
    return [MemoryPart(name=n, memory_bytes=size, share=size / whole) for n, size in found.items() if size > 0]


def _stored(priced: ByOperators) -> dict[str, float]:
    """Return the bytes of the weights by kind."""
    import numpy as np

    parts = {name: float(np.sum(part)) for name, part in priced.figures["weights_bytes"].parts.items()}
    layers = parts.pop("layers")
    names = NAMES if parts["head"] else {**NAMES, "embedding": "embedding and output head"}
    found = {kind.name: kind.share * layers for kind in layer_kinds(priced.demand)}
    return found | {names.get(name, name): size for name, size in parts.items()}


# ---------------------------------------------------------------- the layers' matrices


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of the layers' matrices. `share`: of their parameters; `routed`: tokens choose among them."""

    name: str
    share: float
    routed: bool = False


def layer_kinds(demand: Demand) -> tuple[Kind, ...]:
    """Return what the layers' matrices are for, as far as the model's shape tells it: shares add up to 1.

    Attention is 2 hidden_size head_size (heads + kv_heads) in each of its layers, feed-forward 3 (2 without a gate)
    hidden_size ffn_size, experts what tokens leave idle over the share of experts they leave idle.
    """
    model = demand.model
    if abs(demand.linear_params / model.linear_params - 1) > KNOWN_RATIO:  # a step changed matrices one by one
        return (Kind(LAYERS, 1.0),)
    attention = 2 * model.attention_layers * model.hidden_size * model.head_size * (model.heads + model.kv_heads)
    each = (3 if model.gated_ffn else 2) * model.layers * model.hidden_size * model.ffn_size
    if model.experts > model.experts_active:
        idle = (model.params_total - model.params_active) / model.linear_params
        experts = min(1.0, idle / (1 - model.experts_active / model.experts))
        router = model.layers * model.hidden_size * model.experts
        known = _explains(attention + each * model.experts + router, model.linear_params)
        rest = "attention projections and router" if known else "layers beside the experts"
        return Kind(rest, 1 - experts), Kind("experts", experts, routed=True)
    if not _explains(attention + each, model.linear_params):
        return (Kind(LAYERS, 1.0),)
    share = attention / (attention + each)
    return Kind("attention projections", share), Kind("feed-forward", 1 - share)


def _explains(params: float, linear_params: int) -> bool:
    return abs(params / linear_params - 1) <= KNOWN_RATIO
