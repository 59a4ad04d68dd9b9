"""Heads, hidden size and experts removed from tiny models, and layers cut to a speed: the arithmetic, shapes, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gguf_sessions import make_session
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import calibration, facts_of, logits, reloaded, session_of, tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed, NoFeasiblePlan
from knowledge_base.techniques import merge_experts, prune_experts, prune_heads, prune_hidden, prune_to_speed
from knowledge_base.techniques._blocks import decoder_layers, ffn_of, matrix_of
from knowledge_base.techniques._experts import Mixture
from knowledge_base.techniques._structure import attention_of, columns, shrinking
from knowledge_base.types import Session

# Small models of architectures that make_tiny_model does not make.
_COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "max_position_embeddings": 256}
OTHERS = {
    "gpt_neox": {**_COMMON, "max_position_embeddings": 256},
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "qwen3": {**_GROUPED, "head_dim": 32},
    "gemma": {**_GROUPED, "head_dim": 32},
    "gemma2": {**_GROUPED, "head_dim": 32},
    "phi": {**_COMMON, "max_position_embeddings": 256},
    "bloom": {"vocab_size": 512, "hidden_size": 128, "n_layer": 3, "n_head": 4},
    "opt": {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 256,
            "max_position_embeddings": 256, "word_embed_proj_dim": 128},
    "gemma3_text": {**_GROUPED, "head_dim": 64, "sliding_window": 32},
    "olmo2": {**_GROUPED, "pad_token_id": 0},
    "qwen2_moe": {**_GROUPED, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                  "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "qwen3_moe": {**_GROUPED, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}  # fmt: skip


def session_for(architecture: str) -> Session:
    if architecture not in OTHERS:
        return session_of(tiny_folder(architecture))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(architecture, initializer_range=0.09, **OTHERS[architecture])
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    facts = facts_of(model)
    return Session(model=model, tokenizer=None, facts=facts, calibration=calibration(), seed=0, workspace=tiny_folder())


def roundtrip(session: Session, folder) -> torch.Tensor:
    _torch_artefact.save(session.model, None, folder)
    return logits(_torch_artefact.load(folder, torch.device("cpu")))


# ---------------------------------------------------------------- the arithmetic


def test_removal_is_the_least_squares_answer():
    """What stays of the matrix is what solving the normal equations for the kept inputs gives, and so is the error."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=made, dtype=torch.float64) @ torch.randn(
        6, 6, generator=made, dtype=torch.float64
    )
    weight = torch.randn(3, 6, generator=made, dtype=torch.float64)
    gram = x.T @ x
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    for removal in shrinking(weight, gram, 2, [2, 1]):
        kept = columns(removal.kept, 2)
        wanted = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ weight.T).T
        assert torch.allclose(removal.weight, wanted, atol=1e-9)
        lost = weight @ damped @ weight.T - wanted @ damped[kept] @ weight.T
        assert removal.error == pytest.approx(float(lost.trace()), rel=1e-9)


def test_the_input_that_others_can_make_up_for_goes():
    """Inputs 0 and 1 are the same: either is free to go, however large; input 2 is small and alone."""
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]
    x[:, 2] *= 0.5
    removal = next(shrinking(torch.ones(1, 3), x.T @ x, 1, [2]))
    assert 2 in removal.kept.tolist()
    assert removal.weight.sum().item() == pytest.approx(3, rel=0.02)  # the twin took over


# ---------------------------------------------------------------- heads


@pytest.mark.parametrize("where", ["each", "weakest"])
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "qwen2", "mixtral", "gpt_neox", "phi3", "qwen3", "gemma2", "opt"]
)
def test_heads_go_and_the_model_is_whole(architecture, where, tmp_path):
    session = session_for(architecture)
    before = [attention_of(layer) for layer in decoder_layers(session.model)]
    params = sum(p.numel() for p in session.model.parameters())
    try:
        prune_heads.execute(session, keep=0.5, where=where)
    except CandidateFailed as failed:
        assert (architecture, where) == ("phi3", "weakest")
        assert "config.json" in failed.message
        return
    after = [attention_of(layer) for layer in decoder_layers(session.model)]
    assert sum(a.groups for a in after) == sum(a.groups for a in before) // 2
    assert all(a.queries == b.queries and a.head_size == b.head_size for a, b in zip(after, before))
    assert sum(p.numel() for p in session.model.parameters()) < params
    assert torch.equal(roundtrip(session, tmp_path), logits(session.model))


