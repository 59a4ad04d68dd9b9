"""What `leanplan calibrate` prints: what the machine gives each engine and format, how sure that is, what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Figure, LawCheck, Reached

if TYPE_CHECKING:
    from planner.calibrating.keeping import Kept
    from planner.calibrating.taking import Taken
    from planner.machine import Profile


class GpuFloor(TypedDict):
    """The same on a GPU: what the host takes to send an operator off, and the device to go from one to the next."""

    name: str
    host_s: float  # seconds
    device_s: float  # seconds


class Floor(TypedDict):
    """What starting an operator that has nothing to do takes torch."""

    torch: str
    cpu_s: float  # seconds
    gpu: GpuFloor | None  # None: no GPU that torch can use, so none was timed


class Served(TypedDict):
    """One plan of calibration's own, measured."""

    engine: str
    weight_format: str
    params: int  # of the model
    tpot: Figure
    ttft: Figure
    peak_memory: Figure


class Calibrated(TypedDict):
    """What was measured of this machine, and the laws all its measurements make."""

    fingerprint: str
    wall_s: float  # seconds
    interrupted: bool
    measured: list[Served]
    known: int  # of them, kept from an earlier calibration
    floor: Floor | None
    read_bytes_per_s: dict[str, float]  # bytes/s, by threads
    flop_per_s: dict[str, dict[str, float]]  # flop/s of the processor, by dtype and shape
    reached: tuple[Reached, ...]
    checks: tuple[LawCheck, ...]
    measurements: int  # that the laws rest on, those of runs included
    models: int
    left_out: list[str]
    warnings: list[str]


class Forgotten(TypedDict):
    """The files that were removed."""

    removed: list[str]


def calibrated(profile: Profile, taken: Taken, kept: Kept | None, *, wall_s: float) -> Calibrated:
    """Return the data."""
    from cost_models.demand import chains

    measured = []
    for record in taken.records:
        plan, figures = record.measurement.plan, record.measurement.figures
        measured.append(
            Served(
                engine=plan.engine, weight_format=chains(record.model, record.workload).node(plan).demand.weight_format,
                params=record.model.params_total, tpot=figures["tpot_s"], ttft=figures["ttft_s"],
                peak_memory=figures["peak_memory_bytes"],
            )
        )  # fmt: skip
    facts, floor = profile.facts, taken.floor
    return Calibrated(
        fingerprint=profile.hardware.fingerprint, wall_s=wall_s, interrupted=taken.interrupted is not None,
        measured=measured, known=taken.known,
        floor=Floor(torch=floor["torch"], cpu_s=floor["cpu_s"], gpu=floor["gpu"]) if floor else None,
        read_bytes_per_s=dict(facts["bandwidth"]["read_bytes_per_s"]),
        flop_per_s={dtype: dict(rates) for dtype, rates in facts["matmul"]["flop_per_s"].items()},
        reached=kept.reached if kept else (), checks=kept.checks if kept else (),
        measurements=kept.measurements if kept else 0, models=kept.models if kept else 0,
        left_out=list(taken.left_out), warnings=_warnings(taken),
    )  # fmt: skip


def as_text(facts: Calibrated) -> str:
    """Return the data as lines for people: the machine, the engines' laws, how good they are, what was left out."""
    lines = [*_machine(facts), "", *_laws(facts["reached"]), ""]
    lines += [_checked(check) for check in facts["checks"]]
    lines += [f"left out: {what}" for what in facts["left_out"]]
    lines += [f"note: {warning}" for warning in facts["warnings"]]
    made = f"{len(facts['measured'])} measurements ({facts['known']} known from before)"
    rest = f"; the laws rest on {facts['measurements']} measurements of {facts['models']} models"
    lines.append(f"{made} in {units.format(facts['wall_s'], 'time')}{rest if facts['measurements'] else ''}")
    return "\n".join(lines)


def _machine(facts: Calibrated) -> list[str]:
    reads = facts["read_bytes_per_s"]
    best = max(reads.values())
    enough = next(count for count, rate in reads.items() if rate >= 0.95 * best)
    lines = [
        "memory read: " + ", ".join(f"{rate / 1e9:.1f} GB/s with {count}" for count, rate in reads.items())
        + f" threads; {enough} saturate it"
    ]  # fmt: skip
    for dtype, shapes in facts["flop_per_s"].items():
        told = ", ".join(f"{rate / 1e9:.0f} Gflop/s at {shape}" for shape, rate in shapes.items())
        lines.append(f"{dtype} products: {told}")
    if (floor := facts["floor"]) is not None:
        host, gpu = units.format(floor["cpu_s"], "time"), floor["gpu"]
        told = "no GPU that torch can use, so none was timed"
        if gpu is not None:
            on_host, on_device = units.format(gpu["host_s"], "time"), units.format(gpu["device_s"], "time")
            told = f"on {gpu['name']} {on_host} of the host, {on_device} of the device"
        lines.append(f"starting an operator in torch {floor['torch']}: {host} on the processor; {told}")
    return lines


def _laws(reached: Sequence[Reached]) -> list[str]:
    if not reached:
        return ["no laws: nothing measured predicts better than the tables of the package do"]
    rows = [("engine", "format", "reads weights", "multiplies in prefill", "starts a kernel", "measured")]
    for r in sorted(reached, key=lambda r: (r.engine, -r.n, r.weight_format)):
        rows.append((
            r.engine, f"{r.weight_format}{' compiled' if r.compiled else ''}",
            f"{r.weights_bytes_per_s / 1e9:.1f} GB/s {_within(r.read_log_sd)}",
            f"{r.flop_per_s / 1e9:.0f} Gflop/s {_within(r.flop_log_sd)}",
            f"{units.format(r.kernel_s, 'time')} {_within(r.overhead_log_sd)}",
            f"{r.n}×" if r.n else "no: by the engine's others",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _within(log_sd: float) -> str:
    """Return half of the 80 % interval: `±12%`."""
    from cost_models.predict import Z

    return f"±{math.expm1(Z * log_sd):.0%}"


def _checked(check: LawCheck) -> str:
    label = METRICS[check.metric].label
    used = "" if check.kept else ": worse than without, so not used"
    return (
        f"{label} of what was left out of the fit: {check.after_ratio:.1%} off in the median, "
        f"{check.before_ratio:.1%} without calibration ({check.n} measurements){used}"
    )


def _warnings(taken: Taken) -> list[str]:
    from planner.judging import CROWDED_CORES

    others = [r.measurement.protocol["other_cores"] for r in taken.records]
    crowded = [cores for cores in others if cores > CROWDED_CORES]
    if not crowded:
        return []
    return [
        f"other programs used up to {max(crowded):.1f} cores during {len(crowded)} of {len(others)} measurements: the "
        "intervals are wider for it; on a quiet machine, leanplan calibrate --fresh measures again"
    ]
