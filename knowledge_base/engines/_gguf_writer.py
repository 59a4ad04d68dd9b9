"""Write a transformers causal language model as one GGUF file, in the types of techniques/weight_gguf.py.

GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Tensor names come from the gguf package's map.
Equal models give equal bytes: the file holds no date and rows are quantised independently of the thread count.
"""

from __future__ import annotations

import json
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch

from knowledge_base.engines import _gguf_types as types
from knowledge_base.engines import _llama_abi as abi
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques.weight_gguf import stored_type, table_type
from knowledge_base.types import Session

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k": gguf.LlamaFileType.MOSTLY_Q5_K_S, "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q3_k": gguf.LlamaFileType.MOSTLY_Q3_K_S,
    "q2_k": gguf.LlamaFileType.MOSTLY_Q2_K, "iq4_nl": gguf.LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": gguf.LlamaFileType.MOSTLY_IQ4_XS, "iq3_s": gguf.LlamaFileType.MOSTLY_IQ3_S,
}  # fmt: skip
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

# Regular expressions that cut text before byte-level BPE, by llama.cpp's name for them (src/llama-vocab.cpp).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """How one transformers model_type is laid out in GGUF."""

    name: str  # GGUF's
    interleaved: bool = False  # rotary pairs are neighbours in GGUF, halves in transformers
    rotary: bool = True
    activation: tuple[str, ...] = ("silu",)


ARCHITECTURES = {
    "llama": _Architecture(name="llama", interleaved=True),
    "mistral": _Architecture(name="llama", interleaved=True),
    "qwen2": _Architecture(name="qwen2"),
    "qwen3": _Architecture(name="qwen3"),
    "gpt2": _Architecture(name="gpt2", rotary=False, activation=("gelu_new", "gelu_pytorch_tanh")),
}


