"""What an engine that is only known by its law (serving.py) is predicted to do for a model, a machine and a load.

    serve("vllm", model, workload, hardware, weights="fp8") -> Served

Requests share the engine's steps (continuous batching). Clients in a closed loop are what the laws were fitted on;
arriving requests meet the server that stands for it (queueing.shared_service). Intervals hold 90 %: the factor that the
family's errors on unseen devices stayed within.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from cost_models import queueing, serving
from cost_models.demand import DTYPE_BYTES, demand_of
from cost_models.distributed.links import ETHERNET
from cost_models.efficiency import read_rows
from cost_models.load import copies, falls_behind
from cost_models.serving import Deployments, Laws
from cost_models.terms import terms
from cost_models.terms._prediction import Prediction
from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.types import Demand, Device, Hardware, Model, Value, Workload
from knowledge_base.units import quote

# How weights may be stored: bits for each of the layers' parameters, scales included, and the class of the laws.
WEIGHTS = {
    "bf16": (16.0, "16"), "fp8": (8.0, "fp8"), "int8": (8.5, "8"), "int4": (4.15, "4"), "fp4": (4.5, "fp4"),
}  # fmt: skip
FORMATS = {  # parts of the names of formats that checkpoints come in: float8_e4m3fn, mxfp4, int3
    "fp8": ("float8", "fp8"), "fp4": ("float4", "fp4"), "int8": ("int8", "int7", "int6", "int5"), "int4": ("int4", "int3", "int2"),
}  # fmt: skip
NARROW = {"fp8": ("fp8", 2.0), "fp4": ("int4", 4.0)}  # rates engines compute such weights at, and how much they gain
CACHE_OF_ONE_BYTE = ("tensorrt_llm",)  # with weights of 8 bits or fewer, as in the rows its law was fitted to
USUAL_KINDS = ("data centre",)  # what a law is of where nothing else is said
SPLITTING = ("vllm", "vllm_v0", "sglang", "tensorrt_llm", "gpt_fast", "mlc", "exllama")  # heads over several devices
_NVIDIA = frozenset({"cuda", "nvidia"})
ONLY_ON = {
    "mlx": frozenset({"metal"}), "tensorrt_llm": _NVIDIA, "exllama": _NVIDIA, "awq": _NVIDIA, "awq_gemv": _NVIDIA,
    "tinychat": _NVIDIA, "gpt_fast": _NVIDIA,
}  # fmt: skip
CHUNK_TOKENS = 8192  # of prompts read in one step, at most: the defaults of vLLM, SGLang and TensorRT-LLM
MOST_STATES = 2048  # requests in service that are told apart under arrivals
COVERAGE = 0.9
PLENTY = 1e6  # times a rate, beside which all others are slow
WAITING = ("turn", "queue", "no room", "others' prompts")  # parts that are other requests' work
UNIFORM_P95 = 1.9  # of the mean: others' prompts that a client waits for are between none and all
OF_REQUESTS = ("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "requests_per_s", "energy_j_per_token")
SEVERE = 0.02  # of utilisation left, where an error of the service is no longer told apart from a queue without end


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Predicted figures by metric, the parts they are made of, and what must be known to read them."""

    values: Mapping[str, Value]
    parts: Mapping[str, Mapping[str, float]]  # metric -> parts that add up to it; none where it is prevented
    bounds: Mapping[str, Mapping[str, str]]  # metric -> what each part of it waits for
    work: Mapping[
        str, Mapping[str, tuple[float, float]]
    ]  # metric -> (bytes read, flop) of the parts that do any, all devices
    prevented: Mapping[str, EnvironmentProblem]
    running: float  # requests served together, on average
    room: float  # most that the memory has room for
    devices: int
    limit_bytes: float  # memory of all devices
    notes: tuple[str, ...]


@lru_cache(maxsize=1)
def families() -> Mapping[str, int]:
    """Return the engine families with a law, and how many published measurements each was fitted to."""
    counts: dict[str, int] = {}
    for row in read_rows("engine_laws.csv"):  # what a family has of its own tells of fewer than what all share
        if (told := re.search(r"fitted to ([0-9]+)", row["source"])) and row["family"] != serving.POOLED:
            counts[row["family"]] = min(int(told[1]), counts.get(row["family"], 10**9))
    return counts


