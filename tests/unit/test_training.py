"""What training takes: formulas against hand counts, against what autograd keeps of a real model, against published figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests_support import TOY_MACHINE, TOY_MODEL

from benchmarks.training_error import compare, model_of, runs, summary
from cost_models.catalogue import find_machine
from cost_models.distributed import Cluster, Layout, Link, decode_traffic, distributed_cost, rank_memory, step_traffic
from cost_models.training import (
    TrainingSetup,
    base_bytes,
    layer_activation_bytes,
    state_bytes,
    step_flop,
    trained_params,
    training_cost,
    training_memory,
    training_time,
)
from cost_models.training.memory import logits_bytes
from knowledge_base.errors import BadInput
from knowledge_base.types import Model

GIB = 2**30
LLAMA = model_of("LLaMA-7B")  # 6.738e9 parameters
FAST = Link(name="inside", bytes_per_s=300e9, latency_s=2e-6)
SLOW = Link(name="between", bytes_per_s=25e9, latency_s=10e-6)
CLUSTER = Cluster(devices_per_machine=8, inside=FAST, between=SLOW)

# ---------------------------------------------------------------- counts


def test_parts_of_full_mixed_precision_are_those_lomo_measured() -> None:
    # arXiv:2306.09782, Table 1: 12.55 GiB of parameters, 12.55 of gradients, 75.31 of states (float32 copy, two moments)
    setup = TrainingSetup(master_weights=True, state_dtype="float32", gradient_buckets=True)
    parts = training_memory(LLAMA, setup).parts
    assert parts["weights"].mid / GIB == pytest.approx(12.55, abs=0.01)
    assert parts["gradients"].mid / GIB == pytest.approx(12.55, abs=0.01)
    assert (parts["optimiser states"].mid + parts["master copies"].mid) / GIB == pytest.approx(75.31, abs=0.05)


@pytest.mark.parametrize(("optimiser", "saved_gib"), [("adam_8bit", 51.6 - 39.1), ("adam_4bit", 51.6 - 33.2)])
def test_states_of_few_bits_save_what_torchao_measured(optimiser: str, saved_gib: float) -> None:
    # torchao, optim README: Llama-2-7B on Alpaca, AdamW in bfloat16 51.6, 8 bits 39.1, 4 bits 33.2
    saved = state_bytes(LLAMA, TrainingSetup()) - state_bytes(LLAMA, TrainingSetup(optimiser=optimiser))
    assert saved / GIB == pytest.approx(saved_gib, rel=0.03)


def test_galore_keeps_projectors_and_thin_states() -> None:
    # One layer of LLaMA-7B by hand, rank 128: 4 matrices of 4096 x 4096, 3 of 4096 x 11008, 2 bytes each:
    # projector 4096 x 128, two states of 128 x the other side; embedding and head whole.
    square = 4096 * 128 + 2 * 128 * 4096
    wide = 4096 * 128 + 2 * 128 * 11008
    expected = 2 * 32 * (4 * square + 3 * wide) + 2 * 2 * (2 * 32000 * 4096)
    assert state_bytes(LLAMA, TrainingSetup(method="galore", rank=128)) == expected


def test_adafactor_keeps_rows_and_columns() -> None:
    # one layer: 4 x (4096 + 4096) + 3 x (4096 + 11008) numbers of 4 bytes, and two tables of 32000 + 4096
    assert state_bytes(LLAMA, TrainingSetup(optimiser="adafactor")) == 4 * (32 * (4 * 8192 + 3 * 15104) + 2 * 36096)


@pytest.mark.parametrize(
    ("name", "setup", "params"),
    [
        # LitGPT's table of resources prints these: rank 8 on queries and values
        ("StableLM-3B", TrainingSetup(method="lora", rank=8), 2_097_152),
        ("Llama-2-7B", TrainingSetup(method="lora", rank=8), 4_194_304),
        # PEFT's comparison on MetaMathQA: rank 32, as printed beside the memory
        ("Llama-3.2-3B", TrainingSetup(method="lora", rank=32), 9_175_040),
        ("Llama-3.2-3B", TrainingSetup(), 3_212_574_720),  # 3,212,749,824 with its norms
    ],
)
def test_trained_parameters_are_those_published(name: str, setup: TrainingSetup, params: int) -> None:
    assert trained_params(model_of(name), setup) == params


@pytest.mark.parametrize(("format", "bits"), [("nf4", 4.5), ("nf4_double", 4.127)])
def test_a_packed_base_counts_its_scales(format: str, bits: float) -> None:
    # arXiv:2305.14314, section 3: a scale adds 0.5 bits for each parameter, double quantisation brings it to 0.127
    wide = 2 * (LLAMA.params_total - LLAMA.linear_params)
    packed = base_bytes(LLAMA, TrainingSetup(method="qlora", base_format=format)) - wide
    assert 8 * packed / LLAMA.linear_params == pytest.approx(bits, abs=0.001)


GPTQ = replace(LLAMA, quantised_format="int4", quantised_bytes=int(LLAMA.linear_params * 4.156 / 8))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_checkpoint_that_comes_quantised_is_trained_on_as_it_is_stored(method: str) -> None:
    wide = 2 * (LLAMA.params_total - LLAMA.linear_params)
    setup = TrainingSetup(method=method)
    assert base_bytes(GPTQ, setup) == pytest.approx(GPTQ.quantised_bytes + wide)
    held = training_memory(GPTQ, setup).parts
    assert "4.16 bits" in held["weights"].because and held["workspace"].mid == 2 * 4096 * 11008
    half = rank_memory(GPTQ, setup, Layout(tensor=2)).parts["weights"].mid
    assert half == pytest.approx(held["weights"].mid / 2, rel=0.001)


def test_integers_are_not_trained_and_floats_are_unpacked() -> None:
    with pytest.raises(BadInput, match="come as integers"):
        training_memory(GPTQ, TrainingSetup())
    fp8 = replace(GPTQ, quantised_format="float8_e4m3fn")
    assert base_bytes(fp8, TrainingSetup()) == 2 * LLAMA.params_total


def test_arithmetic_of_full_training_is_six_for_each_parameter() -> None:
    # arXiv:2001.08361: 6ND without attention and without the table of embeddings, which is only looked up
    setup = TrainingSetup(batch=2, sequence_tokens=64, gradient_accumulation=3)
    tokens = 2 * 64 * 3
    attention = 3 * 4 * 32 * 32 * 128 * (65 / 2)  # 3 passes, layers x heads x head size, mean causal context
    params = LLAMA.params_total - LLAMA.embedding_params
    assert step_flop(LLAMA, setup) == pytest.approx(tokens * (6 * params + attention))
    layers = 2 * LLAMA.linear_params + attention / 3
    again = step_flop(LLAMA, replace(setup, checkpointing=True)) - step_flop(LLAMA, setup)
    assert again == pytest.approx(tokens * layers)


# ---------------------------------------------------------------- against a real model


def _kept_bytes(layers: int, kv_heads: int, adapters: list[str] | None, attention: str, dora: bool = False) -> int:
    """Bytes of all storages autograd keeps of a Llama's forward pass over 2 x 32 tokens, parameters left out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=16,
            vocab_size=128,
            attn_implementation=attention,
        )
    ).to(torch.bfloat16)
    if adapters:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=adapters, lora_dropout=0.0, use_dora=dora))
        model.enable_input_require_grads()
    ids = torch.randint(0, 128, (2, 32))
    return _kept_of(model, input_ids=ids, labels=ids, use_cache=False)


