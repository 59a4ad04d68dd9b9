"""Laws of what clients meet, for plans priced by operators and for every engine family known by its law."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests_support import TOY_MODEL

from cost_models.served import ONLY_ON, SPLITTING, WEIGHTS, Served, families, serve
from knowledge_base.errors import BadInput
from knowledge_base.registry import complete
from knowledge_base.types import Device, Hardware, Model, Step, Value, Workload
from planner.estimating.asking import Asked
from planner.estimating.pricing import Priced, price
from planner.estimating.waterfall import PHASES, waterfall

SLACK = 1 + 1e-6
WHOLE = 1.05  # the energy of a mean batch is not the mean of batches: its prompts may just need one more piece
OF_PIECES = 1.005  # a prompt that fills its last piece is cheaper by the token
FAMILIES = sorted(families())
TIMES = ("ttft_s", "tpot_s", "latency_s")
INT8, INT4 = (complete(Step(f"weight_int{bits}")) for bits in (8, 4))
FOUR, SIXTEEN = (Step("batch_size", {"count": count}) for count in (4, 16))
PIECES = Step("chunked_prefill", {"tokens": 128})
BY_OPERATORS: dict[str, tuple[tuple[Step, ...], ...]] = {
    "transformers": ((), (INT4,), (FOUR,), (INT8, SIXTEEN)),
    "llama_cpp": ((), (FOUR,), (complete(Step("weight_gguf")), SIXTEEN), (SIXTEEN, PIECES)),
    "openvino": ((), (complete(Step("weight_openvino")),), (FOUR,), (SIXTEEN, PIECES)),
}
quiet = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Return a decoder of any shape, dense or of experts, with a sliding window or none."""
    layers, heads = draw(st.integers(1, 100)), 8 * draw(st.integers(1, 12))
    kv_heads, head_size = draw(st.sampled_from((1, 8, heads))), draw(st.sampled_from((64, 128)))
    hidden, experts = heads * head_size, draw(st.sampled_from((0, 0, 8, 64)))
    active, ffn = min(experts, draw(st.integers(1, 8))), draw(st.sampled_from((2, 4))) * hidden
    each = 3 * hidden * ffn
    linear = layers * (2 * hidden * head_size * (heads + kv_heads) + each * max(experts, 1))
    table = 32_000 * hidden
    total = linear + 2 * table
    return replace(
        TOY_MODEL, name="drawn", digest=f"{layers}-{heads}-{kv_heads}-{head_size}-{experts}-{active}-{ffn}", layers=layers, hidden_size=hidden,
        heads=heads, kv_heads=kv_heads, head_size=head_size, ffn_size=ffn, vocab_size=32_000, max_context_tokens=10**6,
        params_total=total, params_active=total - layers * each * (experts - active if experts else 0), linear_params=linear,
        embedding_params=table, tied_embeddings=False, experts=experts, experts_active=active, attention_layers=layers,
        sliding_window_tokens=draw(st.sampled_from((None, 4096))), weight_dtype="bfloat16", weight_bytes=2 * total,
    )  # fmt: skip


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    """Return one to eight GPUs with room for anything."""
    device = Device(
        name="drawn", kind="gpu", memory_bytes=2**46, memory_bytes_per_s=draw(st.floats(1e11, 8e12)), idle_w=50.0, busy_w=draw(st.floats(60, 1200)),
        flop_per_s={name: draw(st.floats(1e13, 1e15)) for name in ("float32", "bfloat16", "float16", "int8", "fp8", "int4")}, features=frozenset({"cuda", "metal", "rocm"}),
        link_bytes_per_s=draw(st.sampled_from((None, 4.5e11))),
    )  # fmt: skip
    count = draw(st.sampled_from((1, 2, 4, 8)))
    return Hardware(
        name="drawn", devices=(device,) * count, host_memory_bytes=2**47, memory_limit_bytes=2**46,
        price_usd_per_h=draw(st.sampled_from((None, 4.0))), grid_gco2e_per_kwh=400.0,
    )  # fmt: skip


workloads = st.builds(
    Workload, prompt_tokens=st.integers(1, 8000), output_tokens=st.integers(1, 5) | st.integers(1, 2000), concurrency=st.sampled_from((16, 40, 256))
)  # fmt: skip


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """Return a plan priced by operators or by a law."""
    engine = draw(st.sampled_from((*FAMILIES, *BY_OPERATORS)))
    hardware = draw(machines())
    steps = draw(st.sampled_from(BY_OPERATORS.get(engine, ((),))))
    law = engine not in BY_OPERATORS
    if law and engine not in SPLITTING:
        hardware = replace(hardware, devices=hardware.devices[:1])
    return Asked(
        model=draw(models()), engine=engine, hardware=hardware, workload=draw(workloads), steps=steps,
        weights=draw(st.sampled_from((None, *WEIGHTS))) if law else None,
    )  # fmt: skip


