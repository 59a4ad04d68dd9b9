"""How fast engines serve: the roofline with one law for each engine family, read from a table.

`Deployments` are columns, one entry for each deployment: a model's sizes, its devices, the load. A law is a number of
named coefficients: shares of peak, seconds for each layer, step, sequence and exchange between devices.
serving_fit.py fitted those of knowledge_base/data/engine_laws.csv to published measurements; a family that was never
measured gets the pooled law `*`, with a wider interval. Times are in seconds, memory in bytes, energy in joules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from cost_models.distributed.links import ETHERNET
from cost_models.efficiency import rate, read_rows
from knowledge_base.types import Demand, Device, Hardware

Parts = dict[str, Any]
Law = Mapping[str, Any]  # name of a coefficient -> float or (deployments,) array
Laws = Mapping[tuple[str, str, str], float]  # (family, coefficient, where) -> value; `where` is empty or a tag
POOLED = "*"  # the family of all families

# What is assumed of each coefficient before anything is measured, and the standard deviation of its logarithm.
COEFFICIENTS = {
    "read": (0.7, 0.4),  # share of the memory bandwidth when reading weights, at 1 TB/s
    "read_falls": (0.15, 0.15),  # that share ~ bandwidth^-read_falls; of one card a family tells nothing of it
    "unpack": (2.0, 0.7),  # vector operations for each weight read: a device weak in them cannot use its bandwidth
    "cache": (0.6, 0.6),  # share of the bandwidth when reading the KV cache, falling likewise
    "compute": (0.6, 0.4),  # share of the arithmetic rate while decoding a batch
    "prefill": (0.55, 0.4),  # share of the arithmetic rate while reading prompts
    "attention": (
        1.0,
        0.3,
    ),  # share of that when scoring tokens against each other: not all kernels keep scores on chip
    "layer_s": (3e-5, 0.8),  # starting the kernels of one layer
    "step_s": (1e-3, 1.0),  # host work of one step: scheduling, sampling
    "sequence_s": (5e-6, 1.0),  # host work of one step for each running request
    "exchange_s": (1e-5, 0.8),  # latency of one all-reduce between two devices
    "link": (0.5, 0.6),  # share of the rate of the links between devices
    "interference": (1.0, 0.5),  # how much of others' prompts a decoding request waits for
    "first_s": (2e-2, 1.0),  # host work before a first token
    "turn": (1.0, 0.7),  # steps of the running batch a new request waits for
    "queue": (0.5, 0.8),  # share of the other clients' prompts a new request waits for ...
    "queue_grows": (0.8, 0.4),  # ... as (clients - 1)^queue_grows
    "power_base": (0.35, 0.4),  # share of the power range a device draws as soon as it runs
    "power_read": (0.3, 0.6),  # ... and more in proportion to the share of its bandwidth in use
    "power_compute": (0.45, 0.6),  # ... and of its arithmetic
    "activation": (1.0, 0.4),  # live activations of a prompt, over three feed-forward widths and four hidden states
    "chunk_tokens": (1e6, 0.01),  # of prompts are read at once: all, where the engine does not cut them
    "logits": (0.3, 1.0),  # share of the tokens read at once whose logits are held, in float32
    "runtime_bytes": (4e8, 0.8),  # what the engine holds on each device beside the model
    "filled": (0.9, 0.05),  # share of a device's memory that serving fills with weights and cache
}
IDLE_SHARE = 0.12  # of the power cap, where a device's idle power is not known; 70 to 140 W on cards of 700 to 1000 W
NO_LINK_BYTES_PER_S = 1.6e10  # half of a PCIe 4.0 x16 slot, where a card has no link of its own
RESERVED_BYTES = 2e9  # of each device, for activations and graphs
# NVIDIA's generations as compute capabilities. Volta, Turing and GA100 have as many lanes for integers as for floats;
# the published float32 rate of later ones counts lanes that do either. Before Volta there are no matrix units, and
# engines neither tune their kernels for such cards nor start them as graphs.
_INTEGERS_BESIDE = frozenset({"sm_70", "sm_72", "sm_75", "sm_80"})
_NO_MATRIX_UNITS = frozenset({"sm_50", "sm_52", "sm_53", "sm_60", "sm_61", "sm_62"})
_KIND_OF = {"rocm": "AMD", "metal": "Apple", "xpu": "Intel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployments:
    """Models on devices under a load, as (deployments,) arrays."""

    dense_bytes: Any  # weights read for every token, head included
    expert_bytes: Any  # of all experts
    stored_bytes: Any  # all weights
    dense_params: Any
    expert_params: Any
    experts: Any
    experts_active: Any
    layers: Any
    hidden_size: Any
    ffn_size: Any
    cache_bytes_per_token: Any  # in layers that see everything
    window_bytes_per_token: Any  # in layers with a sliding window
    window_tokens: Any
    state_bytes: Any  # recurrent state of one sequence, read and written at each step
    attention_flop_per_pair: Any
    batch: Any  # requests decoded together; with `clients`, as many as they are
    prompt_tokens: Any
    output_tokens: Any
    clients: Any  # 1 where `batch` clients each send their next request when the last is done, 0 for a fixed batch
    median_step: Any  # 1 where the median gap between tokens is meant rather than the mean
    devices: Any
    memory_bytes: Any  # of one device
    bytes_per_s: Any  # of one device
    flop_per_s: Any  # of one device, at the precision the engine computes in
    link_bytes_per_s: Any  # of the slowest link between two devices
    power_w: Any  # cap of one device
    vocab_size: Any = 0.0
    vector_flop_per_s: Any = np.inf  # of one device, outside its matrix units
    idle_w: Any = np.nan  # of one device; not a number where it is not known
    cache_shards: Any = np.inf  # devices that can share a sequence's cache: its key-value heads, 1 of latent attention

    devices_per_machine: Any = 8

    @property
    def cache_copies(self) -> Any:
        """How many times all devices together hold each key and value: more than once beyond `cache_shards` of them."""
        return np.maximum(self.devices / self.cache_shards, 1.0)

    @property
    def idle_power_w(self) -> Any:
        """Watts one device draws when nothing runs: its own where known, else a share of its cap."""
        return np.where(np.isnan(self.idle_w), IDLE_SHARE * self.power_w, self.idle_w)

    @property
    def context_tokens(self) -> Any:
        """Tokens a query sees halfway through the output."""
        return self.prompt_tokens + self.output_tokens / 2

    @property
    def active_params(self) -> Any:
        """Parameters one token goes through."""
        return self.dense_params + self.expert_params * self.experts_active / np.maximum(self.experts, 1)


def deployment(demand: Demand, hardware: Hardware, *, devices: int = 1, clients: bool = False) -> Deployments:
    """Return a plan's demand on some equal devices as a deployment of one: scalars.

    With `clients`, the demand's batch is that many clients in a closed loop; else a fixed batch.

    Raises:
        EnvironmentProblem: the device lacks the rate the plan computes with.
    """
    model, device, workload = demand.model, hardware.device, demand.workload
    sparse = model.experts > model.experts_active
    idle = (model.params_total - model.params_active) / (1 - model.experts_active / model.experts) if sparse else 0.0
    experts, size = min(idle, demand.linear_params), demand.linear_bytes / demand.linear_params
    windowed = model.window_share if model.sliding_window_tokens else 0.0
    return Deployments(
        dense_bytes=(demand.linear_params - experts) * size + demand.head_read_bytes, expert_bytes=experts * size,
        stored_bytes=demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes,
        dense_params=demand.linear_params - experts + demand.head_flop_per_token / 2, expert_params=experts,
        experts=model.experts, experts_active=model.experts_active, layers=demand.layers, hidden_size=model.hidden_size,
        ffn_size=model.ffn_size, cache_bytes_per_token=(1 - windowed) * demand.kv_bytes_per_token,
        window_bytes_per_token=windowed * demand.kv_bytes_per_token,
        window_tokens=float(model.sliding_window_tokens or np.inf), state_bytes=float(model.state_bytes),
        attention_flop_per_pair=demand.attention_flop_per_token_pair, batch=float(demand.batch),
        prompt_tokens=float(workload.prompt_tokens), output_tokens=float(workload.output_tokens), clients=float(clients),
        median_step=0.0, devices=float(devices), memory_bytes=float(device.memory_bytes), bytes_per_s=device.memory_bytes_per_s,
        flop_per_s=_rate(device, demand.compute_dtype), link_bytes_per_s=NO_LINK_BYTES_PER_S, power_w=device.busy_w or np.nan,
        vocab_size=float(model.vocab_size), vector_flop_per_s=vector_rate(device.flop_per_s.get("float32", np.inf), device.features),
        idle_w=np.nan if device.idle_w is None else device.idle_w, devices_per_machine=float(hardware.devices_per_machine),
        cache_shards=float(model.kv_heads or np.inf) if model.kv_values_per_layer is None else 1.0,
    )  # fmt: skip


def _rate(device: Device, dtype: str) -> float:
    """Return the arithmetic rate the laws are of: half the int8 rate where that is more, as on GeForce cards.

    These halve wide sums, which kernels for reading prompts avoid.
    """
    wide = rate(device, dtype)
    return max(wide, device.flop_per_s.get("int8", 0.0) / 2) if dtype in ("float16", "bfloat16") else wide


def vector_rate(float32_flop_per_s: float, features: Iterable[str]) -> float:
    """Return the rate at which a device unpacks weights: some compute integers beside floats, so with twice the lanes."""
    return float32_flop_per_s * (2.0 if _INTEGERS_BESIDE.intersection(features) else 1.0)


def hardware_kind(name: str, features: Iterable[str]) -> str:
    """Return the class of hardware a device belongs to, as the laws tell them apart: from its name and features.

    Workstation cards are the chips of data centres: GeForce alone halves wide sums, which is what "consumer" tells.
    """
    name, features = re.sub("[ _]", "-", name.lower()), frozenset(features)
    if re.search("jetson|gb10|radeon-8060s", name):
        return "shared memory"
    if features & {"cuda", "nvidia"}:
        if _NO_MATRIX_UNITS.intersection(features):
            return "no matrix units"
        return "consumer" if re.search(r"rtx-\d{4}(?!-ada)|gtx-|geforce", name) else "data centre"
    return next((kind for feature, kind in _KIND_OF.items() if feature in features), "cpu")


@lru_cache(maxsize=1)
def shipped() -> Laws:
    """Return the laws of knowledge_base/data/engine_laws.csv."""
    rows = read_rows("engine_laws.csv")
    return {(row["family"], row["coefficient"], row["where"]): float(row["value"]) for row in rows}


def law_of(laws: Laws, families: Sequence[str], tags: Sequence[frozenset[str]]) -> dict[str, Any]:
    """Return the coefficients of each deployment: its family's, changed by what is true of it.

    `tags` name the class of weights ("fp8", "4 moe") and the kind of hardware ("consumer", "Apple"); a family that was
    never measured gets the pooled law, an effect it never showed the pooled effect.
    """
    known = {family for family, _, _ in laws}
    own = np.array([family if family in known else POOLED for family in families])
    found = {name: np.array([laws[family, name, ""] for family in own]) for name in COEFFICIENTS}
    for name, where in sorted({(name, where) for _, name, where in laws if where}):
        pooled = laws.get((POOLED, name, where), 1.0)
        effect = np.array([laws.get((family, name, where), pooled) for family in own])
        found[name] = np.where([where in t for t in tags], found[name] * effect, found[name])
    return found


def experts_read(d: Deployments, tokens: Any) -> Any:
    """Return the share of all experts that some tokens wake: 1 - (1 - k/E)^tokens, uniform routing assumed."""
    idle = 1 - d.experts_active / np.maximum(d.experts, 1)
    return 1 - idle**tokens


def weights_read_bytes(d: Deployments, tokens: Any) -> Any:
    """Return the bytes of the weights that some tokens wake, of all devices together."""
    return d.dense_bytes + d.expert_bytes * experts_read(d, tokens)


def weights_s(d: Deployments, law: Law, tokens: Any) -> Any:
    """Return seconds to read the weights that some tokens wake, and to unpack them: the slower, where both keep up."""
    read = weights_read_bytes(d, tokens) / (d.devices * d.bytes_per_s * read_share(d, law))
    unpack = (
        law["unpack"] * (d.dense_params + d.expert_params * experts_read(d, tokens)) / (d.devices * d.vector_flop_per_s)
    )
    return _both(read, unpack)


def _both(read_s: Any, compute_s: Any) -> Any:
    # Reading and computing overlap, but not fully where they take as long as each other.
    return (read_s**3 + compute_s**3) ** (1 / 3)


def read_share(d: Deployments, law: Law) -> Any:
    """Return the share of the memory bandwidth reached when reading weights."""
    return np.minimum(law["read"] * _fall(d, law), 1.0)


def _fall(d: Deployments, law: Law) -> Any:
    return (d.bytes_per_s / 1e12) ** -law["read_falls"]


def running(d: Deployments, law: Law) -> Any:
    """Return how many requests run at once: those whose cache fits beside the weights, at least one."""
    free = d.devices * (law["filled"] * d.memory_bytes - RESERVED_BYTES) - d.stored_bytes
    each = np.maximum(cache_bytes(d, d.context_tokens), 1.0)
    fit = np.maximum(np.where(np.isnan(free), np.inf, free) / each, 1.0)
    return np.where(d.clients > 0, np.minimum(d.batch, fit), d.batch)


def cache_bytes(d: Deployments, tokens: Any) -> Any:
    """Return the bytes of cache and recurrent state one request holds at some context, on all devices together."""
    near = np.minimum(tokens, d.window_tokens)
    held = tokens * d.cache_bytes_per_token + near * d.window_bytes_per_token
    return d.cache_copies * held + d.state_bytes


def exchange_s(d: Deployments, law: Law, tokens: Any) -> Any:
    """Return seconds two all-reduces of each layer take: latencies and a ring's bytes; 0 on one device.

    Beyond one machine's devices the network's latency comes on top.
    """
    inside = np.minimum(d.devices, d.devices_per_machine)
    latency = law["exchange_s"] * np.log2(inside) + ETHERNET.latency_s * np.log2(d.devices / inside)
    return 2 * d.layers * latency + exchange_bytes(d, tokens) / (d.link_bytes_per_s * law["link"])


def exchange_bytes(d: Deployments, tokens: Any) -> Any:
    """Return the bytes that each device sends while some tokens go through: two ring all-reduces of each layer, 16 bits."""
    return 2 * d.layers * 2 * (d.devices - 1) / d.devices * tokens * d.hidden_size * 2


def step_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of one decode step of the running requests."""
    batch = running(d, law)
    bandwidth = d.devices * d.bytes_per_s
    flop = 2 * d.active_params * batch / (d.devices * d.flop_per_s * law["compute"])
    kept = cache_bytes(d, d.context_tokens) + d.state_bytes
    return {
        "weights": _both(weights_s(d, law, batch), flop),
        "KV cache": batch * kept / (bandwidth * law["cache"] * _fall(d, law)),
        "exchange": exchange_s(d, law, batch),
        "layers": d.layers * law["layer_s"],
        "host": law["step_s"] + batch * law["sequence_s"],
    }


