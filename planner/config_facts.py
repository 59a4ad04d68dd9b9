"""The facts of a language model's config.json under one name each, within bounds; json is all that is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from planner.architectures import Family, Sizes
from planner.architectures import gated as any_gated
from planner.describing import Description

LONGEST_CONFIG_BYTES = 2**20
UNLIMITED_CONTEXT_TOKENS = 1_048_576  # stands for "no limit" where config.json states none

_OF_THE_MODEL = ("layers", "hidden_size", "vocab_size", "context_tokens")  # facts no layer has of its own

# One fact, the names config.json files have for it (the first is used in messages), smallest and largest value.
_KEYS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "layers": (("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 1, 4096),
    "hidden_size": (("hidden_size", "n_embd", "d_model", "n_embed", "model_dim", "dim", "emb_dim"), 1, 2**20),
    "heads": (("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 1, 2**16),
    "kv_heads": (("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "kv_n_heads"), 1, 2**16),
    "head_size": (("head_dim", "d_kv", "attention_head_dim", "kv_channels"), 1, 2**16),
    "ffn_size": (
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff", "decoder_ffn_dim", "hidden_dim"),
        1, 2**24,
    ),
    "expert_ffn_size": (("moe_intermediate_size", "expert_ffn_hidden_size"), 1, 2**24),
    "shared_expert_ffn_size": (("shared_expert_intermediate_size",), 1, 2**24),
    "vocab_size": (("vocab_size", "n_vocab", "padded_vocab_size"), 1, 4_000_000),
    "context_tokens": (
        (
            "max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx", "seq_length",
            "model_max_length", "context_length", "max_source_positions", "max_target_positions",
        ),
        1, 2**31,
    ),
    "experts": (
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 0, 4096,
    ),
    "experts_active": (
        ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k"),
        0, 4096,
    ),
    "window": (("sliding_window", "sliding_window_size", "attention_window_size"), 0, 2**31),
    "windowless": (("max_window_layers",), 0, 4096),
    "window_pattern": (("sliding_window_pattern",), 0, 4096),
    "state_size": (("state_size", "mamba_d_state", "ssm_state_size"), 1, 2**16),
    "conv_kernel": (("conv_kernel", "mamba_d_conv"), 1, 4096),
    "expand": (("expand", "mamba_expand"), 1, 4096),
    "state_heads": (("mamba_n_heads", "mamba_num_heads"), 1, 2**16),
    "state_head_size": (("mamba_d_head", "mamba_head_dim"), 1, 2**16),
    "state_groups": (("n_groups", "mamba_n_groups"), 1, 2**16),
    "latent_rank": (("kv_lora_rank",), 1, 2**20),
    "latent_query_head": (("qk_nope_head_dim",), 1, 2**16),
    "latent_rope_head": (("qk_rope_head_dim",), 1, 2**16),
    "latent_value_head": (("v_head_dim",), 1, 2**16),
}  # fmt: skip
# Upper bounds of keys by their names' endings, for those without a fact of their own.
_MOST = (
    (re.compile(r"(?:layers|_layer|depth|experts|groups)$"), 4096),
    (
        re.compile(r"(?:hidden_size|intermediate_size|dim|heads|width|rank|d_model|n_embd|d_ff|n_inner|inter_size)$"),
        2**24,
    ),
)
_SWITCHES = (
    "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "use_bias", "use_conv_bias", "use_sliding_window",
    "is_encoder_decoder", "multi_query", "new_decoder_architecture",
)  # fmt: skip
_OBJECTS = ("text_config", "vision_config", "encoder", "decoder", "rope_scaling", "rope_parameters")
_CHOSEN = {"switch_transformers": 1, "nllb-moe": 2}  # experts a token goes through, where no key says
MOST_EXPERTS = 2**18  # of all layers together; the largest published models have 2**15
_RECURRENT = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")  # no attention at all
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_attention")
_PLAIN_FFN = (
    "gpt2", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gptj", "codegen", "opt", "bloom", "falcon", "phi", "mpt",
    "starcoder2", "gpt_bigcode", "nemotron", "persimmon", "biogpt", "xglm", "fuyu",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What config.json says of a language model."""

    sizes: Sizes
    gated: bool
    window: int | None
    window_share: float  # of the cache, what lies in layers with that window
    attention_layers: int
    kv_values_per_layer: float | None  # None: keys and values of kv_heads
    latent_rank: int  # of them, those that keys and values of all heads are made from; 0: none
    state_values: int  # numbers of recurrent state for each sequence, all layers
    wide_state_values: int  # of those, what is kept in float32 whatever the weights are: all but convolution inputs