def _kept_of(model: Any, **inputs: Any) -> int:
    """Bytes of all storages autograd keeps of a forward pass, parameters left out."""
    import weakref

    import torch

    model.train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Kept:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

    alive: weakref.WeakSet[Kept] = weakref.WeakSet()  # what the loss no longer needs is gone from it

    def pack(tensor: Any) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = model(**inputs).loss
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    assert loss.requires_grad
    return sum(size for at, size in storages.items() if at not in own)


def test_a_layer_of_an_encoder_keeps_what_autograd_keeps() -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def kept(layers: int) -> int:
        config = BertConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=layers, num_attention_heads=4, vocab_size=128,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )  # fmt: skip
        model = BertForSequenceClassification(config).to(torch.bfloat16)
        return _kept_of(model, input_ids=torch.randint(0, 128, (2, 32)), labels=torch.tensor([0, 1]))

    told = sum(layer_activation_bytes(ENCODER, TrainingSetup(batch=2, sequence_tokens=32)).values())
    assert told == pytest.approx((kept(3) - kept(2)) / 64, rel=0.01)


ENCODER = replace(
    TOY_MODEL, kind="encoder", hidden_size=64, heads=4, kv_heads=4, head_size=16, ffn_size=160, vocab_size=128,
    gated_ffn=False,
)  # fmt: skip


