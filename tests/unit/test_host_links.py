"""How fast weights come in on machines of the catalogue: assumed by the kind of link, and told so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

import cost_models
from cost_models.catalogue import CATALOGUE, DISK_BYTES_PER_S, find_machine
from cost_models.efficiency import read_rows
from knowledge_base.techniques import offload
from knowledge_base.types import Estimate, Hardware, Plan, Step

LINKS = {row["host_link"]: row for row in read_rows("host_links.csv")}
MODEL = replace(TOY_MODEL, weight_dtype="bfloat16", weight_bytes=2 * TOY_MODEL.params_total)


def priced(machine: Hardware) -> Estimate:
    plan = Plan(model_digest=MODEL.digest, engine="transformers", steps=(Step("offload", {"resident": 0.0}),))
    return cost_models.estimate(plan, MODEL, TOY_WORKLOAD, machine)


def test_links_are_sourced_and_known() -> None:
    assert all(row["source"] for row in LINKS.values())
    used = {row["host_link"] for row in read_rows("devices.csv")}
    assert used - {""} == set(LINKS)
    assert not any(row["host_link"] for row in read_rows("devices.csv") if row["kind"] == "cpu")


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("gtx-1080-ti", "pcie3x16"), ("rtx-3090", "pcie4x16"), ("rtx-4060", "pcie4x8"), ("h100-sxm", "pcie5x16"),
        ("rtx-5060", "pcie5x8"), ("gh200-96gb", "nvlink-c2c"), ("mi300x", "pcie5x16"), ("rx-7900-xtx", "pcie4x16"),
    ],
)  # fmt: skip
def test_an_accelerator_reads_from_its_host_as_fast_as_its_link(name: str, link: str) -> None:
    machine = find_machine(name)
    assert machine.host_link_bytes_per_s == float(LINKS[link]["bytes_per_s"])
    assert offload.rejects(MODEL, TOY_WORKLOAD, machine) is None


@pytest.mark.parametrize("name", ["apple-m3-max:64GB", "gb10", "jetson-agx-orin-64gb"])
def test_where_there_is_one_memory_nothing_is_left_elsewhere(name: str) -> None:
    said = offload.rejects(MODEL, TOY_WORKLOAD, find_machine(name))
    assert said is not None and "one memory" in said


def test_a_processor_reads_from_a_disk_of_that_kind() -> None:
    machine = find_machine("epyc-9554:64GB")
    assert machine.disk_bytes_per_s == DISK_BYTES_PER_S and machine.host_link_bytes_per_s is None
    assert offload.rejects(MODEL, TOY_WORKLOAD, machine) is None


def test_what_is_assumed_is_told_and_what_was_measured_is_not() -> None:
    gpu, cpu = find_machine("rtx-4090"), find_machine("epyc-9554:64GB")
    assert "assumed: weights come in at 25.2 GB/s from the host" in priced(gpu).values["tpot_s"].because
    for name in ("tpot_s", "ttft_s"):
        assert "assumed: weights come in at 2 GB/s from an NVMe disk" in priced(cpu).values[name].because
    measured = replace(cpu, fingerprint=cpu.fingerprint.removeprefix(CATALOGUE))
    assert "assumed" not in priced(measured).values["tpot_s"].because
    plain = Plan(model_digest=MODEL.digest, engine="transformers", steps=())
    assert "assumed" not in cost_models.estimate(plain, MODEL, TOY_WORKLOAD, cpu).values["tpot_s"].because
