"""Laws of every cost term: intervals in order, finite, monotone, the same for one plan as for many."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from cost_models.calibration import Features
from cost_models.case import case_of
from cost_models.demand import Node, chains, demand_of
from cost_models.predict import estimate, estimate_many, evaluate
from cost_models.terms import order, terms
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.metrics import METRICS
from knowledge_base.types import Device, Hardware, Model, Plan, Step, Workload

NAMES = terms.names()
MOE = replace(
    TOY_MODEL, name="moe", digest="moe", experts=8, experts_active=2, linear_params=40_000_000, params_total=41_100_000,
    params_active=14_000_000, weight_bytes=4 * 41_100_000,
)  # fmt: skip
WINDOW = replace(TOY_MODEL, name="window", digest="window", sliding_window_tokens=64)
STATE_SPACE = replace(
    TOY_MODEL,
    name="state",
    digest="state",
    architecture="mamba",
    attention_layers=0,
    state_bytes=200_000,
    heads=0,
    kv_heads=0,
)
MODELS = (TOY_MODEL, MOE, WINDOW, STATE_SPACE)
GPU = Hardware(
    name="toy gpu", fingerprint="gpu", host_memory_bytes=2**36, memory_limit_bytes=2**36,
    devices=(Device(name="toy gpu", kind="gpu", memory_bytes=2**36, memory_bytes_per_s=1e12, busy_w=300.0, source="made up for tests",
                    flop_per_s={"float32": 2e13, "bfloat16": 1e14, "float16": 1e14, "int8": 2e14}),),
)  # fmt: skip
MACHINES = (TOY_MACHINE, GPU)
PLANS = tuple(
    Plan(model_digest="toy", engine=engine, steps=steps)
    for engine in ("transformers", "llama_cpp", "an engine without rows")
    for steps in (
        (),
        (Step("weight_dtype", {"dtype": "bfloat16"}),),
        (Step("drop_layers", {"count": 2, "by": "influence"}), Step("batch_size", {"count": 4})),
        (Step("prompt_lookup", {"tokens": 4}), Step("thread_count", {"count": 1})),
    )
)
TIMES = ("ttft_s", "tpot_s", "latency_s")
BYTES = ("weights_bytes", "kv_cache_bytes", "peak_memory_bytes", "artefact_bytes", "network_bytes_per_start")
PER_TOKEN = ("energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token")


def mids(name: str, model: Model, workload: Workload, hardware: Hardware) -> np.ndarray:
    return estimate_many(PLANS, model, workload, hardware)[name].mid


ROUNDING = 1 + 1e-12  # sums of parts may differ in the last digit


def with_device(hardware: Hardware, **fields: object) -> Hardware:
    return replace(hardware, devices=(replace(hardware.devices[0], **fields),))


@pytest.mark.parametrize("name", NAMES)
def test_a_term_is_a_metric(name: str) -> None:
    term = terms.get(name)
    assert name == term.QUANTITY
    assert name in METRICS
    assert set(term.USES) <= set(NAMES)
    assert term.predict.__doc__


@pytest.mark.parametrize("hardware", MACHINES, ids=lambda h: h.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", NAMES)
def test_intervals_are_finite_and_in_order(name: str, model: Model, hardware: Hardware) -> None:
    figures = estimate_many(PLANS, model, TOY_WORKLOAD, hardware)[name]
    table = np.stack([figures.low, figures.mid, figures.high])
    assert table.shape == (3, len(PLANS))
    assert np.all(np.isfinite(table))
    assert np.all(np.diff(table, axis=0) >= 0)
    if name != "quality_loss_ratio":
        assert np.all(figures.mid > 0) or name == "kv_cache_bytes"
        assert np.all(figures.low >= 0)


@pytest.mark.parametrize("name", NAMES)
def test_one_plan_and_many_agree_exactly(name: str) -> None:
    many = estimate_many(PLANS, MOE, TOY_WORKLOAD, TOY_MACHINE)[name]
    for i, plan in enumerate(PLANS):
        one = estimate(plan, MOE, TOY_WORKLOAD, TOY_MACHINE).values[name]
        assert (one.mid, one.low, one.high) == (many.mid[i], many.low[i], many.high[i])


@pytest.mark.parametrize("hardware", MACHINES, ids=lambda h: h.name)
@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up(name: str, hardware: Hardware) -> None:
    memo = chains(MOE, TOY_WORKLOAD)
    nodes = [memo.node(plan) for plan in PLANS]
    prediction = evaluate(case_of(nodes, TOY_WORKLOAD, hardware), None, Features(nodes))[name]
    if prediction.parts:
        assert np.allclose(sum(prediction.parts.values()), prediction.mid, rtol=1e-12)
        assert all(np.all(part >= 0) for part in prediction.parts.values())


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("fact", ["memory_bytes_per_s", "flop_per_s"])
@pytest.mark.parametrize("name", TIMES)
def test_a_faster_machine_is_never_slower(name: str, fact: str, model: Model) -> None:
    for hardware in MACHINES:
        now = getattr(hardware.device, fact)
        faster = {k: 2 * v for k, v in now.items()} if isinstance(now, dict) else 2 * now
        quick = mids(name, model, TOY_WORKLOAD, with_device(hardware, **{fact: faster}))
        assert np.all(quick <= mids(name, model, TOY_WORKLOAD, hardware) * ROUNDING)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
@pytest.mark.parametrize("length", ["prompt_tokens", "output_tokens"])
@pytest.mark.parametrize("name", ["ttft_s", "tpot_s", "latency_s", "kv_cache_bytes", "peak_memory_bytes"])
def test_more_tokens_are_never_cheaper(name: str, length: str, model: Model) -> None:
    for hardware in MACHINES:
        longer = replace(TOY_WORKLOAD, **{length: 2 * getattr(TOY_WORKLOAD, length)})
        assert np.all(mids(name, model, longer, hardware) * ROUNDING >= mids(name, model, TOY_WORKLOAD, hardware))


@pytest.mark.parametrize("name", BYTES)
def test_fewer_bits_are_never_larger(name: str) -> None:
    plans = [
        Plan(model_digest="toy", engine="llama_cpp", steps=(Step("weight_gguf", {"type": t}),))
        for t in ("q4_k", "q6_k", "q8_0", "f16")
    ]
    figures = estimate_many(plans, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)[name].mid
    assert np.all(np.diff(figures) >= 0)


@pytest.mark.parametrize("name", ["kv_cache_bytes", "peak_memory_bytes", "ttft_s", "tpot_s"])
def test_a_larger_batch_is_never_cheaper_and_serves_no_fewer_tokens(name: str) -> None:
    plans = [
        Plan(model_digest="toy", engine="transformers", steps=(Step("batch_size", {"count": n}),) if n > 1 else ())
        for n in (1, 2, 4)
    ]
    figures = estimate_many(plans, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)
    assert np.all(np.diff(figures[name].mid) >= 0)
    assert np.all(np.diff(figures["throughput_tokens_per_s"].mid) >= 0)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_dearer_and_dirtier_power_costs_more(name: str) -> None:
    worse = replace(
        with_device(TOY_MACHINE, idle_w=20.0, busy_w=80.0),
        electricity_usd_per_kwh=0.3,
        grid_gco2e_per_kwh=800.0,
        price_usd_per_h=0.2,
    )
    assert np.all(mids(name, TOY_MODEL, TOY_WORKLOAD, worse) > mids(name, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE))


def test_energy_is_neither_idle_power_nor_the_cap() -> None:
    figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)
    power = figures["energy_j_per_token"].mid * figures["throughput_tokens_per_s"].mid
    assert np.all(power > TOY_MACHINE.device.idle_w)
    assert np.all(power < TOY_MACHINE.device.busy_w)


def test_a_missing_rate_raises_and_names_device_and_dtype() -> None:
    machine = with_device(TOY_MACHINE, flop_per_s={"float16": 1e12})
    with pytest.raises(EnvironmentProblem, match=r"`toy cpu` has no known float32 rate"):
        estimate_many([PLANS[0]], TOY_MODEL, TOY_WORKLOAD, machine)


def test_an_unknown_power_prevents_energy_alone() -> None:
    machine = replace(with_device(GPU, busy_w=None), price_usd_per_h=1.0)
    figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, machine)
    assert "tpot_s" in figures and "cost_usd_per_token" in figures
    for name in ("energy_j_per_token", "carbon_gco2e_per_token"):
        assert name not in figures
        with pytest.raises(EnvironmentProblem, match="power of `toy gpu` is not known"):
            figures[name]
    assert "energy_j_per_token" not in estimate(PLANS[0], TOY_MODEL, TOY_WORKLOAD, machine).values
    with pytest.raises(KeyError):
        figures["no such metric"]


def test_a_cpu_without_power_figures_is_modelled_and_says_so() -> None:
    value = estimate(PLANS[0], TOY_MODEL, TOY_WORKLOAD, with_device(TOY_MACHINE, busy_w=None, idle_w=None)).values[
        "energy_j_per_token"
    ]
    assert "is not known" in value.because
    assert value.high / value.low > 4


def test_a_circle_of_terms_is_an_error() -> None:
    circle = {"a": SimpleNamespace(USES=("b",)), "b": SimpleNamespace(USES=("a",))}
    with pytest.raises(ValueError, match="circle"):
        order(circle)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no such cost term: c"):
        order({"a": SimpleNamespace(USES=("c",))})  # type: ignore[arg-type]


def test_terms_come_after_those_they_use() -> None:
    found: dict[str, ModuleType] = terms.all()
    names = [term.QUANTITY for term in order(found)]
    assert sorted(names) == sorted(NAMES)
    for name, term in found.items():
        assert all(names.index(used) < names.index(name) for used in term.USES)


def test_a_batch_wakes_more_experts() -> None:
    read = []
    for batch in (1, 2, 8, 1000):
        node = Node(replace(demand_of(MOE, TOY_WORKLOAD, "transformers"), batch=batch))
        from cost_models.roofline import expert_share_read

        read.append(float(expert_share_read(case_of([node], TOY_WORKLOAD, TOY_MACHINE), batch)[0]))
    assert read == sorted(read)
    assert math.isclose(read[0], 1 - (MOE.params_total - MOE.params_active) / MOE.linear_params)
    assert math.isclose(read[-1], 1.0)
