"""A machine as a person describes it in a YAML or JSON file: devices, memory, rates, power, prices.

Figures are texts with units, or plain numbers in the unit the key's name ends in. What a machine cannot have (no
bandwidth, a terabyte of it where a gigabyte was meant, a key that does not exist) is refused with its place; what is
left out is unknown, and `remarks` says what cannot be predicted without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.serde import digest
from knowledge_base.types import Device, Hardware
from planner import _yaml
from planner._kinds import Choice, Key, ListOf, Number, Quantity, Section, Text, Whole, in_place
from planner._owning import BOUGHT_KEY
from planner._yaml import Node

SUFFIXES = (".yaml", ".yml", ".json")
DTYPES = ("float32", "float16", "bfloat16", "int8", "fp8", "int4")
INTENSITIES = (0.1, 20_000)  # FLOP for each byte read, least and most of any machine: 5 to 1,600 of those we know
EXAMPLE = """\
name: my-box
grid: france                      # a region, or e.g. 56 gCO2e/kWh
devices:
  - name: my accelerator
    kind: gpu
    count: 2
    memory_bytes: 24 GiB
    memory_bytes_per_s: 1008 GB/s
    flop_per_s: {float32: 83 TFLOP/s, float16: 165 TFLOP/s, bfloat16: 165 TFLOP/s, int8: 660 TOPS}
    idle_w: 20
    busy_w: 450
    features: [cuda, sm_89]
