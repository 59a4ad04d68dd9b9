"""The benchmark of prediction errors: how published rows are read, judged and held to their committed errors."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from benchmarks import prediction_error as pe
from benchmarks.public_rows import DATA, OPEN_LICENCES, Row, _read, committed, find_shape, observed, usable
from cost_models.serving import Deployments, law_of, predict, shipped
from cost_models.serving_fit import Observed, fit

TOLERANCE = 0.005  # of a median error: other versions of numpy round differently
COMMITTED = json.loads((pe.HERE / "prediction_error.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return usable(committed())[0]


def row(**changes: str) -> dict[str, str]:
    return {
        "source_url": "https://example.org/rows.csv", "licence": "MIT", "model": "meta-llama/Llama-3.1-8B-Instruct",
        "hardware": "NVIDIA H100 SXM x2", "engine": "vllm 0.12.0", "weight_dtype": "bf16", "batch": "16", "prompt_tokens": "1024",
        "output_tokens": "512", "metric": "tpot_s", "value": "0.01", "notes": "[A]",
    } | changes  # fmt: skip


def only(**changes: str) -> Row:
    kept, left = usable(iter([row(**changes)]))
    assert not left, left
    return kept[0]


def reason(**changes: str) -> str:
    kept, left = usable(iter([row(**changes)]))
    assert not kept
    return next(iter(left))[1]


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("Llama-3-8B", 8.03, 8.03), ("meta-llama/Llama-3.1-405B-Instruct-FP8", 405.9, 405.9), ("google/gemma-2-9b-it", 9.24, 9.24),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7, 12.9), ("Qwen/Qwen3-30B-A3B-Instruct-2507", 30.5, 3.3),
        ("openai/gpt-oss-120b", 116.8, 5.1), ("Qwen2.5-72B-Instruct", 72.7, 72.7), ("bigcode/starcoder2-3b", 3.03, 3.03),
    ],
)  # fmt: skip
def test_shapes_have_the_parameters_their_makers_state(name: str, billions: float, active: float) -> None:
    shape = find_shape(name)
    assert shape is not None
    fixed = shape.dense_params + shape.embedding_params
    assert fixed + shape.expert_params == pytest.approx(billions * 1e9, rel=0.015)
    used = fixed + shape.expert_params * shape.experts_active / max(shape.experts, 1)
    assert used == pytest.approx(active * 1e9, rel=0.13)  # makers count the two embeddings in or out


def test_a_row_becomes_a_deployment() -> None:
    found = only()
    assert (found.family, found.device, found.devices, found.kind) == ("vllm", "h100-sxm", 2, "data centre")
    assert (found.shape.name, found.bits, found.metric, found.value) == ("llama-3-8b", 16.0, "tpot", 0.01)


def test_rates_become_seconds_for_each_token_and_request() -> None:
    assert only(metric="decode_tokens_per_s", value="400").value == 16 / 400
    assert only(metric="prefill_tokens_per_s", value="8192").value == 16 * 1024 / 8192
    assert only(metric="request_total_tokens_per_s", value="512").value == 3.0
    assert only(metric="energy_j_per_request", value="1024").value == 2.0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": "somebody/unheard-of-9b"}, "shape of the model is not known"),
        ({"hardware": "NVIDIA GB200 x72"}, "more than 8 devices, or a layout that is not told"),
        ({"hardware": "NVIDIA H100 SXM x0"}, "more than 8 devices, or a layout that is not told"),
        ({"hardware": "Abacus 3000"}, "device is not in the catalogue"),
        (
            {"hardware": "RTX 3060 12GB", "weight_dtype": "bf16"},
            "weights do not fit the device: partly read from the host",
        ),
        ({"weight_dtype": "mystery"}, "weight format is not stated or not known"),
        ({"notes": "SUSPECT"}, "marked suspect, or speculative decoding"),
        ({"engine": "petals"}, "engine has no law"),
        ({"batch": ""}, "batch is not stated"),
        ({"value": "0"}, "no positive value"),
    ],
)
def test_what_cannot_be_predicted_is_left_out_with_a_reason(changes: dict[str, str], why: str) -> None:
    assert reason(**changes) == why


def test_a_value_faster_than_memory_is_left_out(rows: list[Row]) -> None:
    left: Counter[tuple[str, str]] = Counter()
    table, kept = observed([only(value="0.0001"), only()], left)
    assert len(kept) == len(table) == 1
    assert [why for _, why in left] == ["faster than the memory can be read: conditions misstated"]


def test_committed_rows_have_open_licences_and_a_source() -> None:
    sources = {row["source"]: row for row in _read(DATA / "public_sources.csv")}
    assert {row["licence"] for row in sources.values()} <= set(OPEN_LICENCES)
    assert all(row["source_url"].startswith("https://") for row in sources.values())
    assert {row["source"] for row in _read(DATA / "public_rows.csv")} == set(sources)


def synthetic(rows: list[Row], law: dict[str, np.ndarray], table: Observed) -> Observed:
    value = np.empty(len(rows))
    for quantity in set(table.quantity):
        here = table.quantity == quantity
        value[here] = predict(quantity, table.only(here).deployments, {k: v[here] for k, v in law.items()})
    return Observed(**{f.name: getattr(table, f.name) for f in fields(Observed) if f.name != "value"}, value=value)


def test_fitting_finds_the_law_that_made_the_measurements(rows: list[Row]) -> None:
    chosen = [r for r in rows if r.family == "tensorrt_llm" and r.metric == "tpot"][::3]
    table, chosen = observed(chosen, Counter())
    truth = {
        k: v * (1.4 if k in ("read", "layer_s") else 1) for k, v in law_of(shipped(), table.family, table.tags).items()
    }
    table = synthetic(chosen, truth, table)
    before = np.median(np.abs(pe.ratios(shipped(), table) - 1))
    after = np.median(np.abs(pe.ratios(fit(table), table) - 1))
    assert after < 0.02 < before


def judged(rows: list[Row], ratio: np.ndarray) -> pe.Judged:
    return pe.judge(rows, ratio, np.arange(len(rows)) % 2)


def test_the_summary_counts_what_it_says() -> None:
    rows = [only(batch=str(b), value=str(0.01 + 0.001 * b)) for b in range(2, 22)]
    found = pe.summary(judged(rows, np.full(20, 1.25)), range(20))
    assert (found["n"], found["median"], found["bias"]) == (20, 0.25, 0.25)
    assert found["coverage"] == 1.0  # every error is the same as the other fold's
    assert found["rank"] == 1.0
    assert found["calibrated_median"] == pytest.approx(
        1.25 ** (1 / 5) - 1, abs=1e-4
    )  # four of five shares of the shift


def test_an_error_the_other_folds_never_saw_lies_outside_the_interval() -> None:
    rows = [only(batch=str(b)) for b in range(2, 42)]
    ratio = np.full(40, 1.1)
    ratio[::2] = 2.0
    covered = judged(rows, ratio).covered
    assert not covered[::2].any()
    assert covered[1::2].all()


def test_targets_are_marked_hit_or_missed() -> None:
    text = pe.as_markdown(COMMITTED["committed rows"])
    assert "✓" in text
    assert "✗" in text
    for name, *_ in pe.TARGETS:
        assert f"| {name} |" in text
    assert "| why it is left out |" in text


def test_errors_of_the_shipped_laws_only_go_down() -> None:
    held = COMMITTED["shipped laws on committed rows"]
    now = pe.shipped_errors()
    worse = {name: (held[name], error) for name, error in now.items() if error > held.get(name, 0.0) + TOLERANCE}
    assert now.keys() == held.keys()
    assert not worse, "python benchmarks/prediction_error.py writes the new errors, if they are meant to be worse"


@pytest.mark.slow
def test_errors_on_unseen_devices_and_models_only_go_down() -> None:
    found, _, _ = pe.report(committed())
    for title in ("unseen devices", "unseen models"):
        for name, row in COMMITTED["committed rows"][title]["quantities"].items():
            assert found[title]["quantities"][name]["median"] <= row["median"] + 0.01, (title, name)


def test_columns_are_of_one_length(rows: list[Row]) -> None:
    table, kept = observed(rows, Counter())
    assert all(len(getattr(table.deployments, f.name)) == len(kept) for f in fields(Deployments))
