"""Reports, character for character. `make accept` rewrites the files; the change is then read as a diff."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_answers
from goldens import accepted
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.types import Budget, Failure, Figure, Measurement, Plan, Step
from planner import answering
from planner.cli import build_parser
from planner.judging import judge
from planner.reports import _table, html, json, junit, markdown, terminal
from planner.results import ParetoSet, PlanResult, Rejection

HERE = Path(__file__).parent
OBJECTIVES = ("tpot_p50", "peak_memory", "quality_loss")
BUDGETS = (
    Budget(metric="ttft_s", statistic="p95", bound="max", value=0.2, text="200 ms"),
    Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=2**30, text="1 GiB"),
    Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.05, text="5 %", level="warn"),
)
HOSTILE = "x[/bold]|`</script><img onerror=alert(1)>@everyone\x1b[2J::error::"


def result(engine: str, steps: tuple[Step, ...], tpot_s: float, peak: float, loss: float) -> PlanResult:
    def figure(value: float, spread: float = 0.02) -> Figure:
        return Figure(
            value=value, low=value * (1 - spread), high=value * (1 + spread), n=100, samples=(value,) * 100, p95=value
        )

    figures = {
        "ttft_s": figure(4 * tpot_s), "tpot_s": figure(tpot_s), "throughput_tokens_per_s": figure(1 / tpot_s),
        "peak_memory_bytes": figure(peak, 0.0), "artefact_bytes": figure(peak / 10, 0.0), "quality_loss_ratio": figure(loss),
        "agreement_ratio": figure(1 - loss), "kl_divergence_nats": figure(loss / 10),
    }  # fmt: skip
    plan = Plan(model_digest="toy", engine=engine, steps=steps)
    measurement = Measurement(plan=plan, key="k", hardware_fingerprint="toy", figures=figures)
    return PlanResult(plan=plan, measurement=measurement, verdicts=judge(BUDGETS, baseline={}, measurement=measurement))


def answer(name: str = "toy") -> ParetoSet:
    broken = Plan(model_digest="toy", engine="transformers", steps=(Step("low_rank", {"keep": 0.5}),))
    failure = Failure(kind="timeout", stage="build", message="stopped at its time limit while at low_rank")
    results = [
        result("transformers", (), 0.02, 900e6, 0.0),
        result("llama_cpp", (Step("weight_gguf", {"type": "q4_k"}),), 0.004, 200e6, 0.03),
        result("llama_cpp", (Step("weight_gguf", {"type": "q3_k"}),), 0.0035, 180e6, 0.08),
        PlanResult(
            plan=broken, measurement=Measurement(plan=broken, key="b", hardware_fingerprint="toy", failure=failure)
        ),
    ]
    results = answering.mark_front(results, OBJECTIVES)
    best = answering.recommend(results, OBJECTIVES)
    results = [replace(r, why=answering.reasons(r, results, {}, OBJECTIVES)) for r in results]
    return ParetoSet(
        run_id="2026-01-01T0000Z-serve-toy-0000", model=replace(TOY_MODEL, name=name), hardware=TOY_MACHINE, workload=TOY_WORKLOAD,
        budgets=BUDGETS, objectives=OBJECTIVES, results=tuple(results), recommended_id=best.plan.id if best else None,
        rejected=(Rejection(what="weight_int8", why="left out by the spec", kind="rule"), Rejection(what="priced plans", why="predicted beyond peak_memory", kind="predicted", count=12)),
        sentence=answering.sentence(best, results, OBJECTIVES, measured=True),
        forecast=synthetic_answers.forecast(),
        prediction_errors={"tpot_s": {"n": 3.0, "median_abs_ratio": 0.12, "worst_abs_ratio": 0.4, "coverage": 0.67}},
    )  # fmt: skip


RENDERED = {
    "terminal_wide.txt": lambda: terminal.render(answer(), width=160),
    "terminal_20_columns.txt": lambda: terminal.render(answer(), width=20),
    "summary.md": lambda: markdown.render(answer()),
    "hostile.md": lambda: markdown.render(answer(HOSTILE)),
    "junit.xml": lambda: junit.render(answer()),
}


@pytest.mark.rule("markdown")
@pytest.mark.parametrize("name", RENDERED)
def test_report_is_as_accepted(name: str) -> None:
    text = RENDERED[name]()
    assert text == accepted(HERE / name, text)


def test_a_plan_has_the_same_mark_in_every_report() -> None:
    many = synthetic_answers.answer(50)
    page, text, table = html.render(many), markdown.render(many), terminal.render(many, width=240)
    assert set(re.findall(r'href="#s-([^"]+)"', page)) <= set(re.findall(r'<symbol id="s-([^"]+)"', page))
    kinds = {_table.kind(r, many) for r in many.results}
    assert len(kinds) == 7  # every kind there is
    for result in many.results:
        kind = _table.kind(result, many)
        mark, words = _table.KINDS[kind]
        assert f'data-plan="{result.plan.id}"><svg class="mark k-{kind}"' in page
        if kind != "failed":  # listed below the table, with its reason
            assert f"| {mark} | {result.plan.id} |" in text
            assert re.search(rf"^ *{re.escape(mark)} +{result.plan.id} ", table, re.MULTILINE)
            assert f"{mark} {words}" in text and f"{mark} {words}" in table


@pytest.mark.parametrize("installed", [True, False])
def test_the_next_commands_can_be_typed_as_they_are(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        (tmp_path / "leanplan").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [".venv/bin/leanplan", "plan"])
    program = "leanplan" if installed else ".venv/bin/leanplan"
    text = terminal.render(replace(answer(), folder="my runs/one"), width=160).partition("\nNext:\n")[2]
    commands = [shlex.split(line.rpartition("  (")[0]) for line in text.splitlines()]
    assert [command[:2] for command in commands] == [[program, "explain"], [program, "build"], [program, "report"]]
    for command in commands:
        options = build_parser().parse_args(command[1:])
        assert (getattr(options, "run_dir", None) or str(Path(options.run).parent)) == "my runs"


def test_marks_stay_apart_in_ascii() -> None:
    marks = [terminal.in_ascii(kind.mark) for kind in _table.KINDS.values()]
    assert len(set(marks)) == len(marks)
    assert "?" not in marks


def test_json_reads_back_as_the_same_answer(tmp_path: Path) -> None:
    from planner.results import load

    answer().save(tmp_path)
    assert load(tmp_path) == answer()
    assert (tmp_path / "result.json").read_text(encoding="utf-8") == json.render(answer())


def test_the_answer_iterates_over_the_front_recommended_first() -> None:
    members = list(answer())
    assert members[0] is not None
    assert members[0].plan.id == answer().recommended_id
    assert len(members) == len(answer())


def test_a_dataframe_has_a_row_for_each_plan() -> None:
    frame = answer().to_dataframe()
    assert len(frame) == 4
    assert frame["recommended"].sum() == 1


@pytest.mark.rule("terminal")
def test_hostile_names_stay_text_in_the_terminal() -> None:
    text = terminal.render(answer(HOSTILE), width=160)
    assert "[/bold]" in text
    assert "\x1b" not in text
