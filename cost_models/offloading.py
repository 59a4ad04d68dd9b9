"""Weights that are not in memory: what memory that saves, and how long a pass waits for them.

A pass through the layers brings each offloaded weight in once, for the whole batch: from disk where the model runs on a
processor, and from the host's memory, or its disk where that is too small, where it runs on an accelerator. On a
processor the next weights are read while the layers compute, so that a pass takes the longer of the two, as in FlexGen's
cost model (Sheng et al. 2023, arXiv:2303.06865); to an accelerator the engine brings them in when their turn comes, and
the two add up.

    waiting = max(0, bytes / rate - computing)   on a processor;   bytes / rate   to an accelerator
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models.catalogue import CATALOGUE
from knowledge_base import units
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Hardware

if TYPE_CHECKING:
    from cost_models.case import Case

PART = "waiting for weights"  # the part of a pass that is neither computing nor reading memory
HOST_SHARE = 0.8  # of the host's memory, that weights of an accelerator may fill
RATE_LOG_SD = 0.35  # of what a disk or a link gives on one day: neighbours, caches below the file system


def saved_bytes(case: Case) -> Any:
    """Return the bytes of memory that offloading saves: what lies elsewhere, less what is on its way in."""
    return case.demand.linear_bytes * case.demand.offloaded_share - case.demand.transit_bytes


def waiting(case: Case, busy_s: Any, passes: Any = 1) -> dict[str, Any]:
    """Return {PART: seconds waited in some passes that take `busy_s` otherwise}; {} where no plan offloads.

    Raises:
        EnvironmentProblem: some plan does, and how fast this machine brings weights in is not known.
    """
    if not np.any(case.demand.offloaded_share):
        return {}
    hidden = busy_s if overlapped(case.hardware) else 0.0
    return {PART: np.maximum(transfer_s(case, passes) - hidden, 0.0)}


def note(case: Case) -> str:
    """Return that the rate weights come in at is assumed, where a plan needs it and the machine is the catalogue's."""
    hardware = case.hardware
    if not hardware.fingerprint.startswith(CATALOGUE) or not np.any(case.demand.offloaded_share):
        return ""
    disk = f"{units.format(hardware.disk_bytes_per_s or 0.0, 'bandwidth')} from an NVMe disk (as FlexGen's, arXiv:2303.06865)"
    if hardware.device.kind != "gpu":
        return f"assumed: weights come in at {disk}"
    link = units.format(hardware.host_link_bytes_per_s or 0.0, "bandwidth")
    return f"assumed: weights come in at {link} from the host (80 % of its link), or at {disk} where that is full"


def log_sd(case: Case, mid: Any, passes: Any = 1) -> Any:
    """Return (plans,) standard deviations of the log of a time, by what is not known of the rate weights come in at.

    All of it where the time is that of the transfer, and less the more of it lies behind computing.
    """
    if not np.any(case.demand.offloaded_share):
        return 0.0
    return RATE_LOG_SD * np.minimum(transfer_s(case, passes) / mid, 1.0) ** 2


def transfer_s(case: Case, passes: Any = 1) -> Any:
    """Return (plans,) seconds to bring everything in that is not in memory, `passes` times."""
    return passes * seconds_for(case.demand.linear_bytes * case.demand.offloaded_share, case.hardware)


def seconds_for(offloaded_bytes: Any, hardware: Hardware) -> Any:
    """Return the seconds to bring so many bytes of weights in.

    Raises:
        EnvironmentProblem: the rate is not known.
    """
    if why := unknown(hardware):
        raise EnvironmentProblem(
            why, hint="measure it on the machine itself: leanplan probe --refresh", where="hardware"
        )
    if hardware.device.kind != "gpu":
        return offloaded_bytes / hardware.disk_bytes_per_s
    on_host = np.minimum(offloaded_bytes, HOST_SHARE * hardware.host_memory_bytes)
    slowest = min(hardware.host_link_bytes_per_s or 0.0, hardware.disk_bytes_per_s or np.inf)
    return on_host / hardware.host_link_bytes_per_s + (offloaded_bytes - on_host) / slowest


def overlapped(hardware: Hardware) -> bool:
    """Return whether the next weights come in while the layers compute."""
    return hardware.device.kind != "gpu"


def unknown(hardware: Hardware) -> str | None:
    """Return which rate of a machine is missing to tell how fast weights are brought in, as a sentence, or None."""
    if hardware.device.kind == "gpu":
        missing = "its link between host and accelerator" if hardware.host_link_bytes_per_s is None else None
    else:
        missing = "its disk" if hardware.disk_bytes_per_s is None else None
    return f"how fast {hardware.name} reads from {missing} is not known" if missing else None
