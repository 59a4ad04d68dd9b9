"""`leanplan probe`: what this machine can do, measured once and kept."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any

HELP = "measure this machine: bandwidth, matrix rates, limits, noise"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refresh", action="store_true", help="measure again, even if this machine is known")


def output() -> Any:
    from planner.machine import Profile
    from planner.schemas import Beside

    return Annotated[Profile, Beside("ProfileFile", schema=int)]


def run(options: argparse.Namespace) -> int:
    from knowledge_base.serde import plain
    from planner.cli._talk import emit, say
    from planner.cli.ls import table
    from planner.machine import SCHEMA, profile

    quiet = bool(options.quiet or options.no_progress)
    store = Path(options.store or ".leanplan")
    found = profile(store, refresh=options.refresh, tell=lambda text: say(text, quiet=quiet))
    emit(options, {"schema": SCHEMA, **plain(found)}, table(rows(found, store)))
    for problem in found.problems:
        say(f"note: {problem}", quiet=options.quiet)
    return 0


def rows(profile: Any, store: Path) -> list[dict[str, Any]]:
    """Return a profile as rows of what, figure with unit, and where it comes from."""
    from knowledge_base import units

    facts, hardware = profile.facts, profile.hardware
    cpu, memory, noise, disk = (facts[name] for name in ("linux_cpu", "memory_limits", "noise", "disk"))
    measured = f"measured {profile.taken_at}"
    caches = ", ".join(f"{name} {units.format(size, 'bytes')}" for name, size in cpu["caches_bytes"].items())
    lines = [
        ("processor", f"{cpu['name']}, {cpu['cores']} usable of {cpu['logical_cores']} cores", cpu["source"]),
        ("instruction sets", " ".join(cpu["features"]), cpu["source"]),
        ("caches", caches, "/sys/devices/system/cpu"),
        ("memory", units.format(memory["host_bytes"], "bytes"), "installed"),
        ("memory limit", units.format(memory["limit_bytes"], "bytes"), memory["limit_source"]),
        ("memory free", units.format(memory["available_bytes"], "bytes"), "now"),
        ("disk free", units.format(disk["free_bytes"], "bytes"), "current folder, when measured"),
    ]
    if disk["write_bytes_per_s"]:
        lines.append(("disk write", f"{disk['write_bytes_per_s'] / 1e6:.0f} MB/s", f"{measured}, 32 MiB with fsync"))
    for threads, rate in facts["bandwidth"].get("read_bytes_per_s", {}).items():
        lines.append(
            (f"memory read, {threads} thread{'s' if threads != '1' else ''}", f"{rate / 1e9:.1f} GB/s", measured)
        )
    for dtype, shapes in facts["matmul"].get("flop_per_s", {}).items():
        for shape, rate in shapes.items():
            lines.append((f"{dtype} product {shape}", f"{rate / 1e9:.1f} Gflop/s", measured))
    for device in hardware.devices:
        if device.kind == "gpu":
            lines.append(
                (
                    device.name,
                    f"{units.format(device.memory_bytes, 'bytes')}, {device.memory_bytes_per_s / 1e9:.0f} GB/s",
                    measured,
                )
            )
            lines += [
                (f"{device.name} {dtype}", f"{rate / 1e12:.1f} Tflop/s", measured)
                for dtype, rate in device.flop_per_s.items()
            ]
    lines += [
        ("calibration", *_calibration(store, hardware)),
        (
            "accelerators",
            ", ".join(d.name for d in hardware.devices if d.kind == "gpu") or "none",
            "CUDA through torch",
        ),
        (
            "energy counters",
            ", ".join(facts["energy_counters"]["counters"]) or "none: energy can only be modelled",
            "powercap, NVML",
        ),
        ("load", f"{noise['load_1m']:.1f}, others use {noise['busy_ratio']:.0%}", f"when the rates were {measured}"),
        ("governors", ", ".join(noise["governors"]) or "not shown", "cpufreq"),
        ("fingerprint", hardware.fingerprint, "processor, cores, memory, GPUs"),
    ]
    return [{"what": what, "figure": figure, "source": source} for what, figure, source in lines]


def _calibration(store: Path, hardware: Any) -> tuple[str, str]:
    """Return what is known of the engines here and since when; how to find out where nothing is."""
    from planner.calibrating import keeping

    kept = keeping.laws_of(hardware, store)
    if kept is None:
        return "none: predictions use published shares", "leanplan calibrate measures in a minute"
    engines = len({r.engine for r in hardware.device.reached})
    return (
        f"{len(hardware.device.reached)} formats of {engines} engines, by {kept.measurements} measurements of {kept.models} models",
        f"the last of them {keeping.age_words(kept)}",
    )
