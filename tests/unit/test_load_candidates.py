"""Which workloads candidates are served for, and that what is learned from them is still of one batch after the other."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.serde import plain, restore
from knowledge_base.types import Budget, Figure, Measurement, Plan
from planner import spec as specs
from planner.judging import judge
from planner.load.candidates import driven, load_of, require
from planner.store import Record, measurement_key


def spec_of(workload: dict | None = None, budgets: dict | None = None, **more: object) -> specs.Spec:
    asked = {"model": "m", "workload": workload or {}, "budgets": budgets or {"ttft": "1 s"}, **more}
    return specs.from_mapping(asked)


@pytest.mark.parametrize(
    ("workload", "budgets", "expected"),
    [
        ({}, {"ttft_p95": "1 s"}, False),
        ({"concurrency": 8}, {"ttft_p95": "1 s"}, False),
        ({"concurrency": 8}, {"ttft_p99": "1 s"}, True),
        ({"concurrency": 8}, {"itl_p95": "1 s"}, True),
        ({"concurrency": 8}, {"goodput": "2 requests/s", "ttft": "1 s"}, True),
        ({"concurrency": 8}, {"goodput": {"min": "2 requests/s", "level": "off"}, "ttft": "1 s"}, False),
        ({"arrival_rate": "2 requests/s"}, {"peak_memory": "1 GiB"}, True),
        ({"turns": 3}, {"ttft": "1 s"}, True),
        ({"shared_prefix": 3}, {"ttft": "1 s"}, False),
    ],
)  # fmt: skip
def test_candidates_are_served_where_one_batch_does_not_tell(workload: dict, budgets: dict, expected: bool) -> None:
    spec = spec_of(workload, budgets)
    assert driven(spec.workload, spec.budgets) == expected
    assert (load_of(spec) is not None) == expected


def test_the_highest_percentile_says_how_many_requests() -> None:
    few, many = (load_of(spec_of({"arrival_rate": "2 requests/s"}, {f"ttft_{p}": "1 s"})) for p in ("p95", "p99"))
    assert few and many
    assert (few.protocol.least_requests, many.protocol.least_requests) == (90, 459)


def test_a_trace_is_told_from_the_specs_folder(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp,prompt_tokens,output_tokens\n0,5,2\n9,7,3\n")
    load = load_of(
        specs.from_mapping({"model": "m", "workload": {"trace": "t.csv"}, "budgets": {"ttft": "1 s"}}, tmp_path)
    )
    assert load and [r.prompt_tokens for r in load.rows] == [5, 7]


@pytest.mark.parametrize(
    ("workload", "budgets", "lasts_s"),
    [
        ({"arrival_rate": "100 requests/s"}, {"ttft": "1 s"}, 2 + 10),  # warm-up, and the least time
        ({"arrival_rate": "6 requests/s"}, {"ttft": "1 s"}, 2 + 90 / 6),  # until there are enough
        ({"arrival_rate": "6 requests/s", "turns": 3}, {"ttft": "1 s"}, 2 + 90 / 6),  # of conversations' turns
        ({"arrival_rate": "1 requests/s"}, {"ttft": "1 s"}, 25),  # the most
        ({"concurrency": 3}, {"itl_p95": "1 s"}, 2 + 90 / 5),  # as fast as they are answered
        ({"trace": "t.csv"}, {"ttft": "1 s"}, 9),
    ],
    ids=str,
)
def test_how_long_a_load_goes_on(workload: dict, budgets: dict, lasts_s: float, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("timestamp,prompt_tokens,output_tokens\n0,5,2\n9,7,3\n")
    asked = {"model": "m", "workload": workload, "budgets": budgets, "search": {"effort": "quick"}}
    load = load_of(specs.from_mapping(asked, tmp_path))
    assert load and load.lasts_s(0.5, 5.0) == pytest.approx(lasts_s + 0.5)
    assert load.lasts_s(math.inf, 5.0) == pytest.approx(lasts_s + 10)  # what falls behind is waited for no longer


def test_figures_under_another_load_have_another_key() -> None:
    def key(**budgets: str) -> str:
        load = load_of(spec_of({"arrival_rate": "2 requests/s"}, budgets))
        assert load
        return measurement_key(load=load.facts)

    assert key(ttft_p95="1 s") != key(ttft_p95="2 s")  # goodput is another
    assert key(ttft_p95="1 s") == key(ttft_p95="1 s", peak_memory="1 GiB")


def test_what_is_missing_is_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    arriving = spec_of({"arrival_rate": "2 requests/s"})
    require(arriving)
    with pytest.raises(BadInput, match="goodput counts requests within the latency budgets"):
        require(spec_of({"concurrency": 2}, {"goodput": "1 requests/s"}))
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(EnvironmentProblem, match="aiohttp is not installed") as raised:
        require(arriving)
    assert "pip install" in raised.value.hint


def figure(value: float) -> Figure:
    return Figure(value=value, low=value, high=value, n=100, statistic="p50", samples=(value,) * 100)


SERVED = Measurement(
    plan=Plan(model_digest="m", engine="transformers"), key="k", hardware_fingerprint="h",
    figures={"ttft_s": figure(0.9), "perplexity": figure(20.0)}, alone={"ttft_s": figure(0.1)},
)  # fmt: skip


def test_what_was_measured_alone_is_kept_beside_what_was_measured_under_load() -> None:
    alone = SERVED.as_alone
    assert {name: f.value for name, f in alone.figures.items()} == {"ttft_s": 0.1, "perplexity": 20.0}
    assert alone.as_alone is alone
    assert restore(Measurement, plain(SERVED)) == SERVED
    assert "alone" not in plain(replace(SERVED, alone=None))


def test_cost_models_learn_from_what_was_measured_alone() -> None:
    from synthetic_answers import answer

    from cost_models import calibrate

    told = answer()
    measured = [r.measurement for r in told.results if r.measurement and not r.measurement.failure]
    slow = [
        replace(m, figures={n: replace(f, value=9 * f.value) for n, f in m.figures.items()}, alone=m.figures)
        for m in measured
    ]
    mine, theirs, wrong = (
        calibrate.fit(found, told.model, told.workload, told.hardware)
        for found in (measured, slow, [replace(m, alone=None) for m in slow])
    )
    assert measured and mine.corrections
    assert plain_of(mine) == plain_of(theirs) != plain_of(wrong)


def plain_of(calibration: object) -> str:
    return repr(calibration)


def test_a_limit_kept_while_the_queue_grew_is_not_met() -> None:
    budgets = (Budget(metric="ttft_s", statistic="p95", bound="max", value=1.0), Budget(metric="perplexity", statistic="mean", bound="max", value=30.0))  # fmt: skip
    for steady, outcome in ((True, "met"), (False, "inconclusive")):
        measured = replace(SERVED, protocol={"load": {"steady": steady}})
        verdicts = judge(budgets, baseline={}, measurement=measured)
        assert [v.outcome for v in verdicts] == [outcome, "met"]
    assert "arrivals outran the service" in verdicts[0].sentence


def test_a_record_under_load_survives_the_store(tmp_path: Path) -> None:
    from tests_support import TOY_MODEL

    from planner.store import Store

    record = Record(measurement=SERVED, model=TOY_MODEL, workload=spec_of({"turns": 2}).workload)
    Store(tmp_path).put(record)
    assert Store(tmp_path).get("k") == record
