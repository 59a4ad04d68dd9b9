"""Memory: what the machine has, what is free, and what limits this process: control groups and ulimit."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

PROBE = "memory: installed, free, limits of control groups and ulimit"


def find() -> dict[str, Any]:
    """Return {"host_bytes", "available_bytes", "swap_bytes", "limit_bytes", "limit_source"}."""
    import psutil

    memory = psutil.virtual_memory()
    limits = {"installed memory": memory.total}
    limits |= {
        f"control group {path}": size
        for path, size in group_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")).items()
    }
    for name, number in (("ulimit -v", resource.RLIMIT_AS), ("ulimit -d", resource.RLIMIT_DATA)):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            limits[name] = soft
    source = min(limits, key=lambda name: limits[name])
    return {
        "host_bytes": memory.total,
        "available_bytes": memory.available,
        "swap_bytes": psutil.swap_memory().total,
        "limit_bytes": limits[source],
        "limit_source": source,
    }


def group_limits(root: Path, membership: Path) -> dict[str, int]:
    """Return the memory limits of this process's control groups and their parents, by path; version 1 and 2.

    Inside a container the group's own folder is often the root of what is visible, so the root is looked at too.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    limits = {}
    for _, controllers, path in lines:
        if controllers == "":
            base, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = Path(path.lstrip("/"))
        for part in (group, *group.parents):
            try:
                size = int((base / part / file).read_text(encoding="ascii"))
            except (OSError, ValueError):
                continue  # "max", or a level we may not see
            if size < 2**60:  # version 1 writes a huge number for "no limit"
                limits[f"/{part}" if str(part) != "." else "/"] = size
    return limits
