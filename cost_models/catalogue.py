"""Machines known by name, and what electricity costs and emits: data with a source on every row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from cost_models.efficiency import PUBLISHED, read_rows
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.types import Device, Hardware
from knowledge_base.units import quote

RATES = ("float32", "float16", "bfloat16", "int8", "fp8", "int4")
_SIZE = re.compile(r"([0-9.]+)\s*(GiB|GB)", re.IGNORECASE)
_COUNT = re.compile(r"\s*([0-9]{1,6})\s*[x×*]\s*(.+)", re.DOTALL)
_TRIMMINGS = re.compile(  # what names carry beside the model: of makers, of nvidia-smi and /proc/cpuinfo
    r"\((?:r|tm)\)|\b(?:nvidia|geforce|apple|amd|radeon(?=.rx)|instinct|intel|core(?=.*\bi\d)|platinum|gold|qualcomm|aws|tesla"
    r"|\d+-core|\d+th gen|processor|cpu|gpu)\b|@.*"
)
MOST_DEVICES = 4096
CATALOGUE = "catalogue:"  # how the fingerprint of a machine of the catalogue begins
# What an NVMe disk gives where none was measured: that of FlexGen's machine, arXiv:2303.06865.
DISK_BYTES_PER_S = 2e9
UNIFIED = "unified"  # link, and feature, of a device that shares the host's memory
KINDS = ("cpu", "gpu")


def names() -> tuple[str, ...]:
    """Return the names of all machines of the catalogue, sorted."""
    return tuple(sorted(row["name"] for row in read_rows("devices.csv")))


def find_machine(name: str) -> Hardware:
    """Return a machine of the catalogue: a device with its published figures, or several equal ones.

    `RTX 4090` and `NVIDIA GeForce RTX4090` are `rtx-4090`; `4x rtx-4090` has four. A device sold with several memory sizes needs one: `apple-m3-max:64GB`,
    `epyc-9554:256GiB`. Rates are those of dense matrix products; a measured one (`measured_bfloat16_flop_per_s`) is
    used before a published one. The published power cap is taken as busy power. The host's memory is not in the
    catalogue: the devices' own stands for it. A plan runs on one device, so the limit is what one of them holds. How fast
    weights come in from elsewhere is assumed: by the kind of link to the host (host_links.csv), and an NVMe disk.

    Raises:
        BadInput: no such machine (with the nearest names), or a memory size that cannot be read.
        EnvironmentProblem: the catalogue lacks the memory size or bandwidth.
    """
    counted = _COUNT.fullmatch(name)
    count, one = (int(counted[1]), counted[2]) if counted else (1, name)
    if not 1 <= count <= MOST_DEVICES:
        raise BadInput(
            f"{count} devices in one machine", hint=f"from 1 to {MOST_DEVICES}, as in `4x rtx-4090`", where="hardware"
        )
    written, _, size = one.partition(":")
    row = _row(written)
    plain = row["name"]
    if not row["memory_bytes_per_s"]:
        raise EnvironmentProblem(
            f"the memory bandwidth of `{plain}` is not known, so its speed cannot be predicted",
            hint="plan on the machine itself (hardware: local), where it is measured", where="hardware",
        )  # fmt: skip
    if row["kind"] not in KINDS:
        raise BadInput(
            f"`{plain}` is of kind {quote(row['kind'])}",
            hint=f"write {' or '.join(KINDS)} in devices.csv",
            where="hardware",
        )
    memory = _memory_bytes(row, size)
    price = _number(row["price_usd_per_h"])
    device = Device(
        name=plain,
        kind=row["kind"],
        memory_bytes=memory,
        memory_bytes_per_s=float(row["memory_bytes_per_s"]),
        flop_per_s=rates(row),
        cores=round(float(row["cores"])) if row["cores"] else None,
        idle_w=_number(row["idle_w"]),
        busy_w=_number(row["tdp_w"]),
        link_bytes_per_s=_number(row["link_bytes_per_s"]),
        features=_features(row),
        source=row["source"],
    )
    return Hardware(
        name=name,
        devices=(device,) * count,
        host_memory_bytes=memory * count,
        host_assumed=device.kind != "cpu",
        memory_limit_bytes=memory,
        disk_bytes_per_s=DISK_BYTES_PER_S,
        host_link_bytes_per_s=_host_link(row),
        price_usd_per_h=price * count if price is not None else None,
        grid_gco2e_per_kwh=grid_carbon("world")[0],
        fingerprint=f"{CATALOGUE}{name}",
    )


def _row(written: str) -> dict[str, str]:
    """Return the row of a device by its name, or by one that differs from it in spaces, dashes and trimmings alone."""
    rows = {row["name"]: row for row in read_rows("devices.csv")}
    plain = re.sub(r"[\s_]+", "-", written.strip().lower())
    name = plain if plain in rows else {_bare(known): known for known in rows}.get(_bare(written))
    if name is not None:
        return rows[name]
    bare = _bare(re.sub(r"\b[0-9]+ ?gi?b\b.*", "", written.lower()))  # `NVIDIA H100 80GB HBM3`: which H100?
    like = [known for known in rows if bare and _bare(known).startswith(bare)]
    near = (like or difflib.get_close_matches(plain, rows, n=3, cutoff=0.4))[:4]
    guess = f"; did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
    raise BadInput(
        f"unknown machine {quote(written)}{guess}",
        hint="leanplan ls machines; `local` is this one; or describe yours in a file: leanplan help machine",
        where="hardware",
    )


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _TRIMMINGS.sub(" ", name.lower()))


def _features(row: dict[str, str]) -> frozenset[str]:
    """Return how a device is programmed: its toolkit, `sm_89` for NVIDIA's compute capability, instruction sets.

    A processor's rates are worked out from cores, clock and vector width, so engines reach another share of them than
    of measured ones: `published`. https://developer.nvidia.com/cuda-gpus
    """
    capability = {f"sm_{row['compute_capability'].replace('.', '')}"} if row["compute_capability"] else set()
    toolkit = {PUBLISHED} if row["family"] == "cpu" else {row["family"]}
    shared = {UNIFIED} & {row["host_link"]}
    return frozenset({*toolkit, *capability, *shared, *row["features"].split()})


def _host_link(row: Mapping[str, str]) -> float | None:
    """Return how fast a device reads from its host's memory; None where that is not known, or the same memory.

    Raises:
        BadInput: no such kind of link.
    """
    if not row["host_link"]:
        return None
    links = {link["host_link"]: link for link in read_rows("host_links.csv")}
    if row["host_link"] not in links:
        raise BadInput(
            f"`{row['name']}` has a host_link {quote(row['host_link'])}",
            hint=f"one of: {', '.join(links)}", where="devices.csv",
        )  # fmt: skip
    return _number(links[row["host_link"]]["bytes_per_s"])


def rates(row: Mapping[str, str]) -> dict[str, float]:
    """Return a row's rates by dtype, a measured one before a published one."""
    found = {dtype: float(row[f"{dtype}_flop_per_s"]) for dtype in RATES if row[f"{dtype}_flop_per_s"]}
    if row["measured_bfloat16_flop_per_s"]:
        measured = float(row["measured_bfloat16_flop_per_s"])
        found |= dict.fromkeys(("bfloat16", "float16") if "bfloat16" in found else ("float16",), measured)
    return found