def _fact(config: Mapping[str, Any], fact: str, where: str) -> int | None:
    """Return one fact of config.json, or None where it is absent or null.

    Raises:
        BadInput: not a whole number, or out of bounds; names the key.
    """
    names, low, high = _KEYS[fact]
    key = next((name for name in names if config.get(name) is not None), None)
    if key is None:
        return None
    value = config[key]
    if fact not in _OF_THE_MODEL and isinstance(value, list) and value and all(type(v) is int for v in value):
        value = max(value)  # one for each layer: plan for the widest
    if type(value) is not int:
        raise BadInput(
            f"config.json: {key} must be a whole number, got {value!r:.60}", hint="mend config.json", where=where
        )
    if not low <= value <= high:
        limit = f"≥ {low}" if value < low else f"≤ {high}"
        raise BadInput(
            f"config.json: {key} must be {limit}, got {str(value)[:40]}", hint="mend config.json", where=where
        )
    return value


def check_bounds(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a size that is not a whole number within bounds, or a switch that is not true or false; absent ones pass.

    Raises:
        BadInput: names the key and the bound.
    """
    _read(config, where)
    for key in _SWITCHES:
        if not isinstance(config.get(key, False), bool | None):
            raise BadInput(
                f"config.json: {key} must be true or false, got {config[key]!r:.60}",
                hint="mend config.json",
                where=where,
            )


def check_nested(config: Mapping[str, Any], *, where: str, inside: str = "") -> None:
    """Refuse counts and sizes no machine could build, wherever in config.json they are: encoders, vision, unknown keys.

    Raises:
        BadInput: names the key and the bound.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            check_nested(value, where=where, inside=f"{inside}{key}.")
        elif key in _OBJECTS and value is not None:
            raise BadInput(
                f"config.json: {inside}{key} must be an object, got {value!r:.60}", hint="mend config.json", where=where
            )
        elif type(value) in (int, float):
            most = next((bound for pattern, bound in _MOST if pattern.search(key)), None)
            if most is not None and value > most:
                raise BadInput(
                    f"config.json: {inside}{key} must be ≤ {most}, got {str(value)[:40]}",
                    hint="mend config.json", where=where,
                )  # fmt: skip


def _read(config: Mapping[str, Any], where: str) -> dict[str, int | None]:
    # A pattern may also be written as letters, "LLLG"; only transformers reads those.
    text = isinstance(config.get("sliding_window_pattern"), str)
    return {fact: None if text and fact == "window_pattern" else _fact(config, fact, where) for fact in _KEYS}


def require_sizes(config: Mapping[str, Any], family: Family | None, default: Mapping[str, Any], *, where: str) -> None:
    """Refuse a config that leaves its main sizes out: transformers would take those of some other model.

    `default` is the config as transformers completes it; only what it had to complete is asked for of unknown families.

    Raises:
        BadInput: names the key.
    """
    needed = ["layers", "hidden_size", "vocab_size"]
    if config.get("model_type") not in _RECURRENT:
        needed.append("heads")
    for fact in (*needed, *(family.needs if family else ())):
        names = _KEYS[fact][0]
        if all(config.get(name) is None for name in names) and (family or any(default.get(n) for n in names)):
            raise BadInput(f"config.json: no {names[0]}", hint="mend config.json", where=where)


def asks_windows(config: Mapping[str, Any], family: Family) -> bool:
    """Whether only transformers tells which layers have a sliding window."""
    return family.windows == "ask" and bool(config.get("use_sliding_window")) and config.get("layer_types") is None


def facts_of(
    config: Mapping[str, Any],
    family: Family | None,
    notes: list[str],
    *,
    where: str,
    description: Description | None = None,
) -> Facts:
    """Return the sizes of a language model's config, within bounds and consistent.

    What transformers showed of the model itself (`description`) goes before what its keys say.

    Raises:
        BadInput: a size is missing, out of bounds or does not fit the others.
    """
    kind = str(config.get("model_type"))
    got = _read(config, where)

    def need(fact: str) -> int:
        value = got[fact]
        if value is None:
            raise BadInput(f"config.json: no {_KEYS[fact][0][0]}", hint="mend config.json", where=where)
        return value

    layers, hidden, vocab = need("layers"), need("hidden_size"), need("vocab_size")
    recurrent = kind in _RECURRENT or (description is not None and got["heads"] is None)
    heads = 0 if recurrent else need("heads")
    kv_heads = 0 if recurrent else _kv_heads(config, got["kv_heads"], heads, where)
    head_size, latent = 0, None
    if not recurrent:
        if got["latent_rank"] and got["latent_query_head"] and got["latent_value_head"]:
            # Latent attention compares and sums heads of two sizes, of which this is the mean. What it caches is the
            # latent vector and the rotary key, one of each for all heads.
            latent = float(got["latent_rank"] + (got["latent_rope_head"] or 0))
            head_size = -(-(got["latent_query_head"] + (got["latent_rope_head"] or 0) + got["latent_value_head"]) // 2)
            kv_heads = heads
        else:
            head_size = got["head_size"] or (family.head_size if family else None) or _divide(hidden, heads, where)
    ffn = got["ffn_size"]
    if recurrent and ffn is None:
        ffn = (got["expand"] or 2) * hidden
    experts = got["experts"] or 0
    if experts * layers > MOST_EXPERTS:
        raise BadInput(
            f"config.json: {layers} layers of {experts} experts",
            hint=f"at most {MOST_EXPERTS} experts in all",
            where=where,
        )
    if experts and (family is None or family.experts != "mixtral"):  # which has no such key
        ffn = got["expert_ffn_size"] or ffn
    context = got["context_tokens"]
    if context is None:
        context = UNLIMITED_CONTEXT_TOKENS
        notes.append(f"config.json states no context length; {context} tokens are taken as its limit")
    active = got["experts_active"] or (family.experts_active if family else _CHOSEN.get(kind, 0))
    if experts and not 0 < active <= experts:
        key = _KEYS["experts_active"][0][0]
        raise BadInput(
            f"config.json: {key} is {active} of {experts} experts" if active else f"config.json: {experts} experts, no {key}",
            hint="mend config.json", where=where,
        )  # fmt: skip
    attention_layers = 0 if recurrent else _attention_layers(config, family, layers, where)
    gated = family.gated if family else kind not in _PLAIN_FFN
    if description is not None:
        gated = any_gated(description.parameters)
    if description is not None and description.cache is not None:
        cache = description.cache
        attention_layers, state_values, wide = cache.layers, 0, 0
        if cache.layers:
            # Engines keep one key for each group of heads, where transformers repeats it for every head.
            repeated = kv_heads / heads if cache.all_heads and kv_heads else 1.0
            latent = cache.values_per_token * repeated / cache.layers
            if latent == 2 * kv_heads * head_size:
                latent = None
        window = cache.window_tokens
        window_share = cache.window_values_per_token / cache.values_per_token if window else 1.0
    else:
        recurrent_layers = layers - attention_layers if not recurrent and attention_layers < layers else layers
        inputs, state = _state(config, got, hidden)
        state_values, wide = recurrent_layers * (inputs + state), recurrent_layers * state
        if attention_layers < layers and not state_values:
            notes.append(f"the recurrent state of `{kind}` is not counted in memory")
        window, window_share = _window(config, family, got, layers, notes)
    return Facts(
        sizes=Sizes(
            layers=layers, hidden_size=hidden, heads=heads, kv_heads=kv_heads, head_size=head_size,
            ffn_size=ffn or 4 * hidden, vocab_size=vocab, experts=experts, experts_active=active if experts else 0,
            context_tokens=context,
        ),
        gated=gated, window=window, window_share=window_share, kv_values_per_layer=latent,
        latent_rank=(got["latent_rank"] or 0) if latent else 0, attention_layers=attention_layers, state_values=state_values, wide_state_values=wide,
    )  # fmt: skip


def _kv_heads(config: Mapping[str, Any], given: int | None, heads: int, where: str) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    kv_heads = given or heads
    if kv_heads > heads or heads % kv_heads:
        raise BadInput(
            f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads",
            hint="mend config.json",
            where=where,
        )
    return kv_heads


def _divide(hidden: int, heads: int, where: str) -> int:
    if hidden % heads:
        raise BadInput(
            f"config.json: hidden_size {hidden} is not a multiple of {heads} heads",
            hint="mend config.json",
            where=where,
        )
    return hidden // heads


def _attention_layers(config: Mapping[str, Any], family: Family | None, layers: int, where: str) -> int:
    """Return how many layers attend, from the ways hybrid models say so; all of them where none does."""
    for key in ("layer_types", "layers_block_type"):
        kinds = config.get(key)
        if kinds is not None:
            if not isinstance(kinds, list) or len(kinds) != layers or not all(isinstance(k, str) for k in kinds):
                raise BadInput(f"config.json: {key} must name {layers} layers", hint="mend config.json", where=where)
            if family is not None and (odd := [k for k in kinds if k not in _ATTENTION[:3]]):
                raise BadInput(
                    f"config.json: {key} names a layer `{odd[0][:40]}`", hint=f"it has {', '.join(_ATTENTION[:3])}",
                    where=where,
                )  # fmt: skip
            return sum(k in _ATTENTION for k in kinds)
    if family is not None:
        return layers
    pattern = config.get("block_types")
    if isinstance(pattern, list) and pattern:
        return sum(pattern[i % len(pattern)] == "attention" for i in range(layers))
    period, offset = config.get("attn_layer_period"), config.get("attn_layer_offset", 0)
    if type(period) is int and period > 0:
        return sum(i % period == offset for i in range(layers))
    indices = config.get("attn_layer_indices")
    if isinstance(indices, list):
        return min(len(set(map(str, indices))), layers)
    every = config.get("full_attention_interval")
    if type(every) is int and every > 0:
        return layers // every
    drawn = config.get("hybrid_override_pattern")
    if isinstance(drawn, str):
        return min(drawn.count("*"), layers)
    return layers


def _state(config: Mapping[str, Any], got: Mapping[str, int | None], hidden: int) -> tuple[int, int]:
    """Return what one recurrent layer keeps for a sequence: convolution inputs, state (Mamba 1 and 2, RWKV, RG-LRU)."""
    if config.get("model_type") == "rwkv":  # two shifted inputs, numerator, denominator and maximum
        return 0, 5 * int(config.get("attention_hidden_size") or hidden)
    if width := config.get("lru_width"):
        return int(width) * (int(config.get("conv1d_width", 4)) - 1), int(width)
    size, kernel = got["state_size"], got["conv_kernel"]
    if not size or not kernel:
        return 0, 0
    if heads := got["state_heads"] or (got["heads"] if config.get("model_type") == "mamba2" else None):
        head = got["state_head_size"] or got["head_size"] or 64
        return (heads * head + 2 * (got["state_groups"] or 1) * size) * kernel, heads * head * size
    inner = (got["ffn_size"] if config.get("model_type") in _RECURRENT else None) or (got["expand"] or 2) * hidden
    return inner * kernel, inner * size


def _window(
    config: Mapping[str, Any], family: Family | None, got: Mapping[str, int | None], layers: int, notes: list[str]
) -> tuple[int | None, float]:
    """Return the sliding window and the share of attention layers that have it; (None, 1) where there is none."""
    window = got["window"] or (family.window_tokens if family and "sliding_window" not in config else None)
    switch = family is None or family.windows in ("upper", "switched", "ask")  # whether use_sliding_window counts
    if (
        not window
        or (switch and not config.get("use_sliding_window", family is None))
        or (family and family.windows == "none")
    ):
        return None, 1.0
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        attending = [k for k in kinds if k in _ATTENTION]
        share = sum(k in ("sliding_attention", "chunked_attention") for k in attending) / max(len(attending), 1)
    elif family is None:
        if config.get("block_types") is None:  # where it is, the attention there is has the window
            notes.append(
                f"a sliding window of {window} tokens may hold in some layers only; cache sizes are upper bounds"
            )
            return None, 1.0
        share = 1.0
    elif family.windows == "upper" or family.windows == "switched":
        without = got["windowless"] if got["windowless"] is not None else 28
        without = without if family.windows == "upper" else 0
        share = max(0, layers - without) / layers
    elif isinstance(family.windows, int):
        every = got["window_pattern"] or family.windows
        share = (layers - layers // every) / layers
    else:
        share = 1.0
    return (window, share) if share else (None, 1.0)


def read_json(path: Path, longest_bytes: int) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput("not a regular file", hint="download or copy the file again", where=str(path))
    size = path.stat().st_size
    if size > longest_bytes:
        raise BadInput(
            f"{size} bytes, more than {longest_bytes}", hint="this is not the file it should be", where=str(path)
        )

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number JSON knows")

    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"not UTF-8 at byte {error.start}", hint="download or save the file again", where=str(path)
        ) from error
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}:{error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"not JSON: {error}", hint="download or mend the file", where=f"{path}{line}") from error
    if not isinstance(value, dict):
        raise BadInput("expected a JSON object", hint="download or mend the file", where=str(path))
    return value


def read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, LONGEST_CONFIG_BYTES)
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", kind):
        raise BadInput(
            f"model_type must be a name, got {kind!r:.60}" if kind is not None else "no model_type in it",
            hint="config.json must be that of a transformers model", where=str(path),
        )  # fmt: skip
    return config


def decoder_config(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return an encoder-decoder's config as that of its decoder alone, of so many layers."""
    inner = config.get("decoder")
    sizes = {**config, **inner} if isinstance(inner, dict) else dict(config)
    for name, own in (("num_attention_heads", "decoder_attention_heads"), ("intermediate_size", "decoder_ffn_dim")):
        if sizes.get(own) is not None:
            sizes[name] = sizes[own]
    return {**sizes, "num_hidden_layers": layers}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part that describes the language model; a model that also sees or hears keeps it in text_config."""
    for key in ("text_config", "llm_config", "language_config"):
        nested = config.get(key)
        if isinstance(nested, dict):
            outer = {k: config[k] for k in ("model_type", "tie_word_embeddings", "torch_dtype", "dtype") if k in config}
            return {**outer, **nested}
    parts = [config[key] for key in ("attn_config", "ffn_config") if isinstance(config.get(key), dict)]
    return {k: v for part in (*parts, config) for k, v in part.items()}
