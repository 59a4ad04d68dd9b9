"""Forty ways to damage a config.json: each a sentence that names the file and the field, never a wrong number."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from knowledge_base.errors import BadInput, ExitCode
from planner.reading import read_model

GONE = object()
BASE: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "max_position_embeddings": 128, "dtype": "bfloat16",
    },
    "mamba": {
        "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 4, "expand": 2,
        "vocab_size": 320,
    },
    "starcoder2": {
        "model_type": "starcoder2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128,
    },
    "gemma3": {
        "model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "num_hidden_layers": 1},
    },
    "bart": {
        "model_type": "bart", "is_encoder_decoder": True, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "vocab_size": 320, "max_position_embeddings": 128,
    },
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}

# What is changed in which config, and what the refusal says.
DAMAGE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a million layers": ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers must be ≤ 4096, got 1000000"),
    "no layers": ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be ≥ 1, got 0"),
    "layers as text": ("llama", {"num_hidden_layers": "32"}, "num_hidden_layers must be a whole number, got '32'"),
    "layers as a list": ("llama", {"num_hidden_layers": []}, "num_hidden_layers must be a whole number, got []"),
    "hidden 0": ("llama", {"hidden_size": 0}, "hidden_size must be ≥ 1, got 0"),
    "hidden negative": ("llama", {"hidden_size": -64}, "hidden_size must be ≥ 1, got -64"),
    "hidden huge": ("llama", {"hidden_size": 2**40}, "hidden_size must be ≤ 1048576"),
    "hidden infinite": ("llama", {"hidden_size": 10.0**300}, "hidden_size must be a whole number"),
    "hidden fraction": ("llama", {"hidden_size": 64.5}, "hidden_size must be a whole number, got 64.5"),
    "hidden of each layer": ("llama", {"hidden_size": [64, 32]}, "hidden_size must be a whole number, got [64, 32]"),
    "bits below 1": ("llama", {"quantization_config": {**GPTQ, "bits": -1}}, "bits must be a whole number up to 8, got -1"),
    "hidden true": ("llama", {"hidden_size": True}, "hidden_size must be a whole number, got True"),
    "hidden object": ("llama", {"hidden_size": {"a": 1}}, "hidden_size must be a whole number"),
    "heads do not divide": ("llama", {"hidden_size": 66}, "hidden_size 66 is not a multiple of 4 heads"),
    "groups do not divide": ("llama", {"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
    "heads negative": ("llama", {"num_attention_heads": -4}, "num_attention_heads must be ≥ 1, got -4"),
    "feed-forward 0": ("llama", {"intermediate_size": 0}, "intermediate_size must be ≥ 1, got 0"),
    "vocabulary huge": ("llama", {"vocab_size": 10**10}, "vocab_size must be ≤ 4000000"),
    "vocabulary text": ("llama", {"vocab_size": "320"}, "vocab_size must be a whole number"),
    "context 0": ("llama", {"max_position_embeddings": 0}, "max_position_embeddings must be ≥ 1, got 0"),
    "context negative": ("llama", {"max_position_embeddings": -1}, "max_position_embeddings must be ≥ 1, got -1"),
    "dtype unknown": ("llama", {"dtype": "bfloat17"}, "unknown dtype `bfloat17`"),
    "a switch as text": ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
    "a switch as number": ("llama", {"attention_bias": 2}, "attention_bias must be true or false, got 2"),
    "layer types too few": ("llama", {"layer_types": ["full_attention"]}, "layer_types must name 2 layers"),
    "layer types unknown": ("llama", {"layer_types": ["full_attention", "warp"]}, "layer_types names a layer `warp`"),
    "all at their limits": ("llama", {"hidden_size": 2**20, "intermediate_size": 2**24, "num_hidden_layers": 4096,
        "num_attention_heads": 2**16, "num_key_value_heads": 2**16}, "its sizes make"),
    "no model type": ("llama", {"model_type": GONE}, "no model_type in it"),
    "model type a number": ("llama", {"model_type": 7}, "model_type must be a name, got 7"),
    "model type a path": ("llama", {"model_type": "../../etc"}, "model_type must be a name"),
    "unknown architecture": ("llama", {"model_type": "hyperlm"}, "architecture `hyperlm` is not a language model"),
    "misspelt architecture": ("llama", {"model_type": "lama"}, "nothing is predicted from config.json alone"),
    "not a language model": ("llama", {"model_type": "vit"}, "architecture `vit` is not a language model"),
    "experts beyond": ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5 of 4 experts"),
    "experts text": ("qwen3_moe", {"num_experts": "four"}, "num_experts must be a whole number"),
    "experts too many": ("qwen3_moe", {"num_experts": 4000, "num_hidden_layers": 400}, "400 layers of 4000 experts"),
    "expert width negative": ("qwen3_moe", {"moe_intermediate_size": -3}, "moe_intermediate_size must be ≥ 1, got -3"),
    "sparse step text": ("qwen3_moe", {"decoder_sparse_step": "2"}, "sizes that make no model"),
    "sparse step 0": ("qwen3_moe", {"decoder_sparse_step": 0}, "sizes that make no model"),
    "state 0": ("mamba", {"state_size": 0}, "state_size must be ≥ 1, got 0"),
    "rank negative": ("mamba", {"time_step_rank": -4}, "sizes that make no model"),
    "rank text": ("mamba", {"time_step_rank": "many"}, "time_step_rank is 'many'"),
    "nested text": ("gemma3", {"text_config": "see above"}, "text_config must be an object, got 'see above'"),
    "rope scaling": ("llama", {"rope_scaling": "x"}, "rope_scaling must be an object, got 'x'"),
    "nested layers": ("gemma3", {"text_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers must be ≤ 4096"),
    "endless eyes": ("gemma3", {"vision_config": {"num_hidden_layers": 10**8}}, "vision_config.num_hidden_layers must be"),
    "endless encoder": ("bart", {"encoder_layers": 10**8}, "encoder_layers must be ≤ 4096, got 100000000"),
    "heads of a described model": ("starcoder2", {"num_attention_heads": 5}, "5 attention heads cannot share 2"),
    "no layers stated": ("llama", {"num_hidden_layers": GONE}, "no num_hidden_layers"),
    "no width stated": ("llama", {"hidden_size": GONE}, "no hidden_size"),
    "no heads stated": ("llama", {"num_attention_heads": None}, "no num_attention_heads"),
    "no feed-forward stated": ("llama", {"intermediate_size": GONE}, "no intermediate_size"),
    "no vocabulary stated": ("llama", {"vocab_size": GONE}, "no vocab_size"),
    "no groups stated": ("qwen3_moe", {"num_key_value_heads": GONE}, "no num_key_value_heads"),
    "no experts stated": ("qwen3_moe", {"num_experts": GONE}, "no num_local_experts"),
    "no state stated": ("mamba", {"state_size": GONE}, "no state_size"),
    "no layers of a described model": ("starcoder2", {"num_hidden_layers": GONE}, "no num_hidden_layers"),
    "shared layers": ("llama", {"num_hidden_groups": 1}, "2 layers share the matrices of 1"),
    "quantised by nobody": ("llama", {"quantization_config": {"quant_method": "zip"}}, "quantised by `zip`"),
    "quantised, a list": ("llama", {"quantization_config": [4]}, "quantization_config must be an object"),
    "quantised, no bits": ("llama", {"quantization_config": {"quant_method": "awq"}}, "no bits"),
    "quantised to 400 bits": ("llama", {"quantization_config": {**GPTQ, "bits": 400}}, "bits must be a whole number up to"),
    "quantised, group text": ("llama", {"quantization_config": {**GPTQ, "group_size": "all"}}, "group_size must be"),
    "quantised, bad pattern": ("llama", {"quantization_config": {**GPTQ, "ignore": ["re:("]}}, "no regular expression"),
}  # fmt: skip


def damaged(folder: Path, kind: str, changes: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**BASE[kind], **changes}.items() if v is not GONE}))
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mamba"])
def test_the_undamaged_ones_are_read(kind: str, tmp_path: Path) -> None:
    assert read_model(damaged(tmp_path, kind, {}), weights="optional").model.params_total > 0


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_with_file_and_field(case: str, tmp_path: Path) -> None:
    kind, changes, message = DAMAGE[case]
    path = damaged(tmp_path, kind, changes)
    start = time.process_time()
    with pytest.raises(BadInput) as caught:
        read_model(path, weights="optional")
    error = caught.value
    assert message in error.message
    assert error.hint
    assert error.exit_code == ExitCode.BAD_INPUT
    assert "config.json" in str(error.where)
    assert time.process_time() - start < 3, "refused before anything is built here"


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_numbers_json_does_not_know(key: str, text: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, "llama", {key: "HERE"})
    path.write_text(path.read_text().replace('"HERE"', text))
    with pytest.raises(BadInput, match=f"{text} is not a number JSON knows"):
        read_model(path, weights="optional")


def test_the_command_tells_it_in_a_sentence(tmp_path: Path) -> None:
    path = damaged(tmp_path, "llama", {"num_hidden_layers": 10**6})
    command = [sys.executable, "-m", "planner", "estimate", str(path), "--on", "rtx-4090"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == ExitCode.BAD_INPUT
    assert "num_hidden_layers must be ≤ 4096, got 1000000" in done.stderr
    assert "Traceback" not in done.stderr
    path = damaged(tmp_path, "llama", {})
    done = subprocess.run(
        [*command, "--prompt-tokens", "4096"], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == ExitCode.BAD_INPUT
    assert "more than the model's 128" in done.stderr


def test_what_weight_files_tell_of_an_unknown_architecture(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"layers.0.weight": np.zeros((1000, 500), np.float32)}, tmp_path / "model.safetensors")
    path = damaged(tmp_path, "llama", {"model_type": "hyperlm"})
    with pytest.raises(BadInput, match=r"its weight files tell 0.002 GB.*not predicted"):
        read_model(path, weights="optional")
