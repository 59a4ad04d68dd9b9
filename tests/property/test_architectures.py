"""Laws of counting: our own tables say what transformers' model is, and counts behave as architectures do."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from public_configs import transformers_asked_here

from cost_models.demand import demand_of
from knowledge_base.types import Model, Workload
from planner.architectures import FAMILIES
from planner.reading import model, read_model

EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SAME = sorted({f.name for f in fields(Model)} - {"name", "source", "digest", "ffn_size", "max_context_tokens"})


@pytest.fixture(scope="module", autouse=True)
def asked_here() -> Iterator[None]:
    with transformers_asked_here():
        yield


def read(config: dict[str, Any], *, ours: bool = True) -> Model:
    """Return the model of a config.json, by our tables or as transformers builds it."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr(model, "family_of", lambda config: None)
        (Path(name) / "config.json").write_text(json.dumps(config))
        return read_model(Path(name) / "config.json", weights="optional").model


@st.composite
def configs(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(FAMILIES)) -> dict[str, Any]:
    """A small legal config.json of one of the families."""
    kind = draw(st.sampled_from(kinds))
    groups, shared, head = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 9))
    heads, layers = groups * shared, draw(st.integers(1, 5))
    config: dict[str, Any] = {
        "model_type": kind, "num_hidden_layers": layers, "vocab_size": draw(st.integers(2, 300)), "pad_token_id": 0,
        "hidden_size": heads * head, "num_attention_heads": heads, "intermediate_size": draw(st.integers(1, 90)),
        "max_position_embeddings": draw(st.integers(1, 200)), "dtype": draw(st.sampled_from(("float32", "bfloat16"))),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if kind not in ("gpt2", "gpt_neox", "mamba"):
        config |= {
            "num_key_value_heads": groups,
            "attention_bias": draw(st.booleans()),
            "mlp_bias": draw(st.booleans()),
        }
        config["head_dim"] = draw(st.sampled_from((head, 2 * head)))
    if FAMILIES[kind].windows not in ("none", "ask"):
        config |= {"sliding_window": draw(st.sampled_from((1, 7, 64))), "use_sliding_window": draw(st.booleans())}
        config["max_window_layers"] = draw(st.integers(0, 6))
    if kind == "gpt2":
        for old, new in (("hidden_size", "n_embd"), ("num_attention_heads", "n_head"), ("intermediate_size", "n_inner"),
                         ("num_hidden_layers", "n_layer"), ("max_position_embeddings", "n_positions")):  # fmt: skip
            config[new] = config.pop(old)
    if kind == "mamba":
        config |= {"state_size": draw(st.integers(1, 9)), "conv_kernel": draw(st.integers(2, 5)), "expand": 2}
        config["intermediate_size"] = 2 * config["hidden_size"]
    if FAMILIES[kind].experts:
        experts = draw(st.integers(1, 5))
        config |= {"num_local_experts": experts, "num_experts": experts, "moe_intermediate_size": draw(st.integers(1, 60)),
                   "num_experts_per_tok": draw(st.integers(1, experts)), "decoder_sparse_step": draw(st.integers(1, 2)),
                   "shared_expert_intermediate_size": draw(st.integers(1, 60))}  # fmt: skip
    return config


@EXAMPLES
@given(config=configs())
def test_our_tables_say_what_transformers_builds(config: dict[str, Any]) -> None:
    ours, theirs = read(config), read(config, ours=False)
    assert {n: getattr(ours, n) for n in SAME} == {n: getattr(theirs, n) for n in SAME}


@EXAMPLES
@given(config=configs(("llama", "qwen3", "gemma", "olmo2", "gpt2", "gpt_neox", "mamba", "mixtral", "phi3")))
def test_parameters_grow_by_the_same_with_every_layer(config: dict[str, Any]) -> None:
    key = "n_layer" if config["model_type"] == "gpt2" else "num_hidden_layers"
    one, two, three = (read({**config, key: layers}) for layers in (1, 2, 3))
    for what in ("params_total", "params_active", "linear_params", "kv_values_per_token", "state_bytes"):
        assert getattr(three, what) - getattr(two, what) == getattr(two, what) - getattr(one, what)
    assert three.params_total > two.params_total


@EXAMPLES
@given(config=configs(("llama", "mistral", "qwen2", "granite", "gemma2")))
def test_fewer_key_value_heads_keep_less_and_multiply_as_much(config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    each = {kv: read({**config, "num_key_value_heads": kv}) for kv in (1, config["num_key_value_heads"], heads)}
    cache = [each[kv].kv_values_per_token / kv for kv in each]
    assert cache == cache[:1] * len(cache)
    flop = {
        demand_of(m, Workload(prompt_tokens=9, output_tokens=9), "x").attention_flop_per_token_pair
        for m in each.values()
    }
    assert len(flop) == 1


@EXAMPLES
@given(config=configs(("llama", "qwen2", "gemma", "olmo2", "mixtral")))
def test_tying_saves_one_table(config: dict[str, Any]) -> None:
    tied, untied = (read({**config, "tie_word_embeddings": tie}) for tie in (True, False))
    assert untied.params_total - tied.params_total == tied.vocab_size * tied.hidden_size == tied.embedding_params


@EXAMPLES
@given(config=configs(("mixtral", "qwen2_moe", "qwen3_moe")))
def test_active_parameters_are_all_but_the_experts_not_chosen(config: dict[str, Any]) -> None:
    experts = config["num_experts"]
    active = [read({**config, "num_experts_per_tok": k}).params_active for k in range(1, experts + 1)]
    assert active[-1] == read(config).params_total
    assert len({b - a for a, b in itertools.pairwise(active)}) <= 1, "each expert more costs the same"
    assert active == sorted(active)
