"""Measured sensitivities against the slow way, what an option stores, and what weight_mixed makes of an allocation."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from tiny_sessions import calibration, session_of, tiny_folder

from knowledge_base.errors import CandidateFailed, NoFeasiblePlan
from knowledge_base.registry import engines
from knowledge_base.techniques import _packed, _sensitivity, low_rank, weight_mixed
from knowledge_base.techniques._blocks import Moments
from knowledge_base.techniques._choices import EVERYTHING, Option, PackedWays, made, parse, part_of, sizes, weights_of
from knowledge_base.techniques.weight_gptq import compensated_or_nearest
from search.allocation import allocate


@pytest.fixture
def session(tmp_path):
    found = session_of(tiny_folder())
    found.workspace = tmp_path
    return found


def opened(architecture: str, tmp_path):
    found = session_of(tiny_folder(architecture))
    found.workspace = tmp_path
    return found


BITS = {"average_bits": 4.5, "choose": "bits", "speedup": 0.0}


def chosen(measured: dict, knobs: dict) -> dict[str, str]:
    budgets = weight_mixed.budgets(measured, **knobs)
    return dict(allocate(measured["parts"], budgets, ties=measured["ties"]).chosen)


@torch.no_grad()
def log_probs(model, tokens=None) -> torch.Tensor:
    return model(calibration() if tokens is None else tokens, use_cache=False).logits.log_softmax(-1)


# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_equals_changing_one_matrix_and_running_the_whole_model(architecture, tmp_path):
    session = opened(architecture, tmp_path)
    model = session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = _sensitivity.measure_sensitivities(session, PackedWays((Option(3), Option(8)), 32), 1e6)
    assert session.notes["sensitivities.measured"] == _sensitivity.EVERY
    assert found.keys() == _packed.linears(model).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())

    reference = log_probs(model)
    for name in list(found)[:: max(1, len(found) // 3)]:
        for bits in (3, 8):
            if str(bits) not in found[name]:
                assert architecture == "mamba"
                continue
            module = model.get_submodule(name)
            weight = _packed.matrix_of(module)
            kept = weight.clone()
            weight.copy_(weights_of(made(module, Option(bits), 32, None)))
            expected = (reference.exp() * (reference - log_probs(model))).sum(-1).mean().item()
            weight.copy_(kept)
            assert found[name][str(bits)]["loss_increase"] == pytest.approx(expected, rel=0.02, abs=2e-7)


def test_fewer_bits_lose_more_and_take_less(session):
    found = _sensitivity.measure_sensitivities(session, PackedWays(group_size=32), 1e6)
    for choices in found.values():
        losses = [choices[bits]["loss_increase"] for bits in ("2", "3", "4", "8", "16")]
        taken = [choices[bits]["bytes"] for bits in ("2", "3", "4", "8", "16")]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0
        assert taken == sorted(taken) and taken[-1] == 4 * choices["16"]["params"]


def test_what_was_not_measured_is_told_within_a_factor_of_two(session, tmp_path):
    every = _sensitivity.measure_sensitivities(session, PackedWays(group_size=32), 1e6)
    layer = [name for name in every if ".layers.0." in name]
    with torch.no_grad():
        trial = _sensitivity.Trial(
            session.model, _sensitivity.decoder_layers(session.model), _sensitivity.calibration_tokens(session)
        )
        group = {name: session.model.get_submodule(name) for name in layer}
        way = {"measured": _sensitivity.ONE, "compensated": False, "left_out": []}
        told = _sensitivity._layer(trial, 0, group, PackedWays(group_size=32), way)
    for name in layer:
        assert told[name]["4"]["loss_increase"] == pytest.approx(every[name]["4"]["loss_increase"], rel=1e-3)
        for bits in ("3", "8"):
            assert 0.5 < told[name][bits]["loss_increase"] / every[name][bits]["loss_increase"] < 2


def test_little_time_means_whole_layers_and_says_so(session):
    found = _sensitivity.measure_sensitivities(session, PackedWays(), 1e-6)
    assert session.notes == {
        "sensitivities.tokens": 32, "sensitivities.measured": _sensitivity.LAYER, "sensitivities.rounded": "to nearest"
    }  # fmt: skip
    assert all(c["2"]["loss_increase"] > c["4"]["loss_increase"] > c["8"]["loss_increase"] for c in found.values())


def test_making_up_for_errors_costs_less_and_is_left_out_where_it_takes_too_long(session):
    plain = _sensitivity.measure_sensitivities(session, PackedWays(group_size=32), 1e6)
    found = _sensitivity.measure_sensitivities(session, PackedWays(group_size=32, compensated=True), 1e6)
    assert session.notes["sensitivities.rounded"] == "compensated"
    told, before = (sum(choices["3"]["loss_increase"] for choices in way.values()) for way in (found, plain))
    assert told < 0.9 * before
    _sensitivity.measure_sensitivities(session, PackedWays(group_size=32, compensated=True), 1e-6)
    assert session.notes["sensitivities.rounded"] == "to nearest"


def test_an_interrupted_measurement_goes_on_where_it_was(session, monkeypatch):
    whole = _sensitivity.measure_sensitivities(session, PackedWays(), 1e6)
    measured, real = [], _sensitivity._layer

    def stops_once(trial, index, *rest):
        if index == 2 and not measured.count("stopped"):
            measured.append("stopped")
            raise KeyboardInterrupt
        measured.append(index)
        return real(trial, index, *rest)

    monkeypatch.setattr(_sensitivity, "_layer", stops_once)
    with pytest.raises(KeyboardInterrupt):
        _sensitivity.measure_sensitivities(session, PackedWays(), 1e6)
    assert [p.name for p in session.workspace.iterdir()]
    again = _sensitivity.measure_sensitivities(session, PackedWays(), 1e6)
    assert measured[:4] == [0, 1, "stopped", 2]  # and not the first layers once more
    assert again == json.loads(json.dumps(whole))
    assert not list(session.workspace.iterdir())


def test_no_calibration_text_is_refused(session):
    session.calibration = None
    with pytest.raises(CandidateFailed, match="calibration"):
        _sensitivity.measure_sensitivities(session, PackedWays())


# ---------------------------------------------------------------- what an option is


def test_options_and_their_text():
    for option in (*EVERYTHING, Option(16), Option(16, keep=0.5)):
        assert parse(str(option)) == option
    assert parse(4) == Option(4)
    assert [parse(text) for text in ("5", "", None, "4 zeros 0.5 keep 0.5", "8 zeros 0.5", "16 ")] == [None] * 6
    assert {part_of(n) for n in ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj")} == {
        "transformer.h.0.attn"
    }


@pytest.mark.parametrize("option", [o for o in (*EVERYTHING, Option(16, keep=0.5)) if o.bits], ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_an_option_takes_what_it_says(option, known):
    chance = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(128, 96, bias=False).requires_grad_(False)
    module.weight.copy_(torch.randn(96, 128, generator=chance))
    inputs = Moments.of(torch.randn(500, 128, generator=chance), full=True) if known else None
    new = made(module, option, 32, inputs)
    stored = sum(t.numel() * t.element_size() for t in new.state_dict().values())
    assert stored == sizes((96, 128), option, 32, 4 * 96 * 128)["bytes"]
    if not option.zeros:
        assert sizes((96, 128), option, 32, 4 * 96 * 128)["memory"] == stored
    error = (weights_of(new) - module.weight).square().mean() / module.weight.square().mean()
    assert error < {2: 0.2, 3: 0.05, 4: 0.25, 8: 0.7, 16: 0.7}[option.bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_what_is_made_up_for_changes_outputs_less(bits):
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 64, generator=chance) @ torch.randn(64, 64, generator=chance)
    weight = torch.randn(32, 64, generator=chance)
    seen = Moments.of(inputs, full=True)
    changes = []
    nearest = _packed.quantise_groups(weight, 32, bits)
    found = compensated_or_nearest(weight, seen.products / seen.rows, 32, bits)
    assert found.compensated
    for levels in (nearest, found.levels):
        assert levels[0].max() < 2**bits
        changes.append(((_packed.dequantise_groups(*levels, bits) - weight) @ inputs.T).square().sum().item())
    assert changes[1] < 0.6 * changes[0]


def test_a_removed_matrix_gives_its_bias():
    module = torch.nn.Linear(64, 32).requires_grad_(False)
    new = made(module, Option(0), 64, None)
    assert torch.equal(new(torch.randn(3, 64)), module.bias.expand(3, 32))
    assert sizes((32, 64), Option(0), 64, 999) == {"bytes": 0, "memory": 0}


# ---------------------------------------------------------------- what is made of an allocation


def test_the_allocation_is_obeyed(session):
    allocation = dict.fromkeys(_packed.linears(session.model), "4")
    allocation["model.layers.0.mlp.down_proj"] = "16"
    allocation["model.layers.1.self_attn.q_proj"] = "8"
    allocation["model.layers.1.self_attn.k_proj"] = "2"
    allocation["model.layers.1.self_attn.v_proj"] = "3"
    session.allocation = allocation
    weight_mixed.execute(session, **{**BITS, "average_bits": 9.0})
    kinds = {name: getattr(session.model.get_submodule(name), "kind", "dense") for name in allocation}
    assert kinds.pop("model.layers.0.mlp.down_proj") == "dense"
    assert kinds.pop("model.layers.1.self_attn.q_proj") == "int8"
    assert kinds.pop("model.layers.1.self_attn.k_proj") == "int2"
    assert kinds.pop("model.layers.1.self_attn.v_proj") == "int3"
    assert set(kinds.values()) == {"int4"}
    assert session.notes["weight_mixed.matrices.4"] == len(kinds)


def test_what_is_allocated_is_the_model_as_it_is(session):
    low_rank.execute(session, keep=0.6)
    measured = weight_mixed.options(session, time_limit_s=1e6, choose="bits")
    assert any(name.endswith(".reduce") for name in measured["parts"])
    knobs = {**BITS, "average_bits": 4.0}
    session.allocation = chosen(measured, knobs)
    weight_mixed.execute(session, **knobs)
    assert 3.8 < session.notes["weight_mixed.average_bits"] <= 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: None, "needs an allocation"),
        (lambda a: {k: v for k, v in a.items() if "layers.1" not in k}, "gives no option to `model.layers.1"),
        (lambda a: {**a, "model.layers.9.mlp.up_proj": "4"}, r"names `model\.layers\.9"),
        (lambda a: dict.fromkeys(a, "5"), "gives no option"),
        (lambda a: dict.fromkeys(a, "8"), r"takes 8\.1. bits for each weight, more than 5\.0"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(session, change, message):
    session.allocation = change(dict.fromkeys(_packed.linears(session.model), "4"))
    with pytest.raises(CandidateFailed, match=message):
        weight_mixed.execute(session, **{**BITS, "average_bits": 5.0})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What everything takes in a tiny model, as the planner has it: its text read again."""
    found = opened("llama", tmp_path_factory.mktemp("measured"))
    return json.loads(json.dumps(weight_mixed.options(found, time_limit_s=1e6, choose="everything")))


