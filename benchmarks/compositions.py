"""Compositions against single techniques: what `leanplan plan` finds within one and the same number of measured plans.

    python benchmarks/compositions.py               # about 45 minutes on two idle cores, and 9 more the first time
    python benchmarks/compositions.py --again       # forgets what was measured and begins anew
    python benchmarks/compositions.py --tables      # only writes the tables anew from compositions.json

Each model is planned twice from examples/tiny-lm.yaml, with the same seed, machine and number of measured plans: `singles`
may use one technique in a plan (search.max_steps: 1), `compositions` any number. Neither sees what the other measured.
Every plan measured is kept in compositions.json after each of the six runs; the same command goes on from there, and
inside a run from the plans measured. A run has 12 plans and 12 minutes, whichever ends first. Models: the shipped one and two made for the purpose (made_models.py).
Afterwards all plans of both runs of a model are timed in turns, in blocks interleaved with the unchanged model: minutes
apart the same file is served at half the speed.

A point is (size on disk, seconds for each token in these turns, perplexity), each over the unchanged model's. Volumes are
dominated shares of the box from the ideal (0, 0, 1) to REFERENCE: no smaller, no faster, as bad as the budget allows.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from benchmarks.made_models import SHIPPED, made
from benchmarks.readme_tables import figures, keep_figures, placed
from planner import measuring
from planner.finding import find_run
from planner.loop import Run, Settings
from planner.progress import Progress
from search.pareto import front, hypervolume

if TYPE_CHECKING:
    from knowledge_base.types import Plan
    from planner.preparing import Prepared
    from planner.results import ParetoSet
    from planner.spec import Spec
    from planner.validation import Validator

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "tiny-lm.yaml"
RESULTS, README = HERE / "compositions.json", HERE / "README.md"
FOLDER = HERE.parent / ".leanplan" / "compositions"

MODELS = ("tiny-lm", "outliers", "gpt2")
ARMS: dict[str, dict[str, Any]] = {"singles": {"max_steps": 1}, "compositions": {}}
LOSS = 0.2  # of perplexity, that a plan may cost
ASKED: dict[str, Any] = {
    "workload": {"prompt_tokens": 64, "output_tokens": 32, "concurrency": 1},
    "budgets": {"quality_loss": {"max": f"{LOSS:.0%}"}},
    "objectives": ["artefact_size", "tpot_p50", "quality_loss"],
    "search": {"effort": "quick", "time_limit": "12 min", "max_measured": 12, "seed": 0},
}
# Screening is over: speeds are of the blocks.
TURNS = measuring.Protocol(requests=3, least_s=0.2, most_s=1.0, blocks=11, block_s=0.3, blocks_s=300.0)
REFERENCE = (1.0, 1.0, 1.0 + LOSS)
IDEAL = (0.0, 0.0, 1.0)
SIZE, SPEED, QUALITY = range(3)
VOLUMES = {"size": (SIZE, QUALITY), "speed": (SPEED, QUALITY), "all three": (SIZE, SPEED, QUALITY)}
CAPS = (1 / 2, 1 / 4, 1 / 5, 1 / 6, 1 / 7, 1 / 8, 1 / 10)  # of the unchanged model's bytes or seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured plan. `size`, `speed` (seconds for each token) and `perplexity` are ratios to the unchanged model."""

    plan: str
    steps: int
    size: float
    speed: float
    speed_low: float
    speed_high: float
    perplexity: float
    loss_nats: tuple[float, ...]  # of each held-out window, over the unchanged model's
    bytes: int
    peak_memory_bytes: int
    tokens_per_s: float
    build_s: float

    @property
    def costs(self) -> tuple[float, float, float]:
        """The point, smaller is better."""
        return self.size, self.speed, self.perplexity


# ---------------------------------------------------------------- measuring


def folder_of(model: str) -> Path:
    """Return the folder of a model's files, made first if need be."""
    return SHIPPED if model == "tiny-lm" else made(model)


def spec_of(model: Path, arm: str) -> Spec:
    """Return the spec of one run: the example's, with what is asked here."""
    from planner import spec as specs

    asked = specs.from_mapping({**ASKED, "model": str(model), "search": ASKED["search"] | ARMS[arm]})
    changed = {name: getattr(asked, name) for name in ("model", *ASKED)}
    return replace(specs.load(EXAMPLE), **changed)


