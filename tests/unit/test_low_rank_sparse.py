"""Matrices as thin factors and a sparse rest: nearer than either alone at the same size, stored and counted as claimed."""

from dataclasses import replace

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import facts_of, logits, session_of, tiny_folder
from torch import nn

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import low_rank_sparse
from knowledge_base.techniques._blocks import decoder_layers
from knowledge_base.techniques._low_rank_module import best_factors
from knowledge_base.techniques._low_rank_sparse_module import LowRankSparseLinear
from knowledge_base.techniques._sparsity import change_of_outputs
from knowledge_base.techniques.low_rank_sparse import _fitted, taken_apart


def problem(outputs=192, inputs=256, rank=8):
    """Return a matrix of low rank with a few weights that stand out, and the moments of its uneven inputs."""
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(outputs, rank, generator=generator) @ torch.randn(rank, inputs, generator=generator)
    rest = 6 * torch.randn(outputs, inputs, generator=generator)
    rest[torch.rand(outputs, inputs, generator=generator) > 0.1] = 0.0
    x = torch.randn(2000, inputs, generator=generator) * torch.logspace(-1, 1, inputs)
    return thin + rest, x.T @ x / len(x)


def numbers(rest, factors):
    return int((rest != 0).sum()) + sum(part.numel() for part in factors or ())


@pytest.mark.parametrize("kept", [0.3, 0.45])
def test_nearer_than_zeros_alone_and_than_factors_alone_of_the_same_size(kept):
    weight, hessian = problem()
    rest, factors = taken_apart(weight, hessian, kept)
    assert factors is not None
    assert numbers(rest, factors) == pytest.approx(kept * weight.numel(), abs=1)
    error = change_of_outputs(weight, rest + factors[0] @ factors[1], hessian)
    zeros_alone, alone, _ = _fitted(weight, hessian, kept, 0.0)
    assert numbers(alone, None) == pytest.approx(kept * weight.numel(), abs=1)
    expand, reduce = best_factors(weight, hessian, int(kept * weight.numel() / sum(weight.shape)))
    assert error < 0.5 * zeros_alone
    assert error < 0.5 * change_of_outputs(weight, (expand @ reduce).float(), hessian)


def test_factors_are_left_out_where_they_do_not_pay():
    _, hessian = problem()
    weight = torch.diag(torch.arange(1.0, 257.0))  # of full rank and sparse already
    rest, factors = taken_apart(weight, hessian, 0.3)
    assert factors is None
    assert torch.allclose(rest, weight, atol=1e-5)


def test_inputs_never_seen_are_survived():
    weight, hessian = problem()
    hessian[5:] = 0
    hessian[:, 5:] = 0
    rest, factors = taken_apart(weight, hessian, 0.4)
    near = rest if factors is None else rest + factors[0] @ factors[1]
    assert torch.isfinite(near).all()
    assert change_of_outputs(weight, near, hessian) < 0.05 * change_of_outputs(
        weight, torch.zeros_like(weight), hessian
    )


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.bfloat16), ("gpt2", torch.float32)])
def test_stored_as_claimed_and_loaded_as_ordinary_matrices(architecture, dtype, tmp_path):
    session = session_of(tiny_folder(architecture), dtype)
    facts = facts_of(session.model)
    low_rank_sparse.execute(session, keep=0.5)
    layers = decoder_layers(session.model)
    stored = sum(t.numel() * t.element_size() for m in layers.modules() if hasattr(m, "present") for t in m.buffers())
    demand = low_rank_sparse.rewrite(demand_of(facts, TOY_WORKLOAD, "transformers"), keep=0.5)
    assert stored == pytest.approx(demand.linear_bytes * demand.disk_share, rel=0.02)
    assert any(session.notes["low_rank_sparse.ranks"].values())
    now = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    loaded = _torch_artefact.load(tmp_path, torch.device("cpu"))
    assert not any(hasattr(m, "present") for m in loaded.modules())
    assert torch.allclose(logits(loaded), now, atol=1e-5)


def test_a_stored_form_adds_its_parts_up_and_refuses_a_rank_it_cannot_have():
    weight, hessian = problem()
    rest, factors = taken_apart(weight, hessian, 0.4)
    bias = torch.arange(192.0)
    module = LowRankSparseLinear.from_parts(rest, *factors, bias)
    x = torch.randn(3, 256)
    wanted = nn.functional.linear(x, rest + factors[0] @ factors[1], bias)
    assert torch.allclose(module(x), wanted, atol=1e-3)
    assert torch.allclose(module.dequantised()[5:7], module.rows(slice(5, 7), torch.float32), atol=1e-4)
    empty = LowRankSparseLinear.from_spec(256, 192, True, torch.float32, **module.spec())
    assert empty.state_dict().keys() == module.state_dict().keys()
    with pytest.raises(CandidateFailed, match="cannot be held as low_rank_sparse"):
        LowRankSparseLinear.from_spec(256, 192, True, torch.float32, nonzeros=10, rank=193)


def test_experts_and_missing_text_are_refused():
    assert "experts" in low_rank_sparse.rejects(replace(TOY_MODEL, experts=8), TOY_WORKLOAD, TOY_MACHINE)
    session = session_of(tiny_folder("mixtral"))
    with pytest.raises(CandidateFailed, match="experts stored as 3-D weights"):
        low_rank_sparse.execute(session, keep=0.5)
    session = session_of(tiny_folder())
    session.calibration = None
    with pytest.raises(CandidateFailed, match="calibration text"):
        low_rank_sparse.execute(session, keep=0.5)