@pytest.mark.slow
@pytest.mark.parametrize(("choose", "average_bits"), [("bits", 3.5), ("bits", 5.5), ("everything", 3.0)])
def test_measured_allocated_and_packed_within_the_bits(session, measured, choose, average_bits, tmp_path):
    knobs = {"average_bits": average_bits, "choose": choose, "speedup": 0.0}
    if choose == "bits":
        measured = weight_mixed.options(session, time_limit_s=1e6, choose="bits")
    session.allocation = chosen(measured, knobs)
    weight_mixed.execute(session, **knobs)
    assert average_bits * 0.95 < session.notes["weight_mixed.average_bits"] <= average_bits
    before = log_probs(session.model, calibration()[:1])
    engines.get("transformers").export(session, tmp_path / "artefact")
    running = engines.get("transformers").open_artefact(tmp_path / "artefact", {})
    assert numpy.abs(running.log_probs(calibration()[0].tolist()) - before[0].numpy()).max() < 1e-3
    running.close()


def test_everything_is_measured_and_may_be_chosen(measured):
    for name, choices in measured["parts"].items():
        assert choices.keys() == {*map(str, EVERYTHING), "16"}, name
        assert all({"bytes", "memory", "seconds", "params", "loss_increase"} <= c.keys() for c in choices.values())
        assert choices["4 zeros 0.5"]["bytes"] < choices["4"]["bytes"] == choices["4 zeros 0.5"]["memory"]
        assert choices["16"]["loss_increase"] == 0 < choices["removed"]["loss_increase"]
        assert choices["16"]["seconds"] > 0 and choices["removed"]["seconds"] < choices["2"]["seconds"]
    parts = {part_of(name) for name in measured["parts"]}
    assert len(measured["ties"]) == len(parts)
    assert {name for tie in measured["ties"] for name, option in tie if option == "removed"} == set(measured["parts"])
    few = chosen(measured, {"average_bits": 1.5, "choose": "everything", "speedup": 0.0})
    assert {"removed"} < set(few.values())
    for tie in measured["ties"]:
        assert len({few[name] == "removed" for name, _ in tie}) == 1