def planned(model: str, arm: str, folder: Path) -> dict[str, Any]:
    """Run `leanplan plan` on one model, with single techniques or compositions, and return what it measured."""
    from planner.loop import run
    from planner.machine import find

    spec = spec_of(folder_of(model), arm)
    find("local", FOLDER)  # the machine is probed once for all runs
    shutil.copytree(FOLDER / "machines", folder / "store" / "machines", dirs_exist_ok=True)
    settings = Settings(run_root=folder / "runs", store_root=folder / "store")
    began = time.monotonic()
    answer = run(spec, settings, Progress(quiet=False))
    return {
        "wall_s": round(time.monotonic() - began, 1),
        "machine": answer.hardware.device.name,
        "versions": answer.provenance["versions"],
        "points": [asdict(point) for point in points_of(answer)],
        "failed": [
            {"plan": r.plan.words, "kind": r.measurement.failure.kind, "message": r.measurement.failure.message}
            for r in answer.results
            if r.measurement and r.measurement.failure
        ],
    }


def points_of(answer: ParetoSet) -> list[Point]:
    """Return the measured plans of an answer, the unchanged model first."""
    assert answer.baseline and answer.baseline.measurement
    unchanged = answer.baseline.measurement.figures
    points = []
    for result in answer.results:
        if result.measurement is None or result.measurement.failure:
            continue
        figures = result.measurement.figures
        pace, loss = figures["tpot_s"], figures.get("quality_loss_ratio")
        points.append(
            Point(
                plan=result.plan.words, steps=len(result.plan.steps),
                size=figures["artefact_bytes"].value / unchanged["artefact_bytes"].value,
                speed=pace.value / unchanged["tpot_s"].value, speed_low=pace.low / unchanged["tpot_s"].value,
                speed_high=pace.high / unchanged["tpot_s"].value,
                perplexity=1 + loss.value if loss else 1.0,
                loss_nats=tuple(round(x, 6) for x in loss.samples) if loss else (),
                bytes=int(figures["artefact_bytes"].value), peak_memory_bytes=int(figures["peak_memory_bytes"].value),
                tokens_per_s=round(1 / pace.value, 1), build_s=round(figures["build_s"].value, 1),
            )
        )  # fmt: skip
    return points


class Turns(Run):
    """Serves plans that other runs built in blocks interleaved with the unchanged model; `found` has seconds for each token."""

    def __init__(self, prepared: Prepared, settings: Settings, artefacts: Mapping[Plan, Path]) -> None:
        super().__init__(prepared, settings, Progress(live=False), time.monotonic())
        self.artefacts = artefacts
        self.found: dict[str, list[float]] = {}

    def _stages(self, validator: Validator, only: Any) -> None:
        self._baseline(validator)
        baseline = self.prepared.space.unchanged()
        with contextlib.ExitStack() as candidates:
            jobs = {
                plan.id: validator._open(candidates.enter_context(validator._started(plan, "turns")), plan, folder)
                for plan, folder in self.artefacts.items()
            }
            observed = measuring.interleave(
                jobs, baseline.id, TURNS, self.prepared.hardware, waiting=self.progress.line
            )
        for plan in self.artefacts:
            if ratio := observed[plan.id].ratios.get("tpot_s"):
                pace = observed[plan.id].figures["tpot_s"].value
                self.found[plan.words] = [
                    *(round(x, 4) for x in (ratio.value, ratio.low, ratio.high)),
                    round(1 / pace, 1),
                ]


def in_turns(model: str) -> dict[str, list[float]]:
    """Return for each plan that both runs of a model measured [times the unchanged model's seconds, low, high, tokens/s]."""
    from planner.preparing import prepare

    artefacts = {}
    for arm in ARMS:
        root = FOLDER / f"{model}-{arm}"
        for result in find_run(None, root / "runs").results:
            built = next((root / "runs").glob(f"*/artefacts/{result.plan.id}"), None)
            if built is not None and result.measurement and not result.measurement.failure:
                artefacts[result.plan] = built
    store = FOLDER / f"{model}-singles" / "store"
    spec = spec_of(folder_of(model), "compositions")
    patient = replace(spec, limits=replace(spec.limits, time_per_candidate_s=1800.0))  # all stay open until the end
    prepared = prepare(patient, store=store)
    turns = Turns(prepared, Settings(run_root=FOLDER / f"{model}-turns", store_root=store), artefacts)
    turns.go(only=(prepared.space.unchanged(), None))
    return turns.found


