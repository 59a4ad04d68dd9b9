"""What would spoil a measurement right now: load, other programs, swap, frequency scaling, throttling."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

PROBE = "noise: load, frequency scaling, swap, throttling, right now"
SAMPLE_S = 0.3


def find() -> dict[str, Any]:
    """Return {"load_1m", "busy_ratio", "governors", "swap_used_bytes", "throttle_events", "warnings": [...]}.

    `busy_ratio`: share of the machine's CPU time other processes used during a sample of 0.3 s.
    """
    import psutil

    before = sum(os.times()[:2])
    busy = psutil.cpu_percent(interval=SAMPLE_S) / 100
    logical = os.cpu_count() or 1
    own = (sum(os.times()[:2]) - before) / (SAMPLE_S * logical)
    facts: dict[str, Any] = {
        "load_1m": os.getloadavg()[0],
        "busy_ratio": max(0.0, busy - own),
        "governors": dict(Counter(_contents("/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))),
        "swap_used_bytes": psutil.swap_memory().used,
        "throttle_events": sum(
            map(int, _contents("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"))
        ),
    }
    return facts | {"warnings": warnings(facts, logical)}


def warnings(facts: dict[str, Any], logical_cores: int) -> list[str]:
    """Return what in the facts of `find` makes times unreliable, as sentences with what to do."""
    found = []
    if facts["busy_ratio"] > 0.1:
        found.append(f"other programs use {facts['busy_ratio']:.0%} of the processor: stop them, or times will spread")
    elif facts["load_1m"] > logical_cores:
        found.append(f"load average {facts['load_1m']:.1f} on {logical_cores} cores: wait until it falls")
    if scaled := [name for name in facts["governors"] if name not in ("performance", "schedutil")]:
        found.append(f"frequency governor `{scaled[0]}`: sudo cpupower frequency-set -g performance")
    if facts["swap_used_bytes"] > 2**28:
        found.append(f"{facts['swap_used_bytes'] / 2**30:.1f} GiB are swapped out: close programs")
    return found


def _contents(pattern: str) -> list[str]:
    contents = []
    for path in Path("/").glob(pattern.lstrip("/")):
        try:
            contents.append(path.read_text(encoding="ascii").strip())
        except OSError:
            continue  # a core that went offline
    return contents