def test_an_encoder_has_no_logits_and_sees_both_ways() -> None:
    setup = TrainingSetup(batch=2, sequence_tokens=32)
    decoder = replace(ENCODER, kind="decoder")
    assert logits_bytes(ENCODER, setup) == 0 < logits_bytes(decoder, setup)
    head, pairs = 2.0 * 128 * 64, 4.0 * ENCODER.attention_layers * 64 * (32 * 33 / 2) / 32
    more = step_flop(ENCODER, setup) - step_flop(decoder, setup)
    assert more == pytest.approx(setup.tokens * 3 * (pairs - head))


def test_experts_that_all_tokens_share_are_kept_too() -> None:
    # Qwen1.5-MoE: 4 of 60 experts 1408 wide, and a shared one of 5632 with a gate of its own; from its config.json
    h, expert, layers = 2048, 1408, 24
    attention, shared, router = 4 * h * h, 3 * h * 5632 + h, 60 * h
    linear = layers * (attention + shared + router + 60 * 3 * h * expert)
    model = replace(
        TOY_MODEL, layers=layers, attention_layers=layers, hidden_size=h, ffn_size=expert, heads=16, kv_heads=16, head_size=128,
        experts=60, experts_active=4, gated_ffn=True, linear_params=linear, params_total=linear,
        params_active=linear - layers * 56 * 3 * h * expert,
    )  # fmt: skip
    width = layer_activation_bytes(model, TrainingSetup())["ffn"] / (2 * 3)
    assert width == pytest.approx(4 * expert + 5632, abs=1)
    alone = replace(model, linear_params=linear - layers * shared, params_total=linear - layers * shared, params_active=model.params_active - layers * shared)  # fmt: skip
    assert layer_activation_bytes(alone, TrainingSetup())["ffn"] == 2 * 3 * 4 * expert


@pytest.mark.parametrize(("adapters", "targets", "outputs"), [(["q_proj", "v_proj"], ("q", "v"), 64 + 32), (["down_proj"], ("down",), 64)])  # fmt: skip
def test_magnitudes_keep_what_they_multiply(adapters: list[str], targets: tuple[Any, ...], outputs: int) -> None:
    model = replace(TOY_MODEL, hidden_size=64, heads=4, kv_heads=2, head_size=16, ffn_size=160, vocab_size=128)
    setup = TrainingSetup(method="lora", rank=4, targets=targets, magnitudes=True, repeated_kv=False, batch=2, sequence_tokens=32)  # fmt: skip
    three, two = (_kept_bytes(layers, 2, adapters, "sdpa", dora=True) for layers in (3, 2))
    lengths = 3 * 4 * outputs  # the matrix's lengths, the trained ones and their ratio: no more with more tokens
    assert (three - two - lengths) / 64 == sum(layer_activation_bytes(model, setup).values())


@pytest.mark.parametrize(
    ("kv_heads", "adapters", "attention", "setup"),
    [
        (2, None, "sdpa", TrainingSetup(repeated_kv=False)),
        (4, None, "sdpa", TrainingSetup()),
        (2, None, "eager", TrainingSetup(flash_attention=False)),
        (2, ["q_proj", "v_proj"], "sdpa", TrainingSetup(method="lora", rank=4, repeated_kv=False)),
        (2, ["o_proj"], "sdpa", TrainingSetup(method="lora", rank=4, targets=("o",), repeated_kv=False)),
        (
            2, ["gate_proj", "up_proj", "down_proj"], "sdpa",
            TrainingSetup(method="lora", rank=4, targets=("gate", "up", "down"), repeated_kv=False),
        ),
    ],
)  # fmt: skip
def test_a_layer_keeps_exactly_what_autograd_keeps(
    kv_heads: int, adapters: list[str] | None, attention: str, setup: TrainingSetup
) -> None:
    model = replace(TOY_MODEL, hidden_size=64, heads=4, kv_heads=kv_heads, head_size=16, ffn_size=160, vocab_size=128)
    three, two = (_kept_bytes(layers, kv_heads, adapters, attention) for layers in (3, 2))
    told = layer_activation_bytes(model, replace(setup, batch=2, sequence_tokens=32))
    assert (three - two) / 64 == sum(told.values())


