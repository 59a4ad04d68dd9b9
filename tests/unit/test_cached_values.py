"""What models of every kind keep for each sequence, by hand from their papers and config.json files.

Sources: DeepSeek-V2 (arXiv:2405.04434) 2.1.2, Gemma 2 (arXiv:2408.00118), Mamba (arXiv:2312.00752), RWKV
(arXiv:2305.13048), Griffin (arXiv:2402.19427), Jamba (arXiv:2403.19887), T5 (arXiv:1910.10683).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from public_configs import ROWS, transformers_asked_here

from cost_models.case import case_of
from cost_models.demand import chains, demand_of
from cost_models.roofline import cache_bytes, decode_parts, prefill_parts
from knowledge_base.types import Model, Plan, Workload
from planner.reading import read_model

CONFIGS = {row["name"]: row["config"] for row in ROWS}


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Any]:
    def read(name: str, **changes: Any) -> Model:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[name], **changes}))
        return read_model(tmp_path / "config.json", weights="optional").model

    with transformers_asked_here():
        yield read


# name: values cached for a token, window, share of the cache in layers with it, layers that cache, bytes of state
KEPT: dict[str, tuple[int, int | None, float, int, int]] = {
    "Llama-2-7B": (2 * 32 * 32 * 128, None, 1, 32, 0),  # every head has its own keys
    "Llama-3.1-8B": (2 * 32 * 8 * 128, None, 1, 32, 0),  # 4 heads share one
    "gemma-2b": (2 * 18 * 256, None, 1, 18, 0),  # all heads share one
    "falcon-7b": (2 * 32 * 64, None, 1, 32, 0),
    "falcon-40b": (2 * 60 * 8 * 64, None, 1, 60, 0),
    "starcoder": (2 * 40 * 128, None, 1, 40, 0),
    "Mistral-7B-v0.1": (2 * 32 * 8 * 128, 4096, 1, 32, 0),
    "gemma-2-9b": (2 * 42 * 8 * 256, 4096, 1 / 2, 42, 0),
    "gemma-3-27b": (2 * 62 * 16 * 128, 1024, 52 / 62, 62, 0),
    "gpt-oss-20b": (2 * 24 * 8 * 64, 128, 1 / 2, 24, 0),
    "command-r7b": (2 * 32 * 8 * 128, 4096, 3 / 4, 32, 0),
    "Llama-4-Scout-17B-16E-text": (2 * 48 * 8 * 128, 8192, 3 / 4, 48, 0),
    "DeepSeek-V2-Lite": (27 * (512 + 64), None, 1, 27, 0),
    "DeepSeek-V3": (61 * (512 + 64), None, 1, 61, 0),
    "MiniCPM3-4B": (62 * (256 + 32), None, 1, 62, 0),
    "dbrx": (2 * 40 * 8 * 128, None, 1, 40, 0),
    "mamba-2.8b": (0, None, 1, 0, 4 * 64 * 5120 * (16 + 4)),
    "mamba2-2.7b": (0, None, 1, 0, 4 * 64 * (80 * 64 * 128 + (80 * 64 + 2 * 128) * 4)),
    "rwkv-4-169m": (0, None, 1, 0, 4 * 12 * 5 * 768),
    "Jamba-v0.1": (2 * 4 * 8 * 128, None, 1, 4, 28 * 8192 * (2 * 4 + 4 * 16)),
    "granite-4.0-h-tiny": (2 * 4 * 4 * 128, None, 1, 4, 36 * (2 * 3328 * 4 + 4 * 48 * 64 * 128)),
    "Qwen3-Next-80B-A3B": (2 * 12 * 2 * 256, None, 1, 12, 36 * (2 * 8192 * 4 + 4 * 32 * 128 * 128)),
    "recurrentgemma-2b": (2 * 8 * 256, 2048, 1, 8, 18 * 2560 * (3 * 2 + 4)),
    "LFM2-1.2B": (2 * 6 * 8 * 64, None, 1, 6, 2 * 10 * 2048 * 3),
    "t5-small": (2 * 6 * 8 * 64, None, 1, 6, 0),
    "bart-large": (2 * 12 * 16 * 64, None, 1, 12, 0),
    "bert-base-uncased": (0, None, 1, 12, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_for_each_token_and_sequence(name: str, model: Any) -> None:
    m = model(name)
    kept = (m.kv_values_per_token, m.sliding_window_tokens, m.window_share, m.attention_layers, m.state_bytes)
    assert kept == pytest.approx(KEPT[name])


def case(model: Model, prompt: int, output: int = 100) -> Any:
    workload = Workload(prompt_tokens=prompt, output_tokens=output)
    from planner.machine import find

    hardware = find("rtx-4090", Path(".leanplan"), tell=lambda text: None)
    node = chains(model, workload).node(Plan(model_digest=model.digest, engine="transformers"))
    return case_of([node], workload, hardware)


def test_a_window_caps_the_growth_of_the_layers_that_have_it(model: Any) -> None:
    all_, half = model("Mistral-7B-v0.1"), model("gemma-2-9b")
    grown = {m.name + str(t): float(cache_bytes(case(m, t))[0]) for m in (all_,) for t in (4096, 20_000)}
    assert len(set(grown.values())) == 1, "beyond its window nothing more is kept"
    short, long = (float(cache_bytes(case(half, tokens, 1))[0]) for tokens in (4095, 8191))
    assert long == pytest.approx(1.5 * short, rel=1e-3), "half of the layers go on growing"


def test_of_an_encoder_decoder_prompts_go_through_the_encoder_alone(model: Any) -> None:
    m = model("distilbart-cnn-12-6")  # 12 layers read, 6 write
    cross = 2 * 6 * 1024 * 1024  # keys and values of what was read
    assert m.encoder_params == 12 * (4 * 1024**2 + 2 * 1024 * 4096) + cross
    assert m.linear_params - m.encoder_params == 6 * (6 * 1024**2 + 2 * 1024 * 4096)
    demand = demand_of(m, Workload(prompt_tokens=9, output_tokens=9), "transformers")
    assert demand.prompt_share + demand.output_share == 1
    assert demand.prompt_pairs_ratio == 2 * 12 / 6, "both ways, in twice as many layers"
    costs = case(m, 256)
    assert demand.prompt_passes == 1 + 12 / 6, "launches of both stacks come before the first token"
    read, all_ = (
        replace(costs, demand=SimpleNamespace(**{**vars(costs.demand), "prompt_passes": 1.0, **shares}))
        for shares in ({}, {"prompt_share": 1.0, "output_share": 1.0})
    )
    assert prefill_parts(read)["weights"] == pytest.approx(demand.prompt_share * prefill_parts(all_)["weights"])
    first = prefill_parts(costs)["weights"] - prefill_parts(read)["weights"]
    assert first == pytest.approx(decode_parts(costs)["weights"]), "the first token is written by the decoder"
    assert decode_parts(costs)["weights"] == pytest.approx(demand.output_share * decode_parts(all_)["weights"])


def test_an_encoder_reads_both_ways_and_writes_nothing(model: Any) -> None:
    m = model("bert-base-uncased")
    demand = demand_of(m, Workload(prompt_tokens=9, output_tokens=9), "transformers")
    assert (m.kind, demand.kv_bytes_per_token, demand.head_flop_per_token) == ("encoder", 0, 0)
    assert demand.prompt_pairs_ratio == 2


def test_a_configs_class_decides_what_it_is(model: Any) -> None:
    assert model("Qwen3-0.6B").kind == "decoder"
    assert model("Qwen3-0.6B", architectures=["Qwen3Model"]).kind == "encoder", "embeddings are made of it"
    assert model("bert-base-uncased", architectures=None).kind == "encoder"
    assert model("t5-small", architectures=None).kind == "encoder_decoder"


# ---------------------------------------------------------------- quantised checkpoints

LINEAR = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # of Llama-3.1-8B
BLOCKS = {"weights": {"num_bits": 4, "group_size": 128, "symmetric": True, "type": "int"}, "targets": ["Linear"]}
QUANTISED: dict[str, tuple[dict[str, Any], str, float]] = {  # how, format, bits of one weight of the layers
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4", 4 + 20 / 128),
    "gptq, columns": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 8),
    "gptq, some left": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*\\.mlp\\..*": {}}}, "int4",
        ((4 + 20 / 128) * (2 * 4096 * 4096 + 2 * 4096 * 1024) + 16 * 3 * 4096 * 14336) * 32 / LINEAR,
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}, "int4", 4 + 20 / 64),
    "awq, two left": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]}, "int4",
        ((4 + 20 / 128) * 3 * 4096 * 14336 + 16 * (2 * 4096 * 4096 + 2 * 4096 * 1024)) * 32 / LINEAR,
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4", 4.5),
    "bitsandbytes, twice": ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "int4", 4 + 8 / 64 + 32 / 16384),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "float8_e4m3fn", 8 + 32 / 16384),
    "compressed": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": BLOCKS}, "ignore": ["lm_head"]}, "int4",
        4 + 16 / 128,
    ),
    "compressed, an expression": (
        {"quant_method": "compressed-tensors", "config_groups": {"g": BLOCKS}, "ignore": ["re:.*mlp\\..*_proj$"]}, "int4",
        ((4 + 16 / 128) * (2 * 4096 * 4096 + 2 * 4096 * 1024) + 16 * 3 * 4096 * 14336) * 32 / LINEAR,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case_", QUANTISED)
def test_quantised_layers_take_their_bits_and_ignored_ones_keep_theirs(case_: str, model: Any) -> None:
    how, format_, bits = QUANTISED[case_]
    plain, packed = model("Llama-3.1-8B"), model("Llama-3.1-8B", quantization_config=how)
    assert packed.params_total == plain.params_total
    assert plain.linear_params == LINEAR
    assert packed.quantised_format == format_
    assert packed.quantised_bytes == pytest.approx(LINEAR * bits / 8, rel=1e-6)
    assert packed.weight_bytes - packed.quantised_bytes == 2 * (plain.params_total - LINEAR), "tables stay bfloat16"
    demand = demand_of(packed, Workload(prompt_tokens=9, output_tokens=9), "transformers")
    assert (demand.linear_bytes, demand.weight_format) == (packed.quantised_bytes, format_)
    assert demand.kv_bytes_per_token == 2 * plain.kv_values_per_token


def test_published_files_are_as_large(model: Any) -> None:
    # openai/gpt-oss-20b: 13.76 GB of safetensors in all; deepseek-ai/DeepSeek-V3: 688.6 GB with its 11.5 B multi-token
    # prediction layer, which transformers leaves out
    assert model("gpt-oss-20b").weight_bytes / 1e9 == pytest.approx(13.76, rel=0.01)
    assert model("DeepSeek-V3").weight_bytes / 1e9 == pytest.approx(688.6 - 11.6, rel=0.01)


def test_headers_tell_the_bytes_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True, "dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = {
        "model.layers.0.mlp.packed": np.zeros(5000, np.int32),
        "model.embed_tokens.weight": np.zeros((320, 64), np.float16),
    }
    save_file(stored, tmp_path / "model.safetensors")
    read = read_model(tmp_path, weights="optional")
    others = 2 * (320 * 64 + 3 * 64)
    assert read.model.params_total == 320 * 64 + 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64
    assert read.model.weight_bytes == 4 * 5000 + 2 * 320 * 64
    assert read.model.quantised_bytes == read.model.weight_bytes - others
    assert any("those of the weight files" in note for note in read.notes)
