"""Block types allocated to matrices: what is measured is what the file gives back, and the file obeys the allocation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf_sessions import make_session
from tiny_sessions import calibration

from cost_models.demand import demand_of
from knowledge_base.engines import _gguf_types, llama_cpp
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _sensitivity, importance_matrix, weight_gguf_mixed
from knowledge_base.techniques._blocks import Moments
from knowledge_base.techniques._gguf_choices import BlockWays
from knowledge_base.techniques.weight_gguf import BITS, stored_type
from knowledge_base.types import Session, Workload
from search.allocation import allocate

KNOBS: dict[str, Any] = {"average_bits": 4.75, "types": "k"}
TABLE = "model.embed_tokens"


def opened(place: Path, architecture: str = "llama", **options: Any) -> Session:
    session = make_session(architecture, **options)
    session.calibration, session.workspace = calibration(4, 32, 300), place
    return session


def tensors_of(folder: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / llama_cpp.FILE).tensors}


def chosen(measured: dict[str, Any], **knobs: Any) -> dict[str, str]:
    budgets = weight_gguf_mixed.budgets(measured, **KNOBS | knobs)
    return dict(allocate(measured["parts"], budgets).chosen)


@pytest.mark.parametrize(
    "type", sorted({*weight_gguf_mixed.TYPES["k"], *weight_gguf_mixed.TYPES["all"], "f16", "q5_0"})
)
@pytest.mark.parametrize("weighed", [False, True])
def test_what_is_measured_is_what_the_file_gives_back(tmp_path: Path, type: str, weighed: bool) -> None:
    session = opened(tmp_path)
    if weighed:
        importance_matrix.execute(session)
    session.storage |= {"gguf_type": "q4_k", "gguf_types": {"model.layers.1.mlp.up_proj": type}}
    llama_cpp.export(session, tmp_path / "artefact")
    tensor = tensors_of(tmp_path / "artefact")["blk.1.ffn_up.weight"]
    assert tensor.tensor_type.name.lower() == type

    module, entered = session.model.model.layers[1].mlp.up_proj, []
    handle = module.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    session.model(session.calibration)
    handle.remove()
    moments = Moments.of(torch.cat([x.reshape(-1, x.shape[-1]) for x in entered]), full=False)
    importance = _gguf_types.importance_of(moments.squares, moments.rows) if weighed else None
    rounded = _gguf_types.rounded(module.weight, type, importance)
    assert numpy.array_equal(rounded.numpy(), gguf.dequantize(tensor.data, tensor.tensor_type))
    if weighed and type not in ("q8_0", "f16"):
        assert not torch.equal(rounded, _gguf_types.rounded(module.weight, type))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_measured_allocated_and_written_within_the_bits(tmp_path: Path, architecture: str, tied: bool) -> None:
    session = opened(tmp_path, architecture, tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    measured = weight_gguf_mixed.options(session, 1e6, types="k")
    assert all(torch.equal(tensor, before[name]) for name, tensor in session.model.state_dict().items())
    tables = [n for n in measured["parts"] if n.endswith(("embed_tokens", "wte", "lm_head"))]
    assert len(tables) == (1 if tied else 2)
    for choices in measured["parts"].values():
        taken, lost = ([choices[t][what] for t in weight_gguf_mixed.K] for what in ("bytes", "loss_increase"))
        assert taken == sorted(taken) and lost[0] > lost[-1] >= 0

    session.allocation = chosen(measured)
    weight_gguf_mixed.execute(session, **KNOBS)
    llama_cpp.export(session, tmp_path / "artefact")
    stored = tensors_of(tmp_path / "artefact")
    bytes_, weights = (
        sum(f(t) for n, t in stored.items() if len(t.shape) == 2 and n != "position_embd.weight")
        for f in (lambda t: int(t.n_bytes), lambda t: int(t.n_elements))
    )
    assert 0.93 * 4.75 < 8 * bytes_ / weights <= 4.75
    assert stored["blk.0.ffn_up.weight"].tensor_type.name.lower() == next(
        stored_type(type, 256)
        for name, type in session.allocation.items()
        if ".0." in name and name.endswith(("up_proj", "c_fc"))
    )
    demand = demand_of(session.facts, Workload(prompt_tokens=16, output_tokens=16), "llama_cpp")
    told = weight_gguf_mixed.rewrite(demand, **KNOBS)
    total = told.linear_bytes + told.embedding_bytes + told.head_stored_bytes
    assert total == pytest.approx(weights * 4.75 / 8, rel=0.03)


def test_a_table_of_its_own_is_measured_where_it_is_used(tmp_path: Path) -> None:
    session = opened(tmp_path, tie_word_embeddings=False)
    model, tokens = session.model, session.calibration
    measured = _sensitivity.measure_sensitivities(session, BlockWays(("q2_k", "q4_k"), weighed=False), 1e6)
    with torch.no_grad():
        reference = model(tokens, use_cache=False).logits.log_softmax(-1)
        for name in (TABLE, "lm_head", "model.layers.1.mlp.down_proj"):
            weight = model.get_submodule(name).weight
            kept = weight.data.clone()
            weight.copy_(_gguf_types.rounded(kept, "q2_k"))
            changed = model(tokens, use_cache=False).logits.log_softmax(-1)
            weight.copy_(kept)
            expected = (reference.exp() * (reference - changed)).sum(-1).mean().item()
            assert measured[name]["q2_k"]["loss_increase"] == pytest.approx(expected, rel=0.02), name


def test_slow_types_are_left_out_where_time_is_short(tmp_path: Path) -> None:
    session = opened(tmp_path)
    measured = weight_gguf_mixed.options(session, 1e-6, types="all")
    assert session.notes["sensitivities.left_out"] == ["iq3_s", "iq4_xs"]
    assert all(choices.keys() == set(weight_gguf_mixed.K) for choices in measured["parts"].values())
    assert all(
        choices["q2_k"]["loss_increase"] > choices["q8_0"]["loss_increase"] for choices in measured["parts"].values()
    )


def test_what_is_not_measured_is_told_and_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two types that were measured, and above them."""
    session = opened(tmp_path)
    measured = weight_gguf_mixed.options(session, 1e6, types="all")["parts"]
    told = [type for type in weight_gguf_mixed.TYPES["all"] if type not in ("q2_k", "q4_k")]
    assert session.notes["sensitivities.told"] == told
    assert session.notes["sensitivities.measured"] == _sensitivity.EVERY
    for choices in measured.values():
        assert {type for type, choice in choices.items() if "next_token_change_nats" not in choice} == set(told)
    monkeypatch.setattr(BlockWays, "told", ())
    every = weight_gguf_mixed.options(session, 1e6, types="all")["parts"]
    for type, within in {"iq3_s": 0.2, "q3_k": 0.2, "iq4_xs": 0.2, "q5_k": 0.5, "q6_k": 0.5}.items():
        found, wanted = (
            sum(choices[type]["loss_increase"] for choices in parts.values()) for parts in (measured, every)
        )
        assert found == pytest.approx(wanted, rel=within), type


