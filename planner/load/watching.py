"""What a service's processes use while it is under load, read from outside; what the load generator uses itself."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from planner.isolation.watching import machine_busy_s, proportional_bytes, read_stat, resident_bytes

EVERY_S = 0.2
FAMILY_S = 2.0  # how often its processes are looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Used:
    """Over a load: cores are CPU seconds for each second. None: the service's processes could not be read."""

    seconds: float
    peak_bytes: int | None  # resident, all processes of the service together
    service_cores: float | None
    generator_cores: float
    other_cores: float | None  # of everything else on the machine
    energy_j: float | None  # of the machine, where it has counters
    energy_counters: tuple[str, ...] = ()


class Watch:
    """Reads until it is left; `used` then. Its readings are taken in a thread of their own.

    Args:
        pid: the root of the service's processes, None where it is not known.
    """

    def __init__(self, pid: int | None) -> None:
        from planner.energy import Counters

        self._pid = pid
        self._counters = Counters()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch-load", daemon=True)
        self._members: list[int] = []
        self._peak = 0
        self.used: Used | None = None

    def __enter__(self) -> Watch:
        self._members = family(self._pid)
        self._began = time.perf_counter(), time.process_time(), machine_busy_s(), self._cpu_s(), self._counters.read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        began, own_s, busy_s, service_s, joules = self._began
        seconds = max(1e-9, time.perf_counter() - began)
        own = (time.process_time() - own_s) / seconds
        service = max(0.0, self._cpu_s() - service_s) / seconds if self._members else None
        busy = (machine_busy_s() - busy_s) / seconds
        self.used = Used(
            seconds=seconds, peak_bytes=self._peak or None, service_cores=service, generator_cores=own,
            other_cores=None if service is None else max(0.0, busy - own - service),
            energy_j=self._counters.used_j(joules, self._counters.read()), energy_counters=self._counters.names,
        )  # fmt: skip

    def _cpu_s(self) -> float:
        return sum(stat.cpu_s for pid in self._members if (stat := read_stat(pid)))

    def _watch(self) -> None:
        looked = time.monotonic()
        while True:
            if time.monotonic() - looked > FAMILY_S:
                self._members, looked = family(self._pid), time.monotonic()
            # Pages that processes share are counted once: only a sum above the mark is worth the slower reading.
            held = resident_bytes(self._members)
            if held > self._peak and len(self._members) > 1:
                held = min(held, proportional_bytes(self._members) or held)
            self._peak = max(self._peak, held)
            if self._over.wait(EVERY_S):
                return


def family(pid: int | None) -> list[int]:
    """Return a process and all its descendants; nothing where it is not known or gone."""
    import psutil

    with suppress(psutil.Error):
        if pid is not None:
            process = psutil.Process(pid)
            return [pid, *(child.pid for child in process.children(recursive=True))]
    return []


def listener(port: int) -> int | None:
    """Return the process that listens on a port of this machine; None where the system does not tell."""
    import psutil

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            address: Any = connection.laddr
            if connection.status == psutil.CONN_LISTEN and address.port == port and connection.pid:
                return int(connection.pid)
    return None