def mids(found: Priced) -> dict[str, float]:
    return {name: value.mid for name, value in found.values.items()}


def at(asked: Asked, **load: object) -> Priced:
    return price(replace(asked, workload=replace(asked.workload, **load)))


@quiet
@given(asked=asked())
def test_parts_add_up_and_units_agree(asked: Asked) -> None:
    found = price(asked)
    values, fall = mids(found), waterfall(found)
    for phase, metric in PHASES.items():
        assert math.isclose(sum(p["time_s"] for p in fall[phase]), values[metric], rel_tol=1e-6)  # type: ignore[literal-required]
    assert math.isclose(sum(p["memory_bytes"] for p in fall["memory"]), values["peak_memory_bytes"], rel_tol=1e-6)
    output = asked.workload.output_tokens
    assert math.isclose(values["throughput_tokens_per_s"], values["requests_per_s"] * output, rel_tol=1e-9)
    assert math.isclose(values["latency_s"], values["ttft_s"] + (output - 1) * values["tpot_s"], rel_tol=1e-6)
    # 400 g/kWh, and all of the hourly price is borne by the tokens of an hour
    assert math.isclose(values["carbon_gco2e_per_token"], values["energy_j_per_token"] / 3.6e6 * 400, rel_tol=1e-9)
    if asked.hardware.price_usd_per_h:
        hour = values["cost_usd_per_token"] * values["throughput_tokens_per_s"] * 3600
        assert math.isclose(hour, asked.hardware.price_usd_per_h, rel_tol=1e-9)
    for value in found.values.values():
        assert value.low <= value.mid <= value.high and all(
            math.isfinite(x) for x in (value.low, value.mid, value.high)
        )
        assert value.p95 is None or value.p95 >= value.mid * (1 - 1e-9)


@quiet
@given(
    asked=asked(), more=st.floats(1, 10), rate=st.sampled_from(("memory_bytes_per_s", "flop_per_s", "link_bytes_per_s"))
)
def test_a_better_device_is_never_slower(asked: Asked, more: float, rate: str) -> None:
    device = asked.hardware.device
    old = getattr(device, rate)
    if old is None:
        return
    new = {name: more * x for name, x in old.items()} if rate == "flop_per_s" else more * old
    faster = replace(asked.hardware, devices=(replace(device, **{rate: new}),) * len(asked.hardware.devices))
    before, after = mids(price(asked)), mids(price(replace(asked, hardware=faster)))
    for name in TIMES:
        assert after[name] <= before[name] * SLACK, name
    if rate == "link_bytes_per_s" and more > 1.1 and len(faster.devices) > 1 and asked.by_law:
        assert after["ttft_s"] < before["ttft_s"]  # every layer exchanges


@quiet
@given(asked=asked(), more=st.integers(1, 5000))
def test_memory_grows_with_context_and_longer_answers_are_never_sooner_or_cheaper(asked: Asked, more: int) -> None:
    before, longer = price(asked), at(asked, output_tokens=asked.workload.output_tokens + more)
    prompts = at(asked, prompt_tokens=asked.workload.prompt_tokens + more)
    for after in (longer, prompts):
        assert after.values["peak_memory_bytes"].mid * SLACK >= before.values["peak_memory_bytes"].mid
    assert longer.values["latency_s"].mid * SLACK >= before.values["latency_s"].mid
    if asked.workload.concurrency == 1 or not asked.by_law:
        assert prompts.values["latency_s"].mid * OF_PIECES >= before.values["latency_s"].mid
        assert prompts.values["cost_usd_per_token"].mid * SLACK >= before.values["cost_usd_per_token"].mid


@quiet
@given(asked=asked(), more=st.integers(1, 500))
def test_more_clients_wait_longer_and_are_each_served_slower(asked: Asked, more: int) -> None:
    few, many = price(asked), at(asked, concurrency=asked.workload.concurrency + more)
    for name in TIMES:
        assert many.values[name].mid * SLACK >= few.values[name].mid, name
    for name in ("peak_memory_bytes", "kv_cache_bytes"):
        assert many.values[name].mid * SLACK >= few.values[name].mid, name


@quiet
@given(asked=asked(), load=st.floats(0.01, 0.9), more=st.floats(1.01, 1.1))
def test_more_arrivals_wait_longer_and_beyond_the_capacity_no_time_is_told(
    asked: Asked, load: float, more: float
) -> None:
    capacity = capacity_of(asked)
    few, here, fuller = (
        at(asked, requests_per_s=r) for r in (1e-10 * capacity, load * capacity, load * capacity * more)
    )
    for name in ("ttft_s", "latency_s"):
        assert few.values[name].mid <= here.values[name].mid * SLACK <= fuller.values[name].mid * SLACK**2, name
        p95 = here.values[name].p95
        assert p95 is not None and p95 * SLACK >= few.values[name].mid
    assert here.values["requests_per_s"].mid == pytest.approx(load * capacity)
    # the machine costs the same by the hour however little it does
    costs = [found.values["cost_usd_per_token"].mid for found in (few, here, fuller)]
    assert costs[0] * WHOLE >= costs[1] and costs[1] * WHOLE >= costs[2]
    beyond = at(asked, requests_per_s=3 * capacity)
    assert not set(beyond.values) & {"ttft_s", "latency_s", "throughput_tokens_per_s", "cost_usd_per_token"}
    assert "it would fall behind: capacity is" in beyond.prevented["latency_s"].message


