"""Experts from a dense feed-forward part: all of them together are the part it was, a router's choice is near it."""

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_WORKLOAD
from tiny_sessions import facts_of, load, logits, session_of, tiny_folder

from cost_models.demand import demand_of, step_read_bytes
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import experts_from_dense, weight_int4
from knowledge_base.techniques._blocks import decoder_layers, ffn_of
from knowledge_base.techniques.experts_from_dense import _clusters, _ridge, _split, sizes


def test_sizes_add_up():
    for ffn_size in (128, 256, 768, 4864, 11008, 14336):
        for keep in (0.5, 0.75):
            parts = sizes(ffn_size, keep)
            assert parts["shared"] + parts["experts"] * parts["size"] == ffn_size
            assert parts["size"] % 32 == 0
            assert 0 < parts["active"] < parts["experts"]
            assert (parts["shared"] + parts["active"] * parts["size"]) / ffn_size == pytest.approx(keep, abs=0.07)
    assert sizes(100, 0.5) is None


def test_neurons_that_act_together_come_together():
    pattern = torch.eye(3).repeat_interleave(4, 0) + 0.01 * torch.rand(
        12, 3, generator=torch.Generator().manual_seed(0)
    )
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        groups = _clusters(pattern[order], 3, seed)
        assert sorted(torch.cat(groups).tolist()) == list(range(12))
        assert all(len(group) == 4 for group in groups)
    assert any(all(len(set((order[g] // 4).tolist())) == 1 for g in _clusters(pattern[order], 3, s)) for s in range(3))


def test_a_linear_truth_is_found():
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    truth = torch.arange(12.0).view(2, 6)
    weight, bias = _ridge(x, x @ truth.T + torch.tensor([3.0, -1.0]))
    assert torch.allclose(weight, truth, rtol=0.05, atol=0.2)
    assert torch.allclose(bias, torch.tensor([3.0, -1.0]), atol=0.2)


@torch.no_grad()
def test_all_experts_together_are_the_dense_part(monkeypatch):
    ffn = ffn_of(decoder_layers(load(tiny_folder()))[0])
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    wanted = ffn.holder(x)
    module = _split(ffn, x, 0.5, seed=0)
    near = (module(x) - wanted).norm() / wanted.norm()
    assert 0 < near < 0.9
    module.sizes["active"] = module.sizes["experts"]
    monkeypatch.setattr(experts_from_dense, "sizes", lambda size, keep: dict(module.sizes))
    everything = _split(ffn, x, 0.5, seed=0)  # every expert chosen: nothing to make up for
    assert torch.allclose(everything(x), wanted, atol=1e-4)
    alone = torch.cat([everything(row[None]) for row in x])
    assert torch.allclose(alone, wanted, atol=1e-4)


@torch.no_grad()
def test_one_token_goes_through_the_experts_many_would_send_it_to():
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    module = _split(ffn_of(decoder_layers(load(tiny_folder()))[0]), x, 0.5, seed=0)
    assert torch.allclose(torch.cat([module(row[None]) for row in x]), module(x), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral"])
def test_the_artefact_is_counted_as_predicted_and_reloads(architecture, tmp_path):
    session = session_of(tiny_folder(architecture))
    facts = facts_of(session.model)
    experts_from_dense.execute(session, keep=0.5)
    demand = experts_from_dense.rewrite(demand_of(facts, TOY_WORKLOAD, "transformers"), keep=0.5)
    assert (
        sum(p.numel() for p in session.model.parameters())
        == facts.params_total + demand.linear_params - facts.linear_params
    )
    assert step_read_bytes(demand) < 0.8 * demand.linear_bytes
    wanted = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.equal(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), wanted)


def test_experts_are_packed_like_any_matrix(tmp_path):
    session = session_of(tiny_folder())
    experts_from_dense.execute(session, keep=0.5)
    weight_int4.execute(session, group_size=32)
    assert "weight_int4.left_as_they_are" not in session.notes
    wanted = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.allclose(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), wanted, atol=1e-4)


def test_parts_that_are_no_gated_ones_are_refused():
    for architecture in ("gpt2", "mixtral"):
        session = session_of(tiny_folder(architecture))
        assert experts_from_dense.rejects(facts_of(session.model), TOY_WORKLOAD, TOY_MACHINE)
        with pytest.raises(CandidateFailed, match="gated"):
            experts_from_dense.execute(session, keep=0.5)
