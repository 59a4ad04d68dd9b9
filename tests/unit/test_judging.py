"""Verdicts where other programs had the cores: what was missed then cannot be told; what was met is met."""

from __future__ import annotations

import pytest

from knowledge_base.types import Budget, Figure, Measurement, Plan
from planner.checking import compare
from planner.judging import crowding, judge
from planner.lock import Lock

QUIET = {"cores": 2, "own_cores": 1.9, "other_cores": 0.05}
CROWDED = {"cores": 2, "own_cores": 1.3, "other_cores": 0.6}
WIDE = {"cores": 64, "own_cores": 2.0, "other_cores": 3.0}  # the plan's threads had other cores to go to
PLAN = Plan(model_digest="toy", engine="llama_cpp")


def figure(value: float) -> Figure:
    return Figure(value=value, low=0.99 * value, high=1.01 * value, n=20, statistic="p50")


def measured(protocol: dict[str, float], **figures: float) -> Measurement:
    return Measurement(
        plan=PLAN, key="k", hardware_fingerprint="f", protocol=protocol,
        figures={name: figure(value) for name, value in figures.items()},
    )  # fmt: skip


@pytest.mark.parametrize(("protocol", "cores"), [(QUIET, None), (CROWDED, 0.6), (WIDE, None), ({}, None)])
def test_a_crowd_is_told_by_the_cores_that_were_left(protocol: dict[str, float], cores: float | None) -> None:
    assert crowding(measured(protocol)) == cores


@pytest.mark.parametrize(
    ("protocol", "metric", "value", "outcome"),
    [
        (QUIET, "tpot_s", 2.0, "not met"),
        (CROWDED, "tpot_s", 2.0, "inconclusive"),
        (CROWDED, "tpot_s", 0.5, "met"),
        (CROWDED, "energy_j_per_token", 2.0, "inconclusive"),
        (CROWDED, "peak_memory_bytes", 2.0, "not met"),  # other programs take no memory of ours
        (CROWDED, "build_s", 2.0, "not met"),
    ],
)
def test_a_time_limit_missed_in_a_crowd_cannot_be_told(
    protocol: dict[str, float], metric: str, value: float, outcome: str
) -> None:
    statistic = "p50" if metric == "tpot_s" else "mean"
    budget = Budget(metric=metric, statistic=statistic, bound="max", value=1.0)
    (verdict,) = judge([budget], baseline={}, measurement=measured(protocol, **{metric: value}))
    assert verdict.outcome == outcome
    assert ("other programs kept 0.6 cores busy" in verdict.sentence) == (outcome == "inconclusive")


def test_a_paired_ratio_missed_in_a_crowd_cannot_be_told_either() -> None:
    budget = Budget(metric="tpot_s", statistic="p50", bound="max", value=1.0, relative=True)
    for protocol, outcome in ((QUIET, "not met"), (CROWDED, "inconclusive")):
        now = measured(protocol, tpot_s=2.0)
        (verdict,) = judge([budget], baseline={"tpot_s": 1.0}, measurement=now, ratios={"tpot_s": figure(2.0)})
        assert verdict.outcome == outcome


def test_what_is_worse_than_the_lock_in_a_crowd_is_not_compared() -> None:
    locked = measured(QUIET, tpot_s=1.0, peak_memory_bytes=2**30)
    lock = Lock(
        plan=PLAN, artefact_digest="a", hardware_name="local", hardware_fingerprint="f", workload=None,
        figures=locked.figures, baseline={}, allocation=None, versions={},
    )  # type: ignore[arg-type]  # fmt: skip
    for protocol, outcome in ((QUIET, "worse"), (CROWDED, "not compared")):
        now = measured(protocol, tpot_s=2.0, peak_memory_bytes=2**31)
        found = {r.metric: r for r in compare(lock, now, slack=0.03, baseline={}, same_machine=True)}
        assert found["tpot_s"].outcome == outcome
        assert found["peak_memory_bytes"].outcome == "worse"
    assert "other programs kept 0.6 cores busy" in found["tpot_s"].sentence