def test_fewer_heads_everywhere_are_in_the_config_and_cache(tmp_path):
    session = session_of(tiny_folder("qwen2"))
    facts = session.facts
    prune_heads.execute(session, keep=0.5, where="each")
    config = session.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 32)
    assert torch.equal(logits(reloaded(session.model, tmp_path)), logits(session.model))
    cache = session.model(calibration(1), use_cache=True).past_key_values
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    demand = prune_heads.rewrite(demand_of(facts, TOY_WORKLOAD, "transformers"), keep=0.5, where="each")
    assert cached == 32 * demand.kv_bytes_per_token
    assert demand.linear_params == pytest.approx(facts_of(session.model).linear_params)


def test_token_by_token_with_layers_of_different_heads():
    session = session_of(tiny_folder())
    prune_heads.execute(session, keep=0.5, where="weakest")
    model, row = session.model, calibration(1)
    with torch.no_grad():
        whole = model(row, use_cache=False).logits[0]
        first = model(row[:, :20], use_cache=True)
        second = model(row[:, 20:], past_key_values=first.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits[0], second.logits[0]]), whole, atol=1e-3)


def test_the_head_that_does_nothing_goes():
    session = session_of(tiny_folder("llama"))
    for number, layer in enumerate(decoder_layers(session.model)):
        idle = slice(64 * (number % 2), 64 * (number % 2) + 64)
        layer.self_attn.o_proj.weight.data[:, idle] = 0
    wanted = logits(session.model)
    prune_heads.execute(session, keep=0.5, where="each")
    assert torch.allclose(logits(session.model), wanted, atol=1e-3)


def test_heads_refuse_what_they_cannot_do():
    assert "must stay" in prune_heads.rejects(replace(TOY_MODEL, kv_heads=1), TOY_WORKLOAD, TOY_MACHINE)
    with pytest.raises(CandidateFailed, match="no attention of a known shape"):
        prune_heads.execute(session_of(tiny_folder("mamba")), keep=0.5, where="each")
    with pytest.raises(CandidateFailed, match="rounds to all of them"):
        prune_heads.execute(session_of(tiny_folder()), keep=0.875, where="each")


# ---------------------------------------------------------------- hidden size


_BY_STRUCTURE = ("gpt2", "gpt_neox", "opt")  # their heads are the hidden size over their number in config.json


@pytest.mark.parametrize(
    "architecture",
    ["llama", "llama_untied", "qwen2", "mistral", "mixtral", "phi3", "qwen3", "gemma", "gemma2", "gemma3_text", "qwen2_moe",
     "phi", *_BY_STRUCTURE],
)  # fmt: skip
def test_hidden_size_shrinks_and_the_artefact_describes_it(architecture, tmp_path):
    session = session_for(architecture)
    tied = session.model.config.tie_word_embeddings
    heads = [(a.groups, a.queries, a.head_size) for a in map(attention_of, decoder_layers(session.model))]
    prune_hidden.execute(session, keep=0.75)
    assert session.model.config.hidden_size == 96
    assert (session.model.get_output_embeddings().weight is session.model.get_input_embeddings().weight) == bool(tied)
    assert [(a.groups, a.queries, a.head_size) for a in map(attention_of, decoder_layers(session.model))] == heads
    again = roundtrip(session, tmp_path)
    assert (tmp_path / "structure.json").exists() == (architecture in _BY_STRUCTURE)
    assert torch.equal(again, logits(session.model))