def step_work(d: Deployments, law: Law) -> dict[str, tuple[Any, Any]]:
    """Return (bytes read, flop) of the parts of a decode step that read and compute, of all devices together."""
    batch, near = running(d, law), np.minimum(d.context_tokens, d.window_tokens)
    windowed = _windowed(d)
    pairs = (1 - windowed) * d.context_tokens + windowed * near
    return {
        "weights": (weights_read_bytes(d, batch), 2 * d.active_params * batch),
        "KV cache": (batch * (cache_bytes(d, d.context_tokens) + d.state_bytes), batch * pairs * d.attention_flop_per_pair),
    }  # fmt: skip


def prompt_work(d: Deployments, law: Law) -> dict[str, tuple[Any, Any]]:
    """Return (bytes read, flop) of reading one prompt: weights are read for each chunk."""
    chunks = np.maximum(d.prompt_tokens / law["chunk_tokens"], 1.0)
    return {"prompt": (chunks * weights_read_bytes(d, d.prompt_tokens), prompt_flop(d))}


def _windowed(d: Deployments) -> Any:
    return d.window_bytes_per_token / np.maximum(d.window_bytes_per_token + d.cache_bytes_per_token, 1e-9)


def attention_flop(d: Deployments) -> Any:
    """Return the arithmetic of scoring the tokens of one prompt against each other."""
    tokens, near = d.prompt_tokens, np.minimum(d.prompt_tokens, d.window_tokens)
    windowed = _windowed(d)
    pairs = (1 - windowed) * tokens**2 / 2 + windowed * (tokens - near / 2) * near
    return pairs * d.attention_flop_per_pair


