"""`leanplan estimate --finetune`: figures by hand, what would fit, and refusals, as a person meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from estimate_runs import data, run

PARAMS = 8_030_261_248  # of Llama 3 8B


def parts(facts: Any) -> dict[str, float]:
    return {part["name"]: part["memory_bytes"]["mid"] for part in facts["memory"]}


# ---------------------------------------------------------------- figures


def test_full_training_in_mixed_precision_is_sixteen_bytes_for_each_parameter(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    # 2 weights + 2 gradients + 4 master copy + 8 states: arXiv:1910.02054
    facts = data(capsys, config, "--on", "h100-sxm", "--finetune", "full")
    held = parts(facts)
    kept = held["weights"] + held["gradients"] + held["master copies"] + held["optimiser states"]
    assert kept == pytest.approx(16 * PARAMS)
    assert not facts["fits"]
    assert facts["words"] == "full_finetune"


@pytest.mark.parametrize(
    ("way", "part", "expected"),
    [
        ("full+pure_bf16", "optimiser states", 4 * PARAMS),
        ("full+low_bit_adam", "optimiser states", 2 * PARAMS * (1 + 4 / 256)),
        ("lora", "adapters", 4 * 32 * 16 * (4096 + 4096 + 4096 + 1024)),
        ("dora", "adapters", 4 * 32 * (16 * (4096 + 4096 + 4096 + 1024) + 4096 + 1024)),
        ("prompt_tuning", "adapters", 4 * 10 * 4096),
        ("prefix_tuning", "adapters", 4 * 32 * 10 * 2 * 1024),
        ("ia3", "adapters", 4 * 32 * (1024 + 1024 + 14336)),
        ("ln_tuning", "adapters", 4 * 65 * 4096),
        ("qlora", "weights", None),
    ],
)
def test_parts_counted_by_hand(
    capsys: pytest.CaptureFixture[str], config: str, way: str, part: str, expected: float | None
) -> None:
    held = parts(data(capsys, config, "--on", "h100-sxm", "--finetune", way))
    if expected is None:  # 4.127 bits for the layers' matrices, 16 for two tables and the norms
        tables = 2 * 128256 * 4096 + 65 * 4096
        expected = (PARAMS - tables) * 4.127 / 8 + 2 * tables
    assert held[part] == pytest.approx(expected, rel=1e-3)


def test_lists_add_up_to_their_figures(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(
        capsys, config, "--on", "8x h100-sxm", "--finetune", "full", "--checkpointing", "--accumulation", "8",
        "--parallel", "data=2,tensor=2,pipeline=2,zero=1",
    )  # fmt: skip
    assert sum(parts(facts).values()) == pytest.approx(facts["peak_memory_bytes"]["mid"])
    assert sum(part["time_s"] for part in facts["step"]) == pytest.approx(facts["step_s"]["mid"])
    assert sum(sent["sent_bytes"] for sent in facts["sent"]) == facts["sent_bytes"]
    assert {part["name"] for part in facts["step"]} >= {"compute", "recomputation", "bubbles", "tensor", "data"}
    assert facts["devices"] == 8 and facts["fits"]
    # 4 all-reduces (and 2 repeated) of 512 x 4096 hidden values for each of 16 layers and 8 micro-batches, half of it twice
    tensor = next(sent for sent in facts["sent"] if sent["kind"] == "tensor")
    assert tensor["sent_bytes"] == 6 * 16 * 8 * 2 * 512 * 4096


def test_the_bill_is_for_all_devices_and_the_whole_run(capsys: pytest.CaptureFixture[str], config: str) -> None:
    one, eight = (
        data(capsys, config, "--on", machine, "--finetune", "lora", "--samples", "2000", "--epochs", "3")
        for machine in ("h100-sxm", "8x h100-sxm")
    )
    assert one["tokens"] == 2000 * 3 * 512
    assert one["total_s"]["mid"] == pytest.approx(one["tokens"] / one["tokens_per_s"]["mid"])
    assert one["cost_usd"]["mid"] == pytest.approx(2.95 * one["total_s"]["mid"] / 3600)
    assert eight["total_s"]["mid"] == pytest.approx(one["total_s"]["mid"] / 8, rel=0.05)
    assert eight["cost_usd"]["mid"] == pytest.approx(one["cost_usd"]["mid"], rel=0.05)
    assert one["for_each_parameter"]["cost_usd"] == pytest.approx(one["cost_usd"]["mid"] / PARAMS)


def test_positions_of_a_soft_prompt_are_computed_and_are_no_tokens_of_the_data(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    facts = data(capsys, config, "--on", "h100-sxm", "--finetune", "prompt_tuning")
    assert facts["setup"]["sequence_tokens"] == 522
    assert facts["tokens_per_s"]["mid"] == pytest.approx(512 / facts["step_s"]["mid"])


def test_a_device_without_known_power_is_priced_but_not_billed(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, "--on", "gh200-sxm", "--finetune", "lora")
    assert facts["cost_usd"] is None and "power of `gh200-sxm` is not known" in facts["not_billed"]
    assert facts["step_s"]["mid"] > 0


# ---------------------------------------------------------------- what would fit


def test_what_does_not_fit_is_told_with_what_does(capsys: pytest.CaptureFixture[str], config: str) -> None:
    argv = (config, "--on", "rtx-4090", "--batch", "4", "--sequence-tokens", "1024")
    facts = data(capsys, *argv, "--finetune", "lora")
    assert not facts["fits"]
    assert [remedy["change"] for remedy in facts["remedies"]] == ["gradient_checkpointing", "--batch 1"]
    mended = data(capsys, *argv, "--finetune", "lora", "--checkpointing")
    assert mended["fits"]
    assert mended["peak_memory_bytes"] == facts["remedies"][0]["peak_memory_bytes"]
    _, out, _ = run(capsys, *argv, "--finetune", "lora")
    assert "does not fit: needs" in out and "fits with gradient_checkpointing (" in out


def test_several_devices_are_told_to_shard(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, "--on", "8x h100-sxm", "--finetune", "full")
    assert "--parallel data=8,zero=3" in [remedy["change"] for remedy in facts["remedies"]]
    assert data(capsys, config, "--on", "8x h100-sxm", "--finetune", "full", "--parallel", "data=8,zero=3")["fits"]


# ---------------------------------------------------------------- beside each other


def test_two_ways_side_by_side(capsys: pytest.CaptureFixture[str], config: str) -> None:
    argv = (config, "--on", "a100-sxm", "--finetune", "lora")
    sides = data(capsys, *argv, "--compare", "qlora")
    rows = {row["figure"]: row for row in sides["rows"]}
    assert rows["peak memory"]["ratio"] < 1 < rows["step"]["ratio"]  # smaller, and slower to unpack
    assert rows["peak memory"]["a"] == data(capsys, *argv)["peak_memory_bytes"]
    _, out, _ = run(capsys, *argv, "--compare", "qlora")
    assert "a: lora" in out and "b: qlora" in out


def test_a_sweep_over_devices_splits_the_work(capsys: pytest.CaptureFixture[str], config: str) -> None:
    sweep = data(
        capsys, config, "--on", "h100-sxm", "--finetune", "full", "--parallel", "zero=3", "--sweep", "devices=1..8"
    )
    peaks = [point["peak_memory_bytes"]["mid"] for point in sweep["points"]]
    assert [point["at"] for point in sweep["points"]] == [1, 2, 4, 8]
    assert peaks == sorted(peaks, reverse=True)
    assert [point["fits"] for point in sweep["points"]] == [False, True, True, True]


@pytest.mark.parametrize("sweep", ["batch=1..8", "sequence=128..1024", "rank=1..64"])
def test_a_sweep_is_the_estimates_of_its_points(capsys: pytest.CaptureFixture[str], config: str, sweep: str) -> None:
    argv = (config, "--on", "a100-sxm", "--finetune", "lora")
    points = data(capsys, *argv, "--sweep", sweep)["points"]
    key = sweep.partition("=")[0].replace("sequence", "sequence-tokens")
    alone = data(capsys, *argv, f"--{key}", str(points[-1]["at"]))
    assert points[-1]["peak_memory_bytes"] == alone["peak_memory_bytes"]
    assert points[0]["peak_memory_bytes"]["mid"] < points[-1]["peak_memory_bytes"]["mid"]
    assert "peak memory" in run(capsys, *argv, "--sweep", sweep)[1]


# ---------------------------------------------------------------- unequal machines


def test_layers_go_where_they_are_quick_and_fit(capsys: pytest.CaptureFixture[str], config: str) -> None:
    argv = (config, "--finetune", "lora", "--accumulation", "8")
    facts = data(capsys, *argv, "--on", "rtx-4090,rtx-3090")
    quick, slow = facts["stages"]
    assert quick["layers"] + slow["layers"] == 32 and quick["layers"] > slow["layers"]
    assert all(stage["peak_memory_bytes"]["mid"] <= stage["memory_limit_bytes"] for stage in facts["stages"])
    assert sum(part["time_s"] for part in facts["step"]) == pytest.approx(facts["step_s"]["mid"])
    assert facts["layout"]["pipeline"] == 2
    assert facts["sent_bytes"] == 8 * 2 * 512 * 4096  # hidden values of 8 micro-batches on, or their gradients back
    wider = data(capsys, *argv, "--on", "rtx-4090,rtx-3090", "--network", "25 GB/s")
    assert wider["step_s"]["mid"] < facts["step_s"]["mid"]
    _, out, _ = run(capsys, *argv, "--on", "rtx-4090,rtx-3090")
    assert "would be quicker" not in out
    assert f"stage on rtx-4090: {quick['layers']} layers" in out


def test_a_pipeline_that_does_not_pay_is_told(capsys: pytest.CaptureFixture[str], config: str) -> None:
    argv = (config, "--finetune", "qlora")
    notes = data(capsys, *argv, "--on", "rtx-4090,rtx-3090")["notes"]  # one batch: neither works while the other does
    assert any(note.startswith("rtx-4090 alone would be quicker") for note in notes)
    facts = data(capsys, *argv, "--on", "h100-sxm,rtx-3060-12gb")
    assert "rtx-3060-12gb is left out: too slow or too small for a layer" in facts["notes"]
    assert facts["devices"] == len(facts["stages"]) == 1 and not facts["sent"]


UNEQUAL = """\
devices:
  - {name: fast, kind: gpu, memory_bytes: 24 GiB, memory_bytes_per_s: 1 TB/s, flop_per_s: {bfloat16: 165 TFLOP/s}, busy_w: 450}
  - {name: slow, kind: gpu, memory_bytes: 12 GiB, memory_bytes_per_s: 360 GB/s, flop_per_s: {bfloat16: 51 TFLOP/s}, busy_w: 170}
