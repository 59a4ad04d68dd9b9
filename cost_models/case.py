"""What a cost term sees: the demands of many plans as columns, the machine's rates for each, and the request.

`case.demand` and `case.model` have the attributes of Demand and Model, each an array with one entry for each plan;
`case.rates` says what the machine gives that plan. `case.workload` and `case.hardware` are the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from cost_models.demand import MODEL_NUMBERS, NUMBERS, Node
from cost_models.efficiency import efficiency, overhead, rate
from knowledge_base.types import Device, Hardware, Workload

CACHE_GAIN = (
    2.5  # how much faster weights are read that stay in the last level of cache between steps; own runs, 2026-11
)
ONE_CORE_BYTES_PER_S = 25e9  # what one core can read at best; 26 to 28 GB/s measured on a Zen 4 server core


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Plans to price. Arrays of shape (plans,) throughout."""

    demand: Any  # the numbers of Demand, by name
    model: Any  # the numbers of Model, by name, and `window`: sliding window in tokens, inf where there is none
    rates: Rates
    workload: Workload
    hardware: Hardware

    @property
    def device(self) -> Device:
        """The device the model runs on."""
        return self.hardware.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine gives each plan, as (plans,) arrays."""

    bytes_per_s: Any  # memory bandwidth with the plan's threads
    weights_bytes_per_s: Any  # reached when reading weights in the plan's format
    kv_bytes_per_s: Any
    peak_flop_per_s: Any
    flop_per_s: Any  # reached in matrix products
    kernel_s: Any
    step_s: Any
    prefill_chunk_tokens: Any  # inf: the whole prompt at once
    runtime_bytes: Any
    weights_log_sd: Any  # uncertainty of the efficiencies
    overhead_log_sd: Any
    asynchronous: Any  # 1 where the host runs ahead of the device


def case_of(nodes: Sequence[Node], workload: Workload, hardware: Hardware) -> Case:
    """Return the columns of some plans' demands on one machine.

    Raises:
        EnvironmentProblem: the device lacks a rate some plan computes with.
    """
    table = np.array([node.row for node in nodes], dtype=float).T  # (numbers, plans)
    demand = dict(zip(NUMBERS, table[: len(NUMBERS)], strict=True))
    rest = table[len(NUMBERS) :]
    model = dict(zip((*MODEL_NUMBERS, "window"), (*rest[:-2], rest[-1]), strict=True))
    rates = _rates(nodes, rest[-2], demand["linear_bytes"] + demand["head_read_bytes"], hardware.device)
    return Case(
        demand=SimpleNamespace(**demand),
        model=SimpleNamespace(**model),
        rates=rates,
        workload=workload,
        hardware=hardware,
    )


def _rates(nodes: Sequence[Node], threads: np.ndarray, weights_bytes: np.ndarray, device: Device) -> Rates:
    codes: dict[tuple[Any, ...], int] = {}
    index = np.array([codes.setdefault(node.key, len(codes)) for node in nodes])
    rows = np.array([_rates_row(key, device) for key in codes]).T[:, index]  # (rates, plans)
    read, peak, flop, kernel, step, kv, chunk, runtime, weights_sd, overhead_sd, asynchronous = rows
    bandwidth, compute = _thread_shares(threads, device)
    bytes_per_s = device.memory_bytes_per_s * bandwidth
    return Rates(
        bytes_per_s=bytes_per_s,
        weights_bytes_per_s=bytes_per_s * read * _cache_gain(weights_bytes, device),
        kv_bytes_per_s=bytes_per_s * kv,
        peak_flop_per_s=peak,
        flop_per_s=peak * flop * compute,
        kernel_s=kernel,
        step_s=step,
        prefill_chunk_tokens=chunk,
        runtime_bytes=runtime,
        weights_log_sd=weights_sd,
        overhead_log_sd=overhead_sd,
        asynchronous=asynchronous,
    )


def _cache_gain(weights_bytes: np.ndarray, device: Device) -> Any:
    """Return (plans,): how much faster than memory the weights are read, 1 unless the cache holds most of them.

    Weights are read in the same order for each step, so a cache that is too small by a half has lost each again before
    its turn comes; one that is larger by a third holds them all, whatever else passes through.
    """
    if not device.cache_bytes:
        return 1.0
    held = np.clip((1.5 - weights_bytes / device.cache_bytes) / 0.75, 0.0, 1.0)
    return 1 / (1 - held + held / CACHE_GAIN)


def _rates_row(key: tuple[Any, ...], device: Device) -> tuple[float, ...]:
    engine, weight_format, compute_dtype, compiled = key
    shares = efficiency(engine, weight_format, compiled, device.kind, device.features)
    costs = overhead(engine, device.kind, device.features)
    peak = rate(device, shares.rate_dtype or compute_dtype)
    return (
        shares.read_share(device.memory_bytes_per_s), peak, shares.flop_share(peak), costs.kernel_s, costs.step_s, costs.kv_read_ratio,
        costs.prefill_chunk_tokens or np.inf, costs.runtime_bytes, shares.log_sd, costs.log_sd,
        float(costs.asynchronous),
    )  # fmt: skip


def _thread_shares(threads: np.ndarray, device: Device) -> tuple[Any, Any]:
    """Return the shares of bandwidth and arithmetic some threads reach: bandwidth saturates early, arithmetic late."""
    if device.kind != "cpu" or not device.cores:
        return np.ones_like(threads), np.ones_like(threads)
    compute = np.minimum(threads, device.cores) / device.cores
    bandwidth = np.minimum(1.0, threads * max(ONE_CORE_BYTES_PER_S / device.memory_bytes_per_s, 1 / device.cores))
    return bandwidth, compute