def prompt_flop(d: Deployments) -> Any:
    """Return the arithmetic of reading one prompt."""
    return 2 * d.active_params * d.prompt_tokens + attention_flop(d)


def prompts_s(d: Deployments, law: Law, prompts: Any) -> Any:
    """Return seconds that reading some prompts together takes on an idle server: weights are read for each chunk."""
    tokens = d.prompt_tokens * prompts
    chunks = np.maximum(tokens / law["chunk_tokens"], 1.0)
    read = chunks * weights_s(d, law, tokens)
    flop = 2 * d.active_params * d.prompt_tokens + attention_flop(d) / law["attention"]
    compute = prompts * flop / (d.devices * d.flop_per_s * law["prefill"])
    return _both(compute, read) + exchange_s(d, law, tokens)


def tpot_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of the seconds between two tokens of a request.

    Each request that ends makes room for one whose prompt the others wait for: batch / output prompts in every step.
    """
    batch = running(d, law)
    arrivals = np.where(batch > 1, batch / d.output_tokens, 0.0)
    # A prompt disturbs the step it falls into; the median step is disturbed only where most steps are.
    seen = np.where(d.median_step > 0, 1 - np.exp(-arrivals), 1.0)
    waiting = arrivals * seen * law["interference"] * prompts_s(d, law, 1.0)
    return {**step_parts(d, law), "others' prompts": waiting}


def mean_tpot_s(d: Deployments, law: Law) -> Any:
    """Return the mean seconds between two tokens, whichever statistic was asked for."""
    return sum(tpot_parts(replace(d, median_step=0.0 * d.median_step), law).values())


def ttft_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of the mean seconds to the first token.

    A fixed batch reads its prompts together. Clients in a closed loop wait for a turn of the running batch, for some of
    the others' prompts and, where the cache cannot hold all requests, for others to end.
    """
    at_once = np.where(d.clients > 0, 1.0, d.batch)
    prompt, step = prompts_s(d, law, at_once), sum(step_parts(d, law).values())
    room = running(d, law)
    others = np.where(d.clients > 0, np.maximum(room - 1, 0.0), 0.0)
    request = d.output_tokens * mean_tpot_s(d, law)
    return {
        "prompt": prompt,
        "layers": d.layers * law["layer_s"],
        "host": law["first_s"] + law["step_s"],
        "turn": np.where(others > 0, law["turn"] * step, 0.0),
        "queue": law["queue"] * others ** law["queue_grows"] * prompt,
        "no room": np.where(d.clients > 0, (d.batch / room - 1) * request, 0.0),
    }