"""


@pytest.fixture
def unequal(tmp_path: Path) -> str:
    """A machine of two GPUs, one with half the memory and a third of the rates."""
    (tmp_path / "unequal.yaml").write_text(UNEQUAL)
    return str(tmp_path / "unequal.yaml")


def test_unequal_devices_in_one_machine_are_stages_of_their_own(
    capsys: pytest.CaptureFixture[str], config: str, unequal: str
) -> None:
    flags = (config, "--on", unequal, "--finetune", "lora", "--accumulation", "8")
    facts = data(capsys, *flags)
    assert [stage["hardware"] for stage in facts["stages"]] == ["fast", "slow"]
    fast, slow = (stage["layers"] for stage in facts["stages"])
    assert fast + slow == 32 and fast > 2 * slow  # a third of the rate, and the head beside
    assert [stage["memory_limit_bytes"] for stage in facts["stages"]] == [24 * 2**30, 12 * 2**30]
    assert facts["layout"]["data"] == 1 and not facts["setup"]["gradient_buckets"]
    assert facts["sent_bytes"] == 8 * 512 * 4096 * 2  # a hidden state of 16 bits on, or its gradient back
    _, out, _ = run(capsys, *flags)
    assert "memory at its peak of the stage nearest its limit" in out and "PCIe" in out


def test_of_unequal_devices_one_can_be_asked_for_and_no_more(
    capsys: pytest.CaptureFixture[str], config: str, unequal: str
) -> None:
    alone = data(capsys, config, "--on", unequal, "--finetune", "lora", "--devices", "1")
    assert alone["devices"] == 1 and alone["stages"] == [] and alone["memory_limit_bytes"] == 24 * 2**30
    for flags, words in (
        (("--finetune", "lora", "--devices", "2"), "has 1 of 'fast', not 2"),
        (("--devices", "2", "--engine", "vllm"), "has 1 of 'fast', not 2"),
        (("--finetune", "lora", "--parallel", "data=2"), "unequal devices in one, are one pipeline"),
    ):
        code, _, talk = run(capsys, config, "--on", unequal, *flags)
        assert code == 2 and words in talk


def test_a_run_is_at_least_one_step_long(capsys: pytest.CaptureFixture[str], config: str) -> None:
    short = data(capsys, config, "--on", "h100-sxm", "--finetune", "lora", "--batch", "4096", "--tokens", "1k")
    assert short["total_s"]["mid"] == short["step_s"]["mid"]


def test_adapters_of_attention_leave_experts_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shape = {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16,
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "vocab_size": 151936,
        "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    flags = (str(tmp_path / "config.json"), "--on", "8x h100-sxm", "--finetune", "lora")
    alone = data(capsys, *flags)
    assert alone["trained_params"] == 24 * 2 * 16 * (2048 + 2048)
    spread = data(capsys, *flags, "--parallel", "data=8,expert=4")
    experts = 2 * 24 * 60 * 3 * 2048 * 1408  # bytes
    assert parts(alone)["weights"] - parts(spread)["weights"] == pytest.approx(experts * 3 / 4, rel=1e-6)
    assert parts(alone)["adapters"] == parts(spread)["adapters"]


def test_networks_are_sold_in_bits(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (config, "--on", "rtx-4090,rtx-4090", "--finetune", "qlora", "--json", "--network")
    assert run(capsys, *flags, "10 Gbit/s") == run(capsys, *flags, "1.25 GB/s") != run(capsys, *flags, "2.5 GB/s")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argv", "where", "words"),
    [
        (["--finetune", "lorra"], "--finetune", "did you mean `lora`"),
        (["--finetune", "vera"], "--finetune", "what `vera` takes has no formula here"),
        (["--finetune", "adafactor"], "--finetune adafactor", "--optimizer adafactor"),
        (["--finetune", "lora+qlora"], "--finetune", "lora and qlora are both methods"),
        (["--finetune", ""], "--finetune", "unknown way of training"),
        (["--finetune", "lora", "--rank", "0"], "--rank", "must be from 1"),
        (["--finetune", "lora", "--rank", "5000"], "--rank", "more than the matrices' 4096"),
        (["--finetune", "full", "--rank", "8"], "--rank", "`full_finetune` has no rank"),
        (["--finetune", "lora+pure_bf16"], "--finetune", "a way of training all parameters"),
        (["--finetune", "low_bit_adam", "--optimizer", "sgd"], "--optimizer", "names an optimiser already"),
        (["--finetune", "full", "--optimizer", "adamm"], "--optimizer", "unknown optimiser"),
        (["--finetune", "lomo", "--accumulation", "2"], "--accumulation", "cannot be accumulated"),
        (["--finetune", "lora", "--sequence-tokens", "9000"], "--sequence-tokens", "beyond the context"),
        (["--finetune", "lora", "--batch", "-1"], "--batch", "must be from 1"),
        (["--finetune", "lora", "--devices", "0"], "--devices", "must be from 1"),
        (["--finetune", "lora", "--optimizer", "\x1b[31m"], "--optimizer", "unknown optimiser '\\x1b[31m'"),
        (["--finetune", "lora", "--parallel", "tensor=3"], "--parallel", "tensor = 3 does not divide"),
        (["--finetune", "lora", "--parallel", "pipeline=33"], "--parallel", "more than the 32 layers"),
        (["--finetune", "lora", "--parallel", "expert=2"], "--parallel", "no experts"),
        (["--finetune", "lora", "--parallel", "data=2"], "--parallel", "the layout is for 2 devices, the machine has 1"),
        (["--finetune", "lora", "--parallel", "zero=4"], "--parallel", "zero_stage must be"),
        (["--finetune", "lora", "--parallel", "data=two"], "--parallel", "cannot read 'data=two'"),
        (["--finetune", "lora", "--parallel", "data=1,data=1"], "--parallel", "write each kind once"),
        (["--finetune", "lora", "--tokens", "many"], "--tokens", "cannot read 'many'"),
        (["--finetune", "lora", "--tokens", "0"], "--tokens", "cannot read '0'"),
        (["--finetune", "lora", "--samples", "5", "--tokens", "10M"], "--samples", "both say how long"),
        (["--finetune", "lora", "--epochs", "5"], "--epochs", "epochs of how many samples"),
        (["--finetune", "lora", "--link", "25"], "--link", "25 GB/s"),
        (["--finetune", "lora", "--link", "0 GB/s"], "--link", "positive"),
        (["--finetune", "lora", "--link", "nan Gbit/s"], "--link", "--link"),
        (["--finetune", "lora", "--network", "fast/s"], "--network", "--network needs"),
        (["--finetune", "lora", "--step", "weight_int8"], "--step", "is of serving"),
        (["--finetune", "lora", "--engine", "vllm"], "--engine", "is of serving"),
        (["--finetune", "lora", "--prompt-tokens", "0"], "--prompt-tokens", "is of serving"),
        (["--finetune", "lora", "--output-tokens", "64"], "--output-tokens", "is of serving"),
        (["--finetune", "lora", "--draft", "gpt2"], "--draft", "is of serving"),
        (["--finetune", "lora", "--link", "5 GB/s"], "--link", "no two devices are in one machine"),
        (["--finetune", "lora", "--network", "5 GB/s", "--devices", "4"], "--network", "all devices are in one machine"),
        (["--finetune", "lora", "--format", "svg"], "--format svg", "no pictures"),
        (["--finetune", "lora", "--compare", "qlorra"], "--compare", "did you mean `qlora`"),
        (["--finetune", "lora", "--compare", "qlora", "--sweep", "batch=1..2"], "--sweep", "different things"),
        (["--finetune", "lora", "--sweep", "layers=1..2"], "--sweep", "cannot sweep 'layers'"),
        (["--finetune", "lora", "--sweep", "batch=4..2"], "--sweep", "do not rise"),
        (["--rank", "8"], "--rank", "--rank is of training"),
        (["--on", "epyc-9554:256GiB", "--finetune", "qlora"], "--finetune", "`qlora` needs a GPU"),
        (["--on", "t4", "--finetune", "pure_bf16"], "--finetune", "needs bfloat16"),
        (["--on", "rtx-4060,rtx-4060", "--finetune", "full"], "--on", "32 layers do not fit"),
        (["--on", "rtx-4090,t4", "--finetune", "lora", "--parallel", "pipeline=2"], "--parallel", "are one pipeline"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_refusals(
    capsys: pytest.CaptureFixture[str], config: str, argv: list[str], where: str | None, words: str
) -> None:
    code, out, _ = run(capsys, config, *(argv if "--on" in argv else ["--on", "h100-sxm", *argv]), "--json")
    told = json.loads(out)["error"]
    assert code == 2
    assert told["where"] == where
    assert words in f"{told['message']} {told['hint']}"
    assert told["hint"]