def test_all_three_figures_of_an_option_are_kept(measured):
    for choices in measured["parts"].values():
        assert all(-1 < choice["next_token_change_nats"] < 10 for choice in choices.values())
        errors = [choices[option]["output_error"] for option in ("2", "3", "4", "8", "16")]
        assert errors == sorted(errors, reverse=True) and errors[-1] == 0
        assert choices["removed"]["output_error"] == pytest.approx(1.0)
    removed = [choices["removed"]["next_token_change_nats"] for choices in measured["parts"].values()]
    assert any(abs(change) > 1e-4 for change in removed)


def test_memory_is_a_budget_of_its_own(measured):
    knobs = {"average_bits": 3.25, "choose": "everything", "speedup": 0.0}
    budgets = weight_mixed.budgets(measured, **knobs)
    assert budgets["memory"] == pytest.approx(1.04 * budgets["bytes"])
    zeros = {name: {"4 zeros 0.5": choices["4 zeros 0.5"]} for name, choices in measured["parts"].items()}
    assert allocate(zeros, {"bytes": budgets["bytes"]})
    with pytest.raises(NoFeasiblePlan, match="memory"):
        allocate(zeros, budgets)
    fast = {**knobs, "speedup": 1e-3}  # as slow as one likes, and what is fast in memory may be chosen
    assert allocate(zeros, weight_mixed.budgets(measured, **fast))


