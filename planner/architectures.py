"""The tensors a causal language model of a known family stores, from its config.json alone.

One table gives the exact parameter count without weights, and tells which weights are missing where there are some.
Families that are not in it are described by transformers itself (planner/reading/). Shapes follow the modelling
code of transformers 5 (src/transformers/models/<family>/modeling_<family>.py); tests compare every family with it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of a config.json under one name each."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    experts: int = 0
    experts_active: int = 0  # for each token
    context_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family stores its tensors, and the defaults its config class has for keys that may be absent."""

    shapes: Callable[[Family, Sizes, Mapping[str, Any]], Shapes]
    tied: bool = False
    head_size: int | None = None  # None: hidden_size / heads
    gated: bool = True
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    qkv_bias: bool | tuple[str, bool] = ("attention_bias", False)  # a constant, or a key of config.json and its default
    output_bias: bool | tuple[str, bool] = ("attention_bias", False)
    ffn_bias: bool | tuple[str, bool] = False
    qk_norm: str = ""  # "head": one weight for each number of a head, "full": for each number of the projection
    experts: str = ""  # "mixtral" | "qwen": how their tensors are named
    experts_active: int = 0  # where config.json does not say
    shared_expert: bool = False  # one more that every token goes through
    needs: tuple[str, ...] = ()  # further facts of config_facts.py its shapes are made from
    # Which layers a sliding window holds in: "none", "all", "switched" (all, if use_sliding_window), "upper" (from
    # max_window_layers on, if switched on), "ask" (told by transformers, if switched on), or a number n: all but every
    # n-th, or as sliding_window_pattern says.
    windows: str | int = "all"
    window_tokens: int | None = None  # where config.json does not say


def _flag(value: bool | tuple[str, bool], config: Mapping[str, Any]) -> bool:
    return value if isinstance(value, bool) else bool(config.get(*value))


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (rows, columns), **({f"{name}.bias": (rows,)} if bias else {})}


