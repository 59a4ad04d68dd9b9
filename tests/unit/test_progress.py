"""What a run says while it goes on: plain lines in a pipe, a picture on a terminal."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowledge_base.types import Budget, Estimate, Failure, Figure, Measurement, Plan, Step, Value
from planner import answering
from planner import spec as specs
from planner.judging import judge
from planner.progress import LiveProgress, Progress, progress_of, scatter
from planner.results import PlanResult

SPEC = specs.from_mapping(
    {
        "model": "models/tiny-lm",
        "budgets": {"peak_memory": "1 GiB", "quality_loss": "5 %"},
        "objectives": ["tpot_p50", "throughput_p50"],
        "search": {"time_limit": "10 min", "max_measured": 5},
    }
)
BUDGETS: tuple[Budget, ...] = SPEC.budgets
HOSTILE = "x[/bold]\x1b[2J\r\u202e"


def plan(name: str | None) -> Plan:
    return Plan(model_digest="toy", engine="transformers", steps=(Step(name),) if name else ())


def measured(name: str | None, tpot_s: float, loss: float, failure: str = "") -> PlanResult:
    figures = {
        metric: Figure(value=v, low=0.98 * v, high=1.02 * v, n=10)
        for metric, v in {
            "tpot_s": tpot_s, "throughput_tokens_per_s": 1 / tpot_s, "peak_memory_bytes": 3e8, "quality_loss_ratio": loss,
        }.items()
    }  # fmt: skip
    failed = Failure(kind="timeout", stage="build", message=failure) if failure else None
    found = Measurement(
        plan=plan(name), key=str(name), hardware_fingerprint="toy", figures={} if failed else figures, failure=failed
    )
    verdicts = () if failed else judge(BUDGETS, baseline={}, measurement=found)
    return PlanResult(plan=plan(name), measurement=found, verdicts=verdicts)


RESULTS = answering.mark_front(
    [measured(None, 0.005, 0.0), measured("quick", 0.002, 0.04), measured("poor", 0.001, 0.3)], SPEC.objectives
)


def picture(progress: LiveProgress) -> str:
    with progress.console.capture() as got:
        progress.console.print(progress.drawing())
    return got.get()


def live(width: int = 110, height: int = 40) -> LiveProgress:
    from rich.console import Console

    progress = LiveProgress(SPEC, console=Console(file=io.StringIO(), width=width, height=height, legacy_windows=False))
    progress.plain = False
    progress.stages = ["unchanged model", "candidates"]
    return progress


def test_a_pipe_gets_one_line_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.line("toy: 7.3 M parameters")
    progress.stage("candidates")
    progress.trying(plan("quick"), "on the predicted front", None)
    progress.tick("building")
    progress.measured(RESULTS, "tpot 2 ms ±2.0%")
    progress.done()
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "[ 0:00] toy: 7.3 M parameters",
        f"[ 0:00] {plan('quick').id} transformers: quick  (on the predicted front)",
        "[ 0:00]            tpot 2 ms ±2.0%",
    ]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_of(SPEC, quiet=True, live=None)
    progress.line("x")
    progress.trying(plan(None), "why", None)
    progress.measured(RESULTS, "y")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tty", "columns", "term", "live", "kind"),
    [
        (True, "120", "xterm", None, LiveProgress),
        (True, "20", "xterm", None, Progress),
        (True, "120", "dumb", None, Progress),
        (False, "120", "xterm", None, Progress),
        (True, "120", "xterm", False, Progress),
    ],
)
def test_what_draws_suits_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tty: bool, columns: str, term: str, live: bool | None, kind: type
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", term)
    assert type(progress_of(SPEC, quiet=False, live=live)) is kind


def test_the_picture_shows_stages_time_plans_budgets_and_the_front() -> None:
    progress = live(140)
    progress.measured(RESULTS, "")
    text = picture(progress)
    assert "✓ unchanged model  ▸ candidates" in text
    assert "left; 3 of at most 5 plans measured" in text
    first, second, third = (line for line in text.splitlines() if "transformers: " in line)
    assert first.startswith("● transformers: quick")
    assert "286 MiB ±2.0% ✓" in first
    assert "4 % ±2.0% ✓" in first
    assert second.startswith("● transformers: unchanged") is RESULTS[0].on_front
    assert third.startswith("× transformers: poor")
    assert "30 % ±2.0% ✗" in third
    assert "measured" in text
    assert "up: less throughput_p50" in text
    assert "right: more tpot_p50" in text
    assert any(0x2800 < ord(c) < 0x2900 for c in text)


def test_the_plan_in_hand_is_told_with_what_is_predicted_for_it() -> None:
    progress = live()
    values = {"tpot_s": Value(mid=0.003, low=0.002, high=0.004, source="analytic")}
    progress.trying(plan("next"), "unlike anything measured", Estimate(plan_id="x", hardware_name="toy", values=values))
    progress.tick("1234567890: weight_gguf")
    text = picture(progress)
    assert "▸ transformers: next: weight_gguf  (unlike anything measured)" in text
    assert "predicted: tpot 3 ms [2 ms – 4 ms]" in text
    progress.measured(RESULTS, "")
    assert "predicted" not in picture(progress)


def test_what_is_done_with_no_plan_in_hand_is_told_too() -> None:
    progress = live()
    progress.measured(RESULTS, "")
    progress.tick("block 3 of 9")
    assert "▸ block 3 of 9" in picture(progress)


def test_time_left_counts_from_the_first_stage() -> None:
    progress = live()
    progress.stages = []
    progress.limited_from -= 1000  # as if measuring the machine had taken so long
    progress.stage("unchanged model")
    text = picture(progress)
    progress.done()
    assert "0:00, at most" in text


def test_where_columns_are_few_budgets_come_before_lesser_objectives() -> None:
    headings = {}
    for width in (80, 110, 200):
        progress = live(width)
        progress.measured(RESULTS, "")
        headings[width] = next(line for line in picture(progress).splitlines() if line.startswith("measured")).split()
    assert [h for h in headings[80] if h not in "↓↑"] == ["measured", "tpot", "peak_memory"]
    assert [h for h in headings[110] if h not in "↓↑"] == ["measured", "tpot", "peak_memory", "quality_loss"]
    assert "throughput" in headings[200]


def test_the_last_failure_is_told() -> None:
    progress = live()
    progress.measured([*RESULTS, measured("slow", 1, 0, failure="stopped at its time limit")], "")
    assert "last failure: timeout: stopped at its time limit  (transformers: slow)" in picture(progress)


@pytest.mark.parametrize("width", [72, 80, 160])
def test_the_picture_fits_the_terminal(width: int) -> None:
    progress = live(width, 24)
    many = [replace(RESULTS[1], plan=plan(f"a_technique_with_a_long_name_{i}" * 3)) for i in range(40)]
    progress.measured(many, "")
    progress.trying(plan("n" * 200), "why", None)
    lines = picture(progress).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 24
    assert any("more" in line for line in lines)


def test_a_terminal_that_cannot_write_marks_gets_ascii() -> None:
    progress = live()
    progress.plain = True
    progress.measured([*RESULTS, measured("slow", 1, 0, failure="é")], "")
    progress.trying(plan("next"), "why", None)
    assert picture(progress).isascii()


def test_hostile_names_are_shown_not_obeyed() -> None:
    progress = live(200)
    progress.trying(plan(HOSTILE), HOSTILE, None)
    progress.measured([measured(HOSTILE, 0.001, 0.0), measured("b", 1, 0, failure=HOSTILE)], HOSTILE)
    text = picture(progress)
    assert "[/bold]" in text
    assert "\x1b" not in text
    assert "\r" not in text


def test_lines_stay_above_the_picture_and_done_takes_it_away() -> None:
    progress = live()
    progress.stage("finalists")
    progress.measured(RESULTS, "")
    progress.line("finalists: a, b")
    progress.done()
    assert "finalists: a, b" in progress.console.file.getvalue()
    assert progress._display is None
    progress.done()


@given(
    points=st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(1e-9, 1e9)), min_size=1, max_size=20),
    columns=st.integers(1, 40), rows=st.integers(1, 8), plain=st.booleans(),
)  # fmt: skip
def test_a_scatter_has_its_size_and_a_mark(
    points: list[tuple[float, float]], columns: int, rows: int, plain: bool
) -> None:
    lines = scatter(points, columns=columns, rows=rows, plain=plain)
    assert [len(line) for line in lines] == [columns] * rows
    assert "".join(lines).strip()
    assert not plain or "".join(lines).isascii()