def test_a_speed_is_held_to_or_refused_with_what_can_be_had(measured):
    step_s, unchanged_s = measured["step_s"], measured["unchanged_s"]
    assert 0 < unchanged_s <= step_s
    least_s = sum(min(c["seconds"] for c in choices.values()) for choices in measured["parts"].values())
    fastest = step_s / (step_s - unchanged_s + least_s)
    assert fastest > 1.02
    knobs = {"average_bits": 16.0, "choose": "everything", "speedup": (1 + fastest) / 2}
    budgets = weight_mixed.budgets(measured, **knobs)
    assert budgets["seconds"] == pytest.approx(unchanged_s - (1 - 1 / knobs["speedup"]) * step_s)
    taken = chosen(measured, knobs)
    for what in ("bytes", "memory", "seconds"):
        assert sum(measured["parts"][name][option][what] for name, option in taken.items()) <= budgets[what] * (
            1 + 1e-9
        )
    with pytest.raises(NoFeasiblePlan, match=f"{fastest:.2f} times as fast at most by storing matrices in other ways"):
        weight_mixed.budgets(measured, **{**knobs, "speedup": fastest * 1.01})
    assert "seconds" not in weight_mixed.budgets(measured, **{**knobs, "speedup": 0.0})


def test_what_takes_too_long_to_make_is_left_out_and_named(session):
    found = _sensitivity.measure_sensitivities(session, PackedWays(EVERYTHING, 32), 1e-6)
    assert session.notes["sensitivities.left_out"] == ["8 keep 0.6", "8 keep 0.4"]
    assert all(choices.keys() == {"2", "3", "4", "8", "16", "4 zeros 0.5", "removed"} for choices in found.values())
