"""What a candidate does, observed from outside: speed in blocks, memory, energy. Fidelity is fidelity.py's.

Nothing a candidate says is taken as it comes: numbers are checked against the planner's own clock, outputs against
what was asked, decode steps against the time reading the weights takes at best. CPU use, peak memory and energy are
read by the planner itself.
"""

from __future__ import annotations

import os
import random
import statistics as plain_statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Failure, Figure, Hardware, Workload
from planner import energy
from planner.building import read_manifest
from planner.claims import number
from planner.isolation import Candidate
from planner.isolation.watching import machine_busy_s
from planner.locks import measurement_lock
from planner.statistics import (
    exact_figure,
    half_width,
    mean_figure,
    median_figure,
    minimal_samples,
    paired_ratio,
    stability,
    warm_up_length,
)

Progress = Callable[[str, float], None]
TIMED = ("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s")
LONGEST_S = 1e5  # no single time a candidate reports may be above this


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long and how often. Requests are served in batches of the plan's own size; a sample is one batch.

    Screening goes on until there are `requests` samples over `least_s`, the interval of the median time per token is
    within `half_width_ratio`, and (with `tail`) a 95th percentile can be given; at the latest until `most_s`.
    """

    requests: int
    least_s: float
    most_s: float
    half_width_ratio: float = 0.05
    tail: bool = False  # a budget asks for a 95th percentile: 90 samples, if `tail_s` more allow them
    tail_s: float = 0.0
    blocks: int = 9  # of each plan when finalists are interleaved
    block_s: float = 1.0  # aimed at; a block has at least one counted batch
    blocks_s: float = 120.0  # for all interleaved blocks together
    confidence: float = 0.95
    seed: int = 0


PROTOCOLS = {
    "quick": Protocol(requests=10, least_s=3.0, most_s=12.0, tail_s=15.0, blocks=9, block_s=0.5, blocks_s=90.0),
    "normal": Protocol(requests=10, least_s=5.0, most_s=40.0, tail_s=60.0, blocks=9, block_s=3.4, blocks_s=600.0),
    "thorough": Protocol(
        requests=30, least_s=30.0, most_s=600.0, tail_s=600.0, blocks=15, block_s=4.0, blocks_s=3600.0
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An opened artefact and the load it is put under."""

    candidate: Candidate
    folder: Path
    prompts: Path  # .npy of int32 (prompts, at least prompt_tokens)
    prompt_tokens: int
    new_tokens: int
    batch: int
    artefact_bytes: int
    framework_bytes: int  # resident before the artefact was loaded
    open_peak_bytes: int  # highest resident while it was loaded
    load_s: float
    read_s: float  # one read of the weights, at best: no decode step can be faster
    versions: Mapping[str, str]