@pytest.mark.parametrize("architecture", ["llama_untied", "gpt2", "gpt_neox", "phi", "gemma2"])
def test_what_is_not_there_is_deleted_for_free(architecture):
    """States that live in 64 of 128 directions, turned at random, lose next to nothing when 32 others go."""
    session = session_for(architecture)
    made = torch.Generator().manual_seed(3)
    turned = torch.linalg.qr(torch.randn(128, 128, generator=made))[0][:, :64]
    inside = turned @ turned.T
    for layer in decoder_layers(session.model):
        for module in (attention_of(layer).out, ffn_of(layer).down):
            matrix_of(module).copy_(inside @ matrix_of(module))
            if module.bias is not None:
                module.bias.data.copy_(inside @ torch.randn(128, generator=made))
        for norm in (m for m in layer.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight.data += 0.2 * torch.randn(128, generator=made)
            norm.bias.data += 0.2 * torch.randn(128, generator=made)
    tables = [m for m in session.model.modules() if isinstance(m, torch.nn.Embedding)]
    for table in tables:
        table.weight.data.copy_(table.weight.data @ inside)
    wanted = logits(session.model).log_softmax(-1)
    prune_hidden.execute(session, keep=0.75)
    assert (logits(session.model).log_softmax(-1) - wanted).abs().max() < 0.1


def test_what_lies_in_the_narrow_space_of_centred_states_has_no_mean():
    rows = prune_hidden._without_mean(6, torch.ones((), dtype=torch.float64))
    assert torch.allclose(rows @ rows.T, torch.eye(5, dtype=torch.float64))
    assert rows.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize(("architecture", "why"), [("bloom", "found 2 norms"), ("olmo2", "norms of the hidden state")])
def test_hidden_refuses_norms_that_hold_the_state_still(architecture, why):
    with pytest.raises(CandidateFailed, match=why):
        prune_hidden.execute(session_for(architecture), keep=0.75)


def test_a_hidden_size_that_heads_do_not_divide_is_kept_where_transformers_must_build_it():
    """9 heads of 32: Llama's code takes any hidden size, GPT-2's only one that heads divide."""
    found = [prune_hidden.kept_size(a, 288, 32, 0.75) for a in ("llama", "gpt2")]
    assert found == [224, 216]
    model = replace(TOY_MODEL, architecture="gpt2", hidden_size=288, head_size=32, heads=9)
    after = prune_hidden.rewrite(demand_of(model, TOY_WORKLOAD, "transformers"), keep=0.75)
    assert after.model.hidden_size == 216


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize("technique", [prune_experts, merge_experts])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_go_with_their_rows_of_the_router(architecture, technique, tmp_path):
    session = session_for(architecture)
    before = session.model.config.num_experts if architecture != "mixtral" else 4
    technique.execute(session, keep=0.5)
    for layer in decoder_layers(session.model):
        assert ffn_of(layer).experts.down_proj.shape[0] == before // 2
        assert layer.mlp.gate.weight.shape[0] == before // 2
    assert torch.equal(roundtrip(session, tmp_path), logits(session.model))


def test_experts_that_add_nothing_go():
    session = session_of(tiny_folder("mixtral"))
    wanted = []
    for layer in decoder_layers(session.model):
        layer.mlp.experts.down_proj.data[[1, 3]] = 0
        wanted.append(layer.mlp.experts.down_proj.data[[0, 2]].clone())
    prune_experts.execute(session, keep=0.5)
    for layer, down in zip(decoder_layers(session.model), wanted):
        assert torch.equal(layer.mlp.experts.down_proj, down)


def test_equal_experts_merge_into_the_same():
    """Four experts in two pairs of equals, one of each pair with its channels in another order: merging loses nothing."""
    made = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 64, 32, generator=made), torch.randn(4, 32, 32, generator=made)
    order = torch.randperm(32, generator=made)
    for twin, head in ((1, 0), (3, 2)):
        up[twin] = up[head][torch.cat([order, order + 32])]
        down[twin] = down[head][:, order]
    experts, router = torch.nn.Module(), torch.nn.Linear(32, 4, bias=False)
    experts.gate_up_proj, experts.down_proj = torch.nn.Parameter(up), torch.nn.Parameter(down)
    with torch.no_grad():
        router.weight[1], router.weight[3] = router.weight[0], router.weight[2]
    mixture = Mixture(
        experts, router, used=torch.tensor([5.0, 3.0, 2.0, 2.0]), added=torch.tensor([9.0, 1.0, 8.0, 1.0]),
        states=torch.randn(200, 32, generator=made),
    )  # fmt: skip
    groups, _ = merge_experts.grouped(mixture, 2)
    assert groups == [[0, 1], [2, 3]]
    for group in groups:
        merged_up, merged_down = merge_experts._merged(mixture, group)
        assert torch.allclose(merged_up, up[group[0]], atol=1e-5)
        assert torch.allclose(merged_down, down[group[0]], atol=1e-5)


