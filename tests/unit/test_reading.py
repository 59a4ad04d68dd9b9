"""Facts read from config.json and headers equal those of the model itself, instantiated by transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.architectures import FAMILIES
from planner.reading import ReadResult, check_complete, check_finite, read_model
from planner.tiny_models import ARCHITECTURES, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def get(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_tiny_model(tmp_path_factory.mktemp("tiny") / architecture, architecture)
        return made[architecture]

    return get


def on_meta(config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def truth(model: Any) -> dict[str, int]:
    """Return the counts of a transformers model by walking its modules: slow and obvious."""
    import torch

    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    linear = {}
    for name, module in model.named_modules():
        expert = hasattr(module, "gate_up_proj") and getattr(module.gate_up_proj, "ndim", 0) == 3
        router = type(module).__name__.endswith("Router")
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head:
            linear[name] = module.weight.numel()
        elif expert:
            linear[name] = module.gate_up_proj.numel() + module.down_proj.numel()
        elif router:
            linear[name] = module.weight.numel()
    assert isinstance(embeddings, torch.nn.Embedding)
    return {
        "params_total": sum(p.numel() for p in model.parameters()),
        "linear_params": sum(linear.values()),
        "embedding_params": embeddings.weight.numel(),
        "tied_embeddings": head.weight is embeddings.weight,
    }


def counts(read: ReadResult) -> dict[str, int]:
    return {
        name: getattr(read.model, name)
        for name in ("params_total", "linear_params", "embedding_params", "tied_embeddings")
    }


def write_config(folder: Path, config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = config if isinstance(config, dict) else json.loads(config.to_json_string())
    (folder / "config.json").write_text(json.dumps(data))
    return folder


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_headers_and_config_alone_tell_the_same_as_the_model(tiny: Any, architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = tiny(architecture)
    read = read_model(folder)
    assert counts(read) == truth(on_meta(AutoConfig.from_pretrained(folder)))
    assert read.model.weight_bytes == 4 * read.model.params_total
    check_complete(folder)
    check_finite(folder)
    shutil.copy(folder / "config.json", tmp_path)
    alone = read_model(tmp_path, weights="optional")
    assert alone.folder is None
    assert counts(alone) == counts(read)
    assert alone.model.weight_bytes == read.model.weight_bytes
    assert alone.model.params_active == read.model.params_active


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 24},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 48, "attention_bias": True},
    "gemma2": {"head_dim": 32},
    "gpt_neox": {"attention_bias": False},
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {"mlp_only_layers": [1], "num_experts": 5, "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40, "qkv_bias": False},
    "qwen3_moe": {"decoder_sparse_step": 2, "num_experts": 6, "moe_intermediate_size": 32},
    "mamba": {"use_bias": True, "use_conv_bias": False, "time_step_rank": 7},
}  # fmt: skip


@pytest.mark.parametrize("variant", [False, True], ids=["plain", "variant"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_counted_to_the_parameter(
    kind: str, variant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    from planner import describing

    monkeypatch.setattr(describing, "describe", lambda *_, **__: pytest.fail("transformers was asked"))
    sizes: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0,
    }  # fmt: skip
    if kind in ("gpt_neox", "gpt2"):
        sizes.pop("num_key_value_heads")
    if kind == "gpt2":
        sizes.pop("intermediate_size")
    if "moe" in kind:
        sizes |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
        }
    config = AutoConfig.for_model(kind, **{**sizes, **(VARIANTS.get(kind, {}) if variant else {})})
    read = read_model(write_config(tmp_path, config), weights="optional")
    assert counts(read) == truth(on_meta(config))


# config.json as published, reduced to the keys that decide shapes, and the published number of parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-3-70B": ({
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
            "num_hidden_layers": 80,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }, 70_553_706_496),
    "Qwen2.5-7B": ({
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_hidden_layers": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "sliding_window": 131072,
        "use_sliding_window": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }, 7_615_616_512),
    "Mixtral-8x7B": ({
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
        "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
    }, 46_702_792_704),
    "gpt2": ({
        "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "vocab_size": 50257,
    }, 124_439_808),
    "gemma-2-9b": ({
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
            "num_hidden_layers": 42,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192,
            "sliding_window": 4096,
        "torch_dtype": "float32",
    }, 9_241_705_984),
    "mamba-2.8b": ({
        "model_type": "mamba", "hidden_size": 2560, "num_hidden_layers": 64, "state_size": 16, "expand": 2,
            "conv_kernel": 4,
        "intermediate_size": 5120, "time_step_rank": 160, "vocab_size": 50280, "torch_dtype": "float32",
    }, 2_768_345_600),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str, tmp_path: Path) -> None:
    config, params = PUBLISHED[name]
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(config))
    model = read_model(path, weights="optional").model
    assert model.params_total == params
    assert model.name == name
    if name == "Mixtral-8x7B":
        assert model.params_active == 12_879_925_248  # "13B active": total less 6 of 8 experts in 32 layers
    if name == "gemma-2-9b":
        assert (model.sliding_window_tokens, model.window_share) == (4096, 0.5), "every other layer sees everything"


def test_a_dtype_that_is_not_stated_is_told(tmp_path: Path) -> None:
    told = {
        name: read_model(write_config(tmp_path / name, PUBLISHED[name][0]), weights="optional")
        for name in ("gpt2", "Llama-3-70B")
    }
    assert told["gpt2"].model.weight_dtype == "float32"
    assert [any("states no dtype" in note for note in read.notes) for read in told.values()] == [True, False]


def test_speech_models_read_no_more_than_their_positions(tmp_path: Path) -> None:
    sizes = {f"{part}_{name}": 4 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = {
        "model_type": "whisper", "is_encoder_decoder": True, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, **sizes,
        "vocab_size": 51865, "max_source_positions": 1500, "max_target_positions": 448, "num_mel_bins": 80,
    }  # fmt: skip
    assert read_model(write_config(tmp_path, config), weights="optional").model.max_context_tokens == 1500


def test_a_70b_config_is_read_without_torch_in_milliseconds(tmp_path: Path) -> None:
    write_config(tmp_path, PUBLISHED["Llama-3-70B"][0])
    code = (
        "import sys, time; from planner.reading import read_model; start = time.process_time()\n"
        f"model = read_model({str(tmp_path)!r}, weights='optional').model; spent = time.process_time() - start\n"
        "heavy = sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules))\n"
        "print(model.params_total, heavy, spent < 0.5)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "70553706496 [] True"


def test_families_outside_the_table_are_described_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "starcoder2",
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
    )
    read = read_model(write_config(tmp_path, config), weights="optional")
    assert counts(read) == truth(on_meta(config))
    assert not read.model.gated_ffn
    assert any("asked of transformers" in note for note in read.notes)


def test_nested_configs_with_sizes_left_to_defaults(tmp_path: Path) -> None:
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "sliding_window": 32,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {**vision, "image_size": 28, "patch_size": 14},
    }
    model = read_model(write_config(tmp_path, config), weights="optional").model
    assert (model.architecture, model.layers, model.heads, model.kv_heads, model.head_size) == ("gemma3", 2, 8, 4, 256)
    from transformers import AutoConfig

    whole = on_meta(AutoConfig.from_pretrained(tmp_path))
    assert model.params_total == sum(p.numel() for p in whole.parameters())
    inside = whole.get_decoder().layers
    assert model.linear_params == sum(p.numel() for p in inside.parameters() if p.ndim == 2)


# ---------------------------------------------------------------- cache and state


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_kv_values_are_those_of_the_real_cache(tiny: Any, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny(architecture)
    cache = AutoModelForCausalLM.from_pretrained(folder)(torch.zeros(1, 10, dtype=torch.long)).past_key_values
    values = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert read_model(folder).model.kv_values_per_token * 10 == values


def test_state_bytes_are_those_of_the_real_cache(tiny: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny("mamba")
    cache = AutoModelForCausalLM.from_pretrained(folder)(
        torch.zeros(1, 10, dtype=torch.long), use_cache=True
    ).cache_params
    tensors = [t for layer in cache.layers for states in (layer.conv_states, layer.recurrent_states)
               for t in (states.values() if isinstance(states, dict) else [states])]  # fmt: skip
    model = read_model(folder).model
    assert model.state_bytes == sum(t.nbytes for t in tensors)
    assert (model.attention_layers, model.kv_values_per_token) == (0, 0)


def test_windows_count_in_the_layers_that_have_one(tiny: Any) -> None:
    assert read_model(tiny("mistral")).model.sliding_window_tokens == 64
    half = read_model(tiny("qwen2")).model
    assert (half.sliding_window_tokens, half.window_share) == (64, 0.5)


def test_hybrid_layers_are_told_apart(tmp_path: Path) -> None:
    from planner.config_facts import facts_of

    base = {"model_type": "x", "num_hidden_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    mamba = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
    for extra, attending in (
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, 2),
        ({"layers_block_type": ["mamba"] * 6 + ["hybrid"] * 2}, 2),
        ({"full_attention_interval": 4}, 2),
        ({"hybrid_override_pattern": "M-M*M-M*"}, 2),
        ({"layer_types": ["linear_attention", "full_attention"] * 4}, 4),
        ({}, 8),
    ):
        facts = facts_of({**base, **mamba, **extra}, None, [], where="config.json")
        assert facts.attention_layers == attending, extra
        assert facts.state_values == ((8 - attending) or 8) * 128 * (16 + 4)


# ---------------------------------------------------------------- files


def test_shards_tell_the_same_as_one_file(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny("llama")
    shutil.copytree(folder, tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="700KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    one, many = read_model(folder), read_model(tmp_path / "sharded")
    assert counts(one) == counts(many)
    assert one.model.weight_bytes == many.model.weight_bytes
    check_complete(tmp_path / "sharded")
    check_finite(tmp_path / "sharded")


def test_old_gpt2_files_without_prefix_and_with_masks(tiny: Any, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("gpt2"), tmp_path / "old")
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert counts(read_model(folder)) == counts(read_model(tiny("gpt2")))
    assert read_model(folder).model.weight_bytes == read_model(tiny("gpt2")).model.weight_bytes
    check_complete(folder)


def test_the_digest_follows_content_only(tiny: Any, tmp_path: Path) -> None:
    folder = tiny("llama")
    copy = shutil.copytree(folder, tmp_path / "another name", copy_function=shutil.copyfile)
    (copy / "notes.txt").write_text("not part of the model")
    assert read_model(copy).model.digest == read_model(folder).model.digest
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        changed = shutil.copytree(folder, tmp_path / f"changed-{name}")
        data = bytearray((changed / name).read_bytes())
        if name == "model.safetensors":
            data[-3] ^= 1
        else:
            data += b"\n"
        (changed / name).write_bytes(data)
        assert read_model(changed).model.digest != read_model(folder).model.digest, name


def test_large_files_are_sampled(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.reading import files

    monkeypatch.setattr(files, "WHOLE_DIGEST_BYTES", 2**20)
    folder = shutil.copytree(tiny("llama"), tmp_path / "model")
    before = read_model(folder).model.digest
    assert read_model(tiny("llama")).model.digest == before
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-100:] = bytes(100)
    (folder / "model.safetensors").write_bytes(data)
    assert read_model(folder).model.digest != before


def test_finite_check_holds_one_block_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    import numpy as np
    from safetensors.numpy import save_file

    from planner._safetensors_header import non_finite

    values = np.ones(3 * 2**20, dtype=np.float32)
    values[[5, 2**20, -1]] = [np.nan, np.inf, -np.inf]
    half = np.ones(1000, dtype=np.float16)
    half[7] = np.inf
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(77, dtype=np.int8), "b": values, "c": half, "d": np.ones(3, dtype=np.float64)}, path)
    tracemalloc.start()
    assert sorted(non_finite(path, block_bytes=2**16)) == [("b", 3), ("c", 1)]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_finite_check_reads_bfloat16(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from planner._safetensors_header import non_finite

    tensor = torch.full((300,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    tensor[4], tensor[9] = float("nan"), float("-inf")
    save_file({"x": tensor}, tmp_path / "m.safetensors")
    assert list(non_finite(tmp_path / "m.safetensors")) == [("x", 2)]


# ---------------------------------------------------------------- the hub's cache


def test_a_cached_hub_model_is_read_offline(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--some--tiny"
    snapshot = cache / "snapshots" / commit
    for folder in (snapshot, cache / "blobs", cache / "refs"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    for path in tiny("llama").iterdir():
        shutil.copy(path, cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    read = read_model("some/tiny", offline=True)
    assert read.model.revision == commit
    assert read.model.name == "tiny"
    assert read.folder == snapshot
    assert read.model.digest == read_model(tiny("llama")).model.digest


def test_a_local_folder_shadows_a_hub_id_and_says_so(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert "`org/name` is a local folder; a hub model of that name is not looked for" in read_model("org/name").notes