def serve(family: str, model: Model, workload: Workload, hardware: Hardware, *, weights: str | None = None) -> Served:
    """Return what is predicted.

    Raises:
        BadInput: weights of an unknown kind, or heads that cannot be split over the devices.
        EnvironmentProblem: the device lacks the rate the engine computes with.
    """
    count, device = copies(hardware), hardware.device
    _check_runs(family, model, device)
    _check_split(family, model, count)
    demand, weight_class, notes = _stored(family, model, workload, device, weights)
    flop_per_s, told = _rate(device, weight_class)
    link_bytes_per_s, assumed = _link(hardware, count)
    d = serving.deployment(_computing(demand, device), hardware, devices=count, clients=True)
    d = replace(
        d, flop_per_s=flop_per_s, batch=float(workload.concurrency), link_bytes_per_s=link_bytes_per_s
    )  # fmt: skip
    laws = serving.shipped()
    kind = serving.hardware_kind(device.name, device.features)
    tags = frozenset({f"{weight_class} moe" if model.experts else weight_class, kind})
    if kind not in USUAL_KINDS and (family, "read", kind) not in laws:
        notes.append(
            f"the law of {family} was not fitted on {kind} devices: what such devices change is taken from others"
        )
    law = {name: value[0] for name, value in serving.law_of(laws, [family], [tags]).items()}
    spreads = {q: serving.spread(laws, q, family) for q in ("tpot", "ttft", "energy", "memory")}
    found = _Serving(d, law, spreads, workload, hardware)
    served = found.served()
    if count > 1:
        sent = units.format(float(serving.exchange_bytes(d, 1.0)), "bytes")
        assumed.append(f"for each token of a prompt or an answer every device sends {sent} to the others")
    return replace(
        served, notes=(*notes, *told, *assumed, *found.notes, *_tight(laws, family, served, found.one_cache_bytes()))
    )


def _link(hardware: Hardware, count: int) -> tuple[float, list[str]]:
    """Return the rate of the slowest link between the devices, and what was assumed of them."""
    device, together = hardware.device, hardware.devices_per_machine
    found, told = device.link_bytes_per_s or serving.NO_LINK_BYTES_PER_S, []
    if count > 1 and not device.link_bytes_per_s:
        rate = units.format(serving.NO_LINK_BYTES_PER_S, "bandwidth")
        told.append(
            f"the link of `{device.name}` to its neighbours is not known: {rate} assumed, half of a PCIe 4.0 x16 slot"
        )
    if count > together:
        network = hardware.network_bytes_per_s
        between = f"{ETHERNET.name} between them assumed (a machine's file says yours)"
        if network is not None:
            between = f"{units.format(network, 'bandwidth')} between them"
        found = min(found, network or ETHERNET.bytes_per_s)
        told.append(
            f"{count} devices are {-(-count // together)} machines of at most {together}: {between}, "
            "which each exchange of a layer waits for"
        )
    return found, told


def _tight(laws: Laws, family: str, served: Served, one_cache_bytes: float) -> list[str]:
    """Return what there is to say of a deployment that fits by its middle figure, with the cache of one request at least."""
    memory = served.parts["peak_memory_bytes"]
    needed = sum(memory.values()) - max(memory["KV cache"] - one_cache_bytes, 0.0)
    guarded = float(serving.guarded_memory(laws, family, needed, served.devices))
    if not needed <= served.limit_bytes < guarded:
        return []
    told, most, there = (units.format(x, "bytes") for x in (needed, guarded, served.limit_bytes))
    return [
        f"may not fit: {told} of {there} with the cache of one request, and 1 in 50 such predictions is of up to {most}"
    ]


# ---------------------------------------------------------------- what is asked of the engine


def _check_runs(family: str, model: Model, device: Device) -> None:
    if model.kind != "decoder":
        raise BadInput(
            f"the laws of engines are of decoders, and this model is an {model.kind}",
            hint="price it with --engine transformers", where="--engine",
        )  # fmt: skip
    makers = ONLY_ON.get(family)
    if makers and not makers & device.features:
        raise BadInput(
            f"the law of {family} is of devices programmed with {' or '.join(sorted(makers))}, and {quote(device.name)} is not",
            hint="choose another engine, or another machine", where="--engine",
        )  # fmt: skip


