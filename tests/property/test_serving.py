"""Laws every prediction of a serving engine obeys, whatever the law's coefficients, over drawn deployments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from cost_models.demand import demand_of
from cost_models.serving import (
    COEFFICIENTS,
    IDLE_SHARE,
    QUANTITIES,
    Deployments,
    cache_bytes,
    deployment,
    experts_read,
    guarded_memory,
    hardware_kind,
    law_of,
    mean_tpot_s,
    predict,
    running,
    shipped,
    spread,
    vector_rate,
)

FAMILIES = sorted({family for family, _, _ in shipped()})
TAGS = ("16", "4", "fp8 moe", "data centre", "consumer", "no matrix units", "Apple", "before 2024-07")
TIMES = ("tpot", "ttft", "request")
SLACK = 1 + 1e-9


@st.composite
def deployments(draw: st.DrawFn) -> Deployments:
    experts = draw(st.sampled_from((0, 8, 128)))
    dense, routed = draw(st.floats(1e8, 1e11)), draw(st.floats(1e9, 1e12)) if experts else 0.0
    return Deployments(
        dense_bytes=2 * dense, expert_bytes=routed, stored_bytes=2 * dense + routed, dense_params=dense, expert_params=routed,
        experts=float(experts), experts_active=float(min(experts, draw(st.integers(1, 8)))), layers=float(draw(st.integers(1, 126))),
        hidden_size=4096.0, ffn_size=14336.0, cache_bytes_per_token=draw(st.floats(0, 1e6)),
        cache_shards=draw(st.sampled_from((1.0, 4.0, 8.0, np.inf))), window_bytes_per_token=draw(st.floats(0, 1e6)), window_tokens=float(draw(st.integers(64, 8192))),
        state_bytes=draw(st.floats(0, 1e8)), attention_flop_per_pair=draw(st.floats(0, 1e7)),
        batch=float(draw(st.integers(1, 512))), prompt_tokens=float(draw(st.integers(1, 32_000))),
        output_tokens=float(draw(st.integers(2, 8192))), clients=float(draw(st.booleans())), median_step=float(draw(st.booleans())),
        devices=float(draw(st.sampled_from((1, 2, 4, 8)))), memory_bytes=draw(st.floats(8e9, 3e11)), bytes_per_s=draw(st.floats(5e10, 8e12)),
        flop_per_s=draw(st.floats(1e12, 1e16)), link_bytes_per_s=draw(st.floats(1e10, 9e11)), power_w=draw(st.floats(10, 1400)),
    )  # fmt: skip


laws = st.builds(
    lambda family, tags: law_of(shipped(), [family], [frozenset(tags)]),
    st.sampled_from((*FAMILIES, "never seen")),
    st.sets(st.sampled_from(TAGS), max_size=2),
)


@settings(deadline=None)
@given(d=deployments(), law=laws, more=st.floats(1, 10))
def test_a_better_device_is_never_slower(d: Deployments, law: dict, more: float) -> None:
    for better in ("bytes_per_s", "flop_per_s", "link_bytes_per_s"):
        faster = replace(d, **{better: getattr(d, better) * more})
        for quantity in TIMES:
            assert predict(quantity, faster, law) <= predict(quantity, d, law) * SLACK, (better, quantity)


@settings(deadline=None)
@given(d=deployments(), law=laws, more=st.integers(1, 20_000))
def test_longer_prompts_and_answers_never_cost_less(d: Deployments, law: dict, more: int) -> None:
    longer = replace(d, prompt_tokens=d.prompt_tokens + more)
    answers = replace(d, output_tokens=d.output_tokens + more)
    assert predict("memory", longer, law) >= predict("memory", d, law)
    assert predict("memory", answers, law) >= predict("memory", d, law)
    if not d.clients:  # with clients, a longer prompt leaves room for fewer, and each is then answered faster
        for quantity in TIMES:
            assert predict(quantity, longer, law) * SLACK >= predict(quantity, d, law), quantity
        assert predict("request", answers, law) * SLACK >= predict("request", d, law)


@settings(deadline=None)
@given(d=deployments(), law=laws, more=st.integers(1, 512))
def test_more_requests_never_cost_less_memory_or_time(d: Deployments, law: dict, more: int) -> None:
    fuller = replace(d, batch=d.batch + more)
    cache = more * cache_bytes(d, d.prompt_tokens + d.output_tokens)
    assert predict("memory", fuller, law) * SLACK >= predict("memory", d, law) + cache
    for quantity in TIMES:
        assert predict(quantity, fuller, law) * SLACK >= predict(quantity, d, law), quantity
    assert running(d, law) <= running(fuller, law) <= fuller.batch


@settings(deadline=None)
@given(d=deployments(), tokens=st.integers(1, 10**6))
def test_a_cache_is_shared_by_as_many_devices_as_it_has_heads(d: Deployments, tokens: int) -> None:
    d = replace(d, state_bytes=0.0)
    alone = cache_bytes(replace(d, devices=1.0), tokens)
    assert np.isclose(cache_bytes(d, tokens) / d.devices, alone / min(d.devices, d.cache_shards))


@settings(deadline=None)
@given(d=deployments(), law=laws)
def test_parts_add_up_are_never_negative_and_steps_read_the_weights(d: Deployments, law: dict) -> None:
    for quantity, parts_of in QUANTITIES.items():
        parts = parts_of(d, law)
        assert all(part >= 0 for part in parts.values()), (quantity, parts)
        assert np.isclose(predict(quantity, d, law), sum(parts.values()))
    read = d.dense_bytes + d.expert_bytes * experts_read(d, running(d, law))
    assert predict("tpot", d, law) * SLACK >= read / (d.devices * d.bytes_per_s)


@settings(deadline=None)
@given(d=deployments(), law=laws)
def test_power_lies_between_idle_and_the_cap_and_energy_is_power_times_time(d: Deployments, law: dict) -> None:
    watts, joules = predict("power", d, law), predict("energy", d, law)
    assert 0 < watts <= d.devices * d.power_w * SLACK
    assert np.isclose(joules, watts * mean_tpot_s(d, law) / running(d, law))


@settings(deadline=None)
@given(d=deployments(), law=laws, share=st.floats(0, 1))
def test_idle_power_that_is_known_takes_the_place_of_a_share_of_the_cap(
    d: Deployments, law: dict, share: float
) -> None:
    known = replace(d, idle_w=share * d.power_w)
    assert known.idle_power_w * (1 - 1e-9) <= predict("power", known, law) / d.devices <= d.power_w * SLACK
    each = d.devices * mean_tpot_s(d, law) / running(d, law)
    assert np.isclose(QUANTITIES["energy"](known, law)["idle"], known.idle_power_w * each)
    same = replace(d, idle_w=IDLE_SHARE * d.power_w)
    assert np.isclose(predict("energy", same, law), predict("energy", d, law))


@given(quantity=st.sampled_from(sorted(QUANTITIES)), family=st.sampled_from((*FAMILIES, "never seen")))
def test_every_family_has_every_coefficient_and_an_interval(quantity: str, family: str) -> None:
    assert spread(shipped(), quantity, family) > 1
    law = law_of(shipped(), [family], [frozenset()])
    assert set(law) == set(COEFFICIENTS)
    assert all(np.isfinite(v) and v > 0 for v in law.values())


@given(
    family=st.sampled_from((*FAMILIES, "never seen")),
    memory=st.floats(1e8, 1e13),
    more=st.floats(0, 1e12),
    devices=st.integers(1, 8),
)
def test_what_is_to_fit_is_more_than_what_is_predicted_and_grows_with_it(
    family: str, memory: float, more: float, devices: int
) -> None:
    guarded = guarded_memory(shipped(), family, memory, devices)
    assert guarded > memory
    assert guarded_memory(shipped(), family, memory + more, devices) >= guarded
    assert guarded_memory(shipped(), family, memory, devices + 1) > guarded


@pytest.mark.parametrize(
    ("name", "features", "kind", "lanes"),
    [
        ("gtx-1050-ti", {"cuda", "sm_61"}, "no matrix units", 1), ("p40", {"cuda", "sm_61"}, "no matrix units", 1),
        ("rtx-2080-ti", {"cuda", "sm_75"}, "consumer", 2), ("NVIDIA GeForce RTX 4090", {"cuda", "sm_89"}, "consumer", 1),
        ("rtx-4000-ada", {"cuda", "sm_89"}, "data centre", 1), ("RTX 6000 Ada", {"cuda", "sm_89"}, "data centre", 1),
        ("a100-sxm", {"cuda", "sm_80"}, "data centre", 2), ("h100-sxm", {"cuda", "sm_90"}, "data centre", 1),
        ("gb10", {"cuda", "sm_121"}, "shared memory", 1), ("rx-7900-xtx", {"rocm"}, "AMD", 1),
        ("apple-m2", {"metal"}, "Apple", 1), ("epyc-9554", {"published", "avx512"}, "cpu", 1),
    ],
)  # fmt: skip
def test_devices_are_told_apart_by_generation_as_well_as_by_name(
    name: str, features: set[str], kind: str, lanes: int
) -> None:
    assert hardware_kind(name, features) == kind
    assert vector_rate(1e12, features) == lanes * 1e12


def test_a_plans_demand_becomes_a_deployment_with_the_same_weights_and_cache() -> None:
    model = replace(TOY_MODEL, tied_embeddings=False, weight_bytes=TOY_MODEL.weight_bytes + 4 * 4096 * 256)
    d = deployment(demand_of(model, TOY_WORKLOAD, "transformers"), TOY_MACHINE)
    law = law_of(shipped(), ["transformers"], [frozenset({"cpu"})])
    memory = QUANTITIES["memory"](d, law)
    assert memory["weights"] == model.weight_bytes
    assert memory["KV cache"] == (128 + 64) * 4 * TOY_MODEL.kv_values_per_token
    assert d.dense_bytes == 4 * (TOY_MODEL.linear_params + 4096 * 256)  # every layer and the head


def test_experts_of_a_plans_model_are_all_stored_and_few_are_read() -> None:
    model = replace(TOY_MODEL, experts=8, experts_active=2, params_active=TOY_MODEL.params_total - 3_000_000)
    d = deployment(demand_of(model, TOY_WORKLOAD, "transformers"), TOY_MACHINE)
    assert d.expert_params == 4_000_000
    assert np.isclose(d.active_params, TOY_MODEL.linear_params - 3_000_000 + 4096 * 256)
    assert np.isclose(experts_read(d, 1), 0.25)
