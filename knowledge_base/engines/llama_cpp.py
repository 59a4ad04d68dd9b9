"""llama.cpp on the CPU, through the library in the xllamacpp wheel: the fastest decoding of the two engines.

`accepts` and `find` import neither torch nor the library's Python classes; the library itself takes about 20 ms to
load and check.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Engine, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running

ENGINE = Engine(
    summary="llama.cpp on the CPU, weights in GGUF block formats",
    offers=frozenset({"gguf", "kv:8", "kv:4", "batch", "threads"}),
    preload=("numpy", "knowledge_base.engines._llama_running"),
    modules=("xllamacpp", "gguf"),
    devices=frozenset({"cpu"}),  # the wheel is built without GPU kernels
    sources=("https://github.com/ggml-org/llama.cpp", "https://github.com/xorbitsai/xllamacpp"),
)

FILE = "model.gguf"
# model_types of _gguf_writer.ARCHITECTURES, here so that asking needs no torch; a test compares the two.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "batch": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "kv_bits": (lambda v: v in (8, 4), "8 or 4"),
}


def find() -> str | None:
    """Return why this engine cannot run here, or None."""
    missing = [name for name in ENGINE.modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed; pip install {' '.join(missing)}"
    from knowledge_base.engines import _llama_abi

    return _llama_abi.fault()


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return {name: importlib.metadata.version(name) for name in ENGINE.modules}


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    if model.architecture not in ARCHITECTURES:
        return f"architecture `{model.architecture}` has no GGUF writer here; {', '.join(ARCHITECTURES)} have"
    if model.experts:
        return "mixtures of experts are not written to GGUF"
    if model.weight_dtype not in WEIGHT_DTYPES:
        return f"weights are stored as {model.weight_dtype}; this engine starts from {', '.join(WEIGHT_DTYPES)}"
    return None


def export(session: Session, folder: Path) -> None:
    """Write model.gguf, and the tokenizer's own files for programs that read the folder.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine or a structure llama.cpp cannot run;
            "non_finite", a weight the chosen type cannot hold.
    """
    other = sorted(session.storage.keys() - {"gguf_type"})
    if other:
        raise CandidateFailed(
            "unsupported",
            f"the llama_cpp engine has no storage choice {', '.join(f'`{k}`' for k in other)}",
            hint="plan this step with an engine that offers it",
        )
    from knowledge_base.engines import _gguf_writer

    folder.mkdir(parents=True, exist_ok=True)
    _gguf_writer.write(session, folder / FILE)
    if session.tokenizer is not None:
        session.tokenizer.save_pretrained(folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run on the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine has no way to honour, "load_error"
            when model.gguf is missing, damaged or of an unknown kind.
        EnvironmentProblem: xllamacpp is missing or has another binary interface.
    """
    for key, value in runtime.items():
        if key not in _RUNTIME:
            raise CandidateFailed(
                "unsupported", f"unknown runtime key `{key}`", hint=f"the llama_cpp engine knows {', '.join(_RUNTIME)}"
            )
        valid, words = _RUNTIME[key]
        if not valid(value):
            raise CandidateFailed(
                "unsupported", f"runtime key `{key}` is {value!r}, expected {words}", hint="rebuild the artefact"
            )
    path = folder / FILE
    if not path.is_file():
        raise CandidateFailed("load_error", f"{folder.name} holds no {FILE}", hint="build the artefact again")
    from knowledge_base.engines import _llama_running

    return _llama_running.LlamaRunning(path, threads=runtime.get("threads"), kv_bits=runtime.get("kv_bits"))
