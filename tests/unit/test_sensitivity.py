"""Measured sensitivities against the slow way, and what weight_mixed makes of an allocation."""

from __future__ import annotations

import pytest
import torch
from tiny_sessions import calibration, session_of, tiny_folder

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _packed, _sensitivity, low_rank, weight_mixed
from search.allocation import allocate_bits


@torch.no_grad()
def log_probs(model) -> torch.Tensor:
    return model(calibration(), use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "mamba"])
def test_equals_rounding_one_matrix_and_running_the_whole_model(architecture):
    session = session_of(tiny_folder(architecture))
    model = session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = _sensitivity.measure_sensitivities(session, group_size=32)
    assert found.keys() == _packed.linears(model).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())

    reference = log_probs(model)
    for name in list(found)[:: max(1, len(found) // 5)]:
        for bits in ("4", "8"):
            if bits not in found[name]:
                assert architecture == "mamba"
                continue
            weight = _packed.matrix_of(model.get_submodule(name))
            kept = weight.clone()
            weight.copy_(_sensitivity._rounded(kept, int(bits), 32))
            expected = (reference.exp() * (reference - log_probs(model))).sum(-1).mean().item()
            weight.copy_(kept)
            assert found[name][bits]["loss_increase"] == pytest.approx(expected, rel=0.02, abs=2e-7)


def test_fewer_bits_lose_more_and_take_less():
    found = _sensitivity.measure_sensitivities(session_of(tiny_folder()), group_size=32)
    for choices in found.values():
        assert choices["4"]["loss_increase"] > choices["8"]["loss_increase"] >= choices["16"]["loss_increase"] == 0
        assert choices["4"]["bytes"] < choices["8"]["bytes"] < choices["16"]["bytes"] == 4 * choices["16"]["params"]


def test_little_time_means_whole_layers_and_says_so():
    session = session_of(tiny_folder())
    found = _sensitivity.measure_sensitivities(session, time_limit_s=1e-6)
    assert session.notes == {"sensitivities.tokens": 32, "sensitivities.rounded": "a layer at a time"}
    layer = [c["4"] for name, c in found.items() if name.startswith("model.layers.0.")]
    assert len({c["loss_increase"] / c["params"] for c in layer}) <= len(layer)
    assert layer[0]["loss_increase"] / layer[0]["params"] == pytest.approx(
        layer[-1]["loss_increase"] / layer[-1]["params"]
    )


def test_no_calibration_text_is_refused():
    session = session_of(tiny_folder())
    session.calibration = None
    with pytest.raises(CandidateFailed, match="calibration"):
        _sensitivity.measure_sensitivities(session)


def test_the_allocation_is_obeyed():
    session = session_of(tiny_folder())
    allocation = dict.fromkeys(_packed.linears(session.model), 4)
    allocation["model.layers.0.mlp.down_proj"] = 16
    allocation["model.layers.1.self_attn.q_proj"] = 8
    session.allocation = allocation
    weight_mixed.execute(session, average_bits=9.0)
    kinds = {name: getattr(session.model.get_submodule(name), "kind", "dense") for name in allocation}
    assert kinds.pop("model.layers.0.mlp.down_proj") == "dense"
    assert kinds.pop("model.layers.1.self_attn.q_proj") == "int8"
    assert set(kinds.values()) == {"int4"}
    assert session.notes["weight_mixed.matrices_4_bits"] == len(kinds)


def test_the_halves_of_a_factorised_matrix_take_its_bits():
    session = session_of(tiny_folder())
    session.allocation = dict.fromkeys(_packed.linears(session.model), 8)
    low_rank.execute(session, keep=0.6)
    weight_mixed.execute(session, average_bits=9.0)
    packed = [m for m in session.model.modules() if getattr(m, "kind", "") == "int8"]
    assert len(packed) > len(session.allocation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: None, "needs an allocation"),
        (lambda a: {k: v for k, v in a.items() if "layers.1" not in k}, "gives no bits to `model.layers.1"),
        (lambda a: {**a, "model.layers.9.mlp.up_proj": 4}, r"names `model\.layers\.9"),
        (lambda a: dict.fromkeys(a, 5), "gives no bits"),
        (lambda a: dict.fromkeys(a, 8), r"takes 8\.1. bits for each weight, more than 5\.0"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(change, message):
    session = session_of(tiny_folder())
    session.allocation = change(dict.fromkeys(_packed.linears(session.model), 4))
    with pytest.raises(CandidateFailed, match=message):
        weight_mixed.execute(session, average_bits=5.0)


@pytest.mark.parametrize("average_bits", [5.0, 6.0])
def test_measured_allocated_and_packed_within_the_bits(average_bits):
    session = session_of(tiny_folder())
    session.allocation = allocate_bits(_sensitivity.measure_sensitivities(session), average_bits=average_bits).bits
    weight_mixed.execute(session, average_bits=average_bits)
    assert average_bits * 0.95 < session.notes["weight_mixed.average_bits"] <= average_bits
