"""Scales and rotations folded into weights: the model computes what it did, and what is then rounded loses less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_sessions import calibration, load, session_of, tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM

from knowledge_base import rules
from knowledge_base.errors import CandidateFailed
from knowledge_base.registry import techniques
from knowledge_base.techniques import _folding, activation_int8_static, rotate, scale_awq, smooth_quant, weight_int4
from knowledge_base.techniques._blocks import Matrix, Moments
from knowledge_base.techniques._rotation_module import Rotation
from knowledge_base.techniques._static_module import Int8StaticLinear, best_step
from knowledge_base.types import Session, Step

_SIZES = {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
_GPT2 = {
    "n_embd": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OPT = {**_SIZES, "ffn_dim": 256, "word_embed_proj_dim": 128}
CONFIGS = {
    "llama": {**_SIZES, **_GROUPED, "tie_word_embeddings": True},
    "qwen2": {**_SIZES, "num_key_value_heads": 2},
    "qwen3": {**_SIZES, **_GROUPED},
    "gemma": {**_SIZES, **_GROUPED},
    "phi3": {**_SIZES, "num_key_value_heads": 2},
    "gpt2": _GPT2,
    "gpt_neox": _SIZES,
    "opt": _OPT,
    "cohere": {**_SIZES, "num_key_value_heads": 2},
    "mixtral": {**_SIZES, **_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **_SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
    "gemma2": {**_SIZES, **_GROUPED},
    "olmo2": {**_SIZES, "num_key_value_heads": 2},
}  # fmt: skip


def random_session(architecture: str) -> Session:
    """Return a session on a model whose every weight, gain and bias is drawn, so that none is missed for being 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **CONFIGS[architecture]))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    model.tie_weights()
    return Session(model=model.eval(), tokenizer=None, facts=None, calibration=calibration(4), seed=0, workspace=None)  # type: ignore[arg-type]


@torch.no_grad()
def logits(session: Session) -> torch.Tensor:
    return session.model(session.calibration, use_cache=False).logits


def channels(junction: _folding.Junction) -> int:
    inputs = junction.readers[0].weight.shape[-1]
    return inputs if junction.channel_of is None else int(junction.channel_of.max()) + 1


# ---------------------------------------------------------------- folding


@pytest.mark.parametrize("architecture", CONFIGS)
def test_folded_scales_leave_the_function(architecture):
    session = random_session(architecture)
    before, generator = logits(session), torch.Generator().manual_seed(0)
    found = _folding.junctions(session)
    for layer in found:
        assert layer
        for junction in layer:
            weight = junction.readers[0].weight.clone()
            _folding.fold(junction, torch.rand(channels(junction), generator=generator) * 3 + 0.2)
            assert not torch.equal(weight, junction.readers[0].weight)
    assert (logits(session) - before).abs().max() < 1e-4


def test_every_matrix_of_a_llama_is_read_at_some_junction():
    session = random_session("llama")
    readers = [{id(r.module) for j in layer for r in j.readers} for layer in _folding.junctions(session)]
    assert [len(r) for r in readers] == [7, 7]


def test_what_is_not_unchanged_is_refused():
    session = random_session("llama")
    with (
        pytest.raises(CandidateFailed, match="changes what LlamaForCausalLM computes"),
        _folding.unchanged(session, "it"),
    ):
        session.model.model.layers[1].mlp.up_proj.weight.mul_(1.1)


def test_no_calibration_no_folding():
    session = random_session("llama")
    session.calibration = None
    for technique, knobs in ((scale_awq, {"bits": 4}), (smooth_quant, {}), (rotate, {"ends": "folded"})):
        with pytest.raises(CandidateFailed, match="calibration text"):
            technique.execute(session, **knobs)


# ---------------------------------------------------------------- scales


def with_outliers(session: Session, size: float = 30.0) -> Session:
    """Make a few channels of every junction large by folding: the same function, harder to round."""
    for layer in _folding.junctions(session):
        for junction in layer:
            scales = torch.ones(channels(junction))
            scales[3::41] = 1 / size
            _folding.fold(junction, scales)
    return session


