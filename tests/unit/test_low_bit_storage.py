"""Codebooks, 8-bit floats, packed tables, experts and HQQ: by hand, against the unpacked model, and through an artefact."""

from __future__ import annotations

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import logits, session_of, tiny_folder
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import (
    _codebook_module,
    _experts_module,
    _fp8_module,
    _packed,
    _table_module,
    embedding_int8,
    weight_gptq,
    weight_hqq,
    weight_int8,
    weight_low_bits,
    weight_nf4,
)
from knowledge_base.types import Step


def tensor_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def again(model, folder):
    """The model after a round through an artefact."""
    _torch_artefact.save(model, None, folder)
    return _torch_artefact.load(folder, torch.device("cpu"))


# ---------------------------------------------------------------- codebooks


@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_levels_times_the_largest_weight_are_held_exactly(levels):
    table = torch.tensor(_codebook_module.CODEBOOKS[levels])
    weight = 0.5 * table.repeat(3, 4)  # each block of 32 holds every level, and 0.5 is a bfloat16
    module = _codebook_module.CodebookLinear.from_weight(weight, None, group_size=32, levels=levels, double_quant=False)
    assert torch.allclose(module.dequantised(), weight, atol=1e-7)


def test_codebooks_are_the_published_ones():
    nf4, fp4 = (torch.tensor(_codebook_module.CODEBOOKS[name]) for name in ("nf4", "fp4"))
    assert (nf4.diff() > 0).all()
    assert nf4[7] == 0
    # QLoRA's recipe: quantiles of the normal distribution, seven below zero and eight above, over the largest
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    expected = torch.cat([below, torch.zeros(1), above.flip(0)]) / above[0]
    assert torch.allclose(nf4, expected, atol=1e-5)
    assert torch.equal(fp4[8:] * 6, torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0]))
    assert torch.equal(fp4, -fp4.flip(0))


def test_nf4_agrees_with_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = _codebook_module.CodebookLinear.from_weight(weight, None, group_size=64, levels="nf4", double_quant=False)
    assert torch.allclose(ours.dequantised(), theirs, rtol=5e-3)  # our scales are bfloat16


def test_scales_quantised_too_stay_within_half_a_step_and_save_what_is_said():
    largest = torch.rand(40, 20) + 0.5  # 800 scales: three blocks of 256 and one of 32
    held = _codebook_module.quantise_scales(largest)
    found = _codebook_module._scales(held["scales"], held["ranges"])
    assert held["ranges"].shape == (4, 2)
    assert (found - largest).abs().max() <= 0.5 / 255 * 1.01
    single, double = (
        _codebook_module.CodebookLinear.from_weight(
            torch.randn(256, 512), None, group_size=64, levels="nf4", double_quant=d
        )
        for d in (False, True)
    )
    assert tensor_bytes(single) * 8 / single.dequantised().numel() == 4.25
    assert tensor_bytes(double) * 8 / double.dequantised().numel() == pytest.approx(4.129, abs=1e-3)


def test_nf4_loses_less_than_4_bit_integers_in_the_same_blocks_on_normal_weights():
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))

    def error(module):
        return (module.dequantised() - weight).square().mean()

    # at equal bits a weight: 4.25 with one 16-bit scale for 64, or scale and zero for 128
    nf4 = _codebook_module.CodebookLinear.from_weight(weight, None, group_size=64, levels="nf4", double_quant=False)
    assert error(nf4) < error(_packed.Int4Linear.from_weight(weight, None, group_size=128))


# ---------------------------------------------------------------- 8-bit floats


