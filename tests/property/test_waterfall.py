"""The laws of the waterfall: parts add up to the figures that are printed, whatever the model, plan and machine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from cost_models.roofline import expert_share_read
from knowledge_base.registry import complete
from knowledge_base.types import Device, Hardware, Model, Step, Workload
from planner.estimating.asking import Asked
from planner.estimating.pricing import Priced, price
from planner.estimating.sweeping import KEYS, swept
from planner.estimating.waterfall import LAYERS, layer_kinds, waterfall

ATTENTION, FFN = 2 * 8 * 256 * 32 * (8 + 4), 3 * 8 * 256 * 768  # parameters of the toy's layers, by kind
ROUTER = 8 * 256 * 16
MOE_LINEAR = ATTENTION + 16 * FFN + ROUTER
MOE = replace(
    TOY_MODEL, experts=16, experts_active=2, linear_params=MOE_LINEAR, params_total=MOE_LINEAR + 2**20,
    params_active=MOE_LINEAR + 2**20 - 14 * FFN, weight_bytes=4 * (MOE_LINEAR + 2**20),
)  # fmt: skip
ODD = replace(TOY_MODEL, ffn_size=800)  # its shape does not explain its parameters
MIXER = replace(TOY_MODEL, attention_layers=0, state_bytes=2**16)
MODELS = {
    "dense": TOY_MODEL,
    "untied": replace(TOY_MODEL, tied_embeddings=False),
    "moe": MOE,
    "odd": ODD,
    "mixer": MIXER,
}
GPU = replace(
    TOY_MACHINE, devices=(
        Device(name="toy gpu", kind="gpu", memory_bytes=2**34, memory_bytes_per_s=1e12, busy_w=300.0,
               flop_per_s={"float32": 5e13, "bfloat16": 2e14, "float16": 2e14, "int8": 4e14}, features=frozenset({"nvidia"})),
    ),
)  # fmt: skip
PLANS: tuple[tuple[str, tuple[Step, ...]], ...] = (
    ("transformers", ()),
    ("transformers", (complete(Step("weight_int4")),)),
    ("transformers", (complete(Step("weight_int8")), Step("batch_size", {"count": 4}))),
    ("transformers", (complete(Step("low_rank")),)),
    ("transformers", (complete(Step("drop_layers")),)),
    ("transformers", (complete(Step("prune_width")),)),
    ("transformers", (complete(Step("kv_cache_quantised")),)),
    ("transformers", (complete(Step("prompt_lookup")),)),
    ("llama_cpp", (complete(Step("weight_gguf")),)),
    ("llama_cpp", (complete(Step("weight_gguf")), Step("batch_size", {"count": 4}))),
)


def priced(
    model: Model = TOY_MODEL, plan: int = 0, machine: Hardware = TOY_MACHINE, workload: Workload = TOY_WORKLOAD
) -> Priced:
    engine, steps = PLANS[plan]
    return price(Asked(model=model, engine=engine, steps=steps, workload=workload, hardware=machine))


@settings(deadline=None, max_examples=150)
@given(
    model=st.sampled_from(sorted(MODELS)), plan=st.sampled_from(range(len(PLANS))), machine=st.sampled_from((TOY_MACHINE, GPU)),
    prompt=st.integers(1, 100_000), output=st.integers(1, 10_000), window=st.sampled_from((None, 16, 4096)),
)  # fmt: skip
def test_parts_add_up_to_the_figures_printed(
    model: str, plan: int, machine: Hardware, prompt: int, output: int, window: int | None
) -> None:
    workload = replace(TOY_WORKLOAD, prompt_tokens=prompt, output_tokens=output)
    found = priced(replace(MODELS[model], sliding_window_tokens=window), plan, machine, workload)
    fall = waterfall(found)
    for metric, parts in (("ttft_s", fall["prefill"]), ("tpot_s", fall["decode"])):
        assert math.isclose(sum(p["time_s"] for p in parts), found.values[metric].mid, rel_tol=1e-9)
        assert math.isclose(sum(p["share"] for p in parts), 1, rel_tol=1e-9)
        assert all(p["time_s"] > 0 and p["read_bytes"] >= 0 and p["flop"] >= 0 for p in parts)
    assert math.isclose(
        sum(p["memory_bytes"] for p in fall["memory"]), found.values["peak_memory_bytes"].mid, rel_tol=1e-9
    )
    assert math.isclose(sum(p["share"] for p in fall["memory"]), 1, rel_tol=1e-9)
    for parts in (fall["prefill"], fall["decode"], fall["memory"]):
        assert len({p["name"] for p in parts}) == len(parts)


@settings(deadline=None, max_examples=50)
@given(plan=st.sampled_from((0, 1, 2, 7)), prompt=st.integers(1, 5000), model=st.sampled_from(("dense", "moe")))
def test_bytes_and_operations_are_the_demands(plan: int, prompt: int, model: str) -> None:
    """Asked of the terms with unit rates, they are what the plan demands of any machine."""
    found = priced(MODELS[model], plan, workload=replace(TOY_WORKLOAD, prompt_tokens=prompt))
    demand, parts = found.demand, {p["name"]: p for p in waterfall(found)["decode"]}
    positions, kept = demand.batch * demand.verified_tokens_per_step, demand.tokens_per_step
    layers = [part for name, part in parts.items() if name.startswith(("attention proj", "feed", "experts"))]
    read = demand.linear_bytes * float(expert_share_read(found.case, positions)[0]) / kept
    assert math.isclose(sum(p["read_bytes"] for p in layers), read, rel_tol=1e-6)
    assert math.isclose(sum(p["flop"] for p in layers), demand.linear_flop_per_token * positions / kept, rel_tol=1e-6)
    assert math.isclose(parts["output head"]["read_bytes"], demand.head_read_bytes / kept, rel_tol=1e-6)


@pytest.mark.parametrize("prompt", [1, 64, 4096])
def test_experts_are_read_as_far_as_tokens_wake_them(prompt: int) -> None:
    found = priced(MOE, workload=replace(TOY_WORKLOAD, prompt_tokens=prompt))
    parts = {p["name"]: p for p in waterfall(found)["prefill"]}
    awake = 16 * (1 - (1 - 2 / 16) ** prompt)  # of 16 experts, 2 chosen by each token
    assert parts["experts"]["read_bytes"] == pytest.approx(4 * FFN * awake, rel=1e-6)
    assert parts["experts"]["flop"] == pytest.approx(2 * 2 * FFN * prompt, rel=1e-6)
    beside = parts["attention projections and router"]
    assert beside["read_bytes"] == pytest.approx(4 * (ATTENTION + ROUTER), rel=1e-6)
    assert beside["flop"] == pytest.approx(2 * (ATTENTION + ROUTER) * prompt, rel=1e-6)
    of = "read_bytes" if beside["bound"] == "read-bound" else "flop"
    assert parts["experts"]["time_s"] / beside["time_s"] == pytest.approx(parts["experts"][of] / beside[of])
    assert beside["bound"] == ("arithmetic-bound" if prompt == 4096 else "read-bound")


def test_layers_are_split_where_the_shape_tells_and_not_elsewhere() -> None:
    kinds = layer_kinds(priced().demand)
    assert [kind.name for kind in kinds] == ["attention projections", "feed-forward"]
    assert kinds[0].share == pytest.approx(ATTENTION / (ATTENTION + FFN))
    low_rank, mixer = priced(plan=3), priced(MIXER)
    for untold in (priced(ODD), low_rank, mixer):
        assert [kind.name for kind in layer_kinds(untold.demand)] == [LAYERS]
    narrow = layer_kinds(priced(plan=5).demand)  # fewer channels: the model in the demand has the new shape
    assert narrow[0].share > kinds[0].share


def test_what_binds_follows_the_machine() -> None:
    """A machine that reads for nothing is bound by arithmetic, one that computes for nothing by reading."""
    device = TOY_MACHINE.devices[0]
    alone = replace(TOY_WORKLOAD, concurrency=1)
    bounds = {}
    for name, faster in {
        "arithmetic-bound": replace(device, memory_bytes_per_s=1e18, cores=None),  # nor unpacks on any
        "read-bound": replace(device, flop_per_s=dict.fromkeys(device.flop_per_s, 1e21)),
    }.items():
        fall = waterfall(priced(machine=replace(TOY_MACHINE, devices=(faster,)), workload=alone))
        bounds[name] = {p["bound"] for p in (*fall["prefill"], *fall["decode"]) if p["name"] != "engine overhead"}
        assert [p["bound"] for p in fall["decode"] if p["name"] == "engine overhead"] == ["host-bound"]
    assert bounds == {name: {name} for name in bounds}


@settings(deadline=None, max_examples=20)
@given(key=st.sampled_from(("batch", "context", "output")), limit_mib=st.integers(300, 3000))
def test_the_largest_that_fits_fits_and_one_more_does_not(key: str, limit_mib: int) -> None:
    model = replace(TOY_MODEL, max_context_tokens=10**6)
    machine = replace(TOY_MACHINE, memory_limit_bytes=limit_mib * 2**20)
    asked = Asked(model=model, engine="transformers", steps=(), workload=TOY_WORKLOAD, hardware=machine)
    numbers = [100, 1000, 50_000]
    found = swept(asked, key, numbers)  # type: ignore[arg-type]
    memory = [point["values"]["peak_memory_bytes"].mid for point in found["points"]]
    assert memory == sorted(memory)
    largest = found["largest_that_fits"]
    assert [p["fits"] for p in found["points"]] == [largest is not None and p["at"] <= largest for p in found["points"]]
    assert all(("tpot_s" in point["values"]) == point["fits"] for point in found["points"])
    if largest is not None and largest < numbers[-1]:
        more = KEYS[key].at(asked, largest + 1)  # type: ignore[index]
        assert price(KEYS[key].at(asked, largest)).fits and not price(more).fits  # type: ignore[index]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_stored_once_and_named_for_both_its_uses(tied: bool) -> None:
    found = priced(replace(TOY_MODEL, tied_embeddings=tied))
    names = [
        part["name"] for part in waterfall(found)["memory"] if "embedding" in part["name"] or "head" in part["name"]
    ]
    assert names == (["embedding and output head"] if tied else ["embedding", "output head"])
    assert "output head" in [part["name"] for part in waterfall(found)["decode"]]  # read either way
