"""Corrections of rounding: the best of their rank, stored beside any packed matrix, refused where there is nothing to compare."""

from dataclasses import replace

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import facts_of, logits, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import correct_low_rank, weight_int4, weight_int8, weight_low_bits
from knowledge_base.techniques._corrected_module import CorrectedLinear
from knowledge_base.techniques._low_rank_module import best_factors
from knowledge_base.techniques._packed import Int4Linear

ROUNDINGS = {
    "int8": (weight_int8, {}), "int4": (weight_int4, {"group_size": 32}), "int2": (weight_low_bits, {"bits": 2, "group_size": 32}),
}  # fmt: skip


def rounded(architecture="llama", how="int2"):
    session = session_of(tiny_folder(architecture))
    technique, knobs = ROUNDINGS[how]
    technique.execute(session, **knobs)
    return session


def test_the_correction_is_the_best_of_its_rank_on_the_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    x = torch.randn(500, 64, generator=generator) * torch.logspace(-1, 1, 64)
    packed = Int4Linear.from_weight(weight, None, group_size=32)
    error = weight - packed.dequantised()
    made = CorrectedLinear.around(packed, *best_factors(error, x.T @ x, 4))
    left = (x @ (weight - made.dequantised()).T).square().sum().item()
    optimum = torch.linalg.svdvals((x @ error.T).double())[4:].square().sum().item()
    assert left == pytest.approx(optimum, rel=0.02)
    wanted = x @ made.dequantised().T
    assert (made(x) - wanted).norm() < 0.01 * wanted.norm()  # 16-bit kernels
    assert (made(x) - x @ weight.T).norm() < 0.9 * (packed(x) - x @ weight.T).norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("how", list(ROUNDINGS))
def test_any_packed_kind_is_corrected_towards_the_unrounded_model_and_reloads(architecture, how, tmp_path):
    unchanged = logits(session_of(tiny_folder(architecture)).model)
    session = rounded(architecture, how)
    before = (logits(session.model) - unchanged).norm()
    correct_low_rank.execute(session, rank=8)
    after = logits(session.model)
    assert session.notes["correct_low_rank.output_error_ratio"] < 0.9
    assert how == "int8" or (after - unchanged).norm() < before
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.allclose(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), after, atol=1e-4)


def test_bytes_are_as_predicted():
    session = rounded()
    before = sum(b.numel() * b.element_size() for b in session.model.buffers())
    correct_low_rank.execute(session, rank=8)
    added = sum(b.numel() * b.element_size() for b in session.model.buffers()) - before
    facts = facts_of(session_of(tiny_folder()).model)
    demand = demand_of(facts, TOY_WORKLOAD, "transformers")
    assert added == correct_low_rank.rewrite(demand, rank=8).linear_bytes - demand.linear_bytes


def test_weights_that_are_not_those_of_the_files_are_refused():
    session = rounded()
    layers = session.model.model.layers
    layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj
    with pytest.raises(CandidateFailed, match=r"not its weight in the model's files"):
        correct_low_rank.execute(session, rank=8)


def test_nothing_rounded_and_ranks_that_save_nothing_are_refused():
    with pytest.raises(CandidateFailed, match="no matrix is packed"):
        correct_low_rank.execute(session_of(tiny_folder()), rank=8)
    narrow = replace(TOY_MODEL, hidden_size=64)
    assert "rank 32" in correct_low_rank.legal({"rank": 32}, narrow, TOY_WORKLOAD, TOY_MACHINE)
