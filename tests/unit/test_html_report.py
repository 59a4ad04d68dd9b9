"""What the HTML report reckons: axes, the front, ratios, and the limits at which the recommendation would change."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import synthetic_answers
from hypothesis import given
from hypothesis import strategies as st

from knowledge_base.metrics import METRICS
from knowledge_base.types import Budget
from planner import answering
from planner.reports import html
from planner.reports.html import answer as answer_part
from planner.reports.html import errors, explain, resources, scatter, sensitivity, timeline
from planner.reports.html._axes import Axis
from planner.reports.html._view import Row, View
from planner.reports.html._words import change
from planner.results import ParetoSet

SIZES = st.floats(min_value=1e-9, max_value=1e12, allow_nan=False)


@given(values=st.lists(SIZES, min_size=1, max_size=8), metric=st.sampled_from(sorted(METRICS)))
def test_an_axis_holds_its_values_in_order_with_few_distinct_ticks(values: list[float], metric: str) -> None:
    axis = Axis.of(metric, values)
    shares = [axis.at(v) for v in sorted(values)]
    assert shares == sorted(shares)
    assert all(0 <= s <= 1 for s in shares)
    ticks = axis.ticks()
    assert len(ticks) <= 8
    assert all(-1e-6 <= at <= 1.000001 for at, _ in ticks)
    assert len({at for at, _ in ticks}) == len(ticks)


def test_ticks_are_round_numbers_in_a_fitting_unit() -> None:
    assert [text for _, text in Axis.of("peak_memory_bytes", [30 * 2**20, 120 * 2**20]).ticks()] == [
        "40 MiB", "60 MiB", "80 MiB", "100 MiB", "120 MiB",
    ]  # fmt: skip
    assert [text for _, text in Axis.of("tpot_s", [3e-4, 0.03]).ticks()] == [
        "500 us",
        "1 ms",
        "2 ms",
        "5 ms",
        "10 ms",
        "20 ms",
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("measured", [True, False])
def test_the_limits_that_matter_are_those_of_judging_every_limit_anew(seed: int, measured: bool) -> None:
    view = View.of(synthetic_answers.answer(25, seed=seed, measured=measured))
    rungs = 0
    for budget in view.answer.budgets:
        found = sensitivity._rungs(view, budget)
        needs = sorted({need for need, _ in found}, reverse=budget.bound == "min")
        assert needs == [need for need, _ in found]
        assert [row.id for _, row in found] == by_brute_force(view, budget)
        rungs += len(found)
    assert rungs > 3


def by_brute_force(view: View, budget) -> list[str]:  # type: ignore[no-untyped-def]
    """Return the plans recommended one after the other as the limit loosens, with every plan judged at every limit."""
    needs = {}
    for row in view.shown:
        own = next(v for v in row.result.verdicts if v.budget == budget)
        rest = [v for v in row.result.verdicts if v.budget != budget and v.budget.level == "error"]
        if all(v.outcome == "met" for v in rest):
            needs[row.id] = sensitivity._need(own)
    best: list[str] = []
    limits = sorted({n for n in needs.values() if n is not None}, reverse=budget.bound == "min")
    for limit in limits:
        judged = []
        for row in view.shown:
            need = needs.get(row.id)
            if need is not None and (need <= limit if budget.bound == "max" else need >= limit):
                verdicts = tuple(replace(v, outcome="met") if v.budget == budget else v for v in row.result.verdicts)
                could_be = row.result.finalist or not row.result.feasible  # what is out today was in no final
                judged.append(replace(row.result, verdicts=verdicts, finalist=could_be))
        found = answering.recommend(answering.mark_front(judged, view.answer.objectives), view.answer.objectives)
        if found and best[-1:] != [found.plan.id]:
            best.append(found.plan.id)
    return best


def test_the_recommended_plan_is_the_one_at_the_limit_asked_for() -> None:
    view = View.of(synthetic_answers.answer(40))
    for ladder in sensitivity.facts(view)["ladders"]:
        assert sum(rung["now"] for rung in ladder["rungs"]) == 1, ladder["budget"]
        assert "costs nothing" in ladder["sentence"]


@given(value=SIZES, budget=st.sampled_from(synthetic_answers.BUDGETS))
def test_a_limit_told_is_one_that_would_be_met(value: float, budget: Budget) -> None:
    (text,) = sensitivity._limits(budget, [value])
    told = sensitivity._number(budget, text[2:].removesuffix("× baseline"))
    assert told >= value if budget.bound == "max" else told <= value
    assert told == pytest.approx(value, rel=0.011)


def test_limits_that_differ_are_told_apart() -> None:
    memory = synthetic_answers.BUDGETS[1]
    first, second = sensitivity._limits(memory, [213.1 * 2**20, 213.2 * 2**20])
    assert (first, second) == ("≤ 213.1 MiB", "≤ 213.2 MiB")


def test_the_stepped_line_leaves_no_plan_within_the_budgets_beyond_it() -> None:
    view = View.of(synthetic_answers.answer(40))
    plot = scatter.facts(view)["plot"]
    inside = [(m["x"], m["y"]) for m in plot["marks"] if m["row"].result.feasible]
    front = scatter._front([m for m in plot["marks"] if m["row"].result.feasible], "lower", "lower")
    assert front and set(front) <= set(inside)
    for x, y in inside:
        assert any(a <= x and b <= y for a, b in front)
        assert not any(x < a and y < b for a, b in front)


def test_bars_compare_with_the_unchanged_model_and_say_how() -> None:
    view = View.of(synthetic_answers.answer(12))
    found = resources.facts(view)
    bars = {b["label"]: b for b in found["plans"][0]["bars"]}
    plan, baseline = found["plans"][0]["row"], view.baseline
    assert baseline is not None
    assert bars["peak_memory"]["value"] == pytest.approx(
        plan.points["peak_memory_bytes"].value / baseline.points["peak_memory_bytes"].value
    )
    assert bars["throughput"]["good"] is True and bars["throughput"]["value"] > 1
    assert bars["energy"]["source"] == "modelled"
    assert "windows" in bars["perplexity"]["how"]
    for stack in found["memory"]:
        assert sum(p["width"] for p in stack["pieces"]) <= 100.05


def test_the_timeline_has_every_candidate_and_its_failure() -> None:
    view = View.of(synthetic_answers.answer(12))
    rows = timeline.facts(view)["rows"]
    assert [r["row"].id for r in rows] == [r.plan.id for r in view.answer.results]
    (failed,) = (r for r in rows if r["failure"])
    assert failed["stages"][-1]["name"] == "build"
    for row in rows:
        assert all(-0.01 < s["from"] <= s["from"] + s["width"] <= 100.01 for s in row["stages"])


def test_coverage_is_that_of_the_figures_shown() -> None:
    view = View.of(synthetic_answers.answer(30))
    found = errors.facts(view)
    assert found["table"]
    assert found["held"] == sum(
        row.predicted[n].low <= row.points[n].value <= row.predicted[n].high
        for row in view.shown
        for n in row.points
        if n in row.predicted and row.points[n].observed
    )


def test_every_step_is_explained_with_evidence_and_what_stood_in_its_place() -> None:
    view = View.of(synthetic_answers.answer(12))
    steps = explain.facts(view)["steps"]
    assert view.recommended is not None
    assert [s["step"] for s in steps] == [str(s) for s in view.recommended.result.plan.steps]
    assert all(s["changes"] and s["source"] == "predicted" and s["technique"] and s["rivals"] for s in steps)
    assert any(e["link"].startswith("https://") for s in steps for e in s["evidence"] if e["link"])


@pytest.mark.parametrize(
    ("source", "link"),
    [
        ("arXiv:2210.17323", "https://arxiv.org/abs/2210.17323"),
        ("https://example.org/a", "https://example.org/a"),
        ("javascript:alert(1)", None),
        ("data:text/html,x", None),
        ('https://x/"onmouseover=alert(1)', None),
        ("CONTRIBUTING.md", None),
    ],
)
def test_only_web_addresses_become_links(source: str, link: str | None) -> None:
    assert explain._link(source) == link


def test_changes_tell_their_direction() -> None:
    assert [(c.text, c.good) for c in (change("tpot_s", 2.0, 1.0), change("tpot_s", 1.0, 2.5), change("throughput_tokens_per_s", 1.0, 1.1)) if c] == [
        ("−50 %", True), ("2.5×", False), ("+10 %", True),
    ]  # fmt: skip
    points = change("quality_loss_ratio", 0.01, 0.02)
    assert points and (points.text, points.good) == ("+1 points", False)
    assert change("tpot_s", 1.0, 1.001) is None


def test_a_relative_budget_is_told_in_the_unit_it_was_judged_in() -> None:
    first, second = synthetic_answers.answer(3).results[:2]
    unpaired = synthetic_answers.answer(3).results[2]
    told = [
        (s["limit"], s["value"])
        for result in (first, second, unpaired)
        for v in result.verdicts
        if v.budget.relative
        for s in [answer_part._strip(v)]
    ]
    assert told[:2] == [("at most 0.9×", "1×"), ("at most 0.9×", "0.2×")]
    assert all(text.endswith(" ms") for text in told[2])


def test_a_command_to_copy_holds_no_words_of_a_stranger() -> None:
    from knowledge_base.types import Plan, Step

    steps = (Step("kv_cache_quantised", {"bits": 8}), Step("thread_count", {"count": "1; touch /tmp/x"}))
    row = synthetic_answers.answer(1).results[0]
    row = replace(row, plan=Plan(model_digest="toy", engine="llama_cpp", steps=steps))
    command = answer_part._serve(Row(result=row, kind="recommended", points={}, predicted={}))
    assert command == "llama-server -m artefact/model.gguf -fa on -ctk q8_0 -ctv q8_0"


def nothing_fits(answer: ParetoSet) -> ParetoSet:
    results = tuple(
        replace(r, verdicts=tuple(replace(v, outcome="not met") for v in r.verdicts), on_front=False)
        for r in answer.results
    )
    return replace(answer, results=results, recommended_id=None, conflicts=("peak_memory: the best found is 3 GiB",), sentence="No plan meets every budget.")  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        replace(synthetic_answers.answer(1), results=(), recommended_id=None),
        synthetic_answers.answer(1),
        synthetic_answers.answer(2),
        replace(synthetic_answers.answer(6), budgets=(), search={}, provenance={}, prediction_errors={}, rejected=()),
        nothing_fits(synthetic_answers.answer(8)),
        synthetic_answers.answer(1, measured=False),
        replace(synthetic_answers.answer(6), run_id="not a date", objectives=("quality_loss",)),
    ],
    ids=[
        "no plan",
        "only the unchanged model",
        "two plans",
        "no budgets",
        "nothing fits",
        "one predicted",
        "one objective",
    ],
)
def test_odd_answers_have_a_whole_report(answer: ParetoSet) -> None:
    text = html.render(answer)
    assert text.count("<section") == 10
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(json.loads(block)["plans"]) == len(answer.results)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"<(style|script).*?</\1>", "", text, flags=re.DOTALL))
