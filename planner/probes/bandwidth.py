"""Memory bandwidth, measured: how fast 1..N threads read an array far larger than the caches."""

from __future__ import annotations

import time
from typing import Any

from planner.probes._child import measure_apart

PROBE = "memory bandwidth with 1..N threads"
SECONDS_EACH = 0.6  # for each number of threads
LARGEST_BYTES = 2**30


def find() -> dict[str, Any]:
    """Return {"read_bytes_per_s": {"1": ..., "2": ...}, "array_bytes"}, or {"problem": why}."""
    return measure_apart("bandwidth", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")


def measure() -> dict[str, Any]:
    """Read slices of one array with that many threads; the best of several passes counts, since noise only slows.

    Reading is numpy's dot product of an array with itself: each byte is loaded once, two operations for four bytes
    stay far below what a core can do, and numpy lets other threads run meanwhile.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    import psutil

    from planner.probes.linux_cpu import find as cpu_facts

    cpu = cpu_facts()
    cores, largest_cache = cpu["cores"], max(cpu["caches_bytes"].values(), default=0)
    size = min(max(2**28, 4 * largest_cache), LARGEST_BYTES, psutil.virtual_memory().available // 4)
    array = np.ones(size // 4, dtype=np.float32)
    rates = {}
    for threads in _thread_counts(cores):
        slices = np.array_split(array, threads)
        with ThreadPoolExecutor(threads) as pool:
            best, stop = float("inf"), time.monotonic() + SECONDS_EACH
            while time.monotonic() < stop or best == float("inf"):
                start = time.perf_counter()
                list(pool.map(lambda part: float(part @ part), slices))
                best = min(best, time.perf_counter() - start)
        rates[str(threads)] = array.nbytes / best
    return {"read_bytes_per_s": rates, "array_bytes": int(array.nbytes)}


def _thread_counts(cores: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 < cores:
        counts.append(counts[-1] * 2)
    return sorted({*counts, cores})