@dataclass(slots=True)
class Samples:
    """One value for each served batch, in order; energy and CPU use have one for each block."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)
    throughput_tokens_per_s: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    energy_j_per_token: list[float] = field(default_factory=list)
    own_cores: list[float] = field(default_factory=list)
    other_cores: list[float] = field(default_factory=list)

    def extend(self, other: Samples, first: int = 0) -> None:
        """Append another's values, its `first` batches left out."""
        for name in (*TIMED, "steps"):
            getattr(self, name).extend(getattr(other, name)[first:])
        for name in ("energy_j_per_token", "own_cores", "other_cores"):
            getattr(self, name).extend(getattr(other, name))

    def dropped(self, count: int) -> Samples:
        """Return these without the first `count` batches."""
        rest = Samples()
        rest.extend(self, count)
        return rest

    def medians(self) -> dict[str, float]:
        """Return the median of each timed metric, and the mean energy."""
        found = {name: plain_statistics.median(values) for name in TIMED if (values := getattr(self, name))}
        if self.energy_j_per_token:
            found["energy_j_per_token"] = plain_statistics.fmean(self.energy_j_per_token)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen of one candidate. With `failure`, figures are kept but do not count."""

    figures: Mapping[str, Figure]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    failure: Failure | None = None
    ratios: Mapping[str, Figure] = field(default_factory=dict)  # to the baseline, paired; from interleaved blocks


# ---------------------------------------------------------------- opening


def open_artefact(
    candidate: Candidate,
    folder: Path,
    workload: Workload,
    prompts: Path,
    *,
    read_s: float = 0.0,
    progress: Progress | None = None,
) -> Job:
    """Have the candidate load an artefact and return the job of serving the workload with it.

    Args:
        read_s: seconds to read the weights once at this machine's best bandwidth; 0 where none can be told (weights
            that fit the caches). A decode step that claims to be faster is not believed.

    Raises:
        CandidateFailed: it does not load.
    """
    manifest = read_manifest(folder)
    reply = candidate.call(
        "open",
        {"folder": str(folder.resolve()), "engine": manifest["engine"], "runtime": manifest["runtime"]},
        timeout_s=candidate.limits.time_s,
        progress=progress,
    )
    versions = reply.get("versions")
    return Job(
        candidate=candidate, folder=folder, prompts=prompts.resolve(), prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.output_tokens, batch=int(manifest["runtime"].get("batch", 1)),
        artefact_bytes=sum(int(f["bytes"]) for f in manifest["files"].values()),
        framework_bytes=int(number(reply, "framework_bytes", 0, 1e15)), open_peak_bytes=candidate.peak_bytes,
        load_s=number(reply, "load_s", 0, LONGEST_S), read_s=read_s,
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
    )  # fmt: skip


# ---------------------------------------------------------------- speed, memory, energy


def screen(
    job: Job,
    protocol: Protocol,
    hardware: Hardware,
    *,
    counters: energy.Counters | None = None,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
) -> Observed:
    """Serve requests until the figures are sharp enough or the time is up, holding the machine's measurement lock.

    Raises:
        CandidateFailed: it fails, gives fewer tokens than asked, or claims what cannot be.
    """
    counters = counters or energy.Counters()
    samples, first = Samples(), 1
    with measurement_lock(waiting=waiting) as waited_s:
        job.candidate.grant(waited_s)
        load_before = os.getloadavg()[0]
        job.candidate.reset_peak()
        # The very first request compiles, allocates and fills caches: known to be no sample of the steady state.
        cold_s = _block(job, 0, 1, counters, progress).latency_s[0]
        began = time.monotonic()
        while True:
            elapsed = time.monotonic() - began
            batch_s = plain_statistics.median(samples.latency_s) if samples.latency_s else cold_s
            if len(samples.latency_s) > 3 and _enough(samples, protocol, elapsed, batch_s):
                break
            repetitions = max(1, min(50, round(min(1.0, protocol.most_s / 8) / batch_s)))
            samples.extend(_block(job, first, repetitions, counters, progress))
            first += repetitions * job.batch
            if progress:
                progress(f"timed {len(samples.latency_s)} batches", min(1.0, elapsed / protocol.most_s))
        memory = _memory(job)
        serving_peak = job.candidate.peak_bytes
    dropped, settled = warm_up_length(samples.latency_s)
    steady = samples.dropped(dropped)
    other = plain_statistics.fmean(samples.other_cores)
    figures = _timed_figures(steady, job, protocol) | _memory_figures(job, memory, serving_peak)
    figures |= _energy_figures(steady, protocol, hardware, counters, job)
    record = {
        **asdict(protocol), "dropped": dropped, "settled": settled, "counted": len(steady.latency_s), "cold_s": cold_s,
        "load_s": job.load_s, "lock_wait_s": waited_s, "other_cores": other, "load_average": load_before,
        "own_cores": plain_statistics.median(samples.own_cores), "cores": len(os.sched_getaffinity(0)), "batch": job.batch, "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens, "steps": plain_statistics.median(steady.steps), "timed_s": sum(steady.latency_s),
        "framework_bytes": job.framework_bytes, "serving_peak_bytes": serving_peak,
        "open_peak_bytes": job.open_peak_bytes,
        "energy_counters": list(counters.names), "clock": "perf_counter", "process": "forked from a preloaded server",
    }  # fmt: skip
    warnings = stability(steady.latency_s, settled=settled, other_cores=other)
    return Observed(figures=figures, protocol=record, warnings=warnings, versions=job.versions)


def _enough(samples: Samples, protocol: Protocol, elapsed: float, batch_s: float) -> bool:
    dropped, settled = warm_up_length(samples.latency_s)
    steady = samples.dropped(dropped)
    n = len(steady.latency_s)
    if n < 3:
        return False
    tail_n = minimal_samples(0.95, 0)
    wanted = steady.tpot_s or steady.latency_s
    sharp = (
        n >= protocol.requests
        and settled
        and sum(steady.latency_s) >= protocol.least_s
        and half_width(median_figure(wanted, confidence=protocol.confidence)) <= protocol.half_width_ratio
    )
    if protocol.tail and n < tail_n:
        # worth it only if the percentile is within reach
        reachable = elapsed + (tail_n - n) * batch_s <= protocol.most_s + protocol.tail_s
        return elapsed >= protocol.most_s and not reachable
    return sharp or elapsed >= protocol.most_s


def _block(
    job: Job, first: int, repetitions: int, counters: energy.Counters, progress: Progress | None = None
) -> Samples:
    """Serve `repetitions` batches, check the claims, and return the samples.

    Raises:
        CandidateFailed: `output_too_short` or `invalid_result`.
    """
    payload = {
        "prompts": str(job.prompts), "prompt_tokens": job.prompt_tokens, "new_tokens": job.new_tokens,
        "batch": job.batch, "first": first, "repetitions": repetitions,
    }  # fmt: skip
    candidate = job.candidate
    busy, cpu, mine, joules = machine_busy_s(), candidate.cpu_s, time.process_time(), counters.read()
    began = time.perf_counter()
    reply = candidate.call("block", payload, timeout_s=candidate.limits.time_s, progress=progress)
    wall_s = time.perf_counter() - began
    used_j = counters.used_j(joules, counters.read())
    busy, cpu, mine = machine_busy_s() - busy, candidate.cpu_s - cpu, time.process_time() - mine
    samples = _checked(job, reply.get("samples"), repetitions, wall_s)
    samples.own_cores.append(max(0.0, cpu) / wall_s)
    samples.other_cores.append(max(0.0, busy - cpu - mine) / wall_s)
    if used_j is not None:
        samples.energy_j_per_token.append(used_j / (repetitions * job.batch * job.new_tokens))
    return samples


def _checked(job: Job, claimed: Any, repetitions: int, wall_s: float) -> Samples:
    if not isinstance(claimed, list) or len(claimed) != repetitions:
        raise CandidateFailed("invalid_result", f"block: expected {repetitions} samples")
    samples = Samples()
    for claim in claimed:
        if not isinstance(claim, dict):
            raise CandidateFailed("invalid_result", "block: a sample is not an object")
        total_s = number(claim, "total_s", 1e-9, LONGEST_S)
        ttft_s = number(claim, "ttft_s", 1e-9, total_s)
        steps = number(claim, "steps", 0, job.new_tokens)
        counts = claim.get("tokens")
        if not isinstance(counts, list) or len(counts) != job.batch or not all(type(c) is int for c in counts):
            raise CandidateFailed("invalid_result", f"block: `tokens` is not {job.batch} counts")
        if min(counts) < job.new_tokens:
            raise CandidateFailed("output_too_short", f"gave {min(counts)} of {job.new_tokens} tokens")
        if max(counts) > job.new_tokens:
            raise CandidateFailed("invalid_result", f"gave {max(counts)} tokens, {job.new_tokens} were asked for")
        samples.ttft_s.append(ttft_s)
        samples.latency_s.append(total_s)
        samples.throughput_tokens_per_s.append(job.batch * job.new_tokens / total_s)
        samples.steps.append(steps)
        if job.new_tokens > 1:
            samples.tpot_s.append((total_s - ttft_s) / (job.new_tokens - 1))
    claimed_s = sum(samples.latency_s)
    if claimed_s > wall_s * 1.01 + 1e-3:
        text = f"claims {units.format(claimed_s, 'time')} of work in a block that took {units.format(wall_s, 'time')}"
        raise CandidateFailed("invalid_result", text)
    if job.new_tokens > 1:
        _believe(job, samples)
    return samples


def _believe(job: Job, samples: Samples) -> None:
    """Refuse decode steps faster than one read of the weights (row 53 of the table of faults)."""
    if min(samples.steps) < 1:
        raise CandidateFailed("invalid_result", f"gave {job.new_tokens} tokens in no decode step: not believed")
    rows = zip(samples.latency_s, samples.ttft_s, samples.steps, strict=True)
    step_s = plain_statistics.median((total - ttft) / steps for total, ttft, steps in rows)
    if step_s < job.read_s:
        bound = units.format(job.read_s, "time")
        raise CandidateFailed(
            "invalid_result",
            f"a decode step in {units.format(max(step_s, 1e-12), 'time')} is faster than reading the weights once "
            f"(lower bound {bound}): not believed",
        )  # fmt: skip


def _timed_figures(samples: Samples, job: Job, protocol: Protocol) -> dict[str, Figure]:
    found = {
        name: median_figure(values, confidence=protocol.confidence)
        for name in TIMED
        if (values := getattr(samples, name))
    }
    return found | {"requests_per_s": energy.scaled(found["throughput_tokens_per_s"], 1 / job.new_tokens)}


def _memory(job: Job) -> dict[str, int]:
    reply = job.candidate.call("memory", {}, timeout_s=60).get("memory")
    if not isinstance(reply, dict):
        raise CandidateFailed("invalid_result", "memory: no figures")
    return {name: int(number(reply, name, 0, 1e15)) for name in ("weights_bytes", "kv_cache_bytes")}


def _memory_figures(job: Job, memory: Mapping[str, int], serving_peak: int) -> dict[str, Figure]:
    peak = max(job.open_peak_bytes, serving_peak)
    framework = units.format(job.framework_bytes, "bytes")
    note = f"framework {framework}; loading included, {units.format(serving_peak, 'bytes')} while serving"
    return {
        "peak_memory_bytes": exact_figure(peak, note),
        "weights_bytes": exact_figure(memory["weights_bytes"]),
        "kv_cache_bytes": exact_figure(memory["kv_cache_bytes"]),
        "artefact_bytes": exact_figure(job.artefact_bytes),
        "network_bytes_per_start": exact_figure(job.artefact_bytes, "the artefact's files; the engine is not counted"),
    }


def _energy_figures(
    samples: Samples, protocol: Protocol, hardware: Hardware, counters: energy.Counters, job: Job
) -> dict[str, Figure]:
    per_token = [1 / x for x in samples.throughput_tokens_per_s]
    seconds = median_figure(per_token, confidence=protocol.confidence)
    joules: Figure | None
    if samples.energy_j_per_token:
        note = f"{', '.join(counters.names)}: the whole package, other programs included"
        joules = mean_figure(samples.energy_j_per_token, seed=protocol.seed, confidence=protocol.confidence, note=note)
    else:
        joules = energy.modelled_energy(seconds, hardware, plain_statistics.median(samples.own_cores))
    found = {"cost_usd_per_token": energy.cost(seconds, joules, hardware)}
    if joules:
        found |= {"energy_j_per_token": joules, "carbon_gco2e_per_token": energy.carbon(joules, hardware)}
    return {name: figure for name, figure in found.items() if figure is not None}


# ---------------------------------------------------------------- finalists


def interleave(
    jobs: Mapping[str, Job],
    baseline: str,
    protocol: Protocol,
    hardware: Hardware,
    *,
    counters: energy.Counters | None = None,
    progress: Progress | None = None,
    waiting: Callable[[str], None] | None = None,
) -> dict[str, Observed]:
    """Serve all jobs in random blocks, round by round, and return figures and paired ratios to the baseline.

    What the machine does meanwhile (other programs, throttling) then falls on all alike and cancels in the ratios.
    A block's first batch is dropped: caches hold another plan's weights. Whole rounds only, until `protocol.blocks`
    of them or `protocol.blocks_s` are over; ratios of fewer than 9 say so in their note.

    Raises:
        CandidateFailed: a candidate fails; the message starts with its name in `jobs`.
    """
    counters = counters or energy.Counters()
    order = random.Random(protocol.seed)
    blocks: dict[str, list[Samples]] = {name: [] for name in jobs}
    batch_s: dict[str, float] = {}
    with measurement_lock(waiting=waiting) as waited_s:
        for job in jobs.values():
            job.candidate.grant(waited_s)
        began = time.monotonic()
        for name, job in jobs.items():
            batch_s[name] = _named(name, _block, job, 0, 2, counters).latency_s[-1]
        round_s = 0.0
        for number in range(protocol.blocks):
            started = time.monotonic()
            if number >= 2 and started - began + round_s > protocol.blocks_s:
                break
            for name in order.sample(sorted(jobs), len(jobs)):
                job = jobs[name]
                repetitions = 1 + max(1, min(200, round(protocol.block_s / batch_s[name])))
                first = 1 + number * repetitions * job.batch
                samples = _named(name, _block, job, first, repetitions, counters)
                blocks[name].append(samples.dropped(1))
                if progress:
                    progress(f"block {number + 1} of {protocol.blocks}: {name}", number / protocol.blocks)
            round_s = time.monotonic() - started
    medians = {name: [b.medians() for b in found] for name, found in blocks.items()}
    return {
        name: _interleaved(name, baseline, jobs[name], blocks[name], medians, protocol, hardware, counters, waited_s)
        for name in jobs
    }


def _named(name: str, work: Callable[..., Samples], *arguments: Any) -> Samples:
    try:
        return work(*arguments)
    except CandidateFailed as error:
        raise CandidateFailed(error.kind, f"{name}: {error.message}", hint=error.hint) from error


def _interleaved(
    name: str, baseline: str, job: Job, blocks: Sequence[Samples], medians: Mapping[str, list[dict[str, float]]],
    protocol: Protocol, hardware: Hardware, counters: energy.Counters, waited_s: float,
) -> Observed:  # fmt: skip
    samples = Samples()
    for block in blocks:
        samples.extend(block)
    figures = _timed_figures(samples, job, protocol) | _energy_figures(samples, protocol, hardware, counters, job)
    ours, theirs = medians[name], medians[baseline]
    ratios = {}
    if name != baseline:
        for metric in ours[0]:
            pairs = [(a[metric], b[metric]) for a, b in zip(ours, theirs, strict=True) if metric in b]
            if pairs and min(min(p) for p in pairs) > 0:
                mine, base = zip(*pairs, strict=True)
                ratios[metric] = paired_ratio(mine, base, seed=protocol.seed, confidence=protocol.confidence)
    other = plain_statistics.fmean(samples.other_cores)
    record = {
        "interleaved_blocks": len(blocks), "interleaved_batches": len(samples.latency_s), "interleaved_with": baseline,
        "interleaved_s": sum(samples.latency_s), "lock_wait_s": waited_s, "other_cores": other, "seed": protocol.seed,
    }  # fmt: skip
    warnings = stability(samples.latency_s, other_cores=other)
    return Observed(figures=figures, ratios=ratios, protocol=record, warnings=warnings, versions=job.versions)


def greedy_tokens(job: Job, count: int) -> list[list[int]]:
    """Return the greedy continuations of the first `count` prompts, one by one: a lossless step keeps them."""
    payload = {
        "prompts": str(job.prompts), "prompt_tokens": job.prompt_tokens, "new_tokens": job.new_tokens, "count": count,
    }  # fmt: skip
    rows = job.candidate.call("tokens", payload, timeout_s=job.candidate.limits.time_s).get("tokens")
    if not isinstance(rows, list) or not all(isinstance(r, list) and all(type(t) is int for t in r) for r in rows):
        raise CandidateFailed("invalid_result", "tokens: not lists of token ids")
    return rows
