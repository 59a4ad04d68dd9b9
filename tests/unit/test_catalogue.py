"""Machines known by name: every row is sourced and can be read, near names are suggested, missing facts are told."""

from __future__ import annotations

import pytest

from cost_models.catalogue import electricity_price, find_machine, grid_carbon, names
from cost_models.efficiency import efficiency, overhead, rate, read_rows
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.rules import facts

DEVICES = read_rows("devices.csv")


def test_every_row_has_a_source() -> None:
    assert len(DEVICES) >= 128
    for file in (
        "devices.csv",
        "efficiencies.csv",
        "engine_overheads.csv",
        "engine_memory.csv",
        "host_links.csv",
        "grid_carbon.csv",
        "electricity_prices.csv",
    ):
        assert all(row["source"] for row in read_rows(file)), file
    assert all(row["price_source"] for row in DEVICES if row["price_usd_per_h"])
    assert len(set(names())) == len(DEVICES)


@pytest.mark.parametrize("row", DEVICES, ids=lambda r: r["name"])
def test_every_machine_is_found_or_says_what_is_missing(row: dict[str, str]) -> None:
    name = row["name"] if row["memory_bytes"] else f"{row['name']}:64GB"
    try:
        machine = find_machine(name)
    except EnvironmentProblem as problem:
        assert not row["memory_bytes_per_s"]
        assert row["name"] in problem.message
        return
    device = machine.device
    assert device.source and device.memory_bytes >= 2**30
    assert 1e9 < device.memory_bytes_per_s < 1e14
    assert all(1e10 < value < 1e17 for value in device.flop_per_s.values())
    assert device.busy_w is None or 1 < device.busy_w < 3000


def test_known_figures() -> None:
    machine = find_machine("h100-sxm")
    assert machine.device.memory_bytes == 80 * 2**30
    assert machine.device.memory_bytes_per_s == 3.35e12
    assert machine.device.flop_per_s["bfloat16"] == 794.5e12  # measured, below the published 989e12
    assert machine.device.flop_per_s["fp8"] == 1979e12
    assert machine.device.busy_w == 700
    assert machine.price_usd_per_h == 2.95
    assert not machine.measured


def test_near_names_are_suggested() -> None:
    with pytest.raises(BadInput, match=r"did you mean.*`h100-sxm`"):
        find_machine("H100_SXM5")
    with pytest.raises(BadInput, match=r"did you mean.*`rtx-4090`"):
        find_machine("rtx4091")


def test_memory_size_is_asked_for_and_read() -> None:
    with pytest.raises(EnvironmentProblem, match="different memory sizes"):
        find_machine("apple-m3-max")
    assert find_machine("apple-m3-max:64GB").memory_limit_bytes == 64 * 2**30
    for bad in ("lots", "-1GB", "0GB", "64"):
        with pytest.raises(BadInput, match="cannot read the memory size"):
            find_machine(f"apple-m3-max:{bad}")


def test_old_cards_have_no_bfloat16() -> None:
    with pytest.raises(EnvironmentProblem, match="`t4` has no known bfloat16 rate"):
        rate(find_machine("t4").device, "bfloat16")


def test_an_engine_without_rows_works_with_wide_intervals() -> None:
    prior = efficiency("an engine without rows", "a format without rows", False, "cpu", frozenset())
    ours = efficiency("transformers", "float32", False, "cpu", frozenset())
    assert prior.log_sd > ours.log_sd
    assert (
        overhead("an engine without rows", "cpu", frozenset()).log_sd
        > overhead("transformers", "cpu", frozenset()).log_sd
    )


def test_the_row_of_the_device_family_wins() -> None:
    assert (
        overhead("llama_cpp", "gpu", frozenset({"metal"})).kernel_s
        > overhead("llama_cpp", "gpu", frozenset({"cuda"})).kernel_s
    )


def test_regions() -> None:
    assert grid_carbon("france")[0] < grid_carbon("world")[0] < grid_carbon("india")[0]
    assert electricity_price("europe")[0] > electricity_price("world")[0]
    with pytest.raises(BadInput, match="no row for region 'atlantis'"):
        grid_carbon("atlantis")


@pytest.mark.parametrize(
    ("name", "feature"), [("rtx-4090", "sm_89"), ("RTX 5090", "sm_120"), ("v100-sxm2-32gb", "sm_70")]
)
def test_a_gpu_of_nvidia_says_what_it_can_compute(name: str, feature: str) -> None:
    device = find_machine(name).device
    assert feature in device.features
    assert facts(hardware=find_machine(name))["hardware.compute_capability"] == int(feature[3:]) / 10
