"""The processor: name, cores this process may use, caches, instruction sets."""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path
from typing import Any

PROBE = "processor: cores, caches, instruction sets"

# As /proc/cpuinfo spells them; the ones matrix libraries choose their kernels by.
_TELLING = (
    "avx",
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


def find() -> dict[str, Any]:
    """Return {"name", "cores" (usable by us), "logical_cores", "features", "caches_bytes": {"L1d": ...}, "source"}."""
    fields = _cpuinfo(Path("/proc/cpuinfo"))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "cores": usable_cores(),
        "logical_cores": os.cpu_count() or 1,
        "features": [name for name in _TELLING if name in flags],
        "caches_bytes": _caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        "source": "/proc/cpuinfo" if fields else "platform module",
    }


def usable_cores() -> int:
    """Return how many cores this process may use: its affinity, and its control group's share of CPU time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"))
    return max(1, min(allowed, math.ceil(quota))) if quota else allowed


def _quota(root: Path) -> float | None:
    """Return the control group's limit in cores, or None: version 2's cpu.max, version 1's cfs_quota_us."""
    try:
        quota, _, period = (root / "cpu.max").read_text(encoding="ascii").partition(" ")
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        quota = _read(root / "cpu" / "cpu.cfs_quota_us")
        period = _read(root / "cpu" / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _cpuinfo(path: Path) -> dict[str, str]:
    """Return the fields of the first processor."""
    fields: dict[str, str] = {}
    for line in _read(path).splitlines():
        if not line.strip() and fields:
            break
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _caches(folder: Path) -> dict[str, int]:
    caches = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = (_read(index / name).strip() for name in ("level", "type", "size"))
        found = re.fullmatch(r"(\d+)([KMG])", size)
        if found:
            scale = {"K": 2**10, "M": 2**20, "G": 2**30}[found[2]]
            caches[f"L{level}{ {'Data': 'd', 'Instruction': 'i'}.get(kind, '') }"] = int(found[1]) * scale
    return caches


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""  # this kernel or container does not show it