"""


@dataclass(frozen=True)
class Measure:
    """A figure with its unit, or a plain number in the base unit, between bounds that no machine of today leaves."""

    dimension: str
    least: float
    most: float

    @property
    def words(self) -> str:
        return units.DIMENSIONS[self.dimension].wanted

    def read(self, node: Node) -> float:
        plain = node.type == "number"
        value = _number(node.content) if plain else Quantity(self.dimension).read(node)
        if not self.least <= value <= self.most:
            least, most = (units.format(end, self.dimension) for end in (self.least, self.most))
            base = units.DIMENSIONS[self.dimension].base
            unit = f" {base}: a number without a unit is in {base}" if plain and base else ""
            raise node.error(f"{node.name} is {node.content}{unit}", hint=f"of a machine it is from {least} to {most}")
        return value

    def write(self, value: float) -> str:
        return units.exact(value, self.dimension)

    def schema(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.least, "maximum": self.most}
        return {"anyOf": [number, Quantity(self.dimension).schema()]}


def _number(text: str) -> float:
    return float(re.sub(r"\.(?=[a-zA-Z])", "", text))  # YAML writes .inf and .nan


@dataclass(frozen=True)
class Local:
    """What electricity costs or emits: a region of the catalogue, or the figure itself."""

    dimension: str
    file: str
    column: str

    @property
    def words(self) -> str:
        return f"a region (france, europe, world), or {units.DIMENSIONS[self.dimension].wanted}"

    def read(self, node: Node) -> float:
        from cost_models.catalogue import region

        if node.type == "string" and node.content.strip()[:1].isalpha():
            return float(in_place(node, lambda: region(self.file, node.content.strip()))[self.column])
        return Measure(self.dimension, 0, 100 if "price" in self.dimension else 5_000).read(node)

    def write(self, value: float) -> str:
        return units.exact(value, self.dimension)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, {"type": "number", "minimum": 0}]}


@dataclass(frozen=True, slots=True)
class Several:
    """Equal devices of a machine."""

    device: Device
    count: int


def _rates(values: dict[str, Any], node: Node) -> dict[str, Any]:
    known = {dtype: rate for dtype, rate in values.items() if rate is not None}
    if not known:
        raise node.error("flop_per_s is empty", hint="name at least one rate, e.g. {float16: 165 TFLOP/s}")
    return known


def _device(values: dict[str, Any], node: Node) -> dict[str, Any]:
    from cost_models.efficiency import PUBLISHED

    count, like, figures = (values.pop(key) for key in ("count", "like", "figures"))
    given = {key: value for key, value in values.items() if value is not None}
    if like is not None:
        base = _known_device(like, given.get("memory_bytes"), node.content["like"])
        rates = {**base.flop_per_s, **given.get("flop_per_s", {})}
        device = replace(base, **{**given, "flop_per_s": rates})
    else:
        for key in DEVICE.keys:
            if (
                key.name in ("name", "kind", "memory_bytes", "memory_bytes_per_s", "flop_per_s")
                and key.name not in given
            ):
                raise node.error(
                    f"missing key '{key.name}' in {node.name}",
                    hint=f"{key.about}: {key.kind.words}; or start from a known device: `like: rtx-4090`",
                )
        marks = {PUBLISHED} if given["kind"] == "cpu" and figures != "measured" else set()
        given["features"] = frozenset({*given.get("features", ()), *marks})
        device = Device(**{"source": f"{_name(node)}, {figures}", **given})
    _consistent(device, node)
    return {"device": device, "count": count}


def _known_device(name: str, memory_bytes: int | None, node: Node) -> Device:
    """Return a device of the catalogue; one sold with several memory sizes takes the size given beside its name."""
    from cost_models.catalogue import find_machine

    size = f":{memory_bytes / 2**30}GiB" if memory_bytes and ":" not in name else ""
    try:
        return find_machine(f"{name}{size}").device
    except (BadInput, EnvironmentProblem) as error:
        raise node.error(error.message, hint=error.hint) from error


def _consistent(device: Device, node: Node) -> None:
    """Refuse figures that cannot be of one device."""
    if device.idle_w is not None and device.busy_w is not None and device.idle_w > device.busy_w:
        raise node.error(
            f"{node.name}: {device.idle_w:g} W when idle is more than {device.busy_w:g} W when busy",
            hint="exchange idle_w and busy_w",
        )
    for dtype, rate in device.flop_per_s.items():
        if not INTENSITIES[0] <= rate / device.memory_bytes_per_s <= INTENSITIES[1]:
            raise node.error(
                f"{node.name}: {units.format(rate, 'arithmetic')} in {dtype} and {units.format(device.memory_bytes_per_s, 'bandwidth')} "
                "are not of one device",
                hint="one of the two is off by a factor: check M, G, T and P",
            )


def _machine(values: dict[str, Any], node: Node) -> dict[str, Any]:
    if bought := values.pop("bought"):
        values |= {"price_usd_per_h": (values["price_usd_per_h"] or 0.0) + bought.usd_per_h, "owned": True}
    several: tuple[Several, ...] = values.pop("devices")
    devices = tuple(one.device for one in several for _ in range(one.count))
    named = values.pop("name") or Path(_name(node)).stem
    hardware = {
        **values, "name": named, "devices": devices, "fingerprint": f"file:{digest([devices, values])[:16]}",
    }  # fmt: skip
    hardware["host_memory_bytes"] = round(values["host_memory_bytes"] or sum(d.memory_bytes for d in devices))
    runs_on = next((d for d in devices if d.kind == "gpu"), devices[0])
    hardware["host_assumed"] = values["host_memory_bytes"] is None and runs_on.kind == "gpu"
    return {**hardware, "memory_limit_bytes": runs_on.memory_bytes}


def _name(node: Node) -> str:
    return node.source.name if node.source else "a machine"


class _Bytes(Measure):
    """Whole bytes."""

    def read(self, node: Node) -> int:
        return round(super().read(node))


_GB_PER_S = 1e9
RATES = Section(
    dict,
    tuple(Key(dtype, Measure("arithmetic", 1e8, 1e18), f"dense matrix products in {dtype}", default=None, absent="unknown") for dtype in DTYPES),
    gather=_rates,
)  # fmt: skip
_known = partial(Key, default=None, absent="unknown")
DEVICE = Section(
    Several,
    (
        Key("like", Text("a name of `leanplan ls machines`"), "takes every figure not given from a known device",
            default=None, absent="nothing is taken", example="rtx-4090"),
        Key("count", Whole(most=4096), "equal devices of this kind", default=1),
        _known("name", Text("a name"), "the device", absent="required without like", example="my accelerator"),
        _known("kind", Choice(("cpu", "gpu")), "gpu for any accelerator", absent="required without like"),
        _known("memory_bytes", _Bytes("bytes", 2**24, 2**50), "its memory", absent="required without like"),
        _known("memory_bytes_per_s", Measure("bandwidth", 0.1 * _GB_PER_S, 1e5 * _GB_PER_S), "its bandwidth", absent="required without like"),
        _known("flop_per_s", RATES, "rates of dense matrix products, multiply and add counted as two", absent="required without like",
               example="{float16: 165 TFLOP/s}"),
        _known("cores", Whole(most=65_536), "cores of a processor"),
        _known("cache_bytes", _Bytes("bytes", 2**10, 2**40), "last level of cache"),
        _known("idle_w", Measure("power", 0, 1e5), "power when nothing runs"),
        _known("busy_w", Measure("power", 0.01, 1e5), "power when it computes"),
        _known("link_bytes_per_s", Measure("bandwidth", 1e6, 1e14), "to its neighbours in the machine, one way", example="450 GB/s"),
        _known("features", ListOf(Text("a word such as cuda, rocm, metal, sm_89, avx512f", r"^[a-z0-9_]{1,32}$")), "how it is programmed",
               absent="none: shares of a device in general", example="[cuda, sm_89]"),
        Key("figures", Choice(("published", "measured")), "where a processor's figures come from: of published ones less is reached",
            default="published"),
        _known("source", Text("a text"), "where the figures come from", absent="this file", example="data sheet of 2026-11"),
    ),
    gather=_device,
)  # fmt: skip
MACHINE = Section(
    Hardware,
    (
        Key("name", Text("a name"), "the machine", default=None, absent="the file's name", example="my-box"),
        Key("devices", ListOf(DEVICE), "its devices; plans run on the first accelerator, else on the processor"),
        Key("host_memory_bytes", _Bytes("bytes", 2**24, 2**50), "memory of the host", default=None, absent="as much as its devices have"),
        _known("disk_bytes_per_s", Measure("bandwidth", 1e6, 1e12), "reading a file of which nothing is in memory", example="3 GB/s"),
        _known("host_link_bytes_per_s", Measure("bandwidth", 1e6, 1e13), "from its memory to the accelerator, one way", example="25 GB/s"),
        Key("devices_per_machine", Whole(most=4096), "devices that their links join; more are several machines"),
        _known("network_bytes_per_s", Measure("bandwidth", 1e6, 1e13), "between machines, one way", absent="10 Gbit/s", example="50 GB/s"),
        Key("price_usd_per_h", Measure("price_per_hour", 0, 1e6), "what it costs: its rent, or where it was bought the room it stands in",
            absent="only electricity costs"),
        BOUGHT_KEY,
        Key("electricity", Local("price_per_kwh", "electricity_prices.csv", "usd_per_kwh"), "price of electricity",
            attribute="electricity_usd_per_kwh", absent="the world's average", example="europe"),
        Key("grid", Local("carbon_per_kwh", "grid_carbon.csv", "gco2e_per_kwh"), "what electricity emits",
            attribute="grid_gco2e_per_kwh", absent="the world's average", example="france"),
        Key("pue", Number(1, 10), "power usage effectiveness of the building", example="1.2"),
    ),
    gather=_machine,
)  # fmt: skip


def is_machine(node: Node) -> bool:
    """Return whether a file describes a machine rather than anything else."""
    return node.type == "mapping" and "devices" in node.content


def is_profile(node: Node) -> bool:
    """Return whether a file is what `leanplan probe --json` writes."""
    return node.type == "mapping" and {"schema", "hardware"} <= node.content.keys()


def read(path: str | Path) -> Node:
    """Return a machine's file as nodes that know their places.

    Raises:
        BadInput: it cannot be read or is malformed.
    """
    if not Path(path).exists():
        raise BadInput("not found", hint="describe a machine there: leanplan help machine", where=str(path))
    data, name = _yaml.read_bytes(path)
    text = _yaml.decode(data, name)
    return _yaml.parse_yaml(text.replace("\t", " ") if name.endswith(".json") else text, name, "machine")


def machine_of(node: Node) -> Hardware:
    """Return the machine that nodes describe.

    Raises:
        BadInput: a key is unknown or missing, or a figure is not of this world; with file, line and column.
    """
    found: Hardware = MACHINE.read(node)
    return found


def remarks(hardware: Hardware) -> list[str]:
    """Return what cannot be predicted of a machine for want of a figure, as sentences."""
    return [said for device in _distinct(hardware) for said in _wanting(device)]


def _distinct(hardware: Hardware) -> Iterator[Device]:
    seen: list[Device] = []  # a device holds a mapping, so it is no key
    for device in hardware.devices:
        if device not in seen:
            seen.append(device)
            yield device


def _wanting(device: Device) -> Iterator[str]:
    missing = [dtype for dtype in DTYPES if dtype not in device.flop_per_s]
    if missing:
        has = ", ".join(dtype for dtype in DTYPES if dtype in device.flop_per_s)
        yield f"{device.name} has no rate in {', '.join(missing)}: plans are predicted that compute in {has}"
    if device.busy_w is None:
        yield f"{device.name} has no busy_w: energy and carbon are not predicted"
    if device.kind == "gpu" and not device.features:
        yield f"{device.name} has no features (cuda, rocm, metal, xpu; sm_89): what engines reach is taken from GPUs in general"


def rows() -> list[tuple[str, str]]:
    """Return every key with what it means, for help."""
    return [
        (f"{prefix}{key.name}", f"{key.about}: {key.kind.words} ({_default(section, key)})")
        for prefix, section in (("", MACHINE), ("devices.", DEVICE))
        for key in section.keys
    ]


def _default(section: Section, key: Key) -> str:
    text = section.default_text(key)
    return text if text.startswith("required") else f"default: {text}"


def schema() -> Mapping[str, Any]:
    """Return the JSON Schema (2020-12) of a machine's file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "leanplan machine", **MACHINE.schema()}