# ---------------------------------------------------------------- comparing


def volume(points: Sequence[Point], axes: Sequence[int]) -> float:
    """Return the share of the box between IDEAL and REFERENCE that the points dominate, along some axes."""
    if not points:
        return 0.0
    ideal, reference = np.array(IDEAL)[list(axes)], np.array(REFERENCE)[list(axes)]
    costs = np.maximum(np.array([p.costs for p in points])[:, list(axes)], ideal)
    return hypervolume(costs, reference) / float(np.prod(reference - ideal))


def front_of(points: Sequence[Point], axes: Sequence[int]) -> list[Point]:
    """Return the undominated points along some axes that are inside REFERENCE, smallest first cost first."""
    inside = [p for p in points if all(p.costs[axis] <= REFERENCE[axis] for axis in axes)]
    if not inside:
        return []
    chosen = front(np.array([p.costs for p in inside])[:, list(axes)])
    return sorted((inside[i] for i in chosen), key=lambda p: p.costs[axes[0]])


def loses_more(one: Point, other: Point) -> int:
    """Return 1 if `one` surely has more perplexity than `other`, -1 if surely less, 0 if the windows leave it open."""
    from planner.statistics import mean_interval

    length = max(len(one.loss_nats), len(other.loss_nats))
    if not length:
        return 0
    a, b = (p.loss_nats or (0.0,) * length for p in (one, other))  # the unchanged model loses nothing
    differences = [x - y for x, y in zip(a, b, strict=True)]
    low, high = mean_interval(differences, seed=ASKED["search"]["seed"])
    return int(low > 0) - int(high < 0)


def costs_more(one: Point, other: Point, axis: int) -> int:
    """Return 1 if `one` surely is larger, or slower, than `other`; -1 if surely less so; sizes are exact."""
    if axis == SIZE:
        return int(one.size > other.size) - int(one.size < other.size)
    return int(one.speed_low > other.speed_high) - int(one.speed_high < other.speed_low)


def dominates(one: Point, other: Point, axis: int, *, surely: bool) -> bool:
    """Return whether `one` is as small, or as fast, as `other` and as good, and better in one of both.

    Surely: in one of the two it is better beyond the intervals, and in the other not worse beyond them.
    """
    pairs = ((one.costs[axis], other.costs[axis]), (one.perplexity, other.perplexity))
    if any(a > b for a, b in pairs) or all(a == b for a, b in pairs):
        return False
    told = (costs_more(one, other, axis), loses_more(one, other))
    return not surely or (max(told) <= 0 and min(told) < 0)


def compared(singles: Sequence[Point], compositions: Sequence[Point]) -> dict[str, Any]:
    """Return how what both runs found compares: volumes, dominated points, the best within each cap."""
    composed = [p for p in compositions if p.steps > 1]
    found: dict[str, Any] = {
        "volume": {name: {"singles": round(volume(singles, axes), 4), "compositions": round(volume(compositions, axes), 4)} for name, axes in VOLUMES.items()},
    }  # fmt: skip
    for name, axis in (("size", SIZE), ("speed", SPEED)):
        against = [p for p in front_of(singles, (axis, QUALITY)) if p.steps]
        found[name] = {
            "singles_on_front": len(against),
            "dominated": sum(any(dominates(c, s, axis, surely=False) for c in composed) for s in against),
            "surely_dominated": sum(any(dominates(c, s, axis, surely=True) for c in composed) for s in against),
            "best": [
                {
                    "at_most": round(cap, 4),
                    **{arm: best_within(some, axis, cap) for arm, some in (("singles", singles), ("compositions", composed))},
                }
                for cap in CAPS
            ],
        }  # fmt: skip
    return found


def best_within(points: Sequence[Point], axis: int, cap: float) -> float | None:
    """Return the least perplexity ratio of the points that cost at most `cap` along an axis."""
    return min((round(p.perplexity, 4) for p in points if p.costs[axis] <= cap), default=None)


# ---------------------------------------------------------------- telling


