"""Training the scales of rounded weights: the arithmetic, that levels and bytes stay, and that the model comes nearer."""

import math

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import facts_of, session_of, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _training, embedding_int8, recover_quantised, weight_low_bits
from knowledge_base.techniques._packed import (
    Int2Linear,
    Int3Linear,
    Int4Linear,
    dequantise_groups,
    pack_all,
    unpack_bits,
)
from knowledge_base.techniques._scales_module import TrainedScales


@pytest.fixture(autouse=True)
def text_seen_again(monkeypatch):
    """These models learnt nothing, so what they gain lies in seeing the same rows again, not in text written anew."""
    monkeypatch.setattr(_training, "VIEWS_MAX", 1000)


def rounded(tmp_path, kind="int2", architecture="llama", dtype=torch.float32):
    """Return a session of rounded weights whose held-out rows repeat the training rows."""
    session = session_of(tiny_folder(architecture), dtype)
    session.workspace = tmp_path
    session.calibration = session.calibration[:3].repeat(4, 1)
    pack_all(session, "test", kind, 32)
    return session


@pytest.mark.parametrize("kind", [Int2Linear, Int3Linear, Int4Linear])
def test_product_and_gradients_are_those_of_the_dense_matrix(kind):
    generator = torch.Generator().manual_seed(0)
    packed = kind.from_weight(
        torch.randn(24, 64, generator=generator), torch.randn(24, generator=generator), group_size=32
    )
    x = torch.randn(5, 64, generator=generator)
    packed(x)  # int4 now holds its kernel's layout
    trained = TrainedScales(packed)
    mine = x.clone().requires_grad_(True)
    trained(mine).square().sum().backward()

    scales, zeros = (t.detach().clone().requires_grad_(True) for t in (trained.scales, trained.zeros))
    middle = 2 ** (kind.bits - 1)
    grouped = (trained.levels.float().unflatten(1, (2, 32)) - middle) * scales[..., None] + zeros[..., None]
    dense = x.clone().requires_grad_(True)
    (dense @ grouped.flatten(1).T + packed.bias).square().sum().backward()
    for found, wanted in ((trained.scales, scales), (trained.zeros, zeros), (mine, dense)):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-4, atol=1e-3)


def test_it_computes_with_the_scales_that_will_be_stored():
    trained = TrainedScales(Int2Linear.from_weight(torch.randn(8, 32), None, group_size=32))
    with torch.no_grad():
        trained.scales += 1e-5  # lost in 8 bits of mantissa
        trained.scales *= 1.0173
    x = torch.eye(32)
    assert torch.allclose(trained(x).T, trained.packed(torch.float32).dequantised(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture", "dtype"), [
    ("int2", "llama", torch.float32), ("int3", "gpt2", torch.bfloat16), ("int4", "mixtral", torch.float32),
    ("int2", "llama", torch.float16),
])  # fmt: skip
def test_the_model_comes_nearer_and_levels_and_bytes_stay(tmp_path, kind, architecture, dtype):
    session = rounded(tmp_path, kind, architecture, dtype)
    old = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    recover_quantised.execute(session, steps=20)
    before, after = session.notes["recover_quantised.heldout_kl_nats"]
    assert after < 0.97 * before
    new = session.model.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {n: (t.shape, t.dtype) for n, t in old.items()}
    changed = {name.rpartition(".")[2] for name, tensor in new.items() if not torch.equal(tensor, old[name])}
    assert changed == {"scales_and_zeros"}
    assert not any(p.requires_grad for p in session.model.parameters())


def test_a_table_of_few_bits_stays_as_it_is(tmp_path):
    session = rounded(tmp_path, "int2", "llama", torch.float32)
    embedding_int8.execute(session, bits=4)
    table = session.model.get_input_embeddings()
    old = {name: tensor.clone() for name, tensor in table.state_dict().items()}
    recover_quantised.execute(session, steps=20)
    before, after = session.notes["recover_quantised.heldout_kl_nats"]
    assert after < before
    assert session.model.get_input_embeddings() is table
    assert all(torch.equal(tensor, old[name]) for name, tensor in table.state_dict().items())


def test_the_levels_survive_packing():
    packed = Int3Linear.from_weight(torch.randn(16, 64), None, group_size=64)
    again = TrainedScales(packed).packed(torch.float32)
    assert torch.equal(again.packed, packed.packed)
    assert torch.equal(again.scales_and_zeros, packed.scales_and_zeros)
    both = packed.scales_and_zeros.float()
    wanted = dequantise_groups(unpack_bits(packed.packed, 3), both[..., 0].T, both[..., 1].T, 3)
    assert torch.allclose(again.dequantised(), wanted)


def test_failures_are_sentences(tmp_path):
    with pytest.raises(CandidateFailed, match="no matrix is held in groups") as failed:
        recover_quantised.execute(session_of(tiny_folder()), steps=20)
    assert failed.value.kind == "unsupported"
    session = rounded(tmp_path)
    session.calibration = session.calibration[:3]
    with pytest.raises(CandidateFailed, match="at least 4 rows"):
        recover_quantised.execute(session, steps=20)
    mamba = facts_of(session_of(tiny_folder("mamba")).model)
    assert "no scale can be trained" in recover_quantised.rejects(mamba, TOY_WORKLOAD, TOY_MACHINE)


def test_prediction_undoes_part_of_the_rounding_and_keeps_the_bytes():
    demand = weight_low_bits.rewrite(demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers"), bits=2, group_size=64)
    found = [recover_quantised.rewrite(demand, steps=steps) for steps in (20, 60, 200)]
    losses = [math.log(after.perplexity_ratio) for after in found]
    assert math.log(demand.perplexity_ratio) > losses[0] > losses[1] > losses[2] > 0
    assert {after.linear_bytes for after in found} == {demand.linear_bytes}
    assert demand.build_flop < found[0].build_flop < found[2].build_flop
