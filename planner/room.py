"""What is free of memory and disk, which plans it does for, and why a run cannot be done at all."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base import units
from planner.foreseeing import RUN_FILES_BYTES, building_bytes, reference_bytes, scoring_bytes

if TYPE_CHECKING:
    import numpy as np

    from knowledge_base.types import Model
    from planner.spec import Spec
    from search.problem import Priced

SURE_SHARE = 0.65  # of a build's rough forecast that it surely needs: a plan that might fit is tried, within its limit
RESERVE_BYTES = 64 * 2**20  # of disk that a build must leave free


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is free of memory and disk, and what a candidate may take of it."""

    memory_bytes: float  # free now
    memory_limit_bytes: float  # of one candidate: the spec's, or the machine's
    disk_bytes: float  # free where runs are written
    disk_limit_bytes: float  # of one candidate
    scoring_bytes: float  # of memory, beside the open model

    def beyond(self, priced: Priced) -> dict[str, np.ndarray]:
        """Return, by what there is too little of, (plans,) booleans: predicted to need more than there is."""
        import numpy as np

        on_gpu = priced.problem.hardware.device.kind == "gpu"
        serve = 0 if on_gpu else priced.figures["peak_memory_bytes"].mid
        memory = np.maximum(serve + self.scoring_bytes, SURE_SHARE * building_bytes(priced))
        artefact = priced.figures["artefact_bytes"].mid
        return {
            f"the memory that is free ({_bytes(self.memory_bytes)})": memory > self.memory_bytes,
            f"limits.memory ({_bytes(self.memory_limit_bytes)})": memory > self.memory_limit_bytes,
            f"the disk that is free ({_bytes(self.disk_bytes)})": artefact + RESERVE_BYTES > self.disk_bytes,
            f"limits.disk ({_bytes(self.disk_limit_bytes)})": artefact > self.disk_limit_bytes,
        }

    def fitting(self, priced: Priced) -> Priced:
        """Return the plans there is memory and disk for."""
        import numpy as np

        return priced.take(np.flatnonzero(~np.any(list(self.beyond(priced).values()), axis=0)))

    def obstacles(self, spec: Spec, unchanged: Priced, download_bytes: float = 0.0) -> tuple[str, ...]:
        """Return why not even the unchanged model can be measured, each with what to change; empty where it can."""
        figures = unchanged.figures
        artefact = float(figures["artefact_bytes"].low[0])
        disk = artefact + reference_bytes(spec, unchanged.problem.model) + RUN_FILES_BYTES + download_bytes
        told = []
        if unchanged.problem.hardware.device.kind != "gpu":
            memory = float(figures["peak_memory_bytes"].low[0])
            plan = unchanged.plans[0]
            how = f", with {plan.steps[0]}," if plan.steps else ""
            needs = f"the unchanged model{how} needs at least {_bytes(memory)} of memory"
            if memory > self.memory_limit_bytes:
                told.append(
                    f"{needs}, limits.memory and this machine allow {_bytes(self.memory_limit_bytes)}: raise limits.memory, let plans use offload, or plan for another machine with --predict"
                )
            elif memory > self.memory_bytes:
                told.append(
                    f"{needs}, {_bytes(self.memory_bytes)} is free: close other programs, or set limits.memory below that, so that layers wait on disk"
                )
        if disk > self.disk_bytes:
            told.append(
                f"the run needs at least {_bytes(disk)} of disk, {_bytes(self.disk_bytes)} is free: free some (leanplan clean), or name another place with --run-dir and --store"
            )
        if artefact > self.disk_limit_bytes:
            told.append(
                f"the unchanged model's artefact takes {_bytes(artefact)}, limits.disk allows {_bytes(self.disk_limit_bytes)}: raise limits.disk"
            )
        return tuple(told)


def room(spec: Spec, model: Model, limit_bytes: int, folder: Path) -> Room:
    """Return what is free now.

    Args:
        limit_bytes: of the machine's memory, for one process.
        folder: where runs are written, or will be.
    """
    import psutil

    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    return Room(
        memory_bytes=min(psutil.virtual_memory().available, limit_bytes),
        memory_limit_bytes=min(spec.limits.memory_bytes or limit_bytes, limit_bytes),
        disk_bytes=shutil.disk_usage(place).free, disk_limit_bytes=spec.limits.disk_bytes,
        scoring_bytes=scoring_bytes(spec, model),
    )  # fmt: skip


def _bytes(value: float) -> str:
    return units.format(value, "bytes")
