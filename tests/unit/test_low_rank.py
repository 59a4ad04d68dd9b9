"""Low-rank factorisation: the best factors for the inputs; stored, loaded and counted as claimed."""

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import facts_of, logits, session_of, tiny_folder
from torch import nn

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import low_rank
from knowledge_base.techniques._blocks import decoder_layers
from knowledge_base.techniques._low_rank_module import LowRankLinear
from knowledge_base.techniques._packed import linears, pack

DENSE = ("llama", "gpt2", "qwen2", "mistral")


def skewed_problem(outputs=24, inputs=32, rows=400):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(-1.5, 1, inputs)
    x = torch.randn(rows, inputs, generator=generator) @ mix
    return weight, x


def test_whitened_factors_reach_the_optimum_and_beat_plain_svd():
    weight, x = skewed_problem()
    rank = 8
    module = LowRankLinear.factorise(weight, None, x.T @ x, rank=rank)
    lost = (module(x) - x @ weight.T).square().sum().item()
    # Eckart-Young on the outputs themselves: no rank-8 map of these inputs loses less.
    optimum = torch.linalg.svdvals((x @ weight.T).double())[rank:].square().sum()
    assert lost == pytest.approx(optimum.item(), rel=1e-3)
    u, s, vh = torch.linalg.svd(weight)
    plain = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert lost < 0.5 * (x @ (plain - weight).T).square().sum()


def test_full_rank_changes_nothing():
    weight, x = skewed_problem()
    bias = torch.arange(24.0)
    module = LowRankLinear.factorise(weight, bias, x.T @ x, rank=24)
    assert torch.allclose(module(x), nn.functional.linear(x, weight, bias), atol=1e-2)


def test_inputs_never_seen_are_survived():
    weight, x = skewed_problem()
    x[:, 5:] = 0
    module = LowRankLinear.factorise(weight, None, x.T @ x, rank=8)
    assert torch.isfinite(module.reduce.weight).all()
    assert torch.allclose(module(x), x @ weight.T, atol=1e-2)  # five directions fit in rank eight


def test_spec_rebuilds_the_module():
    weight, x = skewed_problem()
    module = LowRankLinear.factorise(weight, torch.ones(24), x.T @ x, rank=8)
    empty = LowRankLinear.from_spec(32, 24, True, torch.float32, **module.spec())
    empty.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(empty(x), module(x))


@pytest.mark.parametrize(
    ("out_features", "in_features", "keep", "rank"),
    [
        (256, 256, 0.8, 96),
        (768, 256, 0.8, 160),
        (128, 256, 0.8, 64),
        (4096, 4096, 0.6, 1216),
        (64, 64, 0.6, 0),  # a rank of 32 would save nothing
        (8, 8, 0.8, 0),
    ],
)
def test_rank_is_rounded_and_saves(out_features, in_features, keep, rank):
    assert low_rank.rank_for(out_features, in_features, keep) == rank
    assert rank * (out_features + in_features) < out_features * in_features


@pytest.mark.parametrize("architecture", DENSE)
def test_factors_take_the_place_of_matrices_and_parameters_are_as_predicted(architecture):
    session = session_of(tiny_folder(architecture))
    before = facts_of(session.model)
    low_rank.execute(session, keep=0.6)
    after = sum(p.numel() for p in decoder_layers(session.model).parameters() if p.dim() > 1)
    predicted = low_rank.rewrite(demand_of(before, TOY_WORKLOAD, "transformers"), keep=0.6)
    assert after == pytest.approx(predicted.linear_params, rel=1e-6)
    assert predicted.linear_bytes == pytest.approx(4 * after)
    assert session.notes["low_rank.kept_ratio"] == pytest.approx(after / before.linear_params, rel=1e-6)
    assert any(isinstance(m, LowRankLinear) for m in session.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_artefact_holds_the_factors_and_opens_to_the_same_model(architecture, dtype, tmp_path):
    session = session_of(tiny_folder(architecture), dtype)
    low_rank.execute(session, keep=0.6)
    wanted = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.equal(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), wanted)


def test_factors_can_be_quantised_and_stored(tmp_path):
    session = session_of(tiny_folder())
    low_rank.execute(session, keep=0.6)
    names = list(linears(session.model))
    assert any(name.endswith("gate_proj.reduce") for name in names)
    assert all(pack(session.model, name, "int8") for name in names)
    wanted = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.equal(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), wanted)


def test_more_rank_is_nearer_to_the_unchanged_model():
    unchanged = logits(session_of(tiny_folder()).model)
    distance = {}
    for keep in (0.6, 0.8):
        session = session_of(tiny_folder(), rows=32)
        low_rank.execute(session, keep=keep)
        distance[keep] = (logits(session.model) - unchanged).norm().item()
    assert distance[0.8] < distance[0.6]


def test_the_same_plan_gives_bit_identical_weights():
    built = []
    for _ in range(2):
        session = session_of(tiny_folder())
        low_rank.execute(session, keep=0.6)
        built.append(session.model.state_dict())
    assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])


def test_what_cannot_be_factorised_is_refused_with_a_reason():
    for architecture, word in (("mixtral", "experts"), ("mamba", "without attention")):
        assert word in low_rank.rejects(
            facts_of(session_of(tiny_folder(architecture)).model), TOY_WORKLOAD, TOY_MACHINE
        )
    with pytest.raises(CandidateFailed, match="experts"):
        low_rank.execute(session_of(tiny_folder("mixtral")), keep=0.6)
    assert low_rank.rejects(TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE) is None
    assert low_rank.legal({"keep": 0.8}, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE) is None
