"""ONNX Runtime on the CPU, graphs by the model builder of ONNX Runtime GenAI: float32, or layers in 8 or 4 bits.

The artefact is a folder as ONNX Runtime GenAI reads it; here its graph runs in ONNX Runtime itself, which has
no generator to make for each request, goes on past an end of text and gives the logits of every position. `accepts`,
`find` and opening an artefact import neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.engines import _shared
from knowledge_base.types import Engine, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running

ENGINE = Engine(
    summary="ONNX Runtime on the CPU, weights in float32, 8 or 4 bits",
    offers=frozenset({"onnx", "batch", "threads", "pinned_threads"}),
    preload=("numpy", "onnxruntime", "knowledge_base.engines._onnx_running"),
    modules=("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    devices=frozenset({"cpu"}),  # the wheel is built without GPU kernels
    extra="onnxruntime",
    sources=("https://github.com/microsoft/onnxruntime", "https://github.com/microsoft/onnxruntime-genai"),
)

# model_types whose graph by this builder was found to compute what transformers does; the builder takes more.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "phi", "nemotron", "ernie4_5")
HEAD_MULTIPLE = 16  # of the size of a head, in the kernel that rotates and attends

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": _shared.AT_LEAST_ONE,
    "pinned": _shared.TRUE,
    "batch": _shared.AT_LEAST_ONE,
}


def find() -> str | None:
    """Return why this engine cannot run here, or None. Imports nothing."""
    return _shared.missing(ENGINE.modules, "onnxruntime")


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return _shared.versions(ENGINE.modules)


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    if why := _shared.why_not_written(model, ARCHITECTURES, "ONNX graph"):
        return why
    if model.head_size % HEAD_MULTIPLE:
        return f"heads of {model.head_size} numbers; ONNX Runtime's attention needs a multiple of {HEAD_MULTIPLE}"
    window = model.sliding_window_tokens
    if model.architecture == "mistral" and window and window < model.max_context_tokens:
        return f"the ONNX graph of mistral would see beyond its window of {window} tokens"
    return None


def export(session: Session, folder: Path) -> None:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer's files, as ONNX Runtime GenAI reads them.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine, or a structure that the builder has no
            operators for or writes a graph of that computes something else.
    """
    _shared.require_storage("onnxruntime", session.storage, {"onnx_bits"})
    from knowledge_base.engines import _onnx_writer

    folder.mkdir(parents=True, exist_ok=True)
    _onnx_writer.write(session, folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run on the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine has no way to honour, "load_error"
            when files are missing, damaged or not this engine's.
    """
    _shared.require_runtime("onnxruntime", runtime, _RUNTIME)
    from knowledge_base.engines import _onnx_running, _pinning

    _pinning.pin(runtime)

    return _onnx_running.OnnxRunning(folder, threads=runtime.get("threads"))
