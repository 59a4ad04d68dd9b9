"""benchmarks/engines.py: what is in the grid, the bound by hand, what is compared, how it is told. Nothing is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from benchmarks import engines as bench
from benchmarks.engines import Question
from benchmarks.readme_tables import figures
from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.registry import engines, techniques
from knowledge_base.serde import plain as as_data
from knowledge_base.types import Failure, Figure, Measurement, Plan, Step
from planner.measuring import Observed
from planner.preparing import Prepared
from planner.store import Record
from search.space import build_space

HOSTILE = "x|<img src=x>\n`y`\x1b[31m"
Q4, Q8, INT8 = Step("weight_gguf", {"type": "q4_k"}), Step("weight_gguf", {"type": "q8_0"}), Step("weight_int8")


@pytest.fixture(scope="module")
def found_plans() -> dict[str, dict[Plan, str]]:
    from planner import spec as specs

    space = build_space(
        TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers", "llama_cpp"), executable=False
    )
    spec = replace(specs.from_mapping({"model": "toy", "objectives": ["tpot_p50"]}), workload=TOY_WORKLOAD)
    prepared = Prepared(spec=spec, model=TOY_MODEL, folder=None, hardware=TOY_MACHINE, space=space, refused=())
    return bench.grid(prepared)


# ---------------------------------------------------------------- the grid


def test_each_engine_has_each_format_once_and_the_model_as_it_came_first(found_plans: Any) -> None:
    assert list(found_plans) == ["transformers", "llama_cpp"]
    for engine, plans in found_plans.items():
        assert next(iter(plans)).steps == () and next(iter(plans.values())) == "float32"
        assert len(set(plans.values())) == len(plans)
        for plan in plans:
            assert plan.engine == engine and len(plan.steps) <= 2
            assert not any(techniques.get(s.technique).TECHNIQUE.needs_calibration for s in plan.steps)
    assert {"q3_k", "q4_k", "q8_0", "bfloat16"} <= set(found_plans["llama_cpp"].values())


def test_a_format_is_made_by_what_a_user_gets_who_says_nothing(found_plans: Any) -> None:
    plans = {name: plan for plan, name in found_plans["transformers"].items()}
    assert plans["int4"].steps == (Step("weight_int4", {"group_size": 32}),)
    assert plans["nf4"].steps[0].knobs["format"] == "nf4"


def test_only_a_few_formats_are_compiled(found_plans: Any) -> None:
    compiled = {name for name in found_plans["transformers"].values() if name.endswith("compiled")}
    assert compiled == {f"{name}, compiled" for name in ("float32", *bench.COMPILED)}
    assert not any("compiled" in name for name in found_plans["llama_cpp"].values())


def test_the_planner_gets_a_quarter_of_the_runs(found_plans: Any) -> None:
    size = sum(map(len, found_plans.values()))
    assert 20 <= size <= 45, "the command is to end within a quarter of an hour"
    for model, questions in bench.QUESTIONS.items():
        for question in questions.values():
            spec = bench.spec_of(bench.SUBJECTS["shipped"], question, {"weight_int8"}, bench.runs_allowed(size))
            assert spec.search.max_measured * 4 <= size
            assert spec.techniques.only == (() if question.any_technique else ("weight_int8",))
            assert spec.workload.concurrency == question.batch
            limits = [b.value for b in spec.budgets]
            assert limits == ([] if question.quality_loss is None else [pytest.approx(question.quality_loss)]), model
    assert spec.objectives[0] == "throughput_p50"


# ---------------------------------------------------------------- the bound


def test_a_step_reads_matrices_head_vectors_and_the_cache_of_every_sequence() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    vectors = TOY_MODEL.weight_bytes - 4 * (TOY_MODEL.linear_params + TOY_MODEL.embedding_params)
    weights = 4 * TOY_MODEL.linear_params + 4 * TOY_MODEL.embedding_params + vectors  # the head is the table, tied
    cached = 4 * 2 * 8 * 4 * 32 * (128 + 32)  # float32; keys and values; layers; heads; their size; tokens half-way
    assert bench.read_bytes(demand, TOY_WORKLOAD, 1) == weights + cached
    assert bench.read_bytes(demand, TOY_WORKLOAD, 8) == weights + 8 * cached


def test_speeds_are_rates_and_the_share_is_of_the_bandwidth() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    read = bench.read_bytes(demand, TOY_WORKLOAD, 8)
    step = Figure(value=0.01, low=0.008, high=0.02, n=9)
    first = Figure(value=0.5, low=0.4, high=0.8, n=9)
    ratio = Figure(value=0.5, low=0.4, high=0.8, n=9)
    told = bench.speeds(
        Observed(figures={"tpot_s": step, "ttft_s": first}, ratios={"tpot_s": ratio}),
        demand,
        TOY_WORKLOAD,
        8,
        read / 0.004,
    )
    assert told["decode_tokens_per_s"] == [800, 400, 1000]
    assert told["prefill_tokens_per_s"] == [8 * 128 / 0.5, 8 * 128 / 0.8, 8 * 128 / 0.4]
    assert told["bound_share"] == pytest.approx(0.4)
    assert told["decode_times"] == [2.0, 1.25, 2.5], "half the time is twice as fast"


def test_times_as_fast_whichever_way_a_metric_goes() -> None:
    ratio = Figure(value=0.5, low=0.4, high=0.8, n=9)  # of the other plan's figure to the recommended plan's
    assert bench.times(ratio, "tpot_s") == [0.5, 0.4, 0.8], "the other takes half as long"
    assert bench.times(ratio, "throughput_tokens_per_s") == [2.0, 1.25, 2.5], "the other gives half as many"
    assert bench.times(None, "tpot_s") == [1, 1, 1]


# ---------------------------------------------------------------- what is compared


def record(engine: str, *steps: Step, loss: float = 0.0, failure: Failure | None = None) -> Record:
    figures = {"quality_loss_ratio": Figure(value=loss, low=loss, high=loss, n=24)}
    figures |= {
        n: Figure(value=v, low=v, high=v, n=1) for n, v in (("artefact_bytes", 4e6), ("peak_memory_bytes", 4e8))
    }
    plan = Plan(model_digest="toy", engine=engine, steps=steps)
    measurement = Measurement(plan=plan, key="k", hardware_fingerprint="toy", figures=figures, failure=failure)
    return Record(measurement=measurement, model=TOY_MODEL, workload=TOY_WORKLOAD)


def row(name: str, engine: str, *steps: Step, rate: float = 100.0, loss: float = 0.0, **more: Any) -> dict[str, Any]:
    one = bench.row_of(name, record(engine, *steps, loss=loss), quality=True)
    speed = {
        "decode_tokens_per_s": [rate] * 3, "prefill_tokens_per_s": [10 * rate] * 3, "decode_times": [rate / 100] * 3,
        "step_read_bytes": 4e6, "bound_share": 0.5, "other_cores": 0.0,
    }  # fmt: skip
    return one | {f"batch {batch}": speed for batch in bench.BATCHES} | more


ROWS = [
    row("float32", "transformers"), row("bfloat16", "transformers", Step("weight_dtype", {"dtype": "bfloat16"}), rate=150),
    row("q4_k", "llama_cpp", Q4, rate=900, loss=0.04), row("q8_0", "llama_cpp", Q8, rate=700, loss=0.001),
]  # fmt: skip


def kept(rows: list[dict[str, Any]] = ROWS, **more: Any) -> dict[str, Any]:
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for one in rows:
        by_engine.setdefault(one["engine"], []).append(one)
    return {
        "machine": "a CPU", "date": "2026-11-22", "grid": 20, "cache_bytes": 2**20, "bandwidth_bytes_per_s": 40e9,
        "workload": {"prompt_tokens": 128, "output_tokens": 32}, "left_out": {}, "rows": by_engine, "asked": {},
        "compared": {}, **more,
    }  # fmt: skip


def test_the_best_of_the_grid_keep_the_quality_budget() -> None:
    words = [p.words for p in bench.best_of(ROWS, Question(batch=1))]
    assert words[0] == "llama_cpp: weight_gguf(type=q4_k)" and len(words) == bench.BEST
    close = bench.best_of(ROWS, Question(batch=8, quality_loss=0.01), count=1)
    assert [p.steps for p in close] == [(Q8,)]
    refused = row("q2", "llama_cpp", Q4, rate=9999) | {"batch 1": {"why": "crashed"}}
    collapsed = row("q2", "llama_cpp", Q4, rate=9999) | {"failure": "quality_collapse: says nothing"}
    assert bench.best_of([refused, collapsed], Question(batch=1)) == []


def test_picks_by_hand_are_found_in_the_grid_by_engine_and_format() -> None:
    assert set(bench.picks_by_hand(ROWS).values()) == {"transformers, bfloat16", "llama.cpp, Q4_K"}
    assert all(engine in {*engines.names(), "openvino"} for engine, _ in bench.BY_HAND.values())


def test_what_was_answered_is_compared_once_with_the_best_and_the_picks() -> None:
    questions = {"fast": Question(batch=1, quality_loss=0.1), "close": Question(batch=1, quality_loss=0.01)}
    recommended = Plan(model_digest="toy", engine="llama_cpp", steps=(Q8,))
    answer = {"runs": 5, "recommended": as_data(recommended), "sentence": ""}
    due = bench.comparisons(kept(asked={"fast": answer, "close": {**answer, "recommended": None}}), questions)
    assert list(due) == ["fast"]
    others = due["fast"].others
    assert recommended not in others, "nothing is timed against itself"
    assert "best of the grid, 1; llama.cpp, Q4_K" in others.values() and "transformers, bfloat16" in str(others)
    assert bench.comparisons(kept(asked={"fast": answer}, compared={"fast": []}), questions) == {}


def test_an_engine_is_complete_when_each_plan_has_both_speeds_or_is_refused_for_good() -> None:
    plans = {Plan(model_digest="toy", engine="llama_cpp", steps=(s,)): s.knobs["type"] for s in (Q4, Q8)}
    assert bench.complete(ROWS, plans)
    assert not bench.complete(ROWS[:3], plans), "one is not there"
    half = {k: v for k, v in ROWS[3].items() if k != "batch 8"}
    assert not bench.complete([*ROWS[:3], half], plans)
    refused = {k: v for k, v in half.items() if k != "batch 1"}
    assert bench.complete([*ROWS[:3], refused | {"failure": "unsupported: no"}], plans)
    assert not bench.complete([*ROWS[:3], refused | {"failure": "oom_host: no memory"}], plans)


# ---------------------------------------------------------------- in turns


class Turns(bench.Grid):
    """Only what decides who is timed together: the figures are made up here."""

    def __init__(self, fails: set[str]) -> None:
        self.fails, self.together = fails, []  # type: ignore[var-annotated]
        self.progress = type("Told", (), {"line": lambda self, text: None})()  # type: ignore[assignment]
        self.prepared = type("P", (), {"hardware": replace(TOY_MACHINE, memory_limit_bytes=2 * 10**9)})()  # type: ignore[assignment]
        self.known = type("K", (), {"records": {}})()  # type: ignore[assignment]

    def _timed_together(self, validator: Any, base: Plan, plans: Any, batch: int, protocol: Any) -> Any:
        for plan in (base, *plans):
            if plan.words in self.fails:
                raise bench._TurnFailed(plan, CandidateFailed("crashed", f"{plan.id}: segmentation fault"))
        self.together.append(len(plans))
        return {plan: Observed(figures={}) for plan in (base, *plans)}


def turns_of(fails: set[str], plans: list[Plan]) -> tuple[dict[Plan, Any], list[int]]:
    run = Turns(fails)
    base = Plan(model_digest="toy", engine="transformers")
    run.known.records = {p: record(p.engine, *p.steps) for p in (base, *plans)}
    return run._in_turns(None, base, plans, 1), run.together  # type: ignore[arg-type]


SOME = [Plan(model_digest="toy", engine="llama_cpp", steps=(s,)) for s in (Q4, Q8, INT8)]


def test_as_many_are_timed_together_as_fit() -> None:
    told, together = turns_of(set(), SOME)
    assert together == [2, 1], "0.4 GB each beside the unchanged model, 1.4 of 2 GB allowed"
    assert set(told) == {Plan(model_digest="toy", engine="transformers"), *SOME}


def test_a_plan_that_fails_in_turn_is_told_and_the_others_are_timed() -> None:
    told, _ = turns_of({SOME[0].words}, SOME)
    assert told[SOME[0]] == "crashed: segmentation fault"
    assert all(isinstance(told[plan], Observed) for plan in SOME[1:])
    told, _ = turns_of({"transformers: unchanged"}, SOME)
    assert all("segmentation fault" in told[plan] for plan in SOME), "nothing can be compared without it"


def test_what_is_far_slower_than_the_unchanged_model_is_not_timed_in_turns() -> None:
    run, base = Turns(set()), Plan(model_digest="toy", engine="transformers")
    found = {base: 0.1, SOME[0]: 0.05, SOME[1]: 0.29, SOME[2]: 0.86}
    records = {plan: record(plan.engine, *plan.steps) for plan in found}
    for plan, value in found.items():
        figures = {"tpot_s": Figure(value=value, low=value, high=value, n=3)}
        records[plan] = replace(records[plan], measurement=replace(records[plan].measurement, figures=figures))
    run.baseline, run.known.records = base, records
    assert [run._too_slow(plan) for plan in SOME] == [
        None,
        None,
        "8.6 times the unchanged model's time per token when screened",
    ]


# ---------------------------------------------------------------- how it is told


def compared(times: float, loss: float = 0.001) -> list[dict[str, Any]]:
    return [
        row("recommended", "llama_cpp", Q8, loss=loss, times=[1, 1, 1]),
        row("best of the grid, 1", "llama_cpp", Q8, loss=0.001, times=[times, times - 0.02, times + 0.02]),
        row("best of the grid, 2; llama.cpp, Q4_K", "llama_cpp", Q4, loss=0.04, times=[1.2, 1.1, 1.3]),
        row("transformers, bfloat16", "transformers", loss=0.0, times=[5, 4, 6]),
    ]


def answered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    answer = {"runs": 5, "recommended": {}, "sentence": "", "wall_s": 60}
    return kept(asked={"one": answer}, compared={"one": rows})


def test_the_verdict_is_of_the_best_that_was_timed_beside_it() -> None:
    question = bench.QUESTIONS["shipped"]["one"]
    text = bench.verdict(answered(compared(0.96)), "one", question)
    assert "0.96 times the speed of the best of the grid, within 5 % of it, with 5 runs where the grid has 20" in text
    assert "not within 5 %" in bench.verdict(answered(compared(0.94)), "one", question)
    assert "1.00 times" in bench.verdict(answered(compared(1.3)[:1]), "one", question), "it is the best itself"


def test_a_pick_by_hand_is_beaten_only_if_surely_slower_and_no_better() -> None:
    question = bench.QUESTIONS["shipped"]["one"]
    text = bench.verdict(answered(compared(1.0)), "one", question)
    assert text.endswith("than llama.cpp, Q4_K (1.20×), transformers, bfloat16 (5.00×)."), (
        "a thousandth is no difference"
    )
    text = bench.verdict(answered(compared(1.0, loss=0.03)), "one", question)
    assert text.endswith("than llama.cpp, Q4_K (1.20×).")
    unsure = compared(1.0)
    unsure[2]["times"] = [1.2, 0.9, 1.4]
    assert "Q4_K" not in bench.verdict(answered(unsure), "one", question)


def test_tables_have_as_many_cells_as_heads_whatever_names_hold() -> None:
    broken = row("q5", "llama_cpp", Q4) | {"batch 8": {"why": HOSTILE}}
    failed = {k: v for k, v in row(HOSTILE, "llama_cpp", INT8).items() if not k.startswith("batch")} | {
        "failure": HOSTILE
    }
    found = answered(compared(0.96)) | {"left_out": {"openvino": HOSTILE}}
    found["compared"]["one"].append({**row(HOSTILE, "x", Q4), "why": HOSTILE})
    found["rows"]["llama_cpp"] = [*found["rows"]["llama_cpp"], broken, failed]
    text = bench.as_markdown(found, "shipped")
    assert "<img" not in text and "\x1b" not in text and "`y`" not in text
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1
    assert "Left out" in text and "- llama_cpp, q5, 8 requests: x" in text and "- openvino: x" in text


def test_what_stays_in_the_caches_is_marked() -> None:
    assert "50%†" not in bench.as_markdown(kept(), "shipped")
    assert "50%†" in bench.as_markdown(kept(cache_bytes=8 * 2**20), "shipped")


def test_a_random_model_says_nothing_of_quality() -> None:
    assert "perplexity_ratio" not in bench.row_of("q", record("llama_cpp", Q4), quality=False)
    heads = bench.grid_table(kept(), quality=False).splitlines()[0]
    assert "perplexity" not in heads


def test_figures_survive_json_and_tables_are_written_between_their_marks_only() -> None:
    found = json.loads(json.dumps({"shipped": answered(compared(0.96))}, allow_nan=False))
    mark = "<!-- engines, shipped: {} -->".format
    text = bench.with_tables(f"before\n{mark('begin')}\nold\n{mark('end')}\nafter\n", found)
    assert text.startswith(f"before\n{mark('begin')}\nOn a CPU, 2026-11-22") and text.endswith(
        f"{mark('end')}\nafter\n"
    )
    assert "old" not in text and "q4_k" in text
    assert bench.with_tables(text, found) == text


def test_the_readme_has_the_tables_of_the_figures() -> None:
    readme = bench.README.read_text(encoding="utf-8")
    assert bench.with_tables(readme, figures(bench.RESULTS)) == readme, (
        "python benchmarks/engines.py --tables writes both"
    )


def test_the_page_on_engines_has_their_fastest_formats() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    assert bench.with_summaries(page, figures(bench.RESULTS)) == page, (
        "python benchmarks/engines.py --tables writes both"
    )


def test_what_loses_quality_is_no_engines_fastest() -> None:
    def row(name: str, ratio: float, rate: float, failure: str | None = None) -> dict[str, Any]:
        speed = {"decode_tokens_per_s": [rate], "prefill_tokens_per_s": [rate]}
        return {
            "format": name,
            "perplexity_ratio": [ratio],
            "batch 1": speed,
            "batch 8": {"why": "no room"},
            "failure": failure,
        }

    rows = [row("int2", 1.3, 90.0), row("int3", 1.0, 80.0, "quality_collapse: says nothing"), row("int8", 1.001, 50.0)]
    told = bench.summary({"rows": {"toy": rows}})
    assert told.splitlines()[-1] == "| toy | 50 (int8) | - | 50 (int8) |"


def test_the_random_model_has_the_parameters_it_is_named_for(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    assert bench.make_random(folder) == folder, "what is there is not made again"
    hidden, layers, ff, kv, vocabulary = 1024, 24, 4096, 512, 8192
    each = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ff + 2 * hidden
    assert round((layers * each + 2 * vocabulary * hidden + hidden) / 1e6) == 394


def test_an_unknown_engine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--only", "warp_drive"])
    assert ended.value.code == 2
    assert "llama_cpp" in capsys.readouterr().err