# ---------------------------------------------------------------- to a speed


def measured(step_s: float = 10.0) -> dict:
    part = {"4": {"loss_increase": 0.0, "seconds": 4.0}, "1": {"loss_increase": 0.5, "seconds": 1.0}}
    return {"step_s": step_s, "unchanged_s": 8.0, "parts": {"a": part, "b": part}}


def test_seconds_left_for_the_parts():
    assert prune_to_speed.budgets(measured(), speedup=1.25) == {"seconds": pytest.approx(8 - 2)}
    with pytest.raises(NoFeasiblePlan, match=r"2\.50 times as fast at most by removing heads and channels"):
        prune_to_speed.budgets(measured(), speedup=3.0)


@pytest.mark.slow
def test_options_leave_the_model_as_it_was_and_are_carried_out(tmp_path):
    session = session_of(tiny_folder("gpt2"))
    session.workspace = tmp_path
    wanted = logits(session.model)
    found = prune_to_speed.options(session, time_limit_s=2.0)
    assert torch.equal(logits(session.model), wanted)
    layers = len(decoder_layers(session.model))
    assert len(found["parts"]) == 2 * layers
    for choices in found["parts"].values():
        most = max(choices, key=int)
        assert choices[most]["loss_increase"] == 0.0
        assert all(c["seconds"] > 0 and c["loss_increase"] >= 0 for c in choices.values())
    keeps = {name: max(choices, key=int) for name, choices in found["parts"].items()}
    first, last = list(keeps)[1], list(keeps)[-2]
    session.allocation = {**keeps, first: "64", last: "1"}
    prune_to_speed.execute(session, speedup=1.25)
    assert ffn_of(decoder_layers(session.model)[0]).size == 64
    assert attention_of(decoder_layers(session.model)[-1]).groups == 1
    assert torch.equal(roundtrip(session, tmp_path / "out"), logits(session.model))


def test_speed_refuses_another_models_allocation():
    session = session_of(tiny_folder())
    with pytest.raises(CandidateFailed, match="needs an allocation"):
        prune_to_speed.execute(session, speedup=1.5)
    session.allocation = {"model.layers.0.self_attn": "9"}
    with pytest.raises(CandidateFailed, match="for another model"):
        prune_to_speed.execute(session, speedup=1.5)


@pytest.mark.parametrize(
    ("technique", "knobs", "heads"),
    [(prune_heads, {"keep": 0.75, "where": "each"}, (8, 4)), (prune_hidden, {"keep": 0.875}, (9, 3))],
)
def test_a_number_of_heads_that_transformers_would_not_read_is_told_beside(technique, knobs, heads, tmp_path):
    """Llama's code runs 6 heads at a hidden size of 256, and its config refuses them wherever it is read."""
    session = make_session(
        "llama", hidden_size=32 * heads[0], num_attention_heads=heads[0], num_key_value_heads=heads[1], vocab_size=512
    )
    session.calibration = calibration()
    technique.execute(session, **knobs)
    config = session.model.config
    assert config.hidden_size % config.num_attention_heads
    told, wanted = (config.num_attention_heads, config.num_key_value_heads, config.head_dim), logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again = _torch_artefact.load(tmp_path, torch.device("cpu"))
    assert (again.config.num_attention_heads, again.config.num_key_value_heads, again.config.head_dim) == told
    assert torch.equal(logits(again), wanted)
    _torch_artefact.save(again, None, tmp_path / "second")
    for name in ("config.json", "structure.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_configuration_that_transformers_would_not_read_is_refused_as_it_is_saved(tmp_path):
    session = session_of(tiny_folder())
    session.model.config.__dict__["rms_norm_eps"] = "small"  # past the check of the assignment
    with pytest.raises(CandidateFailed, match="transformers reads no configuration of these sizes") as refused:
        _torch_artefact.save(session.model, None, tmp_path)
    assert refused.value.kind == "unsupported"
