"""What a cost term sees: the demands of many plans as columns, the machine's rates for each, and the request.

`case.demand` and `case.model` have the attributes of Demand and Model, each an array with one entry for each plan;
`case.rates` says what the machine gives that plan. `case.workload` and `case.hardware` are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from cost_models.demand import MODEL_NUMBERS, NUMBERS, Node
from cost_models.efficiency import efficiency, overhead, rate
from cost_models.engine_memory import held
from knowledge_base.engines._serving import side_by_side
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.registry import engines
from knowledge_base.types import Device, Hardware, Reached, Workload

CACHE_GAIN = 3.0  # how much faster the last level of cache is read than memory; one core of a Zen 4 server, 2026-11
# benchmarks/engines.json, the model of 394 M: eight requests at a time against prompts, median of 23 formats of four engines;
# quartiles 0.24 and 0.6, llama.cpp's formats without repacked kernels the least.
FEW_ROWS_SHARE = 0.43
RUNTIME_LOG_SD = 0.25  # of the memory an engine takes whatever the model
SHAPES_LOG_SD = 0.3  # of the share of the peak rate where no prompt was timed: large matrices told it, prompts are thin
ONE_CORE_BYTES_PER_S = 25e9  # what one core can read at best; 26 to 28 GB/s measured on a Zen 4 server core


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Plans to price. Arrays of shape (plans,) throughout."""

    demand: Any  # the numbers of Demand, by name
    model: Any  # the numbers of Model, by name, and `window`: sliding window in tokens, inf where there is none
    rates: Rates
    workload: Workload
    hardware: Hardware
    calibrated: frozenset[str]  # metrics for which every plan's rates were measured on the device (`Device.reached`)
    decodes: bool = True  # False: an encoder, which reads its text in one pass
    slotted: Any = False  # (plans,) whether requests share the steps of the engine's own server, several at a time
    apart: Any = False  # (plans,) whether that server reads prompts in steps of their own, beside no answer
    reused_tokens: Any = 0.0  # (plans,) of a prompt, kept from earlier requests: only under load

    @property
    def device(self) -> Device:
        """The device the model runs on."""
        return self.hardware.device

    @property
    def counted_tokens(self) -> int:
        """Tokens of a request that figures for each token are of: those of its answer, of an encoder those it reads."""
        return self.workload.output_tokens if self.decodes else self.workload.prompt_tokens

    def need_decoding(self) -> None:
        """Refuse to price tokens of a model that writes none.

        Raises:
            EnvironmentProblem: the model is an encoder.
        """
        if not self.decodes:
            raise EnvironmentProblem(
                "an encoder reads its text in one pass and writes no tokens",
                hint="ttft and latency tell that pass, requests how many texts each second",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine gives each plan, as (plans,) arrays."""

    bytes_per_s: Any  # memory bandwidth with the plan's threads
    streamed_bytes_per_s: Any  # reached when reading weights in the plan's format out of memory
    cached_share: Any  # of the weights, in the last level of cache from one step to the next
    kv_bytes_per_s: Any
    peak_flop_per_s: Any
    flop_per_s: Any  # reached in matrix products
    few_rows_share: Any  # of it, where a product has few rows; see roofline.rows_worth
    kernel_s: Any
    step_s: Any
    prefill_chunk_tokens: Any  # inf: the whole prompt at once
    runtime_bytes: Any
    runtime_log_sd: Any
    weights_log_sd: Any  # uncertainty of the efficiencies
    shapes_log_sd: Any  # what they leave open of the arithmetic rate of a prompt
    overhead_log_sd: Any
    asynchronous: Any  # 1 where the host runs ahead of the device
    held_ratio: Any  # see engine_memory.Held, and the three below
    tied_ratio: Any
    copies_ratio: Any
    copies_log_sd: Any

    @property
    def weights_bytes_per_s(self) -> Any:
        """Reached when reading weights in the plan's format, those in the cache included.

        What the cache saves is the reading; unpacking takes as long as before, so a format gains the less the more of it
        there is: 1 / (1 / streamed - cached share x (1 - 1 / CACHE_GAIN) / bandwidth), CACHE_GAIN x bandwidth at most.
        """
        saved = self.cached_share * (1 - 1 / CACHE_GAIN)
        return self.bytes_per_s / np.maximum(self.bytes_per_s / self.streamed_bytes_per_s - saved, 1 / CACHE_GAIN)


def case_of(nodes: Sequence[Node], workload: Workload, hardware: Hardware) -> Case:
    """Return the columns of some plans' demands on one machine.

    Raises:
        EnvironmentProblem: the device lacks a rate some plan computes with.
    """
    table = np.array([node.row for node in nodes], dtype=float).T  # (numbers, plans)
    demand = dict(zip(NUMBERS, table[: len(NUMBERS)], strict=True))
    rest = table[len(NUMBERS) :]
    model = dict(zip((*MODEL_NUMBERS, "window"), (*rest[:-2], rest[-1]), strict=True))
    decodes = nodes[0].demand.model.kind != "encoder"
    rates = _rates(nodes, rest[-2], demand["linear_bytes"] + demand["head_read_bytes"], hardware.device)
    return Case(
        demand=SimpleNamespace(**demand),
        model=SimpleNamespace(**model),
        rates=rates,
        workload=workload,
        hardware=hardware,
        calibrated=_calibrated(nodes, hardware.device),
        decodes=decodes,
        slotted=_of_engines(nodes, lambda e: side_by_side(e, nodes[0].demand.model)) & (demand["batch"] > 1) & decodes,
        apart=_of_engines(nodes, lambda e: getattr(e, "READS_APART", False)),
    )


def _of_engines(nodes: Sequence[Node], says: Callable[[ModuleType], bool]) -> np.ndarray:
    """Return (plans,): what the plan's engine says of its server; False where it is none of ours."""
    known = {name: name in engines.names() and says(engines.get(name)) for name in {node.key[0] for node in nodes}}
    return np.array([known[node.key[0]] for node in nodes])


def _rates(nodes: Sequence[Node], threads: np.ndarray, weights_bytes: np.ndarray, device: Device) -> Rates:
    codes: dict[tuple[Any, ...], int] = {}
    index = np.array([codes.setdefault(node.key, len(codes)) for node in nodes])
    reached = {(r.engine, r.weight_format, r.compiled): r for r in device.reached}
    rows = np.array([rates_row(key, device, reached) for key in codes]).T[:, index]  # (rates, plans)
    read, peak, flop, kernel, step, kv, chunk, asynchronous, runtime, *log_sds = rows
    runtime_sd, weights_sd, shapes_sd, overhead_sd = log_sds
    memory = [held(engine, weight_format, device) for engine, weight_format, *_ in codes]
    held_ratio, tied_ratio, copies_ratio, copies_sd = np.array([astuple(found) for found in memory]).T[:, index]
    bandwidth, compute = _thread_shares(threads, device)
    bytes_per_s = device.memory_bytes_per_s * bandwidth
    unpacking_s = np.maximum(1 / read - 1, 0) / device.memory_bytes_per_s  # for each byte, on all cores
    return Rates(
        bytes_per_s=bytes_per_s,
        streamed_bytes_per_s=1 / (np.minimum(1 / read, 1) / bytes_per_s + unpacking_s / compute),
        cached_share=_cached_share(weights_bytes, device),
        kv_bytes_per_s=bytes_per_s * kv,
        peak_flop_per_s=peak,
        flop_per_s=peak * flop * compute,
        few_rows_share=np.full_like(flop, FEW_ROWS_SHARE if device.kind == "cpu" else 1.0),
        kernel_s=kernel,
        step_s=step,
        prefill_chunk_tokens=chunk,
        runtime_bytes=runtime,
        runtime_log_sd=runtime_sd,
        weights_log_sd=weights_sd,
        shapes_log_sd=shapes_sd,
        overhead_log_sd=overhead_sd,
        asynchronous=asynchronous,
        held_ratio=held_ratio,
        tied_ratio=tied_ratio,
        copies_ratio=copies_ratio,
        copies_log_sd=copies_sd,
    )


def _cached_share(weights_bytes: np.ndarray, device: Device) -> Any:
    """Return (plans,): the share of the weights that one step leaves in the last level of cache for the next.

    Weights are read in the same order for each step, so a cache that is too small by a half has lost each again before
    its turn comes; one that is larger by a third holds them all, whatever else passes through.
    """
    if not device.cache_bytes:
        return np.zeros_like(weights_bytes)
    return np.clip((1.5 - weights_bytes / device.cache_bytes) / 0.75, 0.0, 1.0)


def rates_row(
    key: tuple[Any, ...], device: Device, reached: Mapping[tuple[str, str, bool], Reached]
) -> tuple[float, ...]:
    """Return what a device gives one engine and weight format: by measurements there are, else by the tables' shares.

    Raises:
        EnvironmentProblem: the device lacks the rate of the dtype that is computed with.
    """
    engine, weight_format, compute_dtype, compiled = key
    shares = efficiency(engine, weight_format, compiled, device.kind, device.features)
    costs = overhead(engine, device.kind, device.features)
    peak = rate(device, shares.rate_dtype or compute_dtype)
    engines_own = (costs.kv_read_ratio, costs.prefill_chunk_tokens or np.inf, float(costs.asynchronous))
    found = reached.get((engine, weight_format, compiled))
    if found is not None:
        return (
            found.weights_bytes_per_s / device.memory_bytes_per_s, peak, found.flop_per_s / peak, found.kernel_s,
            found.step_s, *engines_own, found.runtime_bytes, found.runtime_log_sd, found.read_log_sd,
            found.flop_log_sd, found.overhead_log_sd,
        )  # fmt: skip
    return (
        shares.read_share(device.memory_bytes_per_s, device.cores), peak, shares.flop_share(peak), costs.kernel_s, costs.step_s,
        *engines_own, costs.runtime_bytes, RUNTIME_LOG_SD, shares.log_sd, SHAPES_LOG_SD, costs.log_sd,
    )  # fmt: skip


def _calibrated(nodes: Sequence[Node], device: Device) -> frozenset[str]:
    metrics = {(r.engine, r.weight_format, r.compiled): frozenset(r.metrics) for r in device.reached}
    if not metrics:
        return frozenset()
    keys = {(n.key[0], n.key[1], n.key[3]) for n in nodes}
    return frozenset.intersection(*(metrics.get(key, frozenset()) for key in keys))


def _thread_shares(threads: np.ndarray, device: Device) -> tuple[Any, Any]:
    """Return the shares of bandwidth and arithmetic some threads reach: bandwidth saturates early, arithmetic late."""
    if device.kind != "cpu" or not device.cores:
        return np.ones_like(threads), np.ones_like(threads)
    compute = np.minimum(threads, device.cores) / device.cores
    bandwidth = np.minimum(1.0, threads * max(ONE_CORE_BYTES_PER_S / device.memory_bytes_per_s, 1 / device.cores))
    return bandwidth, compute