def divergence(session: Session, before: torch.Tensor) -> float:
    wanted, given = before.log_softmax(-1), logits(session).log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean().item()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scales_win_back_what_outliers_cost_4_bits(architecture):
    lost = {}
    for steps in ("", "scaled"):
        session = with_outliers(random_session(architecture))
        before = logits(session)
        if steps:
            scale_awq.execute(session, bits=4)
            assert session.notes["scale_awq.output_error_ratio_to_nearest"] < 0.7
            assert (logits(session) - before).abs().max() < 1e-3
        weight_int4.execute(session, group_size=64)
        lost[steps] = divergence(session, before)
    assert lost["scaled"] < 0.7 * lost[""]


def test_smoothing_wins_back_what_outliers_cost_8_bit_activations():
    lost = {}
    for steps in ("", "smoothed", "turned"):
        session = with_outliers(random_session("llama"))
        before = logits(session)
        if steps == "smoothed":
            smooth_quant.execute(session)
        if steps == "turned":
            rotate.execute(session, ends="folded")
        activation_int8_static.execute(session)
        lost[steps] = divergence(session, before)
    assert lost["smoothed"] < 0.3 * lost[""]
    assert lost["turned"] < lost[""]


def test_without_outliers_scales_never_lose():
    """No scaling is among the choices, so the error calibration sees is never above that of plain rounding."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(1))
    module = torch.nn.Linear(64, 16, bias=False)
    reader = _folding.Reader(module, weight)
    junction = _folding.Junction(_folding.Rows(weight.clone(), None, torch.arange(16)), [reader])
    found = [Matrix("m", module, weight, Moments.of(x, full=False))]
    _, plain, best = scale_awq.best_scales(junction, found, 4)
    assert 0 < best <= plain
    strength, _ = smooth_quant.best_strength(junction, found)
    assert 0 <= strength < 1


# ---------------------------------------------------------------- static integers


def test_static_linear_is_the_product_of_rounded_numbers():
    weight = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
    module = Int8StaticLinear.calibrated(weight, torch.tensor([1.0, 0.0]), 0.5)
    x = torch.tensor([[1.2, -3.0], [100.0, 0.0]])
    rounded = torch.tensor([[1.0, -3.0], [63.5, 0.0]])  # steps of 0.5, cut off at 127 of them
    torch.testing.assert_close(module(x), rounded @ module.dequantised().T + torch.tensor([1.0, 0.0]))


def test_a_single_outlier_is_cut_off_and_a_flat_range_is_not():
    sample = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4, 32)
    assert best_step(weight, sample, 40.0) * 127 < 25
    flat = torch.linspace(-1, 1, 256)[:, None].repeat(1, 32)
    assert best_step(weight, flat, 1.0) * 127 == pytest.approx(1.0, abs=0.06)


# ---------------------------------------------------------------- rotations


@pytest.mark.parametrize("size", [32, 48, 64, 56, 7])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_rotations_are_orthogonal(size, keeps_mean):
    rotation = Rotation.drawn(size, 3, torch.device("cpu"), keeps_mean=keeps_mean)
    matrix = rotation.turn(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), atol=1e-5, rtol=0)
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.back(rotation.turn(x)), x, atol=1e-5, rtol=0)
    if keeps_mean:
        torch.testing.assert_close(rotation.turn(x).mean(-1), x.mean(-1), atol=1e-5, rtol=0)


def test_a_rotation_spreads_one_channel_over_all():
    turned = Rotation.drawn(256, 0, torch.device("cpu"), keeps_mean=False).turn(torch.eye(256)[5])
    torch.testing.assert_close(turned.abs(), torch.full((256,), 1 / 16))


@pytest.mark.parametrize("ends", ["folded", "online"])
@pytest.mark.parametrize("architecture", [a for a in CONFIGS if a not in ("gemma2", "olmo2")])
def test_turned_models_compute_what_they_did(architecture, ends):
    session = random_session(architecture)
    before = logits(session)
    weight = next(
        p for n, p in session.model.named_parameters() if "layers.0." in n or ("h.0." in n and p.dim() > 1)
    ).clone()
    rotate.execute(session, ends=ends)
    assert (logits(session) - before).abs().max() < 1e-4
    now = next(p for n, p in session.model.named_parameters() if "layers.0." in n or ("h.0." in n and p.dim() > 1))
    assert not torch.allclose(now, weight, atol=1e-2)


@pytest.mark.parametrize("architecture", ["gemma2", "olmo2"])
def test_norms_after_the_layer_are_refused(architecture):
    with pytest.raises(CandidateFailed, match="cannot be turned"):
        rotate.execute(random_session(architecture), ends="folded")


def test_rotations_are_compared_where_no_group_of_weights_fits():
    sizes = {**CONFIGS["llama"], "hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**sizes, "intermediate_size": 200}))
    session = session_of(tiny_folder())
    session.model = model.eval().requires_grad_(False)
    before = logits(session)
    rotate.execute(session, ends="folded")
    assert (logits(session) - before).abs().max() < 1e-4
    assert all(ratio > 0 for ratio in session.notes["rotate.output_error_ratios"])


def test_tied_tables_stay_tied_when_turned_online():
    session = session_of(tiny_folder("llama"))
    rotate.execute(session, ends="online")
    table, head = session.model.get_input_embeddings(), session.model.get_output_embeddings()
    assert table.weight.data_ptr() == head.weight.data_ptr()
    assert torch.equal(table.weight, load(tiny_folder("llama")).get_input_embeddings().weight)


@pytest.mark.parametrize("ends", ["folded", "online"])
def test_turned_artefact_is_as_large_as_claimed(ends, tmp_path):
    from knowledge_base.engines import _torch_artefact
    from planner._safetensors_header import read_header

    session = session_of(tiny_folder("llama"))
    plain = sum(p.numel() * 4 for p in session.model.parameters())
    before = logits(session)
    rotate.execute(session, ends=ends)
    _torch_artefact.save(session.model, None, tmp_path)
    stored = sum(t.stop - t.start for t in read_header(tmp_path / "model.safetensors").values())
    assert stored - plain == (512 * 128 * 4 if ends == "folded" else 10 * 128)
    session.model = _torch_artefact.load(tmp_path, torch.device("cpu"))
    assert (logits(session) - before).abs().max() < 1e-4


# ---------------------------------------------------------------- what is known of them


def test_rotation_then_scales_then_rounding():
    steps = [
        Step("weight_int4", {"group_size": 32}),
        Step("scale_awq", {"bits": 4}),
        Step("rotate", {"ends": "folded"}),
    ]
    assert [s.technique for s in rules.order(steps)] == ["rotate", "scale_awq", "weight_int4"]
    assert rules.conflict([Step("scale_awq", {"bits": 4}), Step("smooth_quant", {})])


def test_what_eases_rounding_is_predicted_to_lose_less():
    from tests_support import TOY_MODEL, TOY_WORKLOAD

    from cost_models.demand import apply_steps, demand_of

    demand = demand_of(replace(TOY_MODEL), TOY_WORKLOAD, "transformers")
    rounded = Step("weight_int4", {"group_size": 32})
    plain = apply_steps(demand, [rounded]).perplexity_ratio
    scaled = apply_steps(demand, [Step("scale_awq", {"bits": 4}), rounded]).perplexity_ratio
    both = apply_steps(demand, [Step("rotate", {"ends": "folded"}), Step("scale_awq", {"bits": 4}), rounded])
    assert 1 < scaled < plain
    assert both.perplexity_ratio == pytest.approx(scaled)  # the better of the two, not their product
    assert techniques.get("smooth_quant").rewrite(demand).perplexity_ratio == 1