def _check_split(family: str, model: Model, count: int) -> None:
    if count == 1:
        return
    if family not in SPLITTING:
        raise BadInput(
            f"{family} does not split a model over {count} devices", hint=f"these do: {', '.join(SPLITTING)}", where="--devices"
        )  # fmt: skip
    kv = model.kv_heads or 1
    if model.heads % count or (kv % count and count % kv):
        fits = [n for n in range(2, 65) if model.heads % n == 0 and (kv % n == 0 or n % kv == 0)]
        raise BadInput(
            f"{model.heads} heads and {model.kv_heads} key-value heads do not divide over {count} devices",
            hint=f"this model splits over {', '.join(map(str, fits))} devices" if fits else "serve it on one device",
            where="--devices",
        )  # fmt: skip


def _stored(
    family: str, model: Model, workload: Workload, device: Device, weights: str | None
) -> tuple[Demand, str, list[str]]:
    """Return the demand with weights stored as asked, their class, and what was assumed."""
    demand = demand_of(model, workload, family)
    notes = []
    stored, own_bits = _as_they_are(demand)
    if weights is None and own_bits > 16:
        notes.append(f"weights of {own_bits:g} bits are served in 16")
    elif weights is not None and weights not in WEIGHTS:
        raise BadInput(f"unknown weights {quote(weights)}", hint=f"one of: {', '.join(WEIGHTS)}", where="--weights")
    bits, weight_class = WEIGHTS[weights or stored]
    bits = min(own_bits, 16.0) if weights is None else bits  # those that were counted, not those of the class
    wide = 2.0 / DTYPE_BYTES.get(model.weight_dtype, 2)  # embedding, head and norms keep 16 bits
    cache = 1.0 if family in CACHE_OF_ONE_BYTE and weight_class in ("fp8", "fp4") else 2.0
    demand = replace(
        demand, linear_bytes=demand.linear_params * bits / 8, embedding_bytes=wide * demand.embedding_bytes,
        head_stored_bytes=wide * demand.head_stored_bytes, head_read_bytes=wide * demand.head_read_bytes,
        other_bytes=wide * demand.other_bytes,
        kv_bytes_per_token=demand.kv_bytes_per_token * cache / DTYPE_BYTES[demand.compute_dtype],
    )  # fmt: skip
    return demand, weight_class, notes


def _as_they_are(demand: Demand) -> tuple[str, float]:
    """Return which of WEIGHTS the model's own are, by the name of their format or else by their bits, and those bits."""
    bits = 8 * demand.linear_bytes / demand.linear_params
    for stored, formats in FORMATS.items():
        if any(name in demand.weight_format for name in formats):
            return stored, bits
    return "bf16" if bits > 12 else "int8" if bits > 6.5 else "int4", bits


def _computing(demand: Demand, device: Device) -> Demand:
    dtype = next((name for name in ("bfloat16", "float16") if name in device.flop_per_s), "bfloat16")
    return demand.but(compute_dtype=dtype)


def _rate(device: Device, weight_class: str) -> tuple[float, list[str]]:
    """Return the arithmetic rate weights of a class are multiplied at, and what was assumed."""
    from cost_models.efficiency import rate

    told = [] if "bfloat16" in device.flop_per_s else [f"`{device.name}` has no bfloat16 rate: computed in float16"]
    wide = rate(device, "float16" if "float16" in device.flop_per_s and told else "bfloat16")
    if weight_class not in NARROW:
        return wide, told
    dtype, gain = NARROW[weight_class]
    if dtype not in device.flop_per_s:
        return wide, [*told, f"`{device.name}` has no {weight_class} rate: such weights are widened, then multiplied"]
    return min(device.flop_per_s[dtype], gain * wide), told  # a measured wide rate holds back the narrow one


# ---------------------------------------------------------------- what it does


