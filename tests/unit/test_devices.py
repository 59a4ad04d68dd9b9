"""Laws of the catalogue of machines: every row can be true, derived rates are what they say, all can be predicted for."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

import pytest

from cost_models.catalogue import RATES, _bare, find_machine, names, rates
from cost_models.efficiency import efficiency, read_rows
from cost_models.predict import estimate
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Model, Plan, Workload

DEVICES = read_rows("devices.csv")
SLOWER_NARROW = {"rubin-sxm": "int8"}  # published so: it is made for fp8 and fp4
BANDWIDTHS = {"cpu": (1e9, 1.5e12), "gpu": (2e10, 3e13)}  # bytes/s: a Pi 4 to Granite Rapids, a Jetson Nano to MI455X
TOKENS = Workload(prompt_tokens=128, output_tokens=64)
SHAPE = dict(
    name="shape", source="here", digest="shape", architecture="llama", layers=4, hidden_size=256, heads=4, kv_heads=4, head_size=64,
    ffn_size=1024, vocab_size=4096, max_context_tokens=2048, params_total=6_000_000, params_active=6_000_000, linear_params=4_000_000,
    embedding_params=1_000_000, tied_embeddings=False, attention_layers=4, weight_bytes=12_000_000,
)  # fmt: skip


def figure(row: Mapping[str, str], column: str) -> float | None:
    return float(row[column]) if row[column] else None


@pytest.mark.parametrize("row", DEVICES, ids=lambda r: r["name"])
def test_every_figure_can_be_true(row: Mapping[str, str]) -> None:
    for column in row:
        if re.search(r"_(bytes|per_s|w|per_h)$|^cores$", column) and row[column]:
            assert math.isfinite(float(row[column])) and float(row[column]) > 0, column
    least, most = BANDWIDTHS[row["kind"]]
    assert row["memory_bytes_per_s"] == "" or least < float(row["memory_bytes_per_s"]) < most
    known = {dtype: float(row[f"{dtype}_flop_per_s"]) for dtype in RATES if row[f"{dtype}_flop_per_s"]}
    for wide, narrow in (
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("float16", "int8"),
        ("bfloat16", "int8"),
        ("float16", "fp8"),
    ):
        if wide in known and narrow in known and SLOWER_NARROW.get(row["name"]) != narrow:
            assert known[narrow] >= 0.99 * known[wide], f"{narrow} slower than {wide}"
    assert row["source"].startswith("http") and re.fullmatch(r"20\d\d-\d\d", row["as_of"])
    assert bool(row["price_usd_per_h"]) == bool(row["price_source"])
    if row["measured_bfloat16_flop_per_s"]:
        best = known.get("bfloat16") or known.get("float16") or math.inf
        assert float(row["measured_bfloat16_flop_per_s"]) < 1.15 * best, "measured above what is published"


@pytest.mark.parametrize("row", [r for r in DEVICES if r["family"] == "cuda"], ids=lambda r: r["name"])
def test_every_gpu_of_nvidia_has_a_compute_capability(row: Mapping[str, str]) -> None:
    assert (
        re.fullmatch(r"[5-9]\.\d|1[0-2]\.\d", row["compute_capability"]) or row["name"] == "rubin-sxm"
    )  # not told yet


@pytest.mark.parametrize("row", [r for r in DEVICES if "rates derived" in r["notes"]], ids=lambda r: r["name"])
def test_rates_worked_out_from_a_data_sheet_are_what_the_note_says(row: Mapping[str, str]) -> None:
    note = row["notes"]
    parts = re.findall(r"(\d+) cores x ([\d.]+) GHz(?: x (\d+))?", note)
    cores = sum(int(count) for count, _, _ in parts)
    assert cores == int(row["cores"])
    if parts[0][2]:
        expected = sum(int(count) * float(clock) * int(flop) for count, clock, flop in parts) * 1e9
    else:
        flop = re.search(r"(\d+) in float32", note)
        expected = cores * float(parts[0][1]) * int(flop[1]) * 1e9
    assert float(row["float32_flop_per_s"]) == pytest.approx(expected, rel=1e-3)
    if memory := re.search(r"bandwidth (\d+) channels x (\d+) MT/s x 8 B", note):
        assert float(row["memory_bytes_per_s"]) == pytest.approx(int(memory[1]) * int(memory[2]) * 8e6, rel=2e-3)
    assert row["features"], "which instructions"


def test_no_name_stands_for_two_machines() -> None:
    assert [name for name, times in Counter(map(_bare, names())).items() if times > 1] == []


@pytest.mark.parametrize(
    ("written", "name"),
    [("RTX4090", "rtx-4090"), ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop"), ("M3 Max:64GB", "apple-m3-max"),
     ("AMD EPYC 9554 64-Core Processor:64GB", "epyc-9554"), ("13th Gen Intel(R) Core(TM) i9-13900K:64GB", "i9-13900k"),
     ("Intel(R) Xeon(R) Gold 6240 CPU @ 2.60GHz:64GB", "xeon-6240"), ("Tesla T4", "t4"), ("4x rtx-4090", "rtx-4090"), ("8 × H100 SXM", "h100-sxm")],
)  # fmt: skip
def test_names_as_people_and_tools_write_them(written: str, name: str) -> None:
    assert find_machine(written).device.name == name


def test_several_equal_devices() -> None:
    one, four = find_machine("h100-sxm"), find_machine("4x h100-sxm")
    assert four.devices == one.devices * 4
    assert four.memory_limit_bytes == one.memory_limit_bytes == one.device.memory_bytes
    assert four.price_usd_per_h == 4 * (one.price_usd_per_h or 0) > 0
    assert four.fingerprint != one.fingerprint
    assert one.device.link_bytes_per_s == 4.5e11


@pytest.mark.parametrize("engine", ["llama_cpp", "transformers"])
@pytest.mark.parametrize("name", names())
def test_every_machine_is_predicted_for_or_says_what_is_missing(name: str, engine: str) -> None:
    row = next(r for r in DEVICES if r["name"] == name)
    dtype = next((d for d in ("bfloat16", "float16", "float32") if d in rates(row)), "float32")
    model = Model(**SHAPE, weight_dtype=dtype)
    try:
        machine = find_machine(name if row["memory_bytes"] else f"{name}:64GB")
        values = estimate(Plan(model_digest="shape", engine=engine), model, TOKENS, machine).values
    except EnvironmentProblem as problem:
        missing = [c for c in ("memory_bytes_per_s", "float32_flop_per_s", "float16_flop_per_s") if not row[c]]
        assert missing and name in problem.message and problem.hint
        return
    for figure in values.values():
        assert all(math.isfinite(end) for end in (figure.low, figure.mid, figure.high))
        assert 0 <= figure.low <= figure.mid <= figure.high
    assert values["tpot_s"].mid > 0


def test_few_machines_cannot_be_predicted_for() -> None:
    """What the catalogue does not know is told, but it should be little."""
    dark = [r["name"] for r in DEVICES if not r["memory_bytes_per_s"] or not rates(r)]
    assert dark == ["cloud-4-vcpu", "cloud-2-vcpu"]  # the processor is not stated


def test_of_data_sheet_figures_less_is_reached_and_more_doubted() -> None:
    processor = find_machine("epyc-9554:256GB").device
    for engine, kind in (("transformers", "float32"), ("transformers", "bfloat16")):
        published = efficiency(engine, kind, False, "cpu", processor.features)
        measured = efficiency(engine, kind, False, "cpu", processor.features - {"published"})
        assert published.read_ratio < measured.read_ratio and published.flop_ratio < measured.flop_ratio
        assert published.log_sd > measured.log_sd