# ---------------------------------------------------------------- against published figures


def test_published_memory_and_speed_are_met() -> None:
    """A ratchet: medians of benchmarks/training_error.py may only fall. The aim for memory is 8 %."""
    kept, _ = runs()
    misses = [compare(run) for run in kept]
    memory = summary([m for m in misses if m.run.counts != "tokens_per_s"])
    speed = summary([m for m in misses if m.run.counts == "tokens_per_s"])
    assert memory["n"] >= 98 and speed["n"] >= 32
    assert memory["median"] <= 0.026
    assert speed["median"] <= 0.09
    assert 0.75 <= memory["inside"] <= 0.95


# ---------------------------------------------------------------- several devices


def test_zero_divides_what_its_stage_says() -> None:
    # arXiv:1910.02054, Figure 1: 7.5e9 parameters over 64 ranks take 120, 31.4, 16.6 and 1.9 GB at stages 0 to 3
    params = 7_500_000_000
    table = 8192
    model = replace(
        TOY_MODEL, params_total=params, params_active=params, linear_params=params - 2 * table, hidden_size=8192, layers=64,
        attention_layers=64, vocab_size=1, tied_embeddings=False, weight_dtype="bfloat16",
    )  # fmt: skip
    setup = TrainingSetup(
        sequence_tokens=1, master_weights=True, state_dtype="float32", gradient_buckets=True,
    )  # fmt: skip
    names = ("weights", "gradients", "optimiser states", "master copies")
    for stage, gigabytes in enumerate((120, 31.4, 16.6, 1.9)):
        parts = rank_memory(model, setup, Layout(data=64, zero_stage=stage)).parts
        assert sum(parts[name].mid for name in names) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_bytes_over_the_links_are_those_counted_by_hand() -> None:
    setup = TrainingSetup(batch=2, sequence_tokens=1024, gradient_accumulation=4)
    hidden = 2 * 1024 * 4096 * 2
    traffic = step_traffic(LLAMA, setup, Layout(data=4, tensor=2, pipeline=4), CLUSTER)
    assert traffic["tensor"].bytes == 4 * 8 * 4 * (2 * hidden / 2)  # 4 all-reduces x 8 layers x 4 micro-batches
    assert traffic["pipeline"].bytes == 2 * 4 * hidden
    stage = 2 * (LLAMA.linear_params // 8 + 32000 * 4096 // 2)  # bytes of the last stage's gradients
    assert traffic["data"].bytes == pytest.approx(2 * 3 / 4 * stage)
    assert traffic["tensor"].s > 32 * 4 * 2 * FAST.latency_s
    # 16 layers of one micro-batch: each q and output of 4096 and k and v of 4096 values, a quarter stays at home
    swapped = step_traffic(LLAMA, replace(setup, gradient_accumulation=1), Layout(sequence=4, pipeline=2), CLUSTER)
    assert swapped["sequence"].bytes == 16 * 2 * (2 * 256 * 4 * 4096 * 2) * 3 / 4


def test_zero_three_sends_half_as_much_again() -> None:
    # arXiv:1910.02054, section 7.2.2
    volumes = [
        step_traffic(LLAMA, TrainingSetup(), Layout(data=8, zero_stage=stage), CLUSTER)["data"].bytes
        for stage in range(4)
    ]
    assert volumes[0] == volumes[1] == volumes[2]
    assert volumes[3] == pytest.approx(1.5 * volumes[0])


def test_adapters_alone_are_summed() -> None:
    lora = step_traffic(LLAMA, TrainingSetup(method="lora", rank=8), Layout(data=2), CLUSTER)
    assert lora["data"].bytes == 4_194_304 * 4  # float32 gradients, 2 (n-1)/n = 1
    for stage in range(3):
        assert not step_traffic(LLAMA, TrainingSetup(method="mezo"), Layout(data=2, zero_stage=stage), CLUSTER)
    gathered = step_traffic(LLAMA, TrainingSetup(method="mezo"), Layout(data=2, zero_stage=3), CLUSTER)["data"].bytes
    assert gathered == 2 * LLAMA.weight_bytes / 2  # for each of the two forward passes


def test_experts_are_split_and_tokens_sent_to_them() -> None:
    mixtral = replace(
        model_of("Mistral-7B"), experts=8, experts_active=2, linear_params=45_097_156_608, params_total=46_702_792_704,
        params_active=12_879_925_248,
    )  # fmt: skip
    setup = TrainingSetup(batch=1, sequence_tokens=512)
    whole = rank_memory(mixtral, setup, Layout(data=8)).parts["weights"].mid
    split = rank_memory(mixtral, setup, Layout(data=8, expert=8)).parts["weights"].mid
    experts = 2 * 32 * 8 * 3 * 4096 * 14336
    assert whole - split == pytest.approx(experts * 7 / 8, rel=1e-6)
    sent = step_traffic(mixtral, setup, Layout(data=8, expert=8), CLUSTER)["expert"].bytes
    assert sent == 32 * 4 * (2 * 512 * 4096 * 2) * 7 / 8
    # 2 replicas of each expert's quarter, 8 of all else
    dense = 2 * mixtral.params_total - experts
    summed = step_traffic(mixtral, setup, Layout(data=8, expert=4), CLUSTER)["data"].bytes
    assert summed == pytest.approx(2 * (7 / 8 * dense + 1 / 2 * experts / 4))


def test_a_decode_step_sends_two_states_for_each_layer() -> None:
    sent = decode_traffic(LLAMA, batch=3, tensor=4, link=FAST)
    assert sent.bytes == 3 * (64 * 2 * 4096 * 2 * 3 / 4 + 32000 * 2 * 3 / 4)
    assert decode_traffic(LLAMA, batch=3, tensor=1, link=FAST).bytes == 0


# ---------------------------------------------------------------- cost


def test_a_run_is_billed_by_the_hour_and_the_joule() -> None:
    cost = training_cost(TOY_MODEL, TrainingSetup(sequence_tokens=128), TOY_MACHINE, tokens=1e6)
    hours = cost.time.total.mid / 3600
    assert cost.fits
    assert 10 * 3600 * hours < cost.energy_j.mid < 40 * 3600 * hours  # between idle and busy power
    kwh = cost.energy_j.mid * 1.1 / 3.6e6
    assert cost.cost_usd.mid == pytest.approx(0.1 * hours + 0.15 * kwh)
    assert cost.carbon_gco2e.mid == pytest.approx(400 * kwh)
    assert cost.time.total.mid == pytest.approx(1e6 / cost.time.tokens_per_s.mid)


def test_padding_is_paid_for_and_not_counted() -> None:
    full, half = (
        training_time(TOY_MODEL, TrainingSetup(sequence_tokens=128, padding_ratio=share), TOY_MACHINE)
        for share in (0, 0.5)
    )
    assert half.step == full.step
    assert half.tokens_per_s.mid == pytest.approx(full.tokens_per_s.mid / 2)


def test_a_little_work_on_a_fast_device_waits_for_launches() -> None:
    fast = find_machine("a100-sxm")
    eager = training_time(TOY_MODEL, TrainingSetup(sequence_tokens=16), fast)
    # 2 passes over 8 layers of 60 operators, 12 microseconds each, less what the device does meanwhile
    assert eager.parts["launches"] + eager.parts["compute"] == pytest.approx(2 * 8 * 60 * 12e-6)
    assert "launches" in eager.step.because
    assert training_time(TOY_MODEL, TrainingSetup(sequence_tokens=16, compiled=True), fast).parts["launches"] == 0


def test_machines_are_billed_together() -> None:
    setup = TrainingSetup(sequence_tokens=128)
    cost = distributed_cost(TOY_MODEL, setup, TOY_MACHINE, Layout(data=4), CLUSTER, tokens=1e6)
    alone = training_cost(TOY_MODEL, setup, TOY_MACHINE, tokens=1e6)
    assert cost.ranks == 4
    assert alone.time.total.mid / 4 < cost.cost.time.total.mid < alone.time.total.mid
    assert cost.cost.cost_usd.mid > alone.cost_usd.mid  # the same work, and traffic to wait for
    assert sum(cost.cost.time.parts.values()) == pytest.approx(cost.cost.time.step.mid)


# ---------------------------------------------------------------- what is refused

SETUPS: list[tuple[dict[str, Any], str]] = [
    ({"method": "magic"}, "unknown method `magic`"),
    ({"optimiser": "adam9"}, "unknown optimiser"),
    ({"weight_dtype": "int3"}, "unknown weight_dtype"),
    ({"batch": 0}, "batch must be at least 1"),
    ({"rank": 0, "method": "lora"}, "rank must be at least 1"),
    ({"padding_ratio": 1.0}, "padding_ratio"),
    ({"method": "full", "base_format": "nf4"}, "changes every weight"),
    ({"method": "lora", "base_format": "q9"}, "unknown base_format"),
    ({"targets": ("x",)}, "unknown targets"),
    ({"targets": (), "method": "lora"}, "no matrix to adapt"),
    ({"method": "lomo", "gradient_accumulation": 2}, "cannot be accumulated"),
    ({"fused_optimiser": True, "gradient_accumulation": 2}, "cannot be accumulated"),
]


@pytest.mark.parametrize(("fields", "message"), SETUPS)
def test_an_impossible_setup_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        TrainingSetup(**fields)
    assert caught.value.hint and caught.value.where


LAYOUTS: list[tuple[Layout, str]] = [
    (Layout(tensor=3), "does not divide"),
    (Layout(tensor=16), "does not divide the 8 heads"),
    (Layout(tensor=4, sequence=4), "does not divide the 8 heads"),
    (Layout(pipeline=9), "more than the 8 layers"),
    (Layout(expert=2), "no experts"),
    (Layout(zero_stage=4), "zero_stage"),
    (Layout(data=0), "data must be at least 1"),
]


@pytest.mark.parametrize(("layout", "message"), LAYOUTS)
def test_an_impossible_layout_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        rank_memory(TOY_MODEL, TrainingSetup(), layout)
    assert caught.value.hint and caught.value.where


STATE_SPACE = replace(TOY_MODEL, attention_layers=0)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: training_memory(STATE_SPACE, TrainingSetup()), "layers without attention"),
    (
        lambda: training_memory(replace(TOY_MODEL, kind="encoder_decoder"), TrainingSetup()),
        "an encoder beside its decoder",
    ),
    (lambda: training_memory(replace(TOY_MODEL, kv_values_per_layer=576.0), TrainingSetup()), "latent attention"),
    (lambda: training_memory(TOY_MODEL, TrainingSetup(sequence_tokens=2048)), "beyond the context"),
    (lambda: training_cost(TOY_MODEL, TrainingSetup(), TOY_MACHINE, tokens=0), "above 0"),
    (lambda: training_cost(TOY_MODEL, TrainingSetup(), TOY_MACHINE, tokens=math.nan), "above 0"),
    (lambda: training_memory(model_of("Phi-2"), TrainingSetup(method="lora", targets=("gate",))), "no gate"),
    (lambda: Link(name="cut", bytes_per_s=0.0, latency_s=0.0), "bandwidth above 0"),
]


def test_of_a_model_without_a_formula_what_can_be_counted_is_told() -> None:
    with pytest.raises(BadInput) as caught:
        training_memory(replace(LLAMA, attention_layers=0), TrainingSetup())
    one = 2 * LLAMA.params_total / 2**30
    assert f"weights {one:.3g} GiB, gradients {one:.3g} GiB, optimiser states {2 * one:.3g} GiB" in str(
        caught.value.hint
    )
    with pytest.raises(BadInput) as caught:
        training_memory(replace(LLAMA, attention_layers=0), TrainingSetup(method="lora"))
    assert "gradients" not in str(caught.value.hint) and "weights" in str(caught.value.hint)


@pytest.mark.parametrize(("ask", "message"), REFUSED)
def test_what_has_no_answer_is_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ask()


def test_every_value_says_why() -> None:
    memory = training_memory(LLAMA, TrainingSetup(method="qlora", checkpointing=True))
    for name, value in (*memory.parts.items(), ("total", memory.total)):
        assert value.low < value.mid < value.high and value.because, name
    assert isinstance(LLAMA, Model)
