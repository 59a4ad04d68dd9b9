"""benchmarks/techniques.py: which settings are measured, what a row says, how the table is written. Nothing is timed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

from benchmarks import techniques as bench
from benchmarks.readme_tables import figures
from knowledge_base.registry import complete, techniques
from knowledge_base.types import Failure, Figure, Measurement, Plan, Step
from planner.estimating.asking import read_step
from planner.store import Record

HOSTILE = "x|<img src=x>\n`y`\x1b[31m"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Any:
    store = tmp_path_factory.mktemp("bench") / "store"
    shutil.copytree(machine, store)
    return bench.prepared_for(bench.SUBJECTS["shipped"], store)


# ---------------------------------------------------------------- what is measured


@pytest.mark.slow
def test_every_technique_is_measured_or_left_out_with_the_reason(prepared: Any) -> None:
    plans, left_out = bench.plans_of(prepared.space, prepared.refused)
    assert {*plans, *left_out} == set(techniques.names())
    assert all(left_out.values())
    for name, found in plans.items():
        assert 1 <= len(found) <= (11 if name in bench.EVERY_SETTING else 5), name
        assert len({plan.id for plan in found}) == len(found)
        for plan in found:
            assert plan.step(name) and len(plan.steps) <= 2
            assert prepared.space.plan(plan.engine, plan.steps) == plan, "a plan that the planner may choose"
    assert sum(map(len, plans.values())) < 140, "the command is to end within forty minutes"


def test_the_selection_for_the_larger_model_is_legal(prepared: Any) -> None:
    plans, left_out = bench.plans_of(prepared.space, prepared.refused, bench.LARGE)
    assert left_out == {}
    assert sum(map(len, plans.values())) == len(bench.LARGE)
    for said in (*bench.LARGE, *(step for steps in bench.BESIDE.values() for step in steps)):
        read_step(said)
    for name in bench.BESIDE:
        assert name.partition("(")[0] in techniques.names()


def test_settings_are_the_ends_and_the_default_then_one_of_each_other_knob() -> None:
    def every(name: str, **knobs: Sequence[Any]) -> list[Step]:
        first, second = knobs
        return [complete(Step(name, {first: a, second: b})) for a in knobs[first] for b in knobs[second]]

    found = bench.strengths(every("weight_gptq", bits=(2, 3, 4), group_size=(32, 128)))
    assert [(s.knobs["bits"], s.knobs["group_size"]) for s in found] == [(2, 32), (3, 32), (4, 32), (4, 128)]
    large_groups = every("weight_gptq", bits=(2, 3, 4), group_size=(128,))
    assert [s.knobs["bits"] for s in bench.strengths(large_groups)] == [2, 3, 4], "the default group size is not legal"
    counts = [Step("batch_size", {"count": n}) for n in (2, 4, 8, 16, 32)]
    assert [s.knobs["count"] for s in bench.strengths(counts)] == [2, 4, 32]
    steps = [Step("recover_full", {"steps": n}) for n in (20, 60, 200)]
    assert [s.knobs["steps"] for s in bench.strengths(steps)] == [20], "more take minutes"
    assert bench.strengths([Step("weight_int8")]) == [Step("weight_int8")]


# ---------------------------------------------------------------- rows


def exact(value: float) -> Figure:
    return Figure(value=value, low=value, high=value, n=1)


def record(*steps: Step, size: float = 1.0, failure: Failure | None = None) -> Record:
    figures = {
        "artefact_bytes": exact(4e6 * size), "peak_memory_bytes": exact(4e8 * size), "build_s": exact(3.25),
        "quality_loss_ratio": Figure(value=0.02, low=0.01, high=0.03, n=24), "agreement_ratio": exact(0.9),
        "kl_divergence_nats": exact(0.01),
    }  # fmt: skip
    measurement = Measurement(
        plan=Plan(model_digest="toy", engine="transformers", steps=steps), key="k", hardware_fingerprint="toy",
        figures={} if failure and failure.stage == "build" else figures, failure=failure, taken_at="2026-11-22T00:00:00Z",
        protocol={"build_peak_bytes": 10**9, "framework_bytes": 10**8, "other_cores": 0.01},
    )  # fmt: skip
    return Record(measurement=measurement, model=TOY_MODEL, workload=TOY_WORKLOAD)


INT8, WIDTH = Step("weight_int8"), Step("prune_width", {"keep": 0.5})
RATIOS = {
    "tpot_s": Figure(value=0.5, low=0.4, high=0.8, n=9),
    "throughput_tokens_per_s": Figure(value=1.9, low=1.8, high=2, n=9),
}


def row_of(*steps: Step, **more: Any) -> dict[str, Any]:
    one = record(*steps, **more)
    return bench.row("weight_int8", one.measurement.plan, one, RATIOS, record())


def test_a_row_says_how_many_times_faster_not_how_many_times_as_long() -> None:
    row = row_of(WIDTH, INT8, size=0.25)
    assert (row["step"], row["beside"]) == ("weight_int8", ["prune_width(keep=0.5)"])
    assert row["decode"] == [2.0, 1.25, 2.5] and row["throughput"] == [1.9, 1.8, 2]
    assert "prefill" not in row, "its time was not measured"
    assert (row["artefact_ratio"], row["peak_memory_ratio"], row["build_peak_bytes"]) == (0.25, 0.25, 10**9)
    assert row["perplexity_ratio"] == [1.02, 1.01, 1.03]
    json.dumps(row, allow_nan=False)


def test_what_lacks_ratios_is_measured_again_but_not_what_is_refused() -> None:
    unsupported = row_of(INT8, failure=Failure(kind="unsupported", stage="build", message="no matrix"))
    died = row_of(INT8, failure=Failure(kind="killed", stage="build", message="no memory"))
    for row in (unsupported, died):
        row.pop("decode")
    base = bench.row(bench.UNCHANGED, record().measurement.plan, record(), None, record())
    assert bench.complete([row_of(INT8)]) and bench.complete([unsupported]) and bench.complete([base])
    assert not bench.complete([row_of(INT8), died])


def kept(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = bench.row(bench.UNCHANGED, record().measurement.plan, record(), None, record())
    base["perplexity_ratio"] = [1.0, 1.0, 1.0]
    found: dict[str, list[dict[str, Any]]] = {bench.UNCHANGED: [base]}
    for row in rows:
        found.setdefault(row["technique"], []).append(row)
    return {"machine": "a CPU", "date": "2026-11-22", "left_out": {}, "rows": found, **more}


def changed(plan: str, size: float, ratio: float, **more: Any) -> dict[str, Any]:
    row = row_of(INT8, size=size)
    return row | {"plan": plan, "step": f"weight_int8({plan})", "perplexity_ratio": [ratio, ratio, ratio]} | more


def test_the_front_is_of_single_steps_that_work() -> None:
    small, worse, beside, failed = (
        changed("small", 0.2, 1.1), changed("worse", 0.3, 1.2), changed("two", 0.1, 1.0, beside=["x"]),
        changed("broken", 0.1, 1.0, failure="quality_collapse: far off"),
    )  # fmt: skip
    found = kept(small, worse, beside, failed)
    rows = [row for rows in found["rows"].values() for row in rows]
    assert bench.on_front(rows) == {"small", rows[0]["plan"]}
    text = bench.as_markdown(found, quality=True)
    assert "**weight_int8(small)** ●" in text and "**weight_int8(worse)**" not in text


def test_the_table_of_a_random_model_says_nothing_of_quality() -> None:
    with_it, without = (bench.as_markdown(kept(changed("a", 0.2, 1.1)), quality=q) for q in (True, False))
    assert "| perplexity |" in with_it and "1.1×" in with_it
    assert "perplexity" not in without and "●" not in without
    for text in (with_it, without):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1


def test_names_and_reasons_cannot_break_the_table() -> None:
    refused = row_of(INT8, failure=Failure(kind="unsupported", stage="build", message=HOSTILE))
    refused.pop("decode")
    text = bench.as_markdown(
        kept(changed("a", 0.2, 1.1, step=HOSTILE), refused, left_out={HOSTILE: HOSTILE}), quality=True
    )
    assert "<img" not in text and "\x1b" not in text and "`y`" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "- weight_int8: unsupported: x" in text


def test_tables_are_written_between_their_marks_only() -> None:
    mark = "<!-- techniques, shipped: {} -->".format
    readme = f"before\n{mark('begin')}\nold\n{mark('end')}\nafter\n"
    found = {"shipped": kept(changed("a", 0.2, 1.1)), "random-110m": kept()}
    text = bench.with_tables(readme, found)
    assert text.startswith(f"before\n{mark('begin')}\nOn a CPU, 2026-11-22.") and text.endswith(
        f"{mark('end')}\nafter\n"
    )
    assert "old" not in text and "weight_int8(a)" in text
    assert bench.with_tables(text, found) == text
    assert bench.with_tables("no marks", found) == "no marks"


def test_the_readme_has_the_tables_of_the_figures() -> None:
    readme = bench.README.read_text(encoding="utf-8")
    assert bench.with_tables(readme, figures(bench.RESULTS)) == readme, "python benchmarks/techniques.py writes both"


def test_an_unknown_technique_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--only", "weight_int9"])
    assert ended.value.code == 2
    assert "weight_int8" in capsys.readouterr().err
