"""Which processor cores an engine's threads are kept on, where a plan says so.

Threads that share a physical core share its arithmetic, and those of two memory nodes read across the link between them.
So cores are taken in this order: the fast ones of a processor with two kinds, one thread of each physical core, one memory
node before the next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from knowledge_base.errors import CandidateFailed

SYSTEM = Path("/sys/devices")


def pin(runtime: Mapping[str, Any]) -> None:
    """Keep this process, and every thread it starts from now on, on as many cores as the plan has threads; if it says so.

    It stays there: closing an artefact gives no core back.

    Raises:
        CandidateFailed: "unsupported", the process may use fewer cores, or the system cannot keep it on some.
    """
    if "pinned" in runtime:
        os.sched_setaffinity(0, chosen(runtime.get("threads")))


def chosen(count: int | None = None) -> tuple[int, ...]:
    """Return the cores, of those this process may use, that `count` threads are kept on; all of them where none is given.

    Raises:
        CandidateFailed: as `pin`.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise CandidateFailed(
            "unsupported", "threads can be kept on cores under Linux only", hint="thread_count sets how many"
        )
    allowed = os.sched_getaffinity(0)
    if count is not None and count > len(allowed):
        raise CandidateFailed(
            "unsupported", f"{count} threads cannot each have one of the {len(allowed)} cores this process may use",
            hint="plan on this machine, as it is now",
        )  # fmt: skip
    return in_order(allowed)[:count]


def in_order(cores: Collection[int], system: Path = SYSTEM) -> tuple[int, ...]:
    """Return logical cores, those that serve threads best first; in their own order where the system tells nothing."""
    fast = _listed(_read(system / "cpu_core" / "cpus"))  # of a processor with two kinds of cores
    seen: dict[tuple[str, str], int] = {}
    places = {}
    for core in sorted(cores):
        folder = system / "system" / "cpu" / f"cpu{core}"
        package, number = (_read(folder / "topology" / name) for name in ("physical_package_id", "core_id"))
        physical = (package, number or f"logical {core}")
        sibling = seen[physical] = seen.get(physical, -1) + 1
        capacity = int(_read(folder / "cpu_capacity") or 0)
        places[core] = (bool(fast) and core not in fast, -capacity, sibling, _node(folder), core)
    return tuple(sorted(places, key=places.__getitem__))


def _node(folder: Path) -> int:
    return min(
        (int(found[1]) for link in folder.glob("node*") if (found := re.fullmatch(r"node(\d+)", link.name))), default=0
    )


def _listed(text: str) -> frozenset[int]:
    """Return the numbers of a list such as "0-3,8"."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return frozenset(n for first, _, last in spans for n in range(int(first), int(last or first) + 1))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""  # this kernel or container does not show it
