"""`leanplan estimate`: figures, reasons and refusals, as a person meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from estimate_runs import CONFIG, data, run
from tests_support import TOY_MACHINE

from knowledge_base.serde import plain
from planner.estimating.sweeping import read_sweep
from planner.machine import SCHEMA


def test_figures_of_a_plan(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, out, _ = run(
        capsys, config, "--on", "rtx-4090", "--engine", "llama_cpp", "--step", "weight_gguf:type=q4_k", "--json"
    )
    facts = json.loads(out)
    assert code == 0
    assert facts["words"] == "llama_cpp: weight_gguf(type=q4_k)"
    assert facts["fits"]
    tpot = facts["predicted"]["values"]["tpot_s"]
    # 4.7 GB of weights over 1.01 TB/s is 4.7 ms; published figures of this card are near 6.6 ms
    assert 0.0047 < tpot["low"] < tpot["mid"] < tpot["high"] < 0.012
    assert tpot["source"] == "analytic" and "weights" in tpot["because"]


def test_text_shows_interval_reason_and_a_plan_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], config: str
) -> None:
    code, out, _ = run(capsys, config, "--on", "rtx-4060")
    assert code == 0
    assert "intervals hold 80 %" in out and "% weights" in out
    assert "does not fit: peak memory" in out and "of 8 GiB" in out


def test_unknown_power_is_told(capsys: pytest.CaptureFixture[str], config: str) -> None:
    _, out, _ = run(capsys, config, "--on", "gh200-sxm", "--json")
    assert "power of `gh200-sxm` is not known" in json.loads(out)["not_predicted"]["energy_j_per_token"]
    assert "energy_j_per_token" not in json.loads(out)["predicted"]["values"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--on", "rtx-4091"], 2, "did you mean `rtx-4090`"),
        (["--on", "t4"], 4, "`t4` has no known bfloat16 rate"),
        (["--on", "rtx-4090", "--step", "weight_int4:group_size=2"], 2, "`group_size` of `weight_int4` cannot be `2`"),
        (["--on", "rtx-4090", "--step", "weight_int4:group"], 2, "has no setting `group`"),
        (["--on", "rtx-4090", "--step", "weight_int5"], 2, "unknown technique `weight_int5`"),
        (["--on", "rtx-4090", "--step", "weight_gguf"], 2, "needs an engine that offers gguf"),
        (["--on", "rtx-4090", "--step", "batch_size:count=4"], 2, "does not apply"),
        (["--on", "rtx-4090", "--step", "weight_int8", "--step", "weight_int4"], 2, "do not go together"),
        (["--on", "rtx-4090", "--engine", "lama_cpp"], 2, "Did you mean `llama_cpp`"),
        (["--on", "rtx-4090", "--prompt-tokens", "0"], 2, "must be at least 1"),
        (["--on", "rtx-4090", "--prompt-tokens", "8192"], 2, "more than the model's 8192"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(capsys: pytest.CaptureFixture[str], config: str, argv: list[str], code: int, words: str) -> None:
    found, out, talk = run(capsys, config, *argv)
    assert found == code
    assert words in talk and "hint: " in talk
    assert not out


# ---------------------------------------------------------------- where it goes


SVG = "{http://www.w3.org/2000/svg}"
INT4 = ("--on", "rtx-4090", "--step", "weight_int4")


def test_the_waterfall_names_groups_and_what_binds_them(capsys: pytest.CaptureFixture[str], config: str) -> None:
    fall = data(capsys, config, *INT4, "--prompt-tokens", "4096")["waterfall"]
    assert [part["name"] for part in fall["prefill"]] == [
        "attention projections", "feed-forward", "output head", "attention scores"
    ]  # the host runs ahead of a prompt this long  # fmt: skip
    assert {part["name"]: part["bound"] for part in fall["decode"]} == {
        "attention projections": "read-bound", "feed-forward": "read-bound", "output head": "read-bound",
        "KV cache": "read-bound", "engine overhead": "host-bound",
    }  # fmt: skip
    assert fall["prefill"][1]["bound"] == "arithmetic-bound"
    layers = {part["name"]: part["memory_bytes"] for part in fall["memory"]}
    # Llama 3 8B: 41.9 M parameters of attention and 176.2 M of feed-forward in each of 32 layers
    assert layers["attention projections"] / layers["feed-forward"] == pytest.approx(41.943 / 176.161, rel=1e-3)


def test_bars_are_drawn_one_after_the_other(
    capsys: pytest.CaptureFixture[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run(capsys, config, *INT4)
    lines = out.splitlines()
    assert "prefill, to the first token: " in out and "memory at its peak: " in out
    first = next(line for line in lines if line.startswith("  attention projections"))
    second = lines[lines.index(first) + 1]
    assert first.rindex("█") + 1 == second.index("█")
    monkeypatch.setenv("LC_ALL", "C")
    _, plain, _ = run(capsys, config, *INT4)
    assert plain.isascii() and "####" in plain


# ---------------------------------------------------------------- side by side


def test_two_plans_side_by_side(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(
        capsys,
        config,
        *INT4,
        "--concurrency",
        "2",
        "--compare",
        "llama_cpp: weight_gguf:type=q8_0 + batch_size:count=2",
    )
    assert facts["a"]["words"].startswith("transformers: weight_int4")
    assert facts["b"]["words"] == "llama_cpp: weight_gguf(type=q8_0) + batch_size(count=2)"
    row = next(row for row in facts["rows"] if row["metric"] == "weights_bytes")
    assert row["ratio"] == pytest.approx(row["b"]["mid"] / row["a"]["mid"])
    assert 1 < row["ratio_low"] < row["ratio"] < row["ratio_high"] and row["verdict"] == "a is better"
    alone = data(capsys, config, *INT4, "--concurrency", "2")
    assert {row["metric"]: row["a"] for row in facts["rows"]} == alone["predicted"]["values"]


def test_a_plan_beside_itself_is_equal(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, *INT4, "--compare", "weight_int4")
    assert {row["verdict"] for row in facts["rows"]} == {"equal"}
    assert {row["ratio"] for row in facts["rows"]} <= {None, 1.0}


def test_two_machines_side_by_side(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, *INT4, "--compare-on", "l4")
    assert (facts["a"]["hardware"], facts["b"]["hardware"]) == ("rtx-4090", "l4")
    assert facts["a"]["plan"] == facts["b"]["plan"]
    _, out, _ = run(capsys, config, *INT4, "--compare-on", "l4")
    assert "a: transformers: weight_int4(group_size=32) on rtx-4090" in out
    assert re.search(r"^tpot +[\d.]+ \[[\d.]+ – [\d.]+\] ms +.* +[\d.]+ \[[\d.]+ – [\d.]+\] ", out, re.MULTILINE)


def test_times_of_what_does_not_fit_are_not_compared(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (config, "--on", "rtx-3060-12gb", "--step", "weight_int4", "--compare", "unchanged")
    facts = data(capsys, *flags)
    assert (facts["a"]["fits"], facts["b"]["fits"]) == (True, False)
    metrics = {row["metric"] for row in facts["rows"]}
    assert "peak_memory_bytes" in metrics and not metrics & {"tpot_s", "energy_j_per_token", "cost_usd_per_token"}
    _, out, _ = run(capsys, *flags)
    assert "b does not fit: peak memory" in out and "are not compared" in out


def test_of_an_unknown_power_only_energy_is_missing(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, *INT4, "--compare-on", "gh200-sxm")
    assert "energy_j_per_token" in facts["not_predicted"]
    assert {"tpot_s", "energy_j_per_token"} & {row["metric"] for row in facts["rows"]} == {"tpot_s"}


def test_rent_is_not_compared_with_electricity(capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path) -> None:
    (tmp_path / "bought.yaml").write_text("devices: [{like: rtx-4090}]\nbought: 2000\n")
    for other, told in (
        ("rtx-4090", "b is electricity alone"),
        (str(tmp_path / "bought.yaml"), "b is buying and electricity"),
    ):
        facts = data(capsys, config, "--on", "h100-sxm", "--compare-on", other)
        assert "cost_usd_per_token" not in {row["metric"] for row in facts["rows"]}
        assert "a is rent" in facts["not_predicted"]["cost_usd_per_token"]
        assert told in facts["not_predicted"]["cost_usd_per_token"]
    facts = data(capsys, config, "--on", "h100-sxm", "--compare-on", "a100-pcie")
    assert "cost_usd_per_token" in {row["metric"] for row in facts["rows"]}


def test_what_was_bought_costs_its_price_and_electricity(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path
) -> None:
    machine = tmp_path / "box.yaml"
    costs = []
    for line in ("", "bought: 0\n", "bought: 4000\n", "bought: {usd: 4000, used_share: 0.5}\n"):
        machine.write_text("devices: [{like: rtx-4090}]\n" + line)
        costs.append(
            data(capsys, config, *INT4, "--on", str(machine))["predicted"]["values"]["cost_usd_per_token"]["mid"]
        )
    electricity, free, bought, idle = costs
    assert free == pytest.approx(electricity) and idle - free == pytest.approx(2 * (bought - free)) and bought > free


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("batch=1..64", [1, 2, 4, 8, 16, 32, 64]),
        ("batch=1..48", [1, 2, 4, 8, 16, 32, 48]),
        ("context = 100 .. 300", [100, 200, 300]),
        ("output=3,5,9", [3, 5, 9]),
        ("output=7", [7]),
    ],
)
def test_a_sweep_doubles_or_is_as_written(text: str, numbers: list[int]) -> None:
    assert read_sweep(text) == (text.partition("=")[0].strip(), numbers)


def test_a_sweep_marks_where_memory_ends(capsys: pytest.CaptureFixture[str], config: str) -> None:
    flags = (
        config,
        "--on",
        "rtx-3060-12gb",
        "--step",
        "weight_int4",
        "--sweep",
        "batch=1..64",
        "--prompt-tokens",
        "1024",
    )
    facts = data(capsys, *flags)
    fits = [point["fits"] for point in facts["points"]]
    assert fits == sorted(fits, reverse=True) and len(set(fits)) == 2
    assert [point["at"] for point in facts["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert [point["workload"]["concurrency"] for point in facts["points"]] == [1, 2, 4, 8, 16, 32, 64]
    assert all(("tpot_s" in point["values"]) == point["fits"] for point in facts["points"])
    _, out, _ = run(capsys, *flags)
    assert f"fits in 12 GiB up to batch {facts['largest_that_fits']}" in out
    assert re.search(r"^64 +– +– +– +– .* does not fit$", out, re.MULTILINE)
    assert "other batches are priced only" in out and "⠤" in out


def test_a_point_of_a_sweep_is_the_estimate_of_that_plan(capsys: pytest.CaptureFixture[str], config: str) -> None:
    swept = data(capsys, config, *INT4, "--sweep", "context=1024,4096")["points"][1]
    alone = data(capsys, config, *INT4, "--prompt-tokens", str(4096 - 64))
    assert swept["values"] == alone["predicted"]["values"] and swept["plan"] == alone["plan"]
    batch = data(capsys, config, *INT4, "--sweep", "batch=4")["points"][0]
    step = data(capsys, config, *INT4, "--step", "batch_size:count=4", "--concurrency", "4")
    assert batch["values"] == step["predicted"]["values"] and batch["plan"] == step["plan"]


def test_more_clients_wait_longer_for_a_batch_of_one(capsys: pytest.CaptureFixture[str], config: str) -> None:
    values = [p["values"] for p in data(capsys, config, *INT4, "--sweep", "concurrency=1..4")["points"]]
    assert [v["latency_s"]["mid"] / values[0]["latency_s"]["mid"] for v in values] == pytest.approx([1, 2, 4])
    assert len({v["throughput_tokens_per_s"]["mid"] for v in values}) == 1


# ---------------------------------------------------------------- pictures


def test_the_roofline_holds_the_plans_operators(capsys: pytest.CaptureFixture[str], config: str) -> None:
    facts = data(capsys, config, *INT4, "--roofline", "--prompt-tokens", "2048")
    assert facts["memory_bytes_per_s"] == pytest.approx(1.008e12, rel=0.01)
    points = {(o["phase"], o["name"]): o for o in facts["operators"]}
    # 5 bits for each weight, two operations with it for each token
    assert points["decode", "feed-forward"]["flop_per_byte"] == pytest.approx(2 / (5 / 8), rel=1e-3)
    assert points["prefill", "feed-forward"]["flop_per_byte"] == pytest.approx(2048 * 2 / (5 / 8), rel=1e-3)
    for o in facts["operators"]:
        assert o["flop_per_s"] <= o["roof_flop_per_s"] * (1 + 1e-9)
        assert o["roof_flop_per_s"] <= facts["peak_flop_per_s"]
    shares = sum(o["share"] for o in facts["operators"] if o["phase"] == "decode")
    assert set(facts["off_the_roofline"]["decode"]) == {"engine overhead"}
    assert shares + facts["off_the_roofline"]["decode"]["engine overhead"] == pytest.approx(1)
    _, out, _ = run(capsys, config, *INT4, "--roofline")
    assert "(decode)" in out and "⠤" in out


@pytest.mark.parametrize("flags", [("--roofline",), ("--sweep", "batch=1..64"), ("--sweep", "output=8")], ids=" ".join)
def test_pictures_are_whole_svgs_whatever_the_model_is_called(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    hostile = tmp_path / "<b onload='x'>&\u202e\x1b[31m"
    hostile.mkdir()
    (hostile / "config.json").write_text(json.dumps(CONFIG))
    code, out, talk = run(
        capsys, str(hostile), "--on", "rtx-3060-12gb", "--step", "weight_int4", *flags, "--format", "svg"
    )
    assert code == 0, talk
    root = ElementTree.fromstring(out)
    assert root.tag == f"{SVG}svg" and {element.tag for element in root.iter()} <= {
        f"{SVG}{tag}" for tag in ("svg", "title", "text", "line", "polyline", "polygon", "circle")
    }
    assert "<b onload" not in out and "\u202e" not in out and "\x1b" not in out
    assert not re.search(r"#[0-9a-f]{3}|rgb|nan|inf\b", out)  # drawn in currentColor, with numbers
    width, height = (float(n) for n in root.attrib["viewBox"].split()[2:])
    assert width == 900
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height


def test_text_pictures_are_ascii_where_the_terminal_is(
    capsys: pytest.CaptureFixture[str], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    for flags in (("--roofline",), ("--sweep", "batch=1..32"), ("--compare", "weight_int8")):
        code, out, _ = run(capsys, config, *INT4, *flags)
        assert code == 0 and out.isascii()
        assert "?" not in out


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "where", "words"),
    [
        (["--sweep", "width=1..4"], "--sweep", "cannot sweep 'width'"),
        (["--sweep", "batch"], "--sweep", "does not say what to sweep"),
        (["--sweep", ""], "--sweep", "does not say what to sweep"),
        (["--sweep", "batch=0..4"], "--sweep", "'0' in 'batch=0..4' is not a whole number"),
        (["--sweep", "batch=-2..4"], "--sweep", "'-2' in"),
        (["--sweep", "batch=1..1e3"], "--sweep", "'1e3' in"),
        (["--sweep", "batch=1..99999999999"], "--sweep", "is not a whole number from 1 to 1,000,000,000"),
        (["--sweep", "batch=8..2"], "--sweep", "do not rise"),
        (["--sweep", "batch=2..2"], "--sweep", "do not rise"),
        (["--sweep", "output=" + ",".join(map(str, range(1, 70)))], "--sweep", "too many"),
        (["--sweep", "context=1024..16384"], "--sweep context=16384", "more than the model's 8192"),
        (["--sweep", "context=32..64"], "--sweep context=32", "no room for a prompt"),
        (["--sweep", "output=1..16384"], "--sweep output=8192", "more than the model's 8192"),
        (["--sweep", "batch=1..4", "--step", "batch_size", "--concurrency", "4"], "--sweep batch", "a batch already"),
        (["--sweep", "concurrency=1,4", "--step", "batch_size", "--concurrency", "4"], "--sweep concurrency=1", "does not apply"),
        (["--sweep", "batch=1..4", "--compare", "unchanged"], "--sweep", "show different things"),
        (["--roofline", "--sweep", "batch=1..4"], "--roofline", "show different things"),
        (["--format", "svg"], "--format svg", "only a sweep and a roofline"),
        (["--compare", "weight_int8", "--format", "svg"], "--format svg", "only a sweep and a roofline"),
        (["--compare", ""], "--compare", "unknown technique"),
        (["--compare", "weight_int5"], "--compare weight_int5", "unknown technique `weight_int5`"),
        (["--compare", "weight_int8:bits=3"], "--compare weight_int8:bits=3", "has no setting"),
        (["--compare", "lama_cpp: weight_gguf"], "--compare lama_cpp: weight_gguf", "unknown engine"),
        (["--compare", "weight_gguf"], "--compare", "needs an engine that offers gguf"),
        (["--compare", "weight_int8 + weight_int4"], "--compare", "do not go together"),
        (["--compare-on", "rtx-4091"], "hardware", "did you mean `rtx-4090`"),
        (["--prompt-tokens", "-5"], "--prompt-tokens", "must be at least 1"),
        (["--output-tokens", "0"], "--output-tokens", "must be at least 1"),
        (["--concurrency", "0"], "--concurrency", "must be at least 1"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_sentence_with_its_flag_and_a_next_step(
    capsys: pytest.CaptureFixture[str], config: str, flags: list[str], where: str, words: str
) -> None:
    code, out, _ = run(capsys, config, "--on", "rtx-4090", *flags, "--json")
    error = json.loads(out)["error"]
    assert code == error["exit_code"] == 2
    assert error["where"].strip() == where
    assert words in error["message"] and error["hint"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "flags", [("--sweep", "batch=1..4"), ("--roofline",), ("--compare-on", "rtx-4090")], ids=" ".join
)
def test_an_unknown_rate_is_said(capsys: pytest.CaptureFixture[str], config: str, flags: tuple[str, ...]) -> None:
    code, out, talk = run(capsys, config, "--on", "t4", *flags)
    assert code == 4 and not out
    assert "`t4` has no known bfloat16 rate" in talk and "hint: store the weights in one of these: " in talk


@pytest.mark.parametrize("rate", [0.0, -1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("of", ["memory bandwidth", "float32 rate", "rate between devices", "power"])
def test_a_machine_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], config: str, tmp_path: Path, rate: float, of: str
) -> None:
    machine = plain(TOY_MACHINE)
    device = machine["devices"][0]
    if of == "float32 rate":
        device["flop_per_s"]["float32"] = rate
    else:
        fields = {
            "memory bandwidth": "memory_bytes_per_s",
            "rate between devices": "link_bytes_per_s",
            "power": "busy_w",
        }
        device[fields[of]] = rate
    profile = {"schema": SCHEMA, "hardware": machine, "facts": {}, "taken_at": ""}
    (tmp_path / "machine.json").write_text(json.dumps(profile))
    code, out, talk = run(capsys, config, "--on", str(tmp_path / "machine.json"))
    assert code == 2 and not out
    assert f"the {of} of 'toy cpu' is {rate:g}" in talk and "hint: measure the machine" in talk