def request_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of the seconds from a request to its last token."""
    later = (d.output_tokens - 1) * mean_tpot_s(d, law)
    return {"first token": sum(ttft_parts(d, law).values()), "later tokens": later}


def power_w(d: Deployments, law: Law, tpot_s: Any) -> Any:
    """Return the mean watts of all devices while serving: idle power and a share of the rest that follows activity."""
    batch = running(d, law)
    read = (weights_read_bytes(d, batch) + batch * cache_bytes(d, d.context_tokens)) / (
        d.devices * d.bytes_per_s * tpot_s
    )
    flop = (2 * d.active_params + prompt_flop(d) / d.output_tokens) * batch / (d.devices * d.flop_per_s * tpot_s)
    busy = law["power_base"] + law["power_read"] * read + law["power_compute"] * flop
    return d.devices * (d.idle_power_w + (d.power_w - d.idle_power_w) * np.minimum(busy, 1.0))


def energy_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of the joules for each generated token: what idle devices draw anyway, and activity."""
    mean = mean_tpot_s(d, law)
    each = mean / running(d, law)
    idle = d.devices * d.idle_power_w * each
    return {"idle": idle, "activity": power_w(d, law, mean) * each - idle}


def memory_parts(d: Deployments, law: Law) -> Parts:
    """Return the parts of the highest memory of all devices while `batch` requests are served at full length.

    Activations and logits are those of all prompts at once, or of one chunk where the engine cuts them.
    """
    live = np.minimum(d.batch * d.prompt_tokens, law["chunk_tokens"])
    return {
        "weights": d.stored_bytes,
        "KV cache": d.batch * cache_bytes(d, d.prompt_tokens + d.output_tokens),
        "activations": law["activation"] * live * (3 * d.ffn_size + 4 * d.hidden_size) * 2,
        "logits": law["logits"] * live * d.vocab_size * 4,
        "engine": d.devices * law["runtime_bytes"],
    }