def capacity_of(asked: Asked) -> float:
    """Return the requests each second it can answer, as the sentence on far too many tells, to three digits."""
    from knowledge_base import units

    told = at(asked, requests_per_s=1e15).prevented["latency_s"].message
    return units.parse(told.partition("capacity is ")[2], "requests", field="")


@quiet
@given(model=models(), workload=workloads, hardware=machines(), family=st.sampled_from(SPLITTING))
def test_devices_share_a_model(model: Model, workload: Workload, hardware: Hardware, family: str) -> None:
    count = len(hardware.devices)
    alone = serve(family, model, workload, replace(hardware, devices=hardware.devices[:1]))
    split = serve(family, model, workload, hardware)
    assert split.devices == count and split.limit_bytes == count * alone.limit_bytes
    assert split.values["weights_bytes"] == alone.values["weights_bytes"]
    assert share(split) <= share(alone) * SLACK


@quiet
@given(
    model=models(), workload=workloads, hardware=machines(), family=st.sampled_from(SPLITTING),
    room=st.floats(1.2, 20), few=st.integers(1, 300), more=st.integers(1, 300),
)  # fmt: skip
def test_memory_never_falls_as_clients_come_until_the_cache_is_full(
    model: Model, workload: Workload, hardware: Hardware, family: str, room: float, few: int, more: int
) -> None:
    """On devices with room for a few requests, which are full of them before all clients are served."""
    alone = serve(family, model, replace(workload, concurrency=1), hardware)
    needed = math.ceil(room * alone.values["peak_memory_bytes"].mid / len(hardware.devices))
    tight = replace(hardware, devices=tuple(replace(d, memory_bytes=needed) for d in hardware.devices))
    fewer, fuller = (serve(family, model, replace(workload, concurrency=n), tight) for n in (few, few + more))
    for name in ("peak_memory_bytes", "kv_cache_bytes"):
        assert fuller.values[name].mid * SLACK >= fewer.values[name].mid, name


def share(served: Served) -> float:
    return served.values["peak_memory_bytes"].mid / served.devices


def test_heads_that_do_not_divide_are_refused() -> None:
    hardware = Hardware(
        name="three", host_memory_bytes=2**40, memory_limit_bytes=2**40,
        devices=(Device(name="x", kind="gpu", memory_bytes=2**36, memory_bytes_per_s=1e12, flop_per_s={"bfloat16": 1e14}),) * 3,
    )  # fmt: skip
    with pytest.raises(BadInput, match="8 heads and 4 key-value heads do not divide over 3 devices"):
        serve("vllm", TOY_MODEL, Workload(prompt_tokens=8, output_tokens=8), hardware)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prices_a_model_on_a_device_it_runs_on(family: str) -> None:
    device = Device(
        name="x", kind="gpu", memory_bytes=2**36, memory_bytes_per_s=1e12, busy_w=300.0, flop_per_s={"bfloat16": 1e14},
        features=ONLY_ON.get(family, frozenset({"cuda"})),
    )  # fmt: skip
    hardware = Hardware(name="one", devices=(device,), host_memory_bytes=2**36, memory_limit_bytes=2**36)
    found = serve(family, TOY_MODEL, Workload(prompt_tokens=100, output_tokens=100), hardware)
    for name, value in found.values.items():
        assert isinstance(value, Value) and np.isfinite(value.high) and value.low > 0, name
    assert found.values["tpot_s"].mid >= found.values["weights_bytes"].mid / 1e12 * 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_by_its_middle_figure_alone_says_that_it_may_not(family: str) -> None:
    def told(memory_bytes: float) -> Served:
        device = Device(
            name="x", kind="gpu", memory_bytes=int(memory_bytes), memory_bytes_per_s=1e12, busy_w=300.0,
            flop_per_s={"bfloat16": 1e14}, features=ONLY_ON.get(family, frozenset({"cuda"})),
        )  # fmt: skip
        hardware = Hardware(name="one", devices=(device,), host_memory_bytes=2**50, memory_limit_bytes=2**50)
        return serve(family, TOY_MODEL, Workload(prompt_tokens=100, output_tokens=100), hardware)

    roomy = told(2**44)
    needed = roomy.values["peak_memory_bytes"].mid
    assert not any("may not fit" in note for note in roomy.notes)
    assert any("may not fit" in note for note in told(1.01 * needed).notes)
    assert not any("may not fit" in note for note in told(0.5 * needed).notes)  # it does not