@pytest.mark.parametrize("types", ["k", "all"])
def test_more_bits_are_never_predicted_to_lose_more(types: str) -> None:
    demand = demand_of(make_session().facts, Workload(prompt_tokens=16, output_tokens=16), "llama_cpp")
    bits = [bits for bits in weight_gguf_mixed.RANGE["weights_bytes"][1] if types == "k" or bits <= 6]
    losses = [weight_gguf_mixed.rewrite(demand, average_bits=b, types=types).perplexity_ratio for b in bits]
    assert len(set(losses)) > 20 and losses == sorted(losses) and losses[0] >= 1


def test_rows_that_an_earlier_step_narrowed_are_told_and_allocated_in_the_bits_they_take(tmp_path: Path) -> None:
    """Rows of 416 do not divide into blocks of 256: q2_k becomes q4_0 there, and 3.25 bits cannot be reached."""
    session = opened(tmp_path, intermediate_size=416)
    measured = weight_gguf_mixed.options(session, 1e6, types="k")
    session.allocation = chosen(measured, average_bits=2.7)
    weight_gguf_mixed.execute(session, average_bits=2.7, types="k")
    taken = session.notes["weight_gguf_mixed.average_bits"]
    assert taken > 2.7
    demand = demand_of(session.facts, Workload(prompt_tokens=16, output_tokens=16), "llama_cpp")
    told = weight_gguf_mixed.rewrite(demand, average_bits=2.7, types="k")
    assert 8 * told.linear_bytes / told.linear_params == pytest.approx(taken, rel=0.01)


def test_rows_that_do_not_divide_take_the_next_wider_type(tmp_path: Path) -> None:
    session = opened(tmp_path, intermediate_size=416)
    session.allocation = dict.fromkeys([n for group in _sensitivity.matrices(session.model) for n in group], "q4_k") | {
        TABLE: "q6_k"
    }
    weight_gguf_mixed.execute(session, average_bits=6.0, types="k")
    types = session.storage["gguf_types"]
    assert types["model.layers.0.mlp.down_proj"] == "q5_0" and types["model.layers.0.mlp.up_proj"] == "q4_k"
    assert types[TABLE] == "q6_k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: None, "needs an allocation"),
        (lambda a: {k: v for k, v in a.items() if k != TABLE}, f"gives no type to `{TABLE}`"),
        (lambda a: {**a, "model.layers.9.mlp.up_proj": "q4_k"}, r"names `model\.layers\.9"),
        (lambda a: dict.fromkeys(a, "iq3_s"), "gives no type"),
        (lambda a: dict.fromkeys(a, "q8_0"), r"takes 8\.50 bits for each weight, more than 4\.75"),
    ],
)
def test_an_allocation_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    session = opened(tmp_path)
    names = [name for group in _sensitivity.matrices(session.model) for name in group]
    session.allocation = change(dict.fromkeys(names, "q4_k"))
    with pytest.raises(CandidateFailed, match=message):
        weight_gguf_mixed.execute(session, **KNOBS)
    assert not session.storage


def test_a_setting_that_no_allocation_reaches_is_refused() -> None:
    workload = Workload(prompt_tokens=16, output_tokens=16)
    wide, narrow = make_session().facts, make_session(intermediate_size=416).facts
    assert weight_gguf_mixed.legal({"average_bits": 3.25, "types": "k"}, wide, workload, None) is None  # type: ignore[arg-type]
    told = weight_gguf_mixed.legal({"average_bits": 2.5, "types": "k"}, wide, workload, None)  # type: ignore[arg-type]
    assert told is not None and f"{BITS['q2_k']:.3g} to 8.5 bits" in told
    assert weight_gguf_mixed.legal({"average_bits": 2.8, "types": "k"}, narrow, workload, None) is not None  # type: ignore[arg-type]
    assert "nothing better" in (
        weight_gguf_mixed.legal({"average_bits": 6.5, "types": "all"}, wide, workload, None) or ""
    )  # type: ignore[arg-type]
