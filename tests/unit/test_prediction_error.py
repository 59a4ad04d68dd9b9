"""The benchmark of prediction errors: how published rows are read, judged and held to their committed errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from benchmarks import prediction_error as pe
from benchmarks.public_rows import (
    DATA,
    OPEN_LICENCES,
    Row,
    committed,
    find_device,
    find_shape,
    observed,
    read,
    shapes,
    usable,
)
from cost_models.serving import Deployments, law_of, predict, shipped
from cost_models.serving_fit import NOISE, QUEUED_NOISE, Observed, fit, noise

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
        ({"notes": "[A] TP1 EP8 DP8; active params 35B"}, "more than 8 devices, or a layout that is not told"),
        ({"notes": "[A] TP2 PP1 attnDP2"}, "more than 8 devices, or a layout that is not told"),
        ({"hardware": "Abacus 3000"}, "device is not in the catalogue"),
        (
            {"hardware": "RTX 3060 12GB", "weight_dtype": "bf16"},
            "weights do not fit the device: partly read from the host",
        ),
        ({"weight_dtype": "mystery"}, "weight format is not stated or not known"),
        ({"notes": "SUSPECT"}, "marked suspect, or speculative decoding"),
        ({"engine": "petals"}, "engine that is unlike any with a law"),
        ({"batch": ""}, "batch is not stated"),
        ({"value": "0"}, "no positive value"),
        ({"value": "fast"}, "a cell that should be a number is none"),
        ({"prompt_tokens": "-3"}, "a cell that should be a number is none"),
    ],
)
def test_what_cannot_be_predicted_is_left_out_with_a_reason(changes: dict[str, str], why: str) -> None:
    assert reason(**changes) == why


def test_one_copy_of_attention_and_the_links_of_an_sxm_board_are_read() -> None:
    table, kept = observed([only(notes="[A] TP2 EP1 DP1", hardware="NVIDIA A100-SXM4-40GB x2")], Counter())
    assert [r.device for r in kept] == ["a100-sxm-40gb"]
    assert table.deployments.link_bytes_per_s == 3e11


def test_first_tokens_of_clients_are_noisier_than_prompts_read_alone() -> None:
    queued = only(metric="ttft_s", value="0.2", source_url="https://example.org/silicon_sample.csv")
    table, _ = observed([queued, only(metric="ttft_s", value="0.2"), only()], Counter())
    assert list(noise(table)) == [QUEUED_NOISE, NOISE["ttft"], NOISE["tpot"]]


def test_a_value_faster_than_memory_is_left_out(rows: list[Row]) -> None:
    left: Counter[tuple[str, str]] = Counter()
    table, kept = observed([only(value="0.0001"), only()], left)
    assert len(kept) == len(table) == 1
    assert [why for _, why in left] == ["faster than the memory can be read: conditions misstated"]


def test_committed_rows_have_open_licences_and_a_source() -> None:
    sources = {row["source"]: row for row in read(DATA / "public_sources.csv")}
    assert {row["licence"] for row in sources.values()} <= set(OPEN_LICENCES)
    assert all(row["source_url"].startswith("https://") for row in sources.values())
    assert {row["source"] for row in read(DATA / "public_rows.csv")} == set(sources)


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


def judged(rows: list[Row], ratio: np.ndarray, few: np.ndarray | None = None) -> pe.Judged:
    after, sd = ratio if few is None else few, np.ones(len(rows))
    return pe.judge(rows, pe.Errors(ratio, after, sd, after, sd), np.arange(len(rows)) % 2)


def test_the_summary_counts_what_it_says() -> None:
    rows = [only(batch=str(b), value=str(0.01 + 0.001 * b)) for b in range(2, 22)]
    few = np.full(20, 1.1)
    few[:4] = np.nan  # these told the others
    found = pe.summary(judged(rows, np.full(20, 1.25), few), range(20))
    assert (found["n"], found["median"], found["bias"]) == (20, 0.25, 0.25)
    assert found["coverage"] == found["calibrated_coverage"] == 1.0  # every error is the same as the other fold's
    assert found["rank"] == found["calibrated_rank"] == 1.0
    assert found["calibrated_median"] == found["known_model_median"] == 0.1


def test_an_error_the_other_folds_never_saw_lies_outside_the_interval() -> None:
    rows = [only(batch=str(b)) for b in range(2, 42)]
    ratio = np.full(40, 1.1)
    ratio[::2] = 2.0
    beyond = judged(rows, ratio).beyond
    assert (beyond[::2] > 1).all()
    assert (np.abs(beyond[1::2]) <= 1).all()


def test_the_guarded_memory_covers_what_other_folds_saw_and_nothing_else_is_guarded() -> None:
    rows = [only(metric="peak_memory_gb", value="20", batch=str(b)) for b in range(1, 41)]
    ratio = np.full(40, 1.2)
    ratio[::4] = 0.7  # told too low, in both folds
    ratio[1::4] = 0.75
    found = judged(rows, ratio)
    assert (found.guarded > ratio).all()
    assert (found.guarded[1::4] >= 1).all()
    assert pe.tables(found)["whole"]["share_above_guard"] <= 0.25  # the fold that saw 0.75 at worst
    assert pe.tables(judged(rows, np.full(40, 0.5)))["whole"]["share_too_low"] == 1.0
    assert np.isnan(judged([only(batch=str(b)) for b in range(1, 41)], ratio).guarded).all()


def test_at_most_eight_rows_of_a_device_tell_the_others(rows: list[Row]) -> None:
    table, kept = observed([r for r in rows if r.device == "b300-sxm"], Counter())
    found = pe.errors(shipped(), table, kept)
    for few, key in ((found.few, lambda r: ()), (found.model, lambda r: r.shape.name)):
        groups = Counter((r.device, r.family, r.metric, r.batch > 1, key(r)) for r in kept)
        told = Counter((r.device, r.family, r.metric, r.batch > 1, key(r)) for r, x in zip(kept, few) if np.isnan(x))
        assert told == {group: min(8, n // 2) or n for group, n in groups.items()}  # one row alone tells nothing


def test_rows_of_a_file_are_judged_by_the_shipped_laws() -> None:
    rows = [row(batch=str(b)) for b in (1, 2, 4, 8, 16, 32)] + [row(hardware="Abacus 3000")]
    found = pe.report_shipped(rows)
    assert found["rows"] == 6
    assert found["left_out"] == [{"metric": "tpot_s", "why": "device is not in the catalogue", "n": 1}]
    text = pe.as_markdown(found)
    assert "### Shipped laws" in text
    assert "| time per token | vllm | data centre | 6 |" in text


def test_a_file_without_a_usable_row_says_why() -> None:
    with pytest.raises(SystemExit, match="device is not in the catalogue"):
        pe.report_shipped([row(hardware="Abacus 3000")])


@pytest.mark.parametrize(
    ("text", "why"), [("model,batch\nx,1\n", "no column source_url"), ("", "no rows"), ("\udcff", "cannot read")]
)
def test_a_file_that_is_no_table_of_rows_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    run = subprocess.run([sys.executable, pe.__file__, "--rows", path], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert why in run.stderr
    assert "Traceback" not in run.stderr


def test_an_engine_never_measured_gets_the_pooled_law() -> None:
    assert only(engine="splendidserve 1.0").family == "*"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("NVIDIA H200 SXM x4", "h200-sxm"), ("AMD Instinct MI300X x8", "mi300x"), ("GH200 96GB", "gh200-96gb"), ("H100 NVL", "h100-nvl-94gb"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"), ("Ryzen 9 7950X (Nvidia 4070 Ti Super) [GPU]", "rtx-4070-ti-super"),
        ("RTX 4000 Ada 20GB", "rtx-4000-ada"), ("NVIDIA 3080 Ti 12GB", "rtx-3080-ti"), ("AMD Ryzen AI Max+ 395 (Strix Halo)", "radeon-8060s"),
        ("NVIDIA H20 x2", "h20"), ("NVIDIA RTX 3080 12GB", "rtx-3080-12gb"), ("Apple M3 Max 64GB", "apple-m3-max"), ("Apple M4 (10-core)", "apple-m4"), ("Intel Arc A770 16GB", "arc-a770"), ("Abacus 3000", ""),
    ],
)  # fmt: skip
def test_devices_are_found_by_the_names_people_use(words: str, name: str) -> None:
    assert find_device(words) == name


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gemma3:27b", "gemma-3-27b"), ("google/gemma-7b-it", "gemma-7b"), ("phi4", "phi-4"), ("deepseek-r1:7b", "qwen2.5-7b"),
        ("deepseek-r1:671b", "deepseek-v3"), ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "llama-3-70b"), ("mistral:7b", "mistral-7b"),
        ("Qwen1.5-72B-Chat", "qwen1.5-72b"), ("THUDM/glm-4-9b-chat", "glm-4-9b"), ("yi:34b", "yi-34b"), ("zai-org/GLM-4.6", "glm-4.5"),
        ("bigcode/starcoder", "starcoder-15b"), ("facebook/opt-66b", "opt-66b"), ("Qwen3-4B-Q4_K_M.gguf", "qwen3-4b"),
    ],
)  # fmt: skip
def test_models_are_found_by_the_names_people_use(name: str, model: str) -> None:
    shape = find_shape(name)
    assert shape is not None
    assert shape.name == model


def test_every_shape_has_about_the_parameters_of_its_name() -> None:
    for _, shape in shapes():
        label = re.search(r"-(\d+(?:\.\d+)?)([bm])(?:-|$)", shape.name)
        if label and "x" not in shape.name:
            stated = float(label[1]) * {"b": 1e9, "m": 1e6}[label[2]]
            whole = shape.dense_params + shape.embedding_params + shape.expert_params
            assert 0.9 * stated - 1e8 <= whole <= 1.15 * stated + 6.5e8, (
                shape.name
            )  # names round down to whole billions


def test_reports_that_contradict_each_other_are_left_out() -> None:
    kept, left = usable(
        [row(value="0.01"), row(value="0.03"), row(batch="32", value="0.02"), row(batch="32", value="0.03")]
    )
    assert [r.batch for r in kept] == [32, 32]
    assert left == {("tpot_s", "reports of one configuration differ by more than 2 times"): 2}


def test_memory_that_cannot_be_is_left_out() -> None:
    left: Counter[tuple[str, str]] = Counter()
    _, kept = observed([only(metric="peak_memory_gb", value=v) for v in ("5", "20", "500")], left)
    assert [r.value / 2**30 for r in kept] == [20]
    assert sorted(why for _, why in left) == [
        "less memory than the weights take: conditions misstated",
        "more memory than the device has",
    ]


def test_memory_of_a_card_on_which_a_tiny_model_takes_a_gigabyte_is_left_out() -> None:
    of = {
        "hardware": "RTX 3060 12GB",
        "engine": "llama.cpp",
        "weight_dtype": "Q8_0",
        "metric": "peak_memory_gb",
        "batch": "1",
    }
    model = row(**of, model="Qwen/Qwen2.5-0.5B-Instruct", value="2.5")
    for tiny, value, expected in (
        ("tinystories-gpt-0.1-3m", "1.3", 0),
        ("tinystories-gpt-0.1-3m", "0.4", 1),
        ("gpt-300m", "1.3", 1),
        ("gpt-9b-1m", "1.3", 1),
    ):
        kept, left = usable([model, row(**of, model=tiny, value=value)])
        assert len(kept) == expected, tiny
        assert any("all that runs on the device" in why for _, why in left) == (not expected)
    elsewhere = row(**of | {"hardware": "RTX 3080 10GB"}, model="tinystories-gpt-0.1-3m", value="1.3")
    assert len(usable([model, elsewhere])[0]) == 1


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


def test_the_ratchet_tells_what_got_worse() -> None:
    held = COMMITTED["committed rows"]
    assert pe.worse(held, held) == []
    found = json.loads(json.dumps(held))
    found["unseen models"]["quantities"]["peak memory"]["calibrated_median"] += 0.02
    found["unseen models"]["quantities"]["prefill"]["median"] -= 0.02
    lines = pe.worse(found, held)
    assert len(lines) == 1
    assert lines[0].startswith("unseen models, peak memory, calibrated_median")


def test_columns_are_of_one_length(rows: list[Row]) -> None:
    table, kept = observed(rows, Counter())
    assert all(len(getattr(table.deployments, f.name)) == len(kept) for f in fields(Deployments))
