"""`leanplan estimate` of clients, arriving requests, several devices and engines known by their law, as a person meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from estimate_runs import data, run
from tests_support import TOY_MACHINE, TOY_MODEL

from knowledge_base.types import Budget, Estimate, Plan, Value, Workload
from planner.judging import judge

VLLM = ("--on", "h100-sxm", "--engine", "vllm")


def test_an_engine_that_cannot_be_run_is_priced_by_its_law_and_says_so(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    flags = (config, *VLLM, "--weights", "fp8", "--concurrency", "32", "--prompt-tokens", "512")
    code, out, _ = run(capsys, *flags)
    assert code == 0
    assert re.search(
        r"predicted from the law of vllm, fitted to [\d,]+ published rows; Leanplan runs it in an environment of its own",
        out,
    )
    assert "32 clients at a time; intervals hold 90 %" in out
    assert "KV cache" in out and "p95 " in out and "on the device: " in out
    facts = data(capsys, *flags)
    values = facts["predicted"]["values"]
    # 8.0 B parameters, all but embedding and head (1.05 B in 16 bits) in one byte
    assert values["weights_bytes"]["mid"] == pytest.approx(6.98e9 + 2 * 1.05e9, rel=0.02)
    assert {part["name"] for part in facts["waterfall"]["memory"]} >= {
        "weights",
        "KV cache",
        "activations",
        "engine, runtime and allocator",
    }
    # published decode of an 8B model in fp8 on an H100 with 32 clients is between 5 and 15 ms a token
    assert 0.004 < values["tpot_s"]["mid"] < 0.02
    assert facts["words"] == "vllm: weights(stored=fp8)"


def test_more_clients_share_the_reads_and_each_waits_longer(capsys: pytest.CaptureFixture[str], config: str) -> None:
    points = data(capsys, config, *VLLM, "--sweep", "concurrency=1..64")["points"]
    for metric, rises in (("throughput_tokens_per_s", True), ("energy_j_per_token", False), ("latency_s", True)):
        mids = [point["values"][metric]["mid"] for point in points]
        assert mids == sorted(mids, reverse=not rises), metric


def test_arrivals_wait_and_beyond_the_capacity_are_refused_in_words(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    for flags in (VLLM, ("--on", "h100-sxm", "--step", "batch_size:count=8")):
        _, out, _ = run(capsys, config, *flags, "--requests-per-s", "1e12")
        told = re.search(
            r"latency +not predicted +at 1000000000000 requests/s it would fall behind: capacity is ([\d.]+) requests/s",
            out,
        )
        assert told and "inf" not in out and "nan" not in out
        half = data(capsys, config, *flags, "--requests-per-s", str(float(told[1]) / 2))["predicted"]["values"]
        assert half["requests_per_s"]["mid"] == pytest.approx(float(told[1]) / 2)
        assert half["latency_s"]["p95"] > half["latency_s"]["mid"]
    _, out, _ = run(capsys, config, "--on", "h100-sxm", "--requests-per-s", str(0.95 * float(told[1]) / 8))
    assert re.search(r"^capacity is [\d.]+ requests/s, at least [\d.]+ requests/s", out, re.MULTILINE)


def test_a_sweep_of_arrivals_says_where_it_falls_behind(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (config, *VLLM, "--sweep", "requests_per_s=0.5..4096")
    points = data(capsys, *flags)["points"]
    behind = [point["falls_behind"] for point in points]
    assert behind == sorted(behind) and len(set(behind)) == 2
    assert all(("latency_s" in point["values"]) != point["falls_behind"] for point in points)
    _, out, _ = run(capsys, *flags)
    assert "it falls behind what arrives" in out and re.search(r"^4096 +– .* falls behind$", out, re.MULTILINE)
    code, svg, _ = run(capsys, *flags, "--format", "svg")
    assert code == 0 and svg.startswith("<svg") and "nan" not in svg


def test_devices_split_the_model_of_a_law_and_copy_that_of_others(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    one, four = (data(capsys, config, *VLLM, "--devices", n) for n in ("1", "4"))
    assert four["memory"]["devices"] == 4 and four["hardware"] == "4x h100-sxm"
    assert four["memory"]["each_device_bytes"] < 0.5 * one["memory"]["each_device_bytes"]
    assert four["predicted"]["values"]["tpot_s"]["mid"] < one["predicted"]["values"]["tpot_s"]["mid"]
    named = data(capsys, config, "--on", "4x h100-sxm", "--engine", "vllm")
    assert named["predicted"]["values"] == four["predicted"]["values"]
    busy = ("--on", "h100-sxm", "--concurrency", "64")
    alone, copied = (data(capsys, config, *busy, "--devices", n) for n in ("1", "4"))
    assert copied["memory"]["each_device_bytes"] == alone["memory"]["each_device_bytes"]
    assert copied["predicted"]["values"]["requests_per_s"]["mid"] == pytest.approx(
        4 * alone["predicted"]["values"]["requests_per_s"]["mid"]
    )
    assert "each of 4 devices holds a copy of the model" in copied["notes"][0]
    sweep = ("--engine", "vllm", "--sweep", "devices=1..8")
    points = data(capsys, config, "--on", "h100-sxm", *sweep)["points"]
    throughputs = [point["values"]["throughput_tokens_per_s"]["mid"] for point in points]
    assert throughputs == sorted(throughputs) and len(throughputs) == 4
    assert data(capsys, config, "--on", "4x h100-sxm", *sweep)["points"] == points


def test_a_machines_own_idle_power_is_what_it_draws_between_requests(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path
) -> None:
    def joules(idle: str) -> float:
        (tmp_path / "m.yaml").write_text(f"devices:\n  - {{like: h100-sxm, busy_w: 400 W{idle}}}\n")
        flags = (config, "--on", str(tmp_path / "m.yaml"), "--engine", "vllm", "--requests-per-s", "0.01")
        return data(capsys, *flags)["predicted"]["values"]["energy_j_per_token"]["mid"]

    low, high, unknown = joules(", idle_w: 1 W"), joules(", idle_w: 350 W"), joules("")
    assert 20 * low < unknown < high / 5  # 12 % of 400 W where it is not known


def test_what_is_assumed_of_links_is_told(capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path) -> None:
    def notes(machine: str) -> str:
        return "; ".join(data(capsys, config, "--on", machine, "--engine", "vllm")["notes"])

    assert "is not known: 16 GB/s assumed" in notes("2x rtx-4090")
    assert "link" not in notes("rtx-4090") and "link" not in notes("8x h100-sxm")
    assert "16 devices are 2 machines of at most 8: 10 Gbit/s Ethernet between them assumed" in notes("16x h100-sxm")


def test_a_model_split_over_machines_waits_for_the_network(capsys: pytest.CaptureFixture[str], config: str) -> None:
    points = data(capsys, config, *VLLM, "--sweep", "devices=4,8,16,32")["points"]
    four, eight, sixteen, more = (point["values"]["tpot_s"]["mid"] for point in points)
    assert eight < four < sixteen < more
    assert sixteen - eight > 32 * 2 * 30e-6  # two exchanges in each of 32 layers, 30 microseconds at least
    busy = data(capsys, config, *VLLM, "--devices", "16", "--concurrency", "256")["waterfall"]["decode"]
    assert {part["bound"] for part in busy if part["name"] == "exchange"} == {"link-bound"}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def _quantised(config: str, tmp_path: Path, settings: dict[str, object]) -> str:
    """Return the folder of the same model, quantised so."""
    path = tmp_path / "quantised" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(json.loads(Path(config).read_text()) | {"quantization_config": settings}))
    return str(path)


def test_a_checkpoint_of_eight_bit_floats_is_served_as_such(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path
) -> None:
    own = data(capsys, _quantised(config, tmp_path, {"quant_method": "fp8"}), *VLLM)["predicted"]["values"]
    asked = data(capsys, config, *VLLM, "--weights", "fp8")["predicted"]["values"]
    assert {name: value["mid"] for name, value in own.items()} == {n: pytest.approx(v["mid"]) for n, v in asked.items()}


@pytest.mark.parametrize("ignored", [[], ["self_attn", "down_proj"]], ids=str)
def test_a_quantised_checkpoint_keeps_the_bytes_that_were_counted(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path, ignored: list[str]
) -> None:
    path = _quantised(config, tmp_path, GPTQ | {"modules_to_not_convert": ignored})
    law, operators = (
        data(capsys, path, "--on", "h100-sxm", *engine)["predicted"]["values"]["weights_bytes"]["mid"]
        for engine in (("--engine", "vllm"), ())
    )
    assert law == pytest.approx(operators, rel=1e-6)


@pytest.mark.parametrize(
    ("format_", "bits", "kept"),
    [("float8_e4m3fn", 8.03, "fp8"), ("mxfp4", 6.7, "fp4"), ("float4", 4.5, "fp4"), ("int8", 8.25, "int8"), ("int4", 4.16, "int4"),
     ("int4", 12.5, "int4"), ("int3", 3.2, "int4"), ("bfloat16", 16.0, "bf16")],
)  # fmt: skip
def test_weights_are_of_the_class_their_format_names(format_: str, bits: float, kept: str) -> None:
    from cost_models.demand import demand_of
    from cost_models.served import _as_they_are

    demand = demand_of(TOY_MODEL, Workload(prompt_tokens=8, output_tokens=8), "vllm")
    demand = demand.but(weight_format=format_, linear_bytes=demand.linear_params * bits / 8)
    assert _as_they_are(demand) == (kept, pytest.approx(bits))


def test_waiting_is_a_part_of_the_first_token(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, "--on", "rtx-4090", "--step", "weight_int4", "--concurrency", "8")
    waiting = next(part for part in facts["waterfall"]["prefill"] if part["bound"] == "waiting")
    ttft, latency = (facts["predicted"]["values"][name]["mid"] for name in ("ttft_s", "latency_s"))
    assert waiting["time_s"] == pytest.approx(7 / 8 * latency)  # seven others are served before
    assert sum(part["time_s"] for part in facts["waterfall"]["prefill"]) == pytest.approx(ttft)


def test_a_law_beside_a_plan(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, "--on", "h100-sxm", "--concurrency", "8", "--compare", "vllm: fp8")
    assert (facts["a"]["coverage"], facts["b"]["coverage"]) == (0.8, 0.9)
    assert facts["b"]["words"] == "vllm: weights(stored=fp8)"
    assert next(row for row in facts["rows"] if row["metric"] == "throughput_tokens_per_s")["verdict"] == "b is better"
    _, out, _ = run(capsys, config, "--on", "h100-sxm", "--compare", "vllm: fp8")
    assert "intervals hold 80 % (a) and 90 % (b)" in out and "b: predicted from the law of vllm" in out


def test_a_batch_that_cannot_fit_says_which_would(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (
        config,
        "--on",
        "rtx-4090",
        "--step",
        "batch_size:count=32",
        "--concurrency",
        "32",
        "--prompt-tokens",
        "4000",
    )
    _, out, _ = run(capsys, *flags)
    told = re.search(
        r"does not fit: a batch of 32 needs ([\d.]+) GiB, there are 24 GiB; the largest that fits is (\d+)", out
    )
    assert told, out[-300:]
    fits = data(
        capsys, config, "--on", "rtx-4090", "--prompt-tokens", "4000", "--sweep", f"batch={told[2]},{int(told[2]) + 1}"
    )
    assert [point["fits"] for point in fits["points"]] == [True, False]


def test_requests_without_room_in_the_cache_wait(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(
        capsys, config, "--on", "rtx-4090", "--engine", "vllm", "--concurrency", "500", "--prompt-tokens", "4000"
    )
    assert re.search(r"\d+ of 500 requests run at a time, the others wait for room in the KV cache", facts["notes"][1])
    assert facts["fits"]


@pytest.mark.parametrize("load", [("--concurrency", "16"), ("--requests-per-s", "2")], ids=" ".join)
def test_a_model_that_does_not_fit_has_sizes_and_a_sentence_but_no_times(
    capsys: pytest.CaptureFixture[str], config: str, load: tuple[str, ...]
) -> None:
    flags = (config, "--on", "rtx-4060", "--engine", "vllm", *load)
    found = data(capsys, *flags)
    assert not found["fits"] and not found["waterfall"]["decode"] and not found["waterfall"]["prefill"]
    assert set(found["predicted"]["values"]) == {
        "weights_bytes", "kv_cache_bytes", "artefact_bytes", "network_bytes_per_start", "peak_memory_bytes",
    }  # fmt: skip
    assert {"latency_s", "energy_j_per_token", "cost_usd_per_token"} <= set(found["not_predicted"])
    assert "it does not fit 'rtx-4060'" in found["not_predicted"]["tpot_s"]
    assert not any("at a time" in note for note in found["notes"])
    code, out, _ = run(capsys, *flags)
    assert code == 0 and re.search(r"^does not fit: peak memory [\d.]+ GiB of [\d.]+ GiB$", out, re.MULTILINE)


def test_sweeps_and_comparisons_say_what_does_not_fit(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (config, "--on", "rtx-4060", "--engine", "vllm", "--requests-per-s", "0.1")
    points = data(capsys, *flags, "--sweep", "devices=1,8")["points"]
    assert [point["fits"] for point in points] == [False, True] and not points[0]["falls_behind"]
    assert "ttft_s" in points[1]["values"] and "ttft_s" not in points[0]["values"]
    _, out, _ = run(capsys, *flags, "--sweep", "devices=1,8")
    assert "fits from 8 devices on" in out
    sides = data(capsys, config, "--on", "rtx-4060", "--engine", "vllm", "--compare-on", "h100-sxm")
    assert (sides["a"]["fits"], sides["b"]["fits"]) == (False, True)
    assert {row["metric"] for row in sides["rows"]} <= {"weights_bytes", "kv_cache_bytes", "artefact_bytes", "network_bytes_per_start", "peak_memory_bytes"}  # fmt: skip
    _, out, _ = run(capsys, config, "--on", "rtx-4060", "--engine", "vllm", "--compare-on", "h100-sxm")
    assert "a does not fit" in out


def test_a_rate_the_device_lacks_is_said(capsys: pytest.CaptureFixture[str], config: str) -> None:
    notes = data(capsys, config, "--on", "t4", "--engine", "vllm", "--weights", "fp8")["notes"]
    assert "`t4` has no bfloat16 rate: computed in float16" in notes
    assert any("`t4` has no fp8 rate" in note for note in notes)


@pytest.mark.parametrize(
    "flags", [(), ("--engine", "vllm"), ("--engine", "vllm", "--requests-per-s", "2")], ids=" ".join
)
def test_every_figure_has_source_interval_and_reason(
    capsys: pytest.CaptureFixture[str], config: str, flags: tuple[str, ...]
) -> None:
    values = data(capsys, config, "--on", "rtx-4090", *flags)["predicted"]["values"]
    for name, value in values.items():
        assert value["source"] and value["because"], name
        assert value["low"] <= value["mid"] <= value["high"], name
    _, out, _ = run(capsys, config, "--on", "rtx-4090", *flags)
    usual = "published" if flags else "analytic; quality_loss published"
    assert f"\nsources: {usual}\n" in out


def test_engines_alike_are_proposed_once(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, _, talk = run(capsys, config, "--on", "rtx-4090", "--engine", "vlm")
    assert talk.count("`vllm`") == 1


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_unequal_devices_that_stay_idle_are_named(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path, engine: str
) -> None:
    (tmp_path / "two.yaml").write_text("devices:\n  - {like: rtx-4090}\n  - {like: rtx-4060}\n")
    two = data(capsys, config, "--on", str(tmp_path / "two.yaml"), "--engine", engine)
    assert any("rtx-4060 stays idle" in note for note in two["notes"])
    one = data(capsys, config, "--on", "rtx-4090", "--engine", engine)
    assert two["predicted"]["values"]["tpot_s"] == one["predicted"]["values"]["tpot_s"]
    assert not any("idle" in note for note in one["notes"])


@pytest.mark.parametrize(
    "workload",
    [{"concurrency": 0}, {"prompt_tokens": 1.5}, {"output_tokens": True}, {"requests_per_s": float("nan")}, {"requests_per_s": "2"},
     {"concurrency": 10**9}, {"devices": 0}, {"devices": "2"}],
    ids=str,
)  # fmt: skip
def test_the_function_refuses_what_the_command_refuses(config: str, workload: dict[str, object]) -> None:
    from knowledge_base.errors import BadInput
    from planner import estimate

    with pytest.raises(BadInput):
        estimate(config, hardware="rtx-4090", **workload)


@pytest.mark.parametrize(
    ("flags", "where", "words"),
    [
        ((*VLLM, "--concurrency", "0"), "--concurrency", "must be at least 1"),
        ((*VLLM, "--requests-per-s", "-1"), "--requests-per-s", "must be a rate of at least 1e-06, got -1.0"),
        ((*VLLM, "--requests-per-s", "0"), "--requests-per-s", "must be a rate of at least 1e-06, got 0.0"),
        ((*VLLM, "--requests-per-s", "nan"), "--requests-per-s", "must be a rate of at least 1e-06, got nan"),
        ((*VLLM, "--requests-per-s", "inf"), "--requests-per-s", "must be a rate of at least 1e-06, got inf"),
        ((*VLLM, "--requests-per-s", "1e-300"), "--requests-per-s", "must be a rate of at least 1e-06"),
        ((*VLLM, "--concurrency", "1" + 25 * "0"), "--concurrency", "clients at a time are too many"),
        ((*VLLM, "--sweep", "concurrency=1,2000000"), "--sweep concurrency=2000000", "clients at a time are too many"),
        (("--on", "h100-sxm", "--sweep", "batch=1,2000000"), "--sweep batch=2000000", "clients at a time are too many"),
        ((*VLLM, "--requests-per-s", "2", "--concurrency", "4"), "--requests-per-s", "two loads"),
        ((*VLLM, "--requests-per-s", "2", "--sweep", "concurrency=1..4"), "--sweep concurrency", "two loads"),
        ((*VLLM, "--output-tokens", "0"), "--output-tokens", "must be at least 1"),
        ((*VLLM, "--prompt-tokens", "8192"), "--prompt-tokens", "more than the model's 8192"),
        ((*VLLM, "--devices", "3"), "--devices", "32 heads and 8 key-value heads do not divide over 3 devices"),
        ((*VLLM, "--devices", "0"), "--devices", "must be at least 1"),
        ((*VLLM, "--devices", "100000"), "--devices", "too many"),
        (("--on", "4x h100-sxm", "--engine", "vllm", "--devices", "8"), "--devices", "has 4 of 'h100-sxm', not 8"),
        (("--on", "2x h100-sxm", "--engine", "tinychat"), "--devices", "tinychat does not split a model"),
        (("--on", "h100-sxm", "--engine", "mlx"), "--engine", "the law of mlx is of devices programmed with metal"),
        (("--on", "h100-sxm", "--engine", "vlm"), "--engine", "unknown engine 'vlm'. Did you mean `vllm`"),
        (("--on", "h100-sxm", "--engine", "*"), "--engine", "unknown engine '*'"),
        ((*VLLM, "--weights", "fp7"), "--weights", "unknown weights 'fp7'"),
        (("--on", "h100-sxm", "--weights", "fp8"), "--weights", "transformers stores weights as the plan's steps say"),
        ((*VLLM, "--step", "weight_int8"), "--step", "known by its law alone"),
        ((*VLLM, "--roofline"), "--roofline", "does not tell operators apart"),
        ((*VLLM, "--sweep", "batch=1..4"), "--sweep batch", "forms its own batches"),
        ((*VLLM, "--sweep", "devices=2,3"), "--sweep devices=3", "do not divide over 3"),
        ((*VLLM, "--sweep", "requests_per_s=0..4"), "--sweep", "is not a rate above 0"),
        ((*VLLM, "--sweep", "requests_per_s=1e3..4e3"), "--sweep", "is not a rate above 0"),
        ((*VLLM, "--compare", "vllm: fp7"), "--weights", "unknown weights 'fp7'"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_bad_input_is_one_sentence_with_its_flag_and_a_next_step(
    capsys: pytest.CaptureFixture[str], config: str, flags: tuple[str, ...], where: str, words: str
) -> None:
    code, out, _ = run(capsys, config, *flags, "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["where"].strip() == where
    assert words in error["message"] and error["hint"] and "\n" not in error["message"]


def test_an_unknown_engine_lists_both_kinds(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, _, talk = run(capsys, config, "--on", "h100-sxm", "--engine", "nonsense")
    here, _, laws = talk.partition("run here: ")[2].partition("; known by their laws: ")
    assert {"llama_cpp", "transformers"} <= set(here.split(", ")) and laws.startswith("awq") and "sglang" in laws


def test_python_prices_the_same(capsys: pytest.CaptureFixture[str], config: str) -> None:
    from planner import estimate

    found = estimate(config, engine="vllm", weights="fp8", hardware="h100-sxm", devices=2, requests_per_s=3.0)
    same = data(capsys, config, *VLLM, "--weights", "fp8", "--devices", "2", "--requests-per-s", "3")
    assert found.values["latency_s"].mid == same["predicted"]["values"]["latency_s"]["mid"]
    assert found.plan_id == estimate(config, engine="vllm", weights="fp8", hardware="l40s").plan_id


def test_arrivals_are_predicted_for_another_machine(tmp_path: Path) -> None:
    from planner import spec as specs
    from planner.preparing import prepare

    asked = {
        "model": "models/tiny-lm",
        "hardware": "rtx-4090",
        "workload": {"arrival_rate": "4 requests/s"},
        "budgets": {"latency_p95": "2 s"},
    }
    assert prepare(specs.from_mapping(asked), store=tmp_path).hardware.name == "rtx-4090"


# ---------------------------------------------------------------- budgets


def test_a_budget_on_the_tail_is_judged_by_the_predicted_tail() -> None:
    value = Value(mid=1.0, low=0.5, high=2.0, source="analytic", p95=3.0)
    found = Estimate(plan_id="x", hardware_name="y", values={"latency_s": value})
    budgets = [Budget(metric="latency_s", statistic=s, bound="max", value=2.0) for s in ("mean", "p95")]
    mean, tail = judge(budgets, baseline={}, estimate=found)
    assert (mean.outcome, tail.outcome) == ("met", "not met")
    assert tail.sentence == "predicted latency_p95 3 s [1.5 s, 6 s] is more than 2 s"


def test_arrivals_are_part_of_a_search_and_of_an_estimate_of_many() -> None:
    from cost_models.predict import estimate, estimate_many
    from knowledge_base.types import Step

    plans = [
        Plan(model_digest="toy", engine="transformers", steps=s) for s in ((), (Step("batch_size", {"count": 8}),))
    ]
    workload = Workload(prompt_tokens=128, output_tokens=64, concurrency=8, requests_per_s=4.0)
    many = estimate_many(plans, TOY_MODEL, workload, TOY_MACHINE)["latency_s"]
    assert many.mid[0] == float("inf") and many.p95 is not None  # one at a time it would fall behind
    single = estimate(plans[1], TOY_MODEL, workload, TOY_MACHINE).values["latency_s"]
    assert single.mid == pytest.approx(many.mid[1]) and single.p95 == pytest.approx(many.p95[1])
    assert "latency_s" not in estimate(plans[0], TOY_MODEL, workload, TOY_MACHINE).values


def test_parts_that_read_and_compute_say_how_much(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, "--on", "4x h100-sxm", "--engine", "vllm", "--concurrency", "16")
    parts = {part["name"]: part for part in facts["waterfall"]["decode"]}
    weights = facts["predicted"]["values"]["weights_bytes"]["mid"]
    assert 0.8 * weights < parts["weights"]["read_bytes"] <= weights  # all but the table that is looked up in
    assert parts["weights"]["flop"] == pytest.approx(
        16 * parts["weights"]["read_bytes"], rel=0.01
    )  # 16 bits, 16 requests
    assert parts["host"]["flop"] is None
    (prompt,) = (part for part in facts["waterfall"]["prefill"] if part["name"] == "prompt")
    assert prompt["flop"] > 128 * parts["weights"]["flop"] / 16
    # Two all-reduces of 32 layers, 2 (4 - 1) / 4 of 4096 numbers of 16 bits each.
    assert "every device sends 768 KiB to the others" in "\n".join(facts["notes"])


def test_a_machines_file_says_how_many_devices_are_joined_and_by_what(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path
) -> None:
    machine = tmp_path / "pod.yaml"
    found = {}
    for lines in ("", "network_bytes_per_s: 50 GB/s\n", "devices_per_machine: 72\n"):
        machine.write_text("devices: [{like: h100-sxm, count: 16}]\n" + lines)
        kv = json.loads(Path(config).read_text()) | {
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
        }
        (tmp_path / "config.json").write_text(json.dumps(kv))
        facts = data(capsys, str(tmp_path / "config.json"), "--on", str(machine), "--engine", "vllm")
        found[lines] = facts["predicted"]["values"]["tpot_s"]["mid"], "\n".join(facts["notes"])
    (slow, assumed), (quicker, told), (joined, silent) = found.values()
    assert slow > quicker > joined
    assert "Ethernet between them assumed" in assumed and "50 GB/s between them" in told and "machines of" not in silent