def write(session: Session, path: Path) -> None:
    """Write `session`'s model to `path`, in session.storage["gguf_type"] or else the model's own dtype.

    session.storage["gguf_types"] says by module name which matrices are stored in another type.

    Notes in the session which matrices took a wider type ("gguf.wider_types") and a context cut to the sliding
    window ("gguf.context_tokens").

    Raises:
        CandidateFailed: "unsupported", the structure has no form in GGUF or llama.cpp; "non_finite", a weight is
            beyond float16.
    """
    model, config = session.model, session.model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise _unsupported(f"architecture `{config.model_type}` (known: {known})")
    _check(config, architecture)
    tensors = _tensors(model, architecture)
    own = _DTYPES.get(model.get_input_embeddings().weight.dtype)
    if own is None:
        raise _unsupported(f"weights of {model.get_input_embeddings().weight.dtype}")
    wanted = session.storage.get("gguf_type", own)
    stored = {name: _type_of(name, tensor, wanted) for name, tensor in tensors.items()}
    if chosen := session.storage.get("gguf_types"):
        names = _names(config, architecture)
        stored |= {
            str(names.get_name(f"{module}.weight", try_suffixes=(".weight",))): t for module, t in chosen.items()
        }
    elif wider := {n: t for n, t in stored.items() if t not in (wanted, table_type(wanted), "f32")}:
        session.notes["gguf.wider_types"] = wider

    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_file_type(_FILE_TYPES[wanted])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _describe(writer, config, architecture, session)
    _add_tokenizer(writer, session, model.get_input_embeddings().weight.shape[0])
    importance = _importance(session, architecture) if session.storage.get("gguf_importance") else {}
    for name, tensor in tensors.items():
        shape = types.bytes_shape(tensor.shape, stored[name])
        kind = gguf.GGMLQuantizationType(types.NUMBERS[stored[name]])
        writer.add_tensor_info(name, shape, numpy.dtype(numpy.uint8), int(numpy.prod(shape)), kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with ThreadPoolExecutor(abi.cores()) as pool:
            for done, (name, tensor) in enumerate(tensors.items()):
                writer.write_tensor_data(_encode(pool, name, tensor, stored[name], importance.get(name)))
                session.progress("write model.gguf", (done + 1) / len(tensors))
    finally:
        writer.close()


def write_draft(session: Session, path: Path) -> None:
    """Write the draft model a session takes along, in the type its own model is stored in.

    Raises:
        CandidateFailed: as `write`; "build_error", it is no longer where the technique found it.
    """
    from knowledge_base.engines._torch_drafting import read_model

    try:
        model = read_model(Path(session.storage["draft"]))
    except OSError as error:
        raise CandidateFailed("build_error", f"the draft cannot be read: {error}") from error
    storage = {name: value for name, value in session.storage.items() if name == "gguf_type"}
    write(replace(session, model=model, storage=storage, notes={}), path)


def _unsupported(what: str) -> CandidateFailed:
    return CandidateFailed(
        "unsupported", f"llama.cpp cannot store {what}", hint="plan this with the transformers engine"
    )


def _check(config: Any, architecture: _Architecture) -> None:
    """Refuse what llama.cpp would compute otherwise without a word."""
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
    if activation not in architecture.activation:
        raise _unsupported(
            f"`{config.model_type}` with activation `{activation}`, only {' or '.join(architecture.activation)}"
        )
    if config.model_type == "gpt2" and (not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx):
        raise _unsupported("gpt2 with unusual attention scaling")
    if config.model_type == "qwen2" and config.num_attention_heads * _head_size(config) != config.hidden_size:
        raise _unsupported("qwen2 whose heads together are not as wide as its hidden state")


def _tensors(model: Any, architecture: _Architecture) -> dict[str, torch.Tensor]:
    """Return every tensor under its GGUF name, as (rows, row) with rows as llama.cpp multiplies them.

    Raises:
        CandidateFailed: "unsupported", a module GGUF has no place for (packed, factorised, other buffers).
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from knowledge_base.techniques._kinds import resized

    config = model.config
    names = _names(config, architecture)
    transposed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    plain = (nn.Linear, nn.Embedding, Conv1D)
    odd = [
        n for n, m in model.named_modules()
        if "weight" not in dict(m.named_parameters(recurse=False)) and any(True for _ in m.parameters(recurse=False))
    ]  # fmt: skip
    odd += [n for n, m in model.named_modules() if hasattr(m, "kind") and not isinstance(m, plain)]
    odd += [n for n, m in model.named_modules() if resized(m)]  # one size for all layers is all the header holds
    if odd:
        raise _unsupported(f"the module `{odd[0]}` ({type(model.get_submodule(odd[0])).__name__})")
    table = model.get_input_embeddings().weight
    found: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tensor.data_ptr() == table.data_ptr():
            continue  # tied: llama.cpp multiplies with the embedding table
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None or tensor.dim() > 2:
            raise _unsupported(f"the tensor `{name}`")
        if name in transposed:
            tensor = tensor.T
        if architecture.interleaved and ".attn_q." in stored:
            tensor = _interleave(tensor, config.num_attention_heads)
        elif architecture.interleaved and ".attn_k." in stored:
            tensor = _interleave(tensor, config.num_key_value_heads)
        found[stored] = tensor
    if architecture.rotary and (factors := _rotary_factors(model)) is not None:
        if architecture.name != "llama":
            raise _unsupported(f"scaled rotary frequencies of `{config.model_type}`")
        found["rope_freqs.weight"] = factors
    return found


_ARCHITECTURE_IDS = {name: id_ for id_, name in gguf.MODEL_ARCH_NAMES.items()}


def _names(config: Any, architecture: _Architecture) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(_ARCHITECTURE_IDS[architecture.name], config.num_hidden_layers)


def _importance(session: Session, architecture: _Architecture) -> dict[str, numpy.ndarray]:
    """Return float32 (columns,) for each matrix of the layers by GGUF name: the mean square of what enters a column.

    Raises:
        CandidateFailed: no calibration text.
    """
    from knowledge_base.techniques._blocks import Matrix, each_layer

    model = session.model
    full_names = {id(module): name for name, module in model.named_modules()}
    names = _names(model.config, architecture)
    found: dict[str, numpy.ndarray] = {}

    def take(index: int, layer: Any, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            if (means := types.importance_of(matrix.inputs.squares, matrix.inputs.rows)) is not None:
                stored = str(names.get_name(f"{full_names[id(matrix.module)]}.weight", try_suffixes=(".weight",)))
                found[stored] = means

    each_layer(session, take, full=False, label="importance of columns", same=True)
    return found


def _interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn each head's rows from (first halves, second halves) into pairs, as llama.cpp's rotary expects them."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _rotary_factors(model: Any) -> torch.Tensor | None:
    """Return by what each rotary frequency is divided, or None for the plain ones.

    Taken from the frequencies the model itself uses, so that any fixed scaling (linear, Llama 3) is covered.

    Raises:
        CandidateFailed: "unsupported", frequencies that change with length, scaled attention or partial rotation.
    """
    config = model.config
    settings = config.rope_parameters
    rotary = model.base_model.rotary_emb
    if settings["rope_type"] in ("dynamic", "longrope") or float(rotary.attention_scaling) != 1.0:
        raise _unsupported(f"rotary position encoding of type `{settings['rope_type']}`")
    size = _head_size(config)
    used = rotary.inv_freq.detach().double().cpu()
    if 2 * len(used) != size:
        raise _unsupported(f"rotary position encoding of {2 * len(used)} of {size} channels")
    if settings["rope_type"] == "default":
        return None
    plain = settings["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / used).float()


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _window(config: Any) -> int | None:
    """Return the sliding attention window in tokens, or None where every layer sees everything."""
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    return window if window and (sliding or config.model_type == "mistral") else None


def _describe(writer: gguf.GGUFWriter, config: Any, architecture: _Architecture, session: Session) -> None:
    context, window = config.max_position_embeddings, _window(config)
    if window and window < context:
        # llama.cpp would attend to everything in this architecture; up to the window both are the same.
        context = session.notes["gguf.context_tokens"] = window
    size = _head_size(config)
    writer.add_vocab_size(session.model.get_input_embeddings().weight.shape[0])
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or _gpt2_ffn_size(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    if architecture.rotary:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(size)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _gpt2_ffn_size(config: Any) -> int:
    return config.n_inner or 4 * config.hidden_size


def _type_of(name: str, tensor: torch.Tensor, wanted: str) -> str:
    if tensor.dim() == 1 or name == "position_embd.weight":
        return "f32"
    table = name in ("token_embd.weight", "output.weight")
    return stored_type(table_type(wanted) if table else wanted, tensor.shape[-1])


def _encode(
    pool: Executor, name: str, tensor: torch.Tensor, type: str, importance: numpy.ndarray | None = None
) -> numpy.ndarray:
    """Return the tensor's bytes in `type`, (rows, bytes for each row), quantised by llama.cpp's own code.

    Args:
        importance: float32 (columns,), by which errors are weighted; None for all alike.

    Raises:
        CandidateFailed: "non_finite", a weight is not finite or, for float16, out of range.
    """
    values = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    limit = 65504 if type == "f16" else numpy.finfo(numpy.float32).max
    if not (numpy.abs(values) <= limit).all():
        raise CandidateFailed("non_finite", f"`{name}` holds values that {type} cannot", hint="plan another type")
    if type == "f32":
        return values.view(numpy.uint8)
    found = types.encoded(values.reshape(-1, values.shape[-1]), type, importance, pool=pool)
    return found.reshape(types.bytes_shape(tensor.shape, type))


# ---------------------------------------------------------------- tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, session: Session, rows: int) -> None:
    """Write a byte-level BPE tokenizer; any other stays outside, for the engine runs on token ids.

    The chat template is text for other programs; nothing here runs it.
    """
    described = _byte_level_bpe(session.tokenizer) if session.tokenizer is not None else None
    if described is None or max(described["vocab"].values()) >= rows:
        if session.tokenizer is not None:
            session.notes["gguf.tokenizer"] = (
                "not in model.gguf: no byte-level BPE, or more tokens than the table has rows"
            )
        writer.add_tokenizer_model("no_vocab")
        return
    tokens = [f"[PAD{i}]" for i in range(rows)]  # rows no token uses, up to round table sizes
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, i in described["vocab"].items():
        tokens[i], kinds[i] = token, gguf.TokenType.NORMAL
    for added in described["added"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(described["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(described["merges"])
    tokenizer = session.tokenizer
    for id_, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if id_ is not None:
            add(id_)
    first = tokenizer("a").input_ids[:1]
    writer.add_add_bos_token(bool(first) and first[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    if described["pre"] == "default":
        session.notes["gguf.tokenizer"] = (
            "llama.cpp does not know its word pattern; other programs may split text otherwise"
        )


def _byte_level_bpe(tokenizer: Any) -> dict[str, Any] | None:
    """Return vocabulary, merges, added tokens and llama.cpp's name of the word pattern, or None for other kinds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    stored = json.loads(backend.to_str())
    model, pre = stored["model"], stored.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    if model.get("type") != "BPE" or model.get("byte_fallback") or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    added = stored["added_tokens"]
    pattern = steps[0].get("pattern", {}).get("Regex") if len(steps) == 2 else None
    name = (
        "gpt-2" if len(steps) == 1 and steps[0].get("use_regex", True) else _PRE_TOKENIZERS.get(str(pattern), "default")
    )
    vocab = {**model["vocab"], **{a["content"]: a["id"] for a in added}}
    return {"vocab": vocab, "merges": merges, "added": added, "pre": name}
