"""Energy counters: which this process may read, and what stands in the way of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROBE = "energy counters: RAPL and NVML"


def find() -> dict[str, Any]:
    """Return {"kinds": ["rapl", "nvml"], "counters": [...], "problems": [...]}; no kinds: energy is only modelled."""
    from planner.energy import Counters

    counters = Counters().names
    return {
        "kinds": sorted({name.partition(":")[0] for name in counters}),
        "counters": list(counters),
        "problems": _problems(Path("/sys/class/powercap"), counters),
    }


def _problems(powercap: Path, counters: tuple[str, ...]) -> list[str]:
    if any(name.startswith("rapl") for name in counters):
        return []
    zones = sorted(powercap.glob("intel-rapl:*/energy_uj"))
    if zones:
        return [f"{zones[0]} is readable by root only: sudo chmod a+r /sys/class/powercap/intel-rapl*/energy_uj"]
    return ["no RAPL counters: this processor, virtual machine or container does not show them"]
