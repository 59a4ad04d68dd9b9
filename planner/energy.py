"""Joules: read from counters where the machine lets us, else modelled, with a wide interval and labelled so."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Figure, Hardware

J_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Counter:
    """One energy counter. `range_j`: where it wraps to zero; None if it does not."""

    name: str
    range_j: float | None
    source: Any  # a file with microjoules, or an NVML handle


class Counters:
    """The energy counters this process may read: RAPL packages and memory, NVIDIA GPUs. Empty where there are none.

    RAPL counts the whole package, other programs included, and has been readable by root only since 2020
    (CVE-2020-8694); where the files cannot be read they do not count as there.
    """

    def __init__(self, powercap: Path = Path("/sys/class/powercap")) -> None:
        self._counters = _rapl(powercap)
        self._nvml, gpus = _nvml()
        self._counters += gpus

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self._counters)

    def read(self) -> dict[str, float]:
        """Return the joules each counter shows now."""
        return {c.name: self._value(c) for c in self._counters}

    def used_j(self, before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
        """Return the joules used between two readings, all counters together, or None where there is no counter.

        A counter that shows less than before has wrapped once. RAPL wraps after some minutes at full power (2^32 uJ on
        small parts), so readings must be closer together than that.
        """
        if not self._counters:
            return None
        return sum(wrapped(after[c.name] - before[c.name], c.range_j) for c in self._counters)

    def _value(self, counter: Counter) -> float:
        if isinstance(counter.source, Path):
            return int(counter.source.read_text(encoding="ascii")) / 1e6
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(counter.source) / 1e3  # millijoules


def wrapped(difference_j: float, range_j: float | None) -> float:
    """Return a counter's advance: a negative difference means that it wrapped round once at `range_j`."""
    return difference_j + range_j if difference_j < 0 and range_j is not None else difference_j


def _rapl(powercap: Path) -> list[Counter]:
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):  # AMD's packages appear under this name too
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            if not (name.startswith("package") or name == "dram"):
                continue  # core and uncore are parts of a package, psys counts everything twice
            range_j = int((zone / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
            int((zone / "energy_uj").read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue  # not readable: not a counter for us
        found.append(Counter(f"rapl:{zone.name}:{name}", range_j, zone / "energy_uj"))
    return found


def _nvml() -> tuple[Any, list[Counter]]:
    try:
        import pynvml
    except ImportError:
        return None, []
    found = []
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # Volta and later
            found.append(Counter(f"nvml:{index}", None, handle))
    except pynvml.NVMLError:
        return pynvml, found
    return pynvml, found


def modelled_energy(seconds_per_token: Figure, hardware: Hardware, busy_cores: float) -> Figure | None:
    """Return modelled joules for each token, or None where there is nothing to model power from. Never "measured".

        energy = (idle + (busy - idle) x busy cores / cores) x measured seconds for each token

    with the same assumptions on power as the prediction (cost_models/terms/energy_j_per_token.py), and an interval
    that holds their doubt. Fans, power supplies, frequency and instruction mix are left out.
    """
    from cost_models.terms.energy_j_per_token import device_power

    device = hardware.device
    try:
        idle_w, busy_w, log_sd, assumed = device_power(device)
    except EnvironmentProblem:
        return None
    cores = device.cores or os.cpu_count() or 1
    share = 1.0 if device.kind == "gpu" else min(1.0, busy_cores / cores)
    power_w = idle_w + max(0.0, busy_w - idle_w) * share
    factor = math.exp(1.96 * log_sd)
    note = f"{power_w:.1f} W assumed, within a factor of {factor:.1f}; no energy counter can be read here"
    return Figure(
        value=power_w * seconds_per_token.value, low=power_w / factor * seconds_per_token.low,
        high=power_w * factor * seconds_per_token.high, n=seconds_per_token.n, confidence=seconds_per_token.confidence,
        statistic=seconds_per_token.statistic, source="modelled", note="; ".join(t for t in (note, assumed) if t),
    )  # fmt: skip


def carbon(energy: Figure, hardware: Hardware) -> Figure:
    """Return grams of CO2 equivalent for each token: energy x PUE x grid intensity, the world's where none is given."""
    intensity, note = hardware.grid_gco2e_per_kwh, ""
    if intensity is None:
        from cost_models.catalogue import grid_carbon

        intensity, source = grid_carbon("world")
        note = f"grid: world average {intensity:g} g/kWh ({source})"
    return scaled(energy, hardware.pue * intensity / J_PER_KWH, note)


def cost(seconds_per_token: Figure, energy: Figure | None, hardware: Hardware) -> Figure | None:
    """Return US dollars for each token: hourly price over throughput, plus electricity.

    As predicted in cost_models/terms/cost_usd_per_token.py: electricity counts when its price is given, or when the
    machine is not rented. None where neither part can be told.
    """
    from cost_models.terms.cost_usd_per_token import paid_electricity

    parts = []
    if hardware.price_usd_per_h is not None:
        rent = f"${hardware.price_usd_per_h:.4g}/h{' of buying it' if hardware.owned else ''}"
        parts.append(scaled(seconds_per_token, hardware.price_usd_per_h / 3600, rent))
    electricity, note = paid_electricity(hardware)
    if electricity is not None and energy is not None:
        parts.append(scaled(energy, hardware.pue * electricity / J_PER_KWH, note))
    if not parts:
        return None
    modelled = any(p.source == "modelled" for p in parts)
    return Figure(
        value=sum(p.value for p in parts), low=sum(p.low for p in parts), high=sum(p.high for p in parts),
        n=min(p.n for p in parts), confidence=min(p.confidence for p in parts), statistic=parts[0].statistic,
        source="modelled" if modelled else "measured", note="; ".join(p.note for p in parts if p.note),
    )  # fmt: skip


def scaled(figure: Figure, factor: float, note: str = "") -> Figure:
    """Return a figure times a constant; it stays measured or modelled as it was."""
    return Figure(
        value=figure.value * factor, low=figure.low * factor, high=figure.high * factor, n=figure.n,
        confidence=figure.confidence, statistic=figure.statistic, source=figure.source,
        samples=tuple(x * factor for x in figure.samples), note="; ".join(t for t in (figure.note, note) if t),
    )  # fmt: skip
