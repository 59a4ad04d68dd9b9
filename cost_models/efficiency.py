"""How much of a device's peak each engine reaches with each weight format: the priors, from data with sources.

The most telling row wins: one for the engine beats any other, then one for the format, then one for the kind of
device, then one for compiled or not. Rows with `*` hold for all that have none of their own, so a new engine works
at once, with wide intervals. Calibration corrects them from measurements.

Rows for `cpu` are shares of measured bandwidths and rates; those for `published`, a feature of processors whose
figures were only worked out from data sheets, are shares of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from knowledge_base.errors import EnvironmentProblem
from knowledge_base.field.overlay import folders, table
from knowledge_base.types import Device

PUBLISHED = "published"
BEST_SHARE = 0.95  # of a published bandwidth or rate that a falling share may come to


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of peak for one (engine, weight format, kind of device).

    `read_ratio` of the memory bandwidth when reading weights at batch 1, unpacking included, at 1 TB/s; `flop_ratio` of
    the rate of `rate_dtype` in prefill, at 100 Tflop/s; `log_sd` of both, in log space. Fast devices are harder to fill:
    the shares go with bandwidth^-read_falls and rate^-flop_falls, 0 where they are the same at any. Of a processor whose
    memory gave each core `core_bytes_per_s` unpacking is told apart: it takes a core as long beside faster memory.
    """

    rate_dtype: str | None  # None: the plan's own compute dtype
    read_ratio: float
    read_falls: float
    core_bytes_per_s: float | None
    flop_ratio: float
    flop_falls: float
    log_sd: float
    source: str

    def read_share(self, bytes_per_s: float, cores: int | None = None) -> float:
        """Return the share of a memory's bandwidth reached when reading weights.

            1 / (1 + (1 / read_ratio - 1) b)        b: bandwidth for each core, in core_bytes_per_s

        on a processor, a byte taking the memory's time and then a core's; see `Efficiency` on others.
        """
        if self.core_bytes_per_s and cores:
            return 1 / (1 + (1 / self.read_ratio - 1) * bytes_per_s / cores / self.core_bytes_per_s)
        return _share(self.read_ratio, self.read_falls, bytes_per_s / 1e12)

    def flop_share(self, flop_per_s: float) -> float:
        """Return the share of an arithmetic rate reached in prefill."""
        return _share(self.flop_ratio, self.flop_falls, flop_per_s / 1e14)


def _share(ratio: float, falls: float, size: float) -> float:
    return min(BEST_SHARE, ratio * size**-falls) if falls else ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """What an engine costs whatever the model: seconds for each operator and step, memory, and its cache."""

    kernel_s: float
    step_s: float
    kv_read_ratio: float
    kv_bytes_per_value: float | None  # None: as wide as the compute dtype
    runtime_bytes: float
    asynchronous: bool  # the host runs ahead of the device, so only the excess of its time counts
    prefill_chunk_tokens: float | None  # None: the whole prompt at once
    log_sd: float
    source: str


def read_rows(name: str) -> tuple[dict[str, str], ...]:
    """Return the rows of one data file of the package, with those that people laid over it."""
    return table(name)


def best_row(rows: tuple[dict[str, str], ...], wanted: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the most telling row; `wanted`: for each column the acceptable cells, best first, earlier columns weigh more."""
    found = [
        (tuple(cells.index(row[column]) for column, cells in wanted.items()), row)
        for row in rows
        if all(row[column] in cells for column, cells in wanted.items())
    ]
    return min(found, key=lambda item: item[0])[1]


def efficiency(engine: str, weight_format: str, compiled: bool, kind: str, features: frozenset[str]) -> Efficiency:
    """Return the prior shares of peak."""
    return _efficiency(folders(), engine, weight_format, compiled, kind, features)


@lru_cache(maxsize=512)
def _efficiency(
    laid: tuple[Path, ...], engine: str, weight_format: str, compiled: bool, kind: str, features: frozenset[str]
) -> Efficiency:
    # `laid`: the folders of a person's own rows, which the answer depends on.
    wanted = {
        "engine": (engine, "*"),
        "weight_format": (weight_format, "*"),
        "device": (*sorted(features), kind, "*"),
        "compiled": ("1" if compiled else "0", ""),
    }
    row = best_row(read_rows("efficiencies.csv"), wanted)
    return Efficiency(
        rate_dtype=row["rate_dtype"] or None,
        read_ratio=float(row["read_ratio"]),
        read_falls=_number(row["read_falls"]) or 0.0,
        core_bytes_per_s=_number(row["core_bytes_per_s"]),
        flop_ratio=float(row["flop_ratio"]),
        flop_falls=_number(row["flop_falls"]) or 0.0,
        log_sd=float(row["log_sd"]),
        source=row["source"],
    )


def overhead(engine: str, kind: str, features: frozenset[str]) -> Overhead:
    """Return the prior costs of an engine on a kind of device."""
    return _overhead(folders(), engine, kind, features)


@lru_cache(maxsize=64)
def _overhead(laid: tuple[Path, ...], engine: str, kind: str, features: frozenset[str]) -> Overhead:
    row = best_row(
        read_rows("engine_overheads.csv"), {"engine": (engine, "*"), "device": (*sorted(features), kind, "*")}
    )
    return Overhead(
        kernel_s=float(row["kernel_s"]),
        step_s=float(row["step_s"]),
        kv_read_ratio=float(row["kv_read_ratio"]),
        kv_bytes_per_value=_number(row["kv_bytes_per_value"]),
        runtime_bytes=float(row["runtime_bytes"]),
        asynchronous=row["asynchronous"] == "1",
        prefill_chunk_tokens=_number(row["prefill_chunk_tokens"]),
        log_sd=float(row["log_sd"]),
        source=row["source"],
    )


def kv_bytes_per_value(engine: str) -> float | None:
    """Return the bytes an engine keeps for one number of its cache; None: as wide as the compute dtype."""
    return _number(
        next((r["kv_bytes_per_value"] for r in read_rows("engine_overheads.csv") if r["engine"] == engine), "")
    )


def absorbs_latents(engine: str) -> bool:
    """Return whether an engine attends to a latent cache as it is, rather than to keys and values made from it."""
    return any(r["engine"] == engine and r["absorbs_latents"] == "1" for r in read_rows("engine_overheads.csv"))


def rate(device: Device, dtype: str) -> float:
    """Return a device's matmul rate for a dtype, in flop/s.

    Raises:
        EnvironmentProblem: the rate is not known; it is never guessed from another dtype's.
    """
    if dtype in device.flop_per_s:
        return device.flop_per_s[dtype]
    known = ", ".join(sorted(device.flop_per_s))
    choose = f"store the weights in one of these: {known}; or " if known else ""
    raise EnvironmentProblem(
        f"`{device.name}` has no known {dtype} rate; it is not guessed from another dtype",
        hint=f"{choose}measure on the machine itself: leanplan probe", where="hardware",
    )  # fmt: skip


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
