"""Run on fewer CPU threads than the machine has cores.

Decoding one request reads weights faster than arithmetic needs them, so the last cores often add only waiting at
barriers; hyper-threads and cores busy with other work even slow it down. What it brings is found by measuring.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="fewer CPU threads than cores",
    stage="serve",
    family="threads",
    implements=("thread_count",),
    knobs={"count": Choice(options=(1, 2, 4, 8, 16, 32, 64), default=1)},
    spends=("ttft_s", "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
            "cost_usd_per_token"),
    needs=frozenset({"threads"}),
    lossless=True,
    memory=SHAPES,
    sources=("https://docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html",),
)  # fmt: skip

EVIDENCE: tuple[Evidence, ...] = ()


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot help on that machine, or None."""
    device = hardware.device
    if device.kind != "cpu":
        return f"the model runs on {device.name}, not on CPU threads"
    if device.cores == 1:
        return "the machine has one core"
    return None


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused on that machine, or None."""
    cores = hardware.device.cores
    if cores is not None and knobs["count"] >= cores:
        return f"{knobs['count']} threads are not fewer than the {cores} cores used anyway"
    return None


def rewrite(demand: Demand, *, count: int) -> Demand:
    """Return the demand bound to `count` threads."""
    return demand.but(threads=count, because=(*demand.because, f"{count} thread{'s' if count > 1 else ''}"))


def execute(session: Session, *, count: int) -> None:
    """Ask the engine for `count` threads."""
    session.runtime["threads"] = count
