"""llama.cpp's C interface, called in the library that the xllamacpp wheel ships.

The wheel's Python classes reach llama.cpp only through a server; its shared object exports the C functions, which
give exact control of prefill, decoding steps, logits and quantisation. Struct layouts are those of
`include/llama.h` (https://github.com/ggml-org/llama.cpp) at the builds in CHECKED. Nothing is called with them
before `library()` has found the documented default values in the places where they must be, so another layout is a
sentence, not a crash.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_ubyte, c_uint32, c_void_p
from pathlib import Path
from typing import Any

CHECKED = ("2026.10.11549",)  # xllamacpp versions this layout was read for

# enum ggml_type
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30
IQ4_NL, IQ3_S, IQ4_XS = 20, 21, 23
LOAD_WITHOUT_MAPPING = 0  # enum llama_load_mode: read the file into private memory
FLASH_ATTENTION_AUTO, FLASH_ATTENTION_OFF, FLASH_ATTENTION_ON = -1, 0, 1  # enum llama_flash_attn_type

# Fields added to the end of a struct by a later build land here: the library fills in their defaults and reads
# them back, so only a change in the middle matters, and that one `_layout_fault` sees.
_SPARE = ("spare", c_ubyte * 256)


class ModelParams(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
        _SPARE,
    ]


class ContextParams(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("callbacks", c_void_p * 3),  # abort_callback, its data, and one field newer than the public snapshots
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
        _SPARE,
    ]


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# Defaults of llama_model_default_params() and llama_context_default_params() in src/; a field not named is zero.
_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max_per_seq": 1,
    "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "flash_attn_type": -1, "yarn_ext_factor": -1.0, "yarn_attn_factor": -1.0, "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0, "defrag_thold": -1.0, "type_k": F16, "type_v": F16,
    "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True,
}  # fmt: skip

# name -> (result, arguments)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_size": (ctypes.c_uint64, [c_void_p]),
    "llama_model_ftype": (c_int32, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_layer": (c_int32, [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_n_head": (c_int32, [c_void_p]),
    "llama_model_n_head_kv": (c_int32, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_vocab_type": (c_int32, [c_void_p]),
    "llama_tokenize": (
        c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
    ),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_ctx_seq": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_ubatch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_n_threads_batch": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_type_name": (c_char_p, [c_int32]),
    "ggml_blck_size": (c_int64, [c_int32]),
    "ggml_type_size": (c_size_t, [c_int32]),
    "ggml_row_size": (c_size_t, [c_int32, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
}  # fmt: skip
# Block types whose values can be read back, by the name of the C function that does it.
_DEQUANTISE = {
    "q8_0": "q8_0", "q6_k": "q6_K", "q5_k": "q5_K", "q5_1": "q5_1", "q5_0": "q5_0", "q4_k": "q4_K", "q4_0": "q4_0",
    "q3_k": "q3_K", "q2_k": "q2_K", "iq4_nl": "iq4_nl", "iq4_xs": "iq4_xs", "iq3_s": "iq3_s",
}  # fmt: skip
_FUNCTIONS |= {f"dequantize_row_{name}": (None, [c_void_p, c_void_p, c_int64]) for name in _DEQUANTISE.values()}

_LOG_CALLBACK = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


class Library:
    """The loaded library; its functions are attributes, `log` holds the last lines it wrote."""

    def __init__(self, path: Path) -> None:
        # A failed assertion inside the library would otherwise start a debugger on this process.
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.log: collections.deque[str] = collections.deque(maxlen=200)
        self._callback = _LOG_CALLBACK(self._on_log)  # kept: the library holds only its address

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"`{name}` is not among the functions this adapter binds")

    def start(self) -> None:
        """Send the library's log here and set up its tables."""
        self.llama_log_set(ctypes.cast(self._callback, c_void_p), None)
        self.llama_backend_init()

    def _on_log(self, level: int, text: bytes | None, user: int | None) -> None:
        # enum ggml_log_level: 2 information, 3 warning, 4 error; 5 continues the line before (progress dots).
        if text and 2 <= level <= 4:
            self.log.append(text.decode("utf-8", "replace").rstrip())

    def dequantise(self, type: str, blocks: int, values: int, count: int) -> None:
        """Write `count` float32 values at one address, from the blocks of that type at another."""
        getattr(self, f"dequantize_row_{_DEQUANTISE[type]}")(blocks, values, count)

    def complaint(self) -> str:
        """Return the last error lines of the log, else its last line, as one line."""
        words = ("error", "fail", "invalid", "unable", "unsupported", "requires", "missing", "unknown")
        found = [line for line in self.log if any(word in line.lower() for word in words)]
        return "; ".join(dict.fromkeys(found[-3:] or list(self.log)[-1:])) or "llama.cpp gave no reason"


def fault() -> str | None:
    """Return why the library cannot be used here, as a sentence without a full stop, or None."""
    result = _open()
    return result if isinstance(result, str) else None


def library() -> Library:
    """Return the checked library.

    Raises:
        EnvironmentProblem: it is missing or has another binary interface.
    """
    result = _open()
    if isinstance(result, str):
        from knowledge_base.errors import EnvironmentProblem

        raise EnvironmentProblem(result, hint=f"pip install xllamacpp=={CHECKED[-1]}")
    return result


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _open() -> Library | str:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return "xllamacpp not installed; pip install xllamacpp"
    version = importlib.metadata.version("xllamacpp")
    other = f"xllamacpp {version} has another binary interface than this adapter knows (checked {', '.join(CHECKED)})"
    files = sorted(p for p in Path(spec.origin).parent.glob("xllamacpp*") if p.suffix in {".so", ".pyd", ".dylib"})
    if not files:
        return f"xllamacpp {version} ships no shared library beside {Path(spec.origin).name}"
    try:
        found = Library(files[0])
    except OSError as error:
        return f"the library of xllamacpp {version} cannot be loaded: {error}"
    except AttributeError as error:
        return f"{other}: {error}"
    if why := _layout_fault(found):
        return f"{other}: {why}"
    found.start()
    return found


def _layout_fault(found: Library) -> str | None:
    """Compare what the library returns by value with the documented defaults, field by field."""
    for params, defaults in (
        (found.llama_model_default_params(), _MODEL_DEFAULTS),
        (found.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for name, *_ in params._fields_[:-1]:
            value = getattr(params, name)
            value = any(value) if isinstance(value, ctypes.Array) else value or 0  # a null pointer is None
            if value != defaults.get(name, 0):
                return f"default of `{name}` is {value}, expected {defaults.get(name, 0)}"
    token = (c_int32 * 1)(7)
    batch = found.llama_batch_get_one(token, 1)
    if batch.n_tokens != 1 or batch.token[0] != 7 or batch.embd or batch.pos or batch.seq_id or batch.logits:
        return "llama_batch has another layout"
    for type_, name, size in ((F16, b"f16", 2), (BF16, b"bf16", 2), (Q8_0, b"q8_0", 34), (Q4_K, b"q4_K", 144)):
        if found.ggml_type_name(type_) != name or found.ggml_type_size(type_) != size:
            return f"tensor type {type_} is not {name.decode()}"
    return None
