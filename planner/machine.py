"""This machine as Hardware: measured once, kept beside the measurements, read back without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.registry import Folder
from knowledge_base.serde import digest, plain, restore, write_json
from knowledge_base.types import Device, Hardware
from planner import machine_file

probes = Folder("planner.probes", "probe", ("PROBE", "find"))

SCHEMA = 1
LIGHT = ("linux_cpu", "memory_limits", "energy_counters")  # looked at each time; what the others find is kept
NOISY_RATIO = (
    0.25  # rates measured while others used more of the machine than this are measured again once it is quieter
)


_PRICED_ON: set[Path] = set()  # the profiles this process has used: figures of one process are of the same rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A machine as it was probed: what plans are priced on, and every probe's facts behind it.

    `facts["noise"]` is of the moment the rates were measured.
    """

    hardware: Hardware
    facts: Mapping[str, Any]  # by probe
    taken_at: str  # when the rates were measured

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be found out, as sentences."""
        found = [f"{name}: {facts['problem']}" for name, facts in self.facts.items() if facts.get("problem")]
        return (*found, *(f"when the rates were measured, {warning}" for warning in self.facts["noise"]["warnings"]))


def find(name: str, store: Path, *, tell: Callable[[str], None] = lambda text: None) -> Hardware:
    """Return a machine: "local" is this one, a .json or .yaml file describes one, all else is the catalogue's.

    Raises:
        BadInput: no such machine, or the file describes none; EnvironmentProblem: this machine cannot be measured.
    """
    if name == "local":
        return probe(store, tell=tell)
    if name.lower().endswith(machine_file.SUFFIXES):
        return from_file(Path(name))
    from cost_models.catalogue import find_machine

    return find_machine(name)


def from_file(path: Path) -> Hardware:
    """Return the machine of a file: a profile that `leanplan probe --json` wrote, or what a person wrote by hand.

    Raises:
        BadInput: it is neither.
    """
    if (profile := read_profile(path)) is not None:
        return profile.hardware
    node = machine_file.read(path)
    if machine_file.is_profile(node):
        raise BadInput(
            "not a machine profile of this version",
            hint="make one: leanplan probe --json > machine.json",
            where=str(path),
        )
    return machine_file.machine_of(node)


def probe(store: Path, *, refresh: bool = False, tell: Callable[[str], None] = lambda text: None) -> Hardware:
    """Return this machine as Hardware; see `profile`."""
    return profile(store, refresh=refresh, tell=tell).hardware


def profile(store: Path, *, refresh: bool = False, tell: Callable[[str], None] = lambda text: None) -> Profile:
    """Return this machine's profile, measuring what is not known yet (under 30 s, once for each machine).

    Limits and counters are looked at each time; the rest is kept in `<store>/machines/<fingerprint>.json` and found
    again only on `refresh`, or when it was measured while other programs kept the machine busy and it is quieter now:
    asked at a process's first use of it, so that what one process estimates can be held against each other.

    Raises:
        EnvironmentProblem: memory bandwidth or matrix products cannot be measured here; nothing is kept then.
    """
    from planner.calibrating.keeping import laid_on

    light = {name: probes.get(name).find() for name in LIGHT}
    mark = fingerprint(light)
    path = Path(store).resolve() / "machines" / f"{mark}.json"
    known = None if refresh else read_profile(path)
    settled = path in _PRICED_ON
    _PRICED_ON.add(path)
    if known is not None and (settled or not _worth_repeating(known.facts["noise"]["busy_ratio"])):
        facts = {**known.facts, **light}
        hardware = laid_on(_hardware(facts, mark, known.taken_at), store, tell=tell)
        return replace(known, facts=facts, hardware=hardware)
    facts = {**light, "noise": probes.get("noise").find()}  # before our own measurements add to it
    for name in probes.names():
        if name not in facts:
            tell(f"measuring {probes.get(name).PROBE}")
            facts[name] = probes.get(name).find()
    taken_at = time.strftime("%Y-%m-%d %H:%M:%S")
    found = Profile(hardware=_hardware(facts, mark, taken_at), facts=facts, taken_at=taken_at)
    write_json(path, {"schema": SCHEMA, **plain(found)})
    return replace(found, hardware=laid_on(found.hardware, store, tell=tell))


def this_fingerprint() -> str:
    """Return this machine's fingerprint; nothing is measured."""
    return fingerprint({name: probes.get(name).find() for name in LIGHT})


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return what tells two machines apart, as 16 hex digits: processor, usable cores, memory, GPUs; not its system."""
    from planner.probes.accelerators import names

    cpu = facts["linux_cpu"]
    memory_gib = round(facts["memory_limits"]["host_bytes"] / 2**30)
    return digest(
        [cpu["name"], cpu["machine"], cpu["cores"], sorted(cpu["caches_bytes"].items()), memory_gib, names()]
    )[:16]


def _worth_repeating(busy_then: float) -> bool:
    return busy_then > NOISY_RATIO and probes.get("noise").find()["busy_ratio"] < busy_then / 2


def read_profile(path: Path) -> Profile | None:
    """Return a saved profile, or None where there is none that this version can use."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            return None
        return restore(Profile, data)
    except (OSError, ValueError):
        return None  # absent, damaged or of another version: the machine is measured again


def _hardware(facts: Mapping[str, Any], mark: str, taken_at: str) -> Hardware:
    cpu, memory, bandwidth, matmul = (facts[name] for name in ("linux_cpu", "memory_limits", "bandwidth", "matmul"))
    for what, found in (("memory bandwidth", bandwidth), ("matrix product rates", matmul)):
        if problem := found.get("problem"):
            busy = "; ".join(facts["noise"]["warnings"])
            raise EnvironmentProblem(
                f"{what} of this machine cannot be measured: {problem}{f' ({busy})' if busy else ''}",
                hint="try again when the machine is quieter; leanplan doctor; or plan for a machine of leanplan ls machines",
                where="probe",
            )
    source = f"measured {taken_at}"
    processor = Device(
        name=cpu["name"],
        kind="cpu",
        memory_bytes=memory["limit_bytes"],
        memory_bytes_per_s=max(bandwidth["read_bytes_per_s"].values()),
        flop_per_s={dtype: max(rates.values()) for dtype, rates in matmul["flop_per_s"].items()},
        cores=cpu["cores"],
        cache_bytes=cpu["caches_bytes"].get("L3"),
        features=frozenset(cpu["features"]),
        source=source,
    )
    gpus = tuple(
        Device(
            name=gpu["name"], kind="gpu", memory_bytes=gpu["memory_bytes"],
            memory_bytes_per_s=gpu["memory_bytes_per_s"],
            flop_per_s=gpu["flop_per_s"], busy_w=gpu["busy_w"], source=source,
            features=frozenset({"nvidia", f"sm_{gpu['compute_capability'].replace('.', '')}"}),
        )
        for gpu in facts["accelerators"]["gpus"]
    )  # fmt: skip
    return Hardware(
        name="local",
        devices=(processor, *gpus),
        host_memory_bytes=memory["host_bytes"],
        memory_limit_bytes=memory["limit_bytes"],
        disk_bytes_per_s=facts["disk"].get("read_bytes_per_s"),  # absent from profiles of earlier versions
        host_link_bytes_per_s=next((gpu.get("host_link_bytes_per_s") for gpu in facts["accelerators"]["gpus"]), None),
        energy_counters=tuple(facts["energy_counters"]["kinds"]),
        fingerprint=mark,
        measured=True,
    )