def test_what_8_bit_floats_hold_exactly_comes_back():
    weight = torch.tensor([[448.0, -1.75, 0.0, 2.0**-9] * 8, [1.0, 0.5, -0.25, 0.0] * 8])
    weight[1] *= 448  # the largest of each row is the format's, so scales are 1
    module = _fp8_module.Fp8Linear.from_weight(weight, None)
    assert module.values.dtype == torch.float8_e4m3fn
    assert torch.equal(module.dequantised(), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_8_bit_floats_are_multiplied_on_gpus_that_can():
    module = _fp8_module.Fp8Linear.from_weight(torch.randn(64, 128), None)
    x = torch.randn(5, 128)
    expected = module(x)
    assert ((module.cuda()(x.cuda()).cpu() - expected).norm() / expected.norm()) < 0.05


# ---------------------------------------------------------------- HQQ


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_lowers_the_error_of_rounding(bits):
    torch.manual_seed(bits)
    weight = torch.randn(48, 256) * torch.rand(48, 1)
    weight[torch.rand_like(weight) < 0.01] *= 4  # a few outliers, as trained weights have
    found, nearest = weight_hqq.quantise(weight, 64, bits), _packed.quantise_groups(weight, 64, bits)
    errors = [(_packed.dequantise_groups(*f, bits) - weight).square().sum() for f in (found, nearest)]
    assert errors[0] < (0.7 if bits == 2 else 0.9) * errors[1]


def test_the_half_quadratic_zero_never_has_a_larger_mean_error():
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(32, 128)
    scales, zeros = _packed.group_qparams(weight, 32, 3)
    after = weight_hqq.half_quadratic(weight, scales, zeros, 3)

    def errors(zeros):
        found = _packed.dequantise_groups(_packed.levels(weight, scales, zeros, 3), scales, zeros, 3)
        return (found - weight).abs().unflatten(1, (-1, 32)).mean(2)

    assert (errors(after) <= errors(zeros) * 1.01).all()  # zeros are rounded to bfloat16
    assert errors(after).sum() < 0.95 * errors(zeros).sum()


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", [_table_module.Int8Table, _table_module.Int4Table])
def test_a_table_reads_rows_and_multiplies(kind):
    torch.manual_seed(0)
    weight = torch.randn(300, 64)
    spec = {} if kind is _table_module.Int8Table else {"group_size": 32}
    table = kind.from_weight(weight, None, **spec)
    ids = torch.tensor([[0, 299, 7], [7, 7, 1]])
    assert torch.allclose(table(ids), table.dequantised()[ids])
    states = torch.randn(2, 5, 64)
    assert ((table(states) - states @ table.dequantised().T).norm() / (states @ weight.T).norm()) < 0.006
    table.scale = 8.0
    assert torch.allclose(table(ids), 8 * table.dequantised()[ids])
    assert kind.from_spec(64, 300, False, torch.float32, **table.spec()).scale == 8.0


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama_untied", False), ("gpt2", True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_tied_table_is_stored_once(architecture, tied, bits, tmp_path):
    session = session_of(tiny_folder(architecture))
    before, unchanged = logits(session.model), tensor_bytes(session.model)
    embedding_int8.execute(session, bits=bits)
    model = session.model
    assert session.notes["embedding_int8.tied"] == tied
    assert (model.get_input_embeddings() is model.get_output_embeddings()) == tied
    now = logits(model)
    assert ((now - before).norm() / before.norm()) < (0.02 if bits == 8 else 0.3)
    loaded = again(model, tmp_path)
    assert torch.equal(logits(loaded), now)
    assert (loaded.get_input_embeddings() is loaded.get_output_embeddings()) == tied
    one = 512 * (128 + 2) if bits == 8 else 512 * (64 + 4 * 4)
    copies = 1 if tied else 2
    plain = unchanged - 2 * 512 * 128 * 4  # a state dict names a tied table twice
    stored = sum(t.stop - t.start for t in _header(tmp_path).values())
    assert stored == pytest.approx(plain + copies * one, rel=1e-3)


def test_a_head_that_was_untied_before_is_claimed_beside_the_table():
    from cost_models.demand import apply_steps, demand_of

    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    assert TOY_MODEL.tied_embeddings
    eight = Step("embedding_int8", {"bits": 8})
    turned = Step("rotate", {"ends": "folded"})  # gives the head weights of its own
    alone, after = apply_steps(demand, [eight]), apply_steps(demand, [turned, eight])
    assert alone.head_stored_bytes == 0
    assert after.head_stored_bytes == after.embedding_bytes == alone.embedding_bytes


@pytest.mark.parametrize(
    "quantised", [Step("weight_int4", {"group_size": 128}), Step("weight_nf4", {"format": "nf4", "double_quant": "no"})]
)
def test_groups_are_claimed_as_rows_allow_them(quantised, tmp_path):
    """A hidden size of 128 cut to 96 leaves rows of which 32 weights share a scale, whatever was asked for."""
    from cost_models.demand import apply_steps, demand_of
    from knowledge_base.registry import techniques

    session = session_of(tiny_folder("llama_untied"))
    steps = [Step("prune_hidden", {"keep": 0.75}), quantised]
    demand = apply_steps(demand_of(session.facts, TOY_WORKLOAD, "transformers"), steps)
    for step in steps:
        techniques.get(step.technique).execute(session, **step.knobs)
    _torch_artefact.save(session.model, None, tmp_path)
    stored = sum(t.stop - t.start for t in _header(tmp_path).values())
    claimed = demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    assert stored == pytest.approx(claimed, rel=1e-3)


def _header(folder):
    from planner._safetensors_header import read_header

    return read_header(folder / "model.safetensors")


def test_tables_that_do_something_else_are_refused():
    session = session_of(tiny_folder())

    class Odd(nn.Embedding):
        pass

    session.model.model.embed_tokens.__class__ = Odd
    with pytest.raises(CandidateFailed, match="Odd and Linear"):
        embedding_int8.execute(session, bits=8)


def test_rows_are_scaled_as_the_model_does():
    """Gemma multiplies the rows it reads; the head does without."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    session = session_of(tiny_folder())
    session.model = Gemma3ForCausalLM(config).eval()
    before = logits(session.model)
    embedding_int8.execute(session, bits=8)
    assert session.model.get_input_embeddings().scale == pytest.approx(8.0)
    assert ((logits(session.model) - before).norm() / before.norm()) < 0.03


# ---------------------------------------------------------------- experts


def qwen_moe():
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, shared_expert_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=6, num_experts_per_tok=2,
        max_position_embeddings=128, decoder_sparse_step=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_split_experts_give_the_same_and_share_memory(architecture, tmp_path):
    model = qwen_moe() if architecture == "qwen2_moe" else session_of(tiny_folder("mixtral")).model
    before = logits(model)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    _experts_module.split_experts(model)
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} <= held
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert torch.allclose(logits(again(model, tmp_path)), before, atol=1e-5)


@pytest.mark.parametrize(
    ("technique", "knobs"),
    [
        (weight_int8, {}),
        (weight_gptq, {"bits": 3, "group_size": 32}),
        (weight_nf4, {"format": "nf4", "double_quant": "yes"}),
    ],
    ids=["int8", "gptq", "nf4"],
)
def test_experts_are_packed_each_by_itself(technique, knobs, tmp_path):
    session = session_of(tiny_folder("mixtral"))
    session.model = qwen_moe()
    before = logits(session.model)
    technique.execute(session, **knobs)
    name = technique.__name__.rpartition(".")[2]
    # per layer 4 of attention, 3 of the shared expert, and two for each of 6 experts
    assert session.notes[f"{name}.matrices"] == 2 * (4 + 3 + 12)
    large = [n for n, p in session.model.model.layers.named_parameters() if p.dim() > 1 and min(p.shape) >= 8]
    assert not large
    now = logits(session.model)
    assert ((now - before).norm() / before.norm()) < 0.5
    assert torch.equal(logits(again(session.model, tmp_path)), now)


# ---------------------------------------------------------------- what is said before


def test_quantising_twice_and_odd_sizes_are_refused_with_a_sentence():
    from dataclasses import replace

    packed, odd = replace(TOY_MODEL, weight_dtype="int8"), replace(TOY_MODEL, hidden_size=100)
    for technique in (weight_low_bits, weight_hqq, weight_nf4, embedding_int8):
        assert "quantising twice" in technique.rejects(packed, TOY_WORKLOAD, TOY_MACHINE)
        knobs = {k: c.options[0] for k, c in technique.TECHNIQUE.knobs.items()}
        assert "do not divide" in technique.legal(knobs, odd, TOY_WORKLOAD, TOY_MACHINE)
    assert weight_low_bits.rejects(replace(TOY_MODEL, experts=8, experts_active=2), TOY_WORKLOAD, TOY_MACHINE) is None