def as_markdown(kept: Mapping[str, Any]) -> str:
    """Return the tables of the models of which both runs are there."""
    found = {}
    points = {}
    for model, runs in kept["models"].items():
        if set(ARMS) <= set(runs):
            points[model] = {arm: kept_points(runs, arm) for arm in ARMS}
            found[model] = compared(points[model]["singles"], points[model]["compositions"])
    lines = [
        "| model | plans measured | size × perplexity | seconds × perplexity | all three | dominated at the same size | at the same speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, told in found.items():
        plans = " / ".join(str(len(points[model][arm]) + len(kept["models"][model][arm]["failed"])) for arm in ARMS)
        volumes = " | ".join(_volumes(told["volume"][name]) for name in VOLUMES)
        lines.append(f"| {model} | {plans} | {volumes} | {_dominated(told['size'])} | {_dominated(told['speed'])} |")
    for name, what in (("size", "of the unchanged model's bytes"), ("speed", "of its seconds for each token")):
        lines += ["", f"| at most so much {what} | {' | '.join(f'1/{1 / cap:.0f}' for cap in CAPS)} |"]
        lines.append("|---" * (1 + len(CAPS)) + "|")
        for model, told in found.items():
            cells = (f"{_ratio(row['singles'])} / {_ratio(row['compositions'])}" for row in told[name]["best"])
            lines.append(f"| {model} | {' | '.join(cells)} |")
    lines += ["", "| model | on the front of size and perplexity | bytes | seconds | perplexity | built in |"]
    lines.append("|---|---|---|---|---|---|")
    for model, arms in points.items():
        for arm, some in arms.items():
            for p in front_of(some, (SIZE, QUALITY)):
                lines.append(
                    f"| {model}, {arm} | {p.plan} | {p.size:.3f} | {p.speed:.3f} | {p.perplexity:.4f} | {p.build_s:.0f} s |"
                )
    return "\n".join(lines) + "\n"


def kept_points(runs: Mapping[str, Any], arm: str) -> list[Point]:
    """Return the points of one run, with their speed in turns where they were timed so."""
    found = []
    for kept in runs[arm]["points"]:
        point = Point(**{**kept, "loss_nats": tuple(kept["loss_nats"])})
        if timed := runs.get("turns", {}).get(point.plan):
            speed, low, high, tokens = timed
            point = replace(point, speed=speed, speed_low=low, speed_high=high, tokens_per_s=tokens)
        found.append(point)
    return found


def _volumes(told: Mapping[str, float]) -> str:
    one, both = told["singles"], told["compositions"]
    return f"{one:.3f} / {f'**{both:.3f}**' if both > one else f'{both:.3f}'}"


def _dominated(told: Mapping[str, Any]) -> str:
    return f"{told['dominated']} of {told['singles_on_front']}, surely {told['surely_dominated']}"


def _ratio(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def write(kept: Mapping[str, Any]) -> None:
    """Write compositions.json and the tables of README.md."""
    keep_figures(RESULTS, kept)
    README.write_text(placed(README.read_text(encoding="utf-8"), "compositions", as_markdown(kept)), encoding="utf-8")


def kept_before() -> dict[str, Any]:
    """Return what compositions.json holds, if it was measured with the same settings."""
    empty: dict[str, Any] = {"asked": ASKED, "arms": ARMS, "reference": list(REFERENCE), "models": {}}
    kept = figures(RESULTS)
    return kept if {**kept, "models": {}} == empty else empty


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="forget what was measured of these models first")
    parser.add_argument("--tables", action="store_true", help="measure nothing, write the tables anew")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; may be repeated")
    given = parser.parse_args(arguments)
    kept = kept_before()
    runs = [] if given.tables else [(model, arm) for model in given.model or MODELS for arm in ARMS]
    if given.again:
        for model, arm in runs:
            shutil.rmtree(FOLDER / f"{model}-{arm}", ignore_errors=True)
            kept["models"].pop(model, None)
    for number, (model, arm) in enumerate(runs, start=1):
        if arm not in kept["models"].get(model, {}):
            print(f"[{number} of {len(runs)}] {model}, {arm}: about 4 to 8 minutes", flush=True)
            kept["models"].setdefault(model, {})[arm] = planned(model, arm, FOLDER / f"{model}-{arm}")
            kept["models"][model].pop("turns", None)
            write(kept)
    for model in dict.fromkeys(model for model, _ in runs):
        if "turns" not in kept["models"][model]:
            print(f"{model}: all plans in turns, about 3 minutes", flush=True)
            kept["models"][model]["turns"] = in_turns(model)
            write(kept)
    write(kept)
    print(as_markdown(kept))


if __name__ == "__main__":
    main()