def _llama(family: Family, sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    hidden, ffn = sizes.hidden_size, sizes.ffn_size
    query, key = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    bias, output_bias, ffn_bias = (_flag(b, config) for b in (family.qkv_bias, family.output_bias, family.ffn_bias))
    shapes: Shapes = {"model.embed_tokens.weight": (sizes.vocab_size, hidden)}
    for layer in range(sizes.layers):
        at = f"model.layers.{layer}"
        attention = f"{at}.self_attn"
        if family is FAMILIES["phi3"]:
            shapes |= _linear(f"{attention}.qkv_proj", query + 2 * key, hidden)
        else:
            shapes |= _linear(f"{attention}.q_proj", query, hidden, bias)
            shapes |= _linear(f"{attention}.k_proj", key, hidden, bias) | _linear(
                f"{attention}.v_proj", key, hidden, bias
            )
        shapes |= _linear(f"{attention}.o_proj", hidden, query, output_bias)
        if family.qk_norm:
            full = family.qk_norm == "full"
            shapes[f"{attention}.q_norm.weight"] = (query if full else sizes.head_size,)
            shapes[f"{attention}.k_norm.weight"] = (key if full else sizes.head_size,)
        shapes |= {f"{at}.{norm}.weight": (hidden,) for norm in family.norms}
        if _sparse(family, config, layer):
            shapes |= _experts(family, sizes, config, at)
        elif family is FAMILIES["phi3"]:
            shapes |= _linear(f"{at}.mlp.gate_up_proj", 2 * ffn, hidden) | _linear(f"{at}.mlp.down_proj", hidden, ffn)
        else:
            shapes |= _gated(f"{at}.mlp", hidden, int(config["intermediate_size"]) if family.experts else ffn, ffn_bias)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (sizes.vocab_size, hidden)
    return shapes


def _gated(at: str, hidden: int, ffn: int, bias: bool = False) -> Shapes:
    shapes = _linear(f"{at}.gate_proj", ffn, hidden, bias) | _linear(f"{at}.up_proj", ffn, hidden, bias)
    return shapes | _linear(f"{at}.down_proj", hidden, ffn, bias)


def _sparse(family: Family, config: Mapping[str, Any], layer: int) -> bool:
    if family.experts != "qwen":
        return bool(family.experts)
    return layer not in config.get("mlp_only_layers", ()) and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def _experts(family: Family, sizes: Sizes, config: Mapping[str, Any], at: str) -> Shapes:
    hidden, ffn = sizes.hidden_size, sizes.ffn_size
    if family.experts == "mixtral":
        at += ".block_sparse_moe"
        shapes = _linear(f"{at}.gate", sizes.experts, hidden)
        for expert in range(sizes.experts):
            one = f"{at}.experts.{expert}"
            shapes |= {
                f"{one}.w1.weight": (ffn, hidden),
                f"{one}.w2.weight": (hidden, ffn),
                f"{one}.w3.weight": (ffn, hidden),
            }
        return shapes
    at += ".mlp"
    shapes = _linear(f"{at}.gate", sizes.experts, hidden)
    for expert in range(sizes.experts):
        shapes |= _gated(f"{at}.experts.{expert}", hidden, ffn)
    if family.shared_expert:
        shared = int(config["shared_expert_intermediate_size"])
        shapes |= _gated(f"{at}.shared_expert", hidden, shared) | _linear(f"{at}.shared_expert_gate", 1, hidden)
    return shapes


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _gpt2(family: Family, sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    hidden, ffn = sizes.hidden_size, sizes.ffn_size

    def transposed(name: str, rows: int, columns: int) -> Shapes:  # transformers' Conv1D stores (inputs, outputs)
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}

    shapes: Shapes = {
        "transformer.wte.weight": (sizes.vocab_size, hidden),
        "transformer.wpe.weight": (sizes.context_tokens, hidden),
    }
    for layer in range(sizes.layers):
        at = f"transformer.h.{layer}"
        shapes |= _norm(f"{at}.ln_1", hidden) | _norm(f"{at}.ln_2", hidden)
        shapes |= transposed(f"{at}.attn.c_attn", hidden, 3 * hidden) | transposed(f"{at}.attn.c_proj", hidden, hidden)
        shapes |= transposed(f"{at}.mlp.c_fc", hidden, ffn) | transposed(f"{at}.mlp.c_proj", ffn, hidden)
    return shapes | _norm("transformer.ln_f", hidden) | {"lm_head.weight": (sizes.vocab_size, hidden)}


def _gpt_neox(family: Family, sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    hidden, ffn = sizes.hidden_size, sizes.ffn_size
    bias = bool(config.get("attention_bias", True))
    shapes: Shapes = {"gpt_neox.embed_in.weight": (sizes.vocab_size, hidden)}
    for layer in range(sizes.layers):
        at = f"gpt_neox.layers.{layer}"
        shapes |= _norm(f"{at}.input_layernorm", hidden) | _norm(f"{at}.post_attention_layernorm", hidden)
        shapes |= _linear(f"{at}.attention.query_key_value", 3 * hidden, hidden, bias)
        shapes |= _linear(f"{at}.attention.dense", hidden, hidden, bias)
        shapes |= _linear(f"{at}.mlp.dense_h_to_4h", ffn, hidden, True) | _linear(
            f"{at}.mlp.dense_4h_to_h", hidden, ffn, True
        )
    return shapes | _norm("gpt_neox.final_layer_norm", hidden) | {"embed_out.weight": (sizes.vocab_size, hidden)}


def _mamba(family: Family, sizes: Sizes, config: Mapping[str, Any]) -> Shapes:
    hidden, inner, state = sizes.hidden_size, sizes.ffn_size, int(config["state_size"])
    rank = config.get("time_step_rank", "auto")
    rank = -(-hidden // 16) if rank == "auto" else rank
    if type(rank) is not int:
        raise ValueError(f"time_step_rank is {rank!r:.40}")
    bias = bool(config.get("use_bias", False))
    shapes: Shapes = {"backbone.embeddings.weight": (sizes.vocab_size, hidden)}
    for layer in range(sizes.layers):
        at = f"backbone.layers.{layer}.mixer"
        shapes |= {
            f"backbone.layers.{layer}.norm.weight": (hidden,),
            f"{at}.A_log": (inner, state),
            f"{at}.D": (inner,),
        }
        shapes[f"{at}.conv1d.weight"] = (inner, 1, int(config["conv_kernel"]))
        if config.get("use_conv_bias", True):
            shapes[f"{at}.conv1d.bias"] = (inner,)
        shapes |= _linear(f"{at}.in_proj", 2 * inner, hidden, bias) | _linear(f"{at}.x_proj", rank + 2 * state, inner)
        shapes |= _linear(f"{at}.dt_proj", inner, rank, True) | _linear(f"{at}.out_proj", hidden, inner, bias)
    return shapes | {"backbone.norm_f.weight": (hidden,), "lm_head.weight": (sizes.vocab_size, hidden)}


_FOUR_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")

_GROUPED = ("ffn_size", "kv_heads")  # what transformers would fill with the sizes of another model

FAMILIES: dict[str, Family] = {
    "llama": Family(needs=("ffn_size",), shapes=_llama, windows="none", ffn_bias=("mlp_bias", False)),
    "mistral": Family(needs=_GROUPED, shapes=_llama, qkv_bias=False, output_bias=False, window_tokens=4096),
    "granite": Family(needs=("ffn_size",), shapes=_llama, windows="none", ffn_bias=("mlp_bias", False)),
    "smollm3": Family(needs=_GROUPED, shapes=_llama, tied=True, windows="ask", ffn_bias=("mlp_bias", False)),
    "qwen2": Family(needs=_GROUPED, shapes=_llama, qkv_bias=True, output_bias=False, windows="upper"),
    "qwen3": Family(needs=_GROUPED, shapes=_llama, head_size=128, qk_norm="head", windows="upper"),
    "phi3": Family(needs=("ffn_size",), shapes=_llama, qkv_bias=False, output_bias=False),
    "gemma": Family(needs=_GROUPED, shapes=_llama, tied=True, head_size=256, windows="none"),
    "gemma2": Family(
        needs=_GROUPED,
        shapes=_llama, tied=True, head_size=256, norms=_FOUR_NORMS, windows=2, window_tokens=4096,
    ),
    "gemma3_text": Family(
        needs=_GROUPED,
        shapes=_llama, tied=True, head_size=256, norms=_FOUR_NORMS, qk_norm="head", windows=6, window_tokens=4096,
    ),
    "olmo2": Family(needs=("ffn_size",), shapes=_llama, norms=_POST_NORMS, qk_norm="full", windows="none"),
    "olmo3": Family(needs=("ffn_size",), shapes=_llama, norms=_POST_NORMS, qk_norm="full", windows=4, window_tokens=4096),
    "mixtral": Family(
        shapes=_llama, qkv_bias=False, output_bias=False, experts="mixtral", experts_active=2,
        needs=(*_GROUPED, "experts"),
    ),
    "qwen2_moe": Family(
        shapes=_llama, qkv_bias=("qkv_bias", True), output_bias=False, experts="qwen", shared_expert=True, experts_active=4,
        windows="ask",
        needs=(*_GROUPED, "experts", "expert_ffn_size", "shared_expert_ffn_size"),
    ),
    "qwen3_moe": Family(
        shapes=_llama, qk_norm="head", experts="qwen", experts_active=8, windows="switched",
        needs=(*_GROUPED, "experts", "expert_ffn_size"),
    ),
    "gpt2": Family(shapes=_gpt2, tied=True, gated=False, windows="none"),
    "gpt_neox": Family(needs=("ffn_size",), shapes=_gpt_neox, gated=False, windows="none"),
    "mamba": Family(shapes=_mamba, tied=True, needs=("state_size", "conv_kernel"), windows="none"),
}  # fmt: skip


# ---------------------------------------------------------------- parts of a model, by the names of tensors

_LAYER = re.compile(r"\.\d+\.")  # a member of a list of modules
_OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|video|projector|aligner")
_BUFFER = re.compile(r"(?:\.(?:attn|attention)\.(?:bias|masked_bias)|rotary_emb\.(?:inv_freq|cos_cached|sin_cached))$")
_NOT_LINEAR = re.compile(
    r"A_log|(?:conv|norm)[^.]*(?:\.\d+)?\.(?:weight|bias)$|embed|\.wpe|time_mix|time_decay|relative_attention_bias|bias$|sinks$"
)
_ROUTER = re.compile(r"router|\.gate\.(?:weight|e_score)")
_GATED = re.compile(r"gate_proj|gate_up|wi_1\.|\.w3\.|linear_v|input_linear|\.Wi\.|\.v1$|mixer\.in_proj")
_INPUT = re.compile(r"(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings|embedding)\.weight$")
_OUTPUT = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output|head)\.weight$")


def is_buffer(name: str) -> bool:
    """Whether old files store it although nobody learnt it: attention masks, rotary frequencies."""
    return bool(_BUFFER.search(name))


def gated(names: Iterable[str]) -> bool:
    """Return whether feed-forward layers multiply two projections, by the names their tensors have."""
    return any(_GATED.search(name) for name in names)


def part_of(name: str, shape: Shape, *, embedding: str = "", head: str = "") -> str:
    """Return which part of the model a tensor is: "linear", "embedding", "head" or "other".

    `embedding` and `head` are the names of these two where somebody knows them.
    """
    if embedding and name in (embedding, head):
        return "embedding" if name == embedding else "head"
    if _OTHER_SENSES.search(name):
        return "other"
    if _LAYER.search(name):
        return "linear" if len(shape) in (2, 3) and not _NOT_LINEAR.search(name) else "other"
    if embedding:
        return "other"
    if len(shape) == 2 and _INPUT.search(name):
        return "embedding"
    return "head" if len(shape) == 2 and _OUTPUT.search(name) else "other"


def is_expert(name: str, shape: Shape, experts: int) -> bool:
    """Whether a tensor is that of one routed expert, or of all of them stacked."""
    if not experts or not _LAYER.search(name) or "shared" in name or _ROUTER.search(name):
        return False
    return ".experts." in name or (len(shape) == 3 and shape[0] == experts)


def count(
    shapes: Mapping[str, Shape],
    sizes: Sizes,
    *,
    tied: bool,
    embedding: str = "",
    head: str = "",
    encoder: Collection[str] = (),
) -> dict[str, int]:
    """Return parameter counts by part. A tied head is not counted again, buffers not at all.

    Active are all but the routed experts that a token does not choose: experts' parameters times (1 - chosen / all).
    """
    totals, expert_params, rows, encoder_params = Counter[str](), 0, 0, 0
    inside = frozenset(encoder)
    for name, shape in shapes.items():
        part = part_of(name, shape, embedding=embedding, head=head)
        if is_buffer(name) or (tied and part == "head"):
            continue
        size = math.prod(shape)
        totals[part] += size
        if is_expert(name, shape, sizes.experts):
            expert_params += size
        if part == "embedding":
            rows = max(rows, shape[0])
        if part == "linear" and name in inside:
            encoder_params += size
    total = sum(totals.values())
    idle = 0
    if sizes.experts:
        idle = expert_params * (sizes.experts - sizes.experts_active) // sizes.experts
    return {
        "params_total": total, "params_active": total - idle, "linear_params": totals["linear"],
        "embedding_params": totals["embedding"], "vocabulary_rows": rows or sizes.vocab_size,
        "encoder_params": encoder_params,
    }  # fmt: skip
