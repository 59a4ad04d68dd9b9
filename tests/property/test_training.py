"""Laws of training and distributed execution, over drawn models, set-ups and layouts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL

from cost_models.distributed import (
    GATHERED_LAYERS,
    Cluster,
    Layout,
    Link,
    all_gather,
    all_reduce,
    all_to_all,
    bubble_ratio,
    distributed_cost,
    distributed_time,
    pipeline_s,
    place_layers,
    rank_memory,
    reduce_scatter,
    step_traffic,
    unequal_pipeline,
)
from cost_models.training import (
    BASE_BITS,
    LOST_RATIO,
    METHODS,
    OPTIMISERS,
    RUNTIME_BYTES,
    WHOLE,
    TrainingSetup,
    step_flop,
    training_cost,
    training_memory,
    training_time,
)
from knowledge_base.types import Model

LINK = Link(name="inside", bytes_per_s=100e9, latency_s=5e-6)
CLUSTER = Cluster(devices_per_machine=4, inside=LINK, between=Link(name="between", bytes_per_s=10e9, latency_s=20e-6))
SPLIT = ("weights", "gradients", "optimiser states", "master copies", "adapters")


@st.composite
def models(draw: st.DrawFn) -> Model:
    layers, heads, head = draw(st.integers(2, 24)), draw(st.sampled_from((4, 8, 16))), draw(st.sampled_from((32, 64)))
    kv_heads, gated = draw(st.sampled_from((2, 4))), draw(st.booleans())
    hidden, vocab = heads * head, draw(st.sampled_from((1000, 32000)))
    ffn, tied = hidden * draw(st.integers(2, 4)), draw(st.booleans())
    linear = layers * hidden * (2 * hidden + 2 * kv_heads * head + (3 if gated else 2) * ffn)
    total = linear + vocab * hidden * (1 if tied else 2)
    return replace(
        TOY_MODEL, layers=layers, attention_layers=layers, heads=heads, kv_heads=kv_heads, head_size=head,
        hidden_size=hidden, ffn_size=ffn, gated_ffn=gated, vocab_size=vocab, tied_embeddings=tied, linear_params=linear,
        params_total=total, params_active=total, embedding_params=vocab * hidden,
    )  # fmt: skip


@st.composite
def setups(draw: st.DrawFn) -> TrainingSetup:
    method, fused = draw(st.sampled_from(METHODS)), draw(st.booleans())
    flags = ("flash_attention", "compiled", "chunked_cross_entropy", "adapter_dropout", "repeated_kv", "fused_qkv",
             "gradient_buckets", "master_weights", "checkpointing", "offload_activations")  # fmt: skip
    return TrainingSetup(
        method=method, optimiser=draw(st.sampled_from(tuple(OPTIMISERS))), fused_optimiser=fused,
        weight_dtype=draw(st.sampled_from(("bfloat16", "float32"))),
        base_format=None if method in WHOLE else draw(st.sampled_from((None, *BASE_BITS))),
        batch=draw(st.integers(1, 8)), sequence_tokens=draw(st.sampled_from((64, 512, 1024))),
        gradient_accumulation=1 if fused or method == "lomo" else draw(st.integers(1, 4)), rank=draw(st.integers(1, 64)),
        targets=draw(st.sampled_from((("q", "v"), ("q", "k", "v", "o", "up", "down")))),
        **{flag: draw(st.booleans()) for flag in flags},
    )  # fmt: skip


@given(model=models(), setup=setups())
def test_parts_add_up_inside_their_interval(model: Model, setup: TrainingSetup) -> None:
    memory = training_memory(model, setup)
    assert sum(part.mid for part in memory.parts.values()) == pytest.approx(memory.total.mid)
    assert all(0 < part.mid < math.inf and part.low <= part.mid <= part.high for part in memory.parts.values())
    assert sum(p.low for p in memory.parts.values()) <= memory.total.low < memory.total.high
    coming = sum(memory.parts[name].mid for name in ("gradients", "activations", "logits") if name in memory.parts)
    assert memory.parts["fragmentation"].mid == pytest.approx(LOST_RATIO * coming)
    assert memory.total.mid - memory.allocated_bytes == pytest.approx(RUNTIME_BYTES + LOST_RATIO * coming)
    time = training_time(model, setup, TOY_MACHINE, tokens=1e6)
    assert sum(time.parts.values()) == pytest.approx(time.step.mid)


@given(model=models(), setup=setups())
def test_more_work_never_takes_less(model: Model, setup: TrainingSetup) -> None:
    here = training_memory(model, setup).total.mid
    for more in (
        replace(setup, batch=setup.batch + 1), replace(setup, sequence_tokens=setup.sequence_tokens - 1),
        replace(setup, rank=setup.rank + 1),
    ):  # fmt: skip
        there = training_memory(model, more).total.mid
        assert there <= here if more.sequence_tokens < setup.sequence_tokens else there >= here
    longer = replace(setup, batch=setup.batch + 1)
    assert step_flop(model, longer) > step_flop(model, setup)
    assert training_time(model, longer, TOY_MACHINE).step.mid >= training_time(model, setup, TOY_MACHINE).step.mid


@given(model=models(), setup=setups())
def test_checkpointing_never_takes_more_memory_nor_less_time(model: Model, setup: TrainingSetup) -> None:
    without, with_it = (replace(setup, checkpointing=c) for c in (False, True))
    assert training_memory(model, with_it).total.mid <= training_memory(model, without).total.mid * (1 + 1e-9)
    assert step_flop(model, with_it) >= step_flop(model, without)


@given(model=models(), setup=setups())
def test_every_saver_saves(model: Model, setup: TrainingSetup) -> None:
    here = training_memory(model, setup).total.mid
    plain = replace(setup, offload_states=False, gradient_buckets=False)
    assert training_memory(model, replace(setup, offload_states=True)).total.mid <= here
    assert (
        training_memory(model, plain).total.mid
        <= training_memory(model, replace(plain, gradient_buckets=True)).total.mid
    )
    assert (
        training_memory(model, replace(setup, compiled=True)).total.mid
        <= training_memory(model, replace(setup, compiled=False)).total.mid
    )
    assert (
        training_memory(model, replace(setup, flash_attention=True)).total.mid
        <= training_memory(model, replace(setup, flash_attention=False)).total.mid
    )


@given(model=models(), setup=setups(), rank=st.integers(1, 32))
def test_adapters_never_take_more_than_training_everything(model: Model, setup: TrainingSetup, rank: int) -> None:
    common = replace(setup, base_format=None, rank=rank, fused_optimiser=False, adapter_dtype="bfloat16", adapter_dropout=False)  # fmt: skip
    whole = training_memory(model, replace(common, method="full", optimiser="adamw", weight_dtype="bfloat16"))
    for method in (
        "lora",
        "bias",
        "norm",
    ):  # prompts lengthen what is read and scales keep what they scale: they may take more
        thin = replace(common, method=method, optimiser="adamw", weight_dtype="bfloat16")
        kept = (
            2 * thin.tokens * model.layers * rank * len(thin.targets)
        )  # of the thin products, which full training lacks
        assert training_memory(model, thin).total.mid <= whole.total.mid + kept * (1 + LOST_RATIO)
    packed = replace(common, method="qlora", base_format="nf4", weight_dtype="bfloat16")
    assert (
        training_memory(model, packed).parts["weights"].mid
        <= training_memory(model, replace(packed, method="lora", base_format=None)).parts["weights"].mid
    )


@given(model=models(), setup=setups(), devices=st.sampled_from((1, 2, 4, 8)), stage_of_zero=st.integers(0, 3))
def test_more_devices_never_take_more_memory_of_each(
    model: Model, setup: TrainingSetup, devices: int, stage_of_zero: int
) -> None:
    few, many = (
        rank_memory(model, setup, Layout(data=n, zero_stage=stage_of_zero)).total.mid for n in (devices, 2 * devices)
    )
    gathered = GATHERED_LAYERS / model.layers if stage_of_zero == 3 else 0  # a rank gathers what others now hold
    assert many <= few * (1 + 1e-9) or gathered >= 1 / 2


@given(model=models(), setup=setups())
def test_recomputing_takes_time_and_is_told(model: Model, setup: TrainingSetup) -> None:
    without, with_it = (training_time(model, replace(setup, checkpointing=c), TOY_MACHINE) for c in (False, True))
    assert with_it.step.mid >= without.step.mid * (1 - 1e-9)
    assert without.parts["recomputation"] == 0
    assert (with_it.parts["recomputation"] > 0) == (setup.method != "mezo")


@given(
    model=models(), setup=setups(), speeds=st.lists(st.floats(0.5, 4), min_size=1, max_size=3), micro=st.integers(1, 6),
)  # fmt: skip
def test_a_pipeline_of_unequal_machines_holds_every_layer(
    model: Model, setup: TrainingSetup, speeds: list[float], micro: int
) -> None:
    assume(not setup.fused_optimiser and setup.method != "lomo")
    setup = replace(setup, gradient_accumulation=micro)
    device = TOY_MACHINE.device
    machines = [
        replace(TOY_MACHINE, devices=(replace(device, flop_per_s={n: r * speed for n, r in device.flop_per_s.items()}, memory_bytes=2**50),))
        for speed in speeds
    ]  # fmt: skip
    run = unequal_pipeline(model, setup, machines, LINK, tokens=1e6)
    assert sum(stage.layers for stage in run.stages) == model.layers
    assert sum(run.time.parts.values()) == pytest.approx(run.time.step.mid)
    if len(machines) == 1:
        assert run.time.step.mid == pytest.approx(training_time(model, setup, machines[0]).step.mid)
        assert not run.traffic


@given(model=models(), factor=st.floats(1, 10))
def test_a_faster_machine_is_never_slower(model: Model, factor: float) -> None:
    device = TOY_MACHINE.device
    wide = replace(device, memory_bytes_per_s=device.memory_bytes_per_s * factor)
    quick = replace(device, flop_per_s={name: r * factor for name, r in device.flop_per_s.items()})
    setup = TrainingSetup(method="qlora", batch=2)
    slow = training_time(model, setup, TOY_MACHINE).step.mid
    for better in (wide, quick):
        assert training_time(model, setup, replace(TOY_MACHINE, devices=(better,))).step.mid <= slow


@given(model=models(), setup=setups(), ranks=st.sampled_from((2, 4, 8, 64)))
def test_zero_stages_never_take_more_and_divide_evenly(model: Model, setup: TrainingSetup, ranks: int) -> None:
    setup = replace(setup, fused_optimiser=False)
    assume(setup.method != "lomo")
    stages = [rank_memory(model, setup, Layout(data=ranks, zero_stage=stage)) for stage in range(4)]
    totals = [memory.total.mid for memory in stages]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(totals))
    alone = rank_memory(model, setup, Layout(zero_stage=3)).parts
    for name in SPLIT:
        if name in alone and name != "gradients":  # of gradients the moment decides how many are there
            assert stages[3].parts[name].mid == pytest.approx(alone[name].mid / ranks)
    assert rank_memory(model, setup, Layout(data=ranks)).total.mid == pytest.approx(
        rank_memory(model, setup, Layout()).total.mid
    )


@given(model=models(), setup=setups(), tensor=st.sampled_from((2, 4)), sequence=st.sampled_from((1, 2)))
def test_splitting_the_model_never_takes_more(model: Model, setup: TrainingSetup, tensor: int, sequence: int) -> None:
    assume(model.heads % (tensor * sequence) == 0)
    alone = rank_memory(model, setup, Layout())
    assert alone.total.mid == pytest.approx(training_memory(model, setup).total.mid)
    assert rank_memory(model, setup, Layout(tensor=tensor, sequence=sequence)).total.mid <= alone.total.mid
    split = rank_memory(model, setup, Layout(pipeline=2))
    assert split.parts["weights"].mid < alone.parts["weights"].mid * (1 if model.layers > 2 else 1.01)


@given(model=models(), setup=setups())
def test_one_device_sends_nothing(model: Model, setup: TrainingSetup) -> None:
    assert step_traffic(model, setup, Layout(), CLUSTER) == {}
    one = distributed_cost(model, setup, TOY_MACHINE, Layout(), CLUSTER, tokens=1e6)
    alone = training_cost(model, setup, TOY_MACHINE, tokens=1e6)
    assert one.cost.time.total.mid == pytest.approx(alone.time.total.mid)
    assert one.cost.energy_j.mid == pytest.approx(alone.energy_j.mid)
    assert one.cost.cost_usd.mid == pytest.approx(alone.cost_usd.mid)


@given(model=models(), setup=setups(), tensor=st.sampled_from((1, 2, 4)), pipeline=st.sampled_from((1, 2)))
def test_a_step_over_ranks_is_one_devices_work_divided(
    model: Model, setup: TrainingSetup, tensor: int, pipeline: int
) -> None:
    layout = Layout(tensor=tensor, pipeline=pipeline)
    alone = training_time(model, setup, TOY_MACHINE).parts
    time = distributed_time(model, setup, TOY_MACHINE, layout, step_traffic(model, setup, layout, CLUSTER), tokens=1e6)
    for name in ("compute", "recomputation", "optimiser"):
        assert time.parts[name] == pytest.approx(alone[name] / layout.ranks)
    busy = sum(time.parts[name] for name in ("compute", "recomputation", "unpacking", "launches"))
    idle = time.parts["bubbles"] / (busy + time.parts["bubbles"])
    assert idle == pytest.approx((pipeline - 1) / (setup.gradient_accumulation + pipeline - 1))
    assert sum(time.parts.values()) == pytest.approx(time.step.mid)


@given(size=st.floats(1, 1e12), ranks=st.integers(1, 4096))
def test_collectives_are_their_formulas(size: float, ranks: int) -> None:
    share = (ranks - 1) / ranks
    assert all_reduce(size, ranks, LINK).bytes == pytest.approx(2 * share * size)
    for collective in (all_gather, reduce_scatter, all_to_all):
        traffic = collective(size, ranks, LINK)
        assert traffic.bytes == pytest.approx(share * size)
        assert traffic.s == pytest.approx((ranks - 1) * 5e-6 + share * size / 100e9)


@given(model=models(), setup=setups(), ranks=st.sampled_from((2, 4, 16)))
def test_traffic_grows_with_ranks_and_falls_with_bandwidth(model: Model, setup: TrainingSetup, ranks: int) -> None:
    assume(setup.method != "mezo")
    few, many = (step_traffic(model, setup, Layout(data=n, zero_stage=1), CLUSTER)["data"] for n in (ranks, 2 * ranks))
    assert few.bytes < many.bytes and few.s < many.s
    quick = Cluster(devices_per_machine=64, inside=LINK, between=LINK)
    assert (
        step_traffic(model, setup, Layout(data=16), quick)["data"].s
        < step_traffic(model, setup, Layout(data=16), CLUSTER)["data"].s
    )


@given(stages=st.integers(1, 64), micro=st.integers(1, 10_000))
def test_bubbles_vanish_with_many_micro_batches(stages: int, micro: int) -> None:
    here = bubble_ratio(stages, micro)
    assert 0 <= here < 1
    assert here == (stages - 1) / (micro + stages - 1)
    assert bubble_ratio(stages, 1000 * micro) <= here / 2 if stages > 1 and micro >= stages else here >= 0
    assert (here == 0) == (stages == 1)
    # equal stages: the idle share is what the pipeline's time has beyond its work
    assert pipeline_s((1.0,) * stages, micro) == pytest.approx(micro / (1 - here))


@given(
    layers=st.integers(1, 9),
    machines=st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 9)), min_size=1, max_size=3),
)
def test_no_placement_beats_ours(layers: int, machines: list[tuple[float, int]]) -> None:
    speeds, room = zip(*machines, strict=True)
    assume(sum(room) >= layers)
    ours = place_layers(layers, speeds, room)
    assert sum(ours) == layers and all(count <= most for count, most in zip(ours, room, strict=True))

    def slowest(counts: tuple[int, ...]) -> float:
        return max(count * s for count, s in zip(counts, speeds, strict=True))

    every = itertools.product(*(range(most + 1) for most in room))
    assert slowest(ours) <= min(slowest(c) for c in every if sum(c) == layers) * (1 + 1e-12)