QUANTITIES = {
    "tpot": tpot_parts, "ttft": ttft_parts, "request": request_parts, "energy": energy_parts, "memory": memory_parts,
    "power": lambda d, law: {"power": power_w(d, law, mean_tpot_s(d, law))},
}  # fmt: skip


def spread(laws: Laws, quantity: str, family: str) -> float:
    """Return the factor that 90 % of a family's errors on unseen devices stayed within; the pooled one if unknown."""
    return laws.get((family, f"spread {quantity}", "")) or laws[POOLED, f"spread {quantity}", ""]


def guarded_memory(laws: Laws, family: str, memory_bytes: Any, devices: Any) -> Any:
    """Return the bytes below which 98 % of a family's deployments on unseen devices stayed: what decides whether one fits."""
    times = laws.get((family, "guard memory", "")) or laws[POOLED, "guard memory", ""]
    return memory_bytes + times * memory_slack(memory_bytes, devices)


def memory_slack(memory_bytes: Any, devices: Any) -> Any:
    """Return the bytes that predictions of memory are wrong by: some in proportion, some on each device."""
    return 0.1 * memory_bytes + 1e9 * devices


def predict(quantity: str, d: Deployments, law: Law) -> Any:
    """Return a quantity of each deployment: the sum of its parts."""
    return sum(QUANTITIES[quantity](d, law).values())
