"""llama.cpp on the CPU, through the library in the xllamacpp wheel.

`accepts` and `find` import neither torch nor the library's Python classes; the library itself takes about 20 ms to
load and check.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.engines import _shared
from knowledge_base.types import Engine, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running
    from knowledge_base.engines._serving import Server, Texts

ENGINE = Engine(
    summary="llama.cpp on the CPU, weights in GGUF block formats",
    offers=frozenset(
        {
            "gguf",
            "kv:8",
            "kv:4",
            "lookup",
            "draft_model",
            "batch",
            "threads",
            "pinned_threads",
            "prefix_cache",
            "prefill_chunk",
        }
    ),
    preload=("numpy", "knowledge_base.engines._llama_running"),
    modules=("xllamacpp", "gguf"),
    devices=frozenset({"cpu"}),  # the wheel is built without GPU kernels
    sources=("https://github.com/ggml-org/llama.cpp", "https://github.com/xorbitsai/xllamacpp"),
)

FILE = "model.gguf"
DRAFT = "draft.gguf"
# model_types of _gguf_writer.ARCHITECTURES, here so that asking needs no torch; a test compares the two.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": _shared.AT_LEAST_ONE,
    "pinned": _shared.TRUE,
    "batch": _shared.AT_LEAST_ONE,
    "kv_bits": _shared.KV_BITS,
    "prefix_cache": _shared.TRUE,  # these two are the server's: one batch after the other keeps and interrupts nothing
    "prefill_chunk": _shared.AT_LEAST_ONE,
    "lookup_tokens": _shared.AT_LEAST_ONE,
    "draft_tokens": _shared.AT_LEAST_ONE,
}
_DRAFTS = ("lookup_tokens", "draft_tokens")
_TOGETHER = _shared.Together(
    one_of=((_DRAFTS, _shared.ONE_WAY),),
    clashes=((_DRAFTS, _shared.BATCHES, "guessing tokens", _shared.OTHER_LENGTHS),),
)


def find() -> str | None:
    """Return why this engine cannot run here, or None."""
    if why := _shared.missing(ENGINE.modules):
        return why
    from knowledge_base.engines import _llama_abi

    return _llama_abi.fault()


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return _shared.versions(ENGINE.modules)


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    return _shared.why_not_written(model, ARCHITECTURES, "GGUF writer")


def export(session: Session, folder: Path) -> None:
    """Write model.gguf, draft.gguf in the same type where a draft goes along, and the tokenizer's own files.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine or a structure llama.cpp cannot run;
            "non_finite", a weight the chosen type cannot hold.
    """
    _shared.require_storage("llama_cpp", session.storage, {"gguf_type", "gguf_types", "gguf_importance", "draft"})
    from knowledge_base.engines import _gguf_writer

    folder.mkdir(parents=True, exist_ok=True)
    _gguf_writer.write(session, folder / FILE)
    if "draft" in session.storage:
        _gguf_writer.write_draft(session, folder / DRAFT)
    if session.tokenizer is not None:
        session.tokenizer.save_pretrained(folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run on the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine has no way to honour, "load_error"
            when model.gguf is missing, damaged or of an unknown kind.
        EnvironmentProblem: xllamacpp is missing or has another binary interface.
    """
    path = _checked(folder, runtime)
    from knowledge_base.engines import _llama_running, _pinning

    _pinning.pin(runtime)

    drafted = runtime.get("draft_tokens", runtime.get("lookup_tokens", 0))
    draft = folder / DRAFT if "draft_tokens" in runtime else None
    return _llama_running.LlamaRunning(
        path, threads=runtime.get("threads"), kv_bits=runtime.get("kv_bits"), drafted=drafted, draft=draft
    )


def open_server(folder: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> Server:
    """Load an artefact into llama.cpp's own server, which answers `batch` requests at once.

    Raises:
        CandidateFailed, EnvironmentProblem: as `open_artefact`; OneByOneOnly: answers are drafted.
    """
    path = _checked(folder, runtime)
    if runtime.keys() & {"lookup_tokens", "draft_tokens"}:
        from knowledge_base.engines._serving import OneByOneOnly

        raise OneByOneOnly("llama.cpp's server drafts in another way than was measured")
    from knowledge_base.engines import _llama_server, _pinning

    _pinning.pin(runtime)

    return _llama_server.LlamaServer(path, runtime, context_tokens)


def _checked(folder: Path, runtime: Mapping[str, Any]) -> Path:
    """Return the model file of an artefact whose runtime this engine can honour."""
    _shared.require_runtime("llama_cpp", runtime, _RUNTIME)
    _shared.require_together(runtime, _TOGETHER)
    _shared.require_files(folder, (FILE, DRAFT) if "draft_tokens" in runtime else (FILE,))
    return folder / FILE
