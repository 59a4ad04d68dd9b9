"""Arithmetic that cost models count, against what torch counts in a step of the real architecture, built small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from cost_models.demand import demand_of
from cost_models.predict import estimate
from knowledge_base.types import Model, Plan
from planner.reading import read_model

LATENT = {
    "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 96, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "vocab_size": 100, "max_position_embeddings": 256, "torch_dtype": "float32",
}  # fmt: skip


def read(tmp_path: Path, config: dict) -> Model:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_model(str(tmp_path / "config.json"), weights="optional").model


def decode_flop(config: dict, context: int) -> int:
    """Return what torch counts in the step after so many tokens."""
    made = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "torch_dtype"})
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    with torch.inference_mode():
        cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counted:
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return counted.get_total_flops()


def test_latent_attention_makes_keys_and_values_of_the_whole_context_at_each_step(tmp_path: Path) -> None:
    each = (decode_flop(LATENT, 96) - decode_flop(LATENT, 32)) / 64
    model = read(tmp_path, LATENT)
    demand = demand_of(model, TOY_WORKLOAD, "transformers")
    assert demand.attention_flop_per_token_pair + demand.expanding_flop_per_token == pytest.approx(each)
    absorbed = demand_of(model, TOY_WORKLOAD, "vllm")
    assert absorbed.expanding_flop_per_token == 0
    assert absorbed.attention_flop_per_token_pair > demand.attention_flop_per_token_pair


def prefill_s(model: Model, engine: str, tokens: int = 128) -> float:
    plan = Plan(model_digest="", engine=engine, steps=())
    workload = replace(TOY_WORKLOAD, prompt_tokens=tokens)
    return estimate(plan, model, workload, TOY_MACHINE).values["ttft_s"].mid


def test_a_recurrence_goes_through_its_prompt_token_by_token_where_no_kernel_does() -> None:
    recurrent = replace(TOY_MODEL, attention_layers=0, state_bytes=2**20)
    looped, chunked = (replace(recurrent, architecture=name) for name in ("mamba", "mamba2"))

    def grows(model: Model, engine: str) -> float:
        return prefill_s(model, engine, 256) - prefill_s(model, engine, 128)

    assert grows(looped, "transformers") - grows(chunked, "transformers") > 128 * TOY_MODEL.layers * 1e-6
    assert grows(looped, "llama_cpp") == grows(chunked, "llama_cpp")


def test_recurrent_state_is_computed_for_each_token_of_a_prompt() -> None:
    small, large = (replace(TOY_MODEL, state_bytes=size) for size in (2**10, 2**30))
    assert prefill_s(large, "llama_cpp") > 2 * prefill_s(small, "llama_cpp")


def test_the_first_token_waits_for_both_stacks_of_an_encoder_decoder() -> None:
    both = {"kind": "encoder_decoder", "encoder_params": TOY_MODEL.linear_params // 2}
    few, many = (prefill_s(replace(TOY_MODEL, encoder_layers=layers, **both), "transformers") for layers in (1, 13))
    assert many > few  # of as many weights: what differs is launched