@dataclass(slots=True)
class _Serving:
    """One deployment under its workload's load."""

    d: Deployments
    law: Mapping[str, Any]
    spreads: Mapping[str, float]
    workload: Workload
    hardware: Hardware
    notes: tuple[str, ...] = ()

    def served(self) -> Served:
        """Return the figures under the load: a closed loop of clients, or arrivals."""
        room = self._room()
        values, parts, prevented, running = (
            self._clients(room) if self.workload.requests_per_s is None else self._arrivals(room)
        )
        memory, limit = self._memory_parts(running), float(self.d.devices * self.d.memory_bytes)
        if sum(memory.values()) > limit:  # nothing would run
            self.notes, values, parts = (), {}, {"ttft_s": {}, "tpot_s": {}}
            prevented = dict.fromkeys(OF_REQUESTS, self._too_large(sum(memory.values()), limit))
        values |= self._sizes(memory, running)
        parts["peak_memory_bytes"] = memory
        self._bill(values, prevented)
        return Served(
            values=values, parts=parts, bounds=self._bounds(running), work=self._work(running), prevented=prevented, running=running, room=room, devices=int(self.d.devices),
            limit_bytes=limit, notes=self.notes,
        )  # fmt: skip

    def _too_large(self, needed: float, there: float) -> EnvironmentProblem:
        """Return what to say of a model that does not fit, even where one request is served at a time."""
        told, most = (units.format(x, "bytes") for x in (needed, there))
        return EnvironmentProblem(
            f"it does not fit {quote(self.hardware.name)}: {told} needed, {most} there",
            hint="take more or larger devices, weights of fewer bits, or shorter prompts and answers", where="--on",
        )  # fmt: skip

    def _bounds(self, running: float) -> dict[str, dict[str, str]]:
        """Return what each part of the times waits for: what would shorten it most if there were plenty of it."""
        d = self._at(max(running, 1.0))
        plenty = {
            "read-bound": replace(d, bytes_per_s=d.bytes_per_s * PLENTY), "arithmetic-bound": replace(d, flop_per_s=d.flop_per_s * PLENTY),
            "link-bound": replace(d, link_bytes_per_s=d.link_bytes_per_s * PLENTY),
        }  # fmt: skip
        found: dict[str, dict[str, str]] = {}
        for metric, parts_of in (("ttft_s", serving.ttft_parts), ("tpot_s", serving.tpot_parts)):
            parts, faster = parts_of(d, self.law), {bound: parts_of(at, self.law) for bound, at in plenty.items()}
            found[metric] = {}
            for name, part in parts.items():
                best = min(faster, key=lambda bound: float(faster[bound][name]))
                helped = float(faster[best][name]) < 0.9 * float(part)
                found[metric][name] = "waiting" if name in WAITING else best if helped else "host-bound"
        return found

    def _work(self, running: float) -> dict[str, dict[str, tuple[float, float]]]:
        d = self._at(max(running, 1.0))
        work = {"ttft_s": serving.prompt_work(d, self.law), "tpot_s": serving.step_work(d, self.law)}
        return {
            metric: {name: (float(r), float(f)) for name, (r, f) in parts.items()} for metric, parts in work.items()
        }

    def _room(self) -> float:
        return float(serving.running(replace(self.d, batch=1e9), self.law))

    def _at(self, count: Any) -> Deployments:
        return replace(self.d, batch=count)

    def _times(self, d: Deployments) -> tuple[Any, Any, Any]:
        """Return (first token, token after it, whole request), in seconds."""
        first, each = (sum(parts(d, self.law).values()) for parts in (serving.ttft_parts, serving.tpot_parts))
        return first, each, first + (self.d.output_tokens - 1) * each

    def _clients(self, room: float) -> tuple[dict[str, Value], dict[str, Any], dict[str, EnvironmentProblem], float]:
        d, count = self.d, float(self.d.batch)
        first, each, request = (float(x) for x in self._times(d))
        ttft, tpot = _floats(serving.ttft_parts(d, self.law)), _floats(serving.tpot_parts(d, self.law))
        waiting = sum(ttft.get(name, 0.0) for name in WAITING)
        late = (UNIFORM_P95 - 1) * waiting
        values = self._timed(first, each, request, ttft, tpot, gain=1.0, first_p95=first + late, request_p95=request + late)  # fmt: skip
        served = count / request
        factor = self._factor(first, request)
        values |= self._rates(served, factor, f"{count:g} at a time, each served in {units.format(request, 'time')}")
        energy = _floats(serving.energy_parts(d, self.law))
        values |= self._energy(sum(energy.values()), _words(energy))
        if count > room:
            self.notes += (
                f"{room:.0f} of {count:.0f} requests run at a time, the others wait for room in the KV cache",
            )
        return values, {"ttft_s": ttft, "tpot_s": tpot}, {}, min(count, room)

    def _arrivals(self, room: float) -> tuple[dict[str, Value], dict[str, Any], dict[str, EnvironmentProblem], float]:
        rate = self.workload.requests_per_s or 0.0
        counts = np.arange(1.0, min(room, MOST_STATES) + 2)
        first, each, request = (np.broadcast_to(x, counts.shape) for x in self._times(_columns(self._at(counts))))
        shared = queueing.shared_service(rate, request)
        factor = self._factor(float(first[-1]), float(request[-1]))
        if shared is None:
            problem = falls_behind(rate, float(np.max(counts / request)))
            return {}, {"ttft_s": {}, "tpot_s": {}}, dict.fromkeys(OF_REQUESTS, problem), float(min(room, MOST_STATES))
        running = shared.mean
        left = 1 - rate / shared.capacity_per_s
        whole, start = running / rate, shared.seen(first)
        typical = self._at(max(running, 1.0))
        token = max(whole - start, 0.0) / max(self.d.output_tokens - 1, 1)
        ttft = _scaled(serving.ttft_parts(typical, self.law), start)
        tpot = _scaled(serving.tpot_parts(typical, self.law), token)
        waited = 1 - float(request[0]) / whole if whole > request[0] else 0.0
        gain = 1 + waited / max(left, SEVERE)
        values = self._timed(
            start, token, whole, ttft, tpot, gain=gain,
            first_p95=shared.seen_p95(first), request_p95=shared.seen_p95(request),
        )  # fmt: skip
        values |= self._rates(rate, 1.0, f"as they arrive; capacity {shared.capacity_per_s:.3g}/s")
        watts = self._watts(shared, counts, each)
        values |= self._energy(watts / (rate * self.d.output_tokens), f"{units.format(watts, 'power')} on average")
        if shared.capacity_per_s / factor <= rate:
            self.notes += (
                f"it may fall behind: capacity is {shared.capacity_per_s:.3g} requests/s, "
                f"at least {shared.capacity_per_s / factor:.3g}",
            )  # fmt: skip
        return values, {"ttft_s": ttft, "tpot_s": tpot}, {}, running

    def _watts(self, shared: queueing.Shared, counts: np.ndarray, each: np.ndarray) -> float:
        """Return mean watts: those at each number of running requests, weighted by how often they run."""
        busy = np.broadcast_to(serving.power_w(_columns(self._at(counts)), self.law, each), counts.shape)
        by_count = np.concatenate([[self.d.devices * self.d.idle_power_w], busy])
        return float(shared.at @ by_count[np.minimum(np.arange(len(shared.at)), len(by_count) - 1)])

    # ------------------------------------------------------------ values

    def _factor(self, first: float, request: float) -> float:
        """Return the factor of a whole request's error: those of its two parts, which go together."""
        share = first / request
        return math.exp(share * math.log(self.spreads["ttft"]) + (1 - share) * math.log(self.spreads["tpot"]))

    def _timed(
        self, first: float, each: float, request: float, ttft: Mapping[str, float], tpot: Mapping[str, float], *,
        gain: float, first_p95: float, request_p95: float,
    ) -> dict[str, Value]:  # fmt: skip
        tokens = {"first token": first, "later tokens": max(request - first, 0.0)}
        return {
            "ttft_s": _value(first, self.spreads["ttft"] ** gain, _words(ttft), first_p95),
            "tpot_s": _value(each, self.spreads["tpot"] ** min(gain, 2.0), _words(tpot)),
            "latency_s": _value(request, self._factor(first, request) ** gain, _words(tokens), request_p95),
        }

    def _rates(self, requests: float, factor: float, words: str) -> dict[str, Value]:
        return {
            "throughput_tokens_per_s": _value(requests * self.d.output_tokens, factor, words),
            "requests_per_s": _value(requests, factor, words),
        }

    def _energy(self, joules: float, words: str) -> dict[str, Value]:
        return {} if math.isnan(joules) else {"energy_j_per_token": _value(joules, self.spreads["energy"], words)}

    def _memory_parts(self, running: float) -> dict[str, float]:
        """Return the parts of all devices' memory while that many requests run.

        Prompts are read in chunks. Requests are at different lengths, so more of them fit than full ones would: the
        cache is never larger than its pool, what the model and the activations of a full server leave.
        """
        d, room = self._at(max(running, 1.0)), self._room()
        chunk = min(float(self.law["chunk_tokens"]), max(CHUNK_TOKENS, d.prompt_tokens / 4))
        parts, full = (
            _floats(serving.memory_parts(at, {**self.law, "chunk_tokens": chunk})) for at in (d, self._at(room))
        )
        one = float(serving.cache_bytes(d, d.context_tokens))
        pool = float(self.law["filled"] * d.devices * d.memory_bytes) - (sum(full.values()) - full["KV cache"])
        parts["KV cache"] = min(parts["KV cache"], room * one, max(pool, one))
        return parts

    def one_cache_bytes(self) -> float:
        """Return the bytes of one request's keys and values at its full length."""
        return float(serving.cache_bytes(self.d, self.d.prompt_tokens + self.d.output_tokens))

    def _sizes(self, memory: Mapping[str, float], running: float) -> dict[str, Value]:
        d, words = self.d, _words(memory)
        held = f"{max(running, 1.0):.3g} at a time"
        values = {
            "weights_bytes": _value(memory["weights"], 1.05, "all devices together"),
            "kv_cache_bytes": _value(memory["KV cache"], 1.05, held),
            "artefact_bytes": _value(float(d.stored_bytes), 1.05, "weights as they are stored"),
            "network_bytes_per_start": _value(float(d.stored_bytes), 1.05, "the artefact once"),
        }
        return values | {"peak_memory_bytes": _value(sum(memory.values()), self.spreads["memory"], words)}

    def _bill(self, values: dict[str, Value], prevented: dict[str, EnvironmentProblem]) -> None:
        """Add carbon and money: the cost terms' own, of the throughput and energy found here."""
        if "energy_j_per_token" not in values and "energy_j_per_token" not in prevented:
            prevented["energy_j_per_token"] = EnvironmentProblem(
                f"the power of `{self.hardware.device.name}` is not known, so energy cannot be predicted",
                hint="name a machine with a known power", where="--on",
            )  # fmt: skip
        used = {n: _as_prediction(values[n]) for n in ("throughput_tokens_per_s", "energy_j_per_token") if n in values}
        case = SimpleNamespace(hardware=self.hardware)
        for name in ("carbon_gco2e_per_token", "cost_usd_per_token"):
            try:
                found = terms.get(name).predict(case, used)
            except KeyError as missing:
                prevented[name] = prevented[missing.args[0]]
                continue
            words = "; ".join(filter(None, (_words(_floats(found.parts)), found.note))) or "follows energy"
            values[name] = _value(float(found.mid), math.exp(float(found.log_sd)), words)


def _as_prediction(value: Value) -> Prediction:
    log = math.log(value.high / value.mid)
    return Prediction(mid=value.mid, log_sd=log, inherited_log_sd=log)


def _columns(d: Deployments) -> Deployments:
    """Return a deployment with every field as wide as its batch."""
    return Deployments(**{f.name: np.broadcast_to(getattr(d, f.name), d.batch.shape) for f in fields(Deployments)})


def _value(mid: float, factor: float, because: str, p95: float | None = None) -> Value:
    return Value(mid=mid, low=mid / factor, high=mid * factor, source="published", because=because, p95=p95)


def _floats(parts: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(part) for name, part in parts.items()}


def _scaled(parts: Mapping[str, Any], whole: float) -> dict[str, float]:
    """Return parts in their proportions that add up to the mean over all loads."""
    found = _floats(parts)
    return {name: part * whole / sum(found.values()) for name, part in found.items()}


def _words(parts: Mapping[str, float]) -> str:
    whole = sum(parts.values())
    shares = sorted(((part / whole, name) for name, part in parts.items()), reverse=True) if whole else []
    return ", ".join(f"{share:.0%} {name}" for share, name in shares[:3] if share >= 0.05)
