"""Machines known by name, and what electricity costs and emits: data with a source on every row."""

from __future__ import annotations

import difflib
import re
from typing import Any

from cost_models.efficiency import read_rows
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.types import Device, Hardware

_RATES = ("float32", "float16", "bfloat16", "int8", "fp8", "int4")
_SIZE = re.compile(r"([0-9.]+)\s*(GiB|GB)", re.IGNORECASE)


def names() -> tuple[str, ...]:
    """Return the names of all machines of the catalogue, sorted."""
    return tuple(sorted(row["name"] for row in read_rows("devices.csv")))


def find_machine(name: str) -> Hardware:
    """Return a machine of the catalogue: one device with its published figures.

    `RTX 4090` is `rtx-4090`. A device sold with several memory sizes needs one: `apple-m3-max:64GB`,
    `epyc-9554:256GiB`. Rates are those of dense matrix products; a measured one (`measured_bfloat16_flop_per_s`) is
    used before a published one. The published power cap is taken as busy power. The host's memory is not in the
    catalogue: the device's own stands for it.

    Raises:
        BadInput: no such machine (with the nearest names), or a memory size that cannot be read.
        EnvironmentProblem: the catalogue lacks the memory size or bandwidth.
    """
    written, _, size = name.partition(":")
    plain = re.sub(r"[\s_]+", "-", written.strip().lower())
    row = next((r for r in read_rows("devices.csv") if r["name"] == plain), None)
    if row is None:
        near = difflib.get_close_matches(plain, names(), n=3, cutoff=0.4)
        guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
        raise BadInput(
            f"unknown machine `{name}`{guess}", hint="leanplan ls machines; `local` is this one", where="hardware"
        )
    if not row["memory_bytes_per_s"]:
        raise EnvironmentProblem(
            f"the memory bandwidth of `{plain}` is not known, so its speed cannot be predicted",
            hint="plan on the machine itself (hardware: local), where it is measured", where="hardware",
        )  # fmt: skip
    memory = _memory_bytes(row, size)
    device = Device(
        name=plain,
        kind=row["kind"],
        memory_bytes=memory,
        memory_bytes_per_s=float(row["memory_bytes_per_s"]),
        flop_per_s=_rates(row),
        cores=int(row["cores"]) if row["cores"] else None,
        idle_w=_number(row["idle_w"]),
        busy_w=_number(row["tdp_w"]),
        features=_features(row),
        source=row["source"],
    )
    return Hardware(
        name=name,
        devices=(device,),
        host_memory_bytes=memory,
        memory_limit_bytes=memory,
        price_usd_per_h=_number(row["price_usd_per_h"]),
        grid_gco2e_per_kwh=grid_carbon("world")[0],
        fingerprint=f"catalogue:{name}",
    )


def _features(row: dict[str, str]) -> frozenset[str]:
    """Return the kind of toolkit a device is programmed with, and `sm_89` where NVIDIA gives it a compute capability.

    https://developer.nvidia.com/cuda-gpus
    """
    capability = {f"sm_{row['compute_capability'].replace('.', '')}"} if row["compute_capability"] else set()
    return frozenset(({row["family"]} - {"cpu"}) | capability)


def _rates(row: dict[str, str]) -> dict[str, float]:
    rates = {dtype: float(row[f"{dtype}_flop_per_s"]) for dtype in _RATES if row[f"{dtype}_flop_per_s"]}
    if row["measured_bfloat16_flop_per_s"]:
        measured = float(row["measured_bfloat16_flop_per_s"])
        rates |= dict.fromkeys(("bfloat16", "float16") if "bfloat16" in rates else ("float16",), measured)
    return rates


def _memory_bytes(row: dict[str, str], size: str) -> int:
    if size:
        found = _SIZE.fullmatch(size.strip())
        if not found or not float(found[1]) > 0:
            raise BadInput(
                f"cannot read the memory size `{size}`", hint=f"write for example {row['name']}:64GB", where="hardware"
            )
        return round(float(found[1]) * 2**30)  # memory modules come in binary units whichever way they are labelled
    if row["memory_bytes"]:
        return int(row["memory_bytes"])
    sizes = f" ({row['memory_choices']} GB)" if row["memory_choices"] else ""
    raise EnvironmentProblem(
        f"`{row['name']}` comes with different memory sizes{sizes}",
        hint=f"say which, for example {row['name']}:64GB", where="hardware",
    )  # fmt: skip


def grid_carbon(region: str = "world") -> tuple[float, str]:
    """Return (grams of CO2 equivalent for each kWh, source) of a region's electricity.

    Raises:
        BadInput: no such region.
    """
    row = _region("grid_carbon.csv", region)
    return float(row["gco2e_per_kwh"]), f"{row['source']}, {row['year']}"


def electricity_price(region: str = "world") -> tuple[float, str]:
    """Return (US dollars for each kWh, source) of a region's electricity for businesses.

    Raises:
        BadInput: no such region.
    """
    row = _region("electricity_prices.csv", region)
    return float(row["usd_per_kwh"]), f"{row['source']}, {row['period']}"


def _region(file: str, region: str) -> dict[str, str]:
    rows: dict[str, Any] = {row["region"]: row for row in read_rows(file)}
    if region not in rows:
        raise BadInput(f"no row for region `{region}` in {file}", hint=f"regions: {', '.join(rows)}", where=file)
    return rows[region]


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