def _memory_bytes(row: dict[str, str], size: str) -> int:
    if size:
        found = _SIZE.fullmatch(size.strip())
        if not found or not float(found[1]) > 0:
            raise BadInput(
                f"cannot read the memory size `{size}`", hint=f"write for example {row['name']}:64GB", where="hardware"
            )
        return round(float(found[1]) * 2**30)  # memory modules come in binary units whichever way they are labelled
    if row["memory_bytes"]:
        return round(float(row["memory_bytes"]))
    sizes = f" ({row['memory_choices']} GB)" if row["memory_choices"] else ""
    raise EnvironmentProblem(
        f"`{row['name']}` comes with different memory sizes{sizes}",
        hint=f"say which, for example {row['name']}:64GB", where="hardware",
    )  # fmt: skip


def grid_carbon(where: str = "world") -> tuple[float, str]:
    """Return (grams of CO2 equivalent for each kWh, source) of a region's electricity.

    Raises:
        BadInput: no such region.
    """
    row = region("grid_carbon.csv", where)
    return float(row["gco2e_per_kwh"]), f"{row['source']}, {row['year']}"


def electricity_price(where: str = "world") -> tuple[float, str]:
    """Return (US dollars for each kWh, source) of a region's electricity for businesses.

    Raises:
        BadInput: no such region.
    """
    row = region("electricity_prices.csv", where)
    return float(row["usd_per_kwh"]), f"{row['source']}, {row['period']}"


def region(file: str, name: str) -> dict[str, str]:
    """Return the row of a region in grid_carbon.csv or electricity_prices.csv.

    Raises:
        BadInput: no such region.
    """
    rows: dict[str, Any] = {row["region"]: row for row in read_rows(file)}
    if name not in rows:
        raise BadInput(f"no row for region {quote(name)} in {file}", hint=f"regions: {', '.join(rows)}", where=file)
    return rows[name]


def _number(cell: str) -> float | None:
    return float(cell) if cell else None
