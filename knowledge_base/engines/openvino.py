"""OpenVINO on the CPU: whole graphs compiled for the processor, weights in float, 8 or 4 bits.

`accepts`, `find` and opening an artefact import neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.engines import _shared
from knowledge_base.serde import write_json
from knowledge_base.types import Engine, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running
    from knowledge_base.engines._serving import Server, Texts

ENGINE = Engine(
    summary="OpenVINO on the CPU, weights in float, 8 or 4 bits",
    offers=frozenset({"openvino", "factorised", "kv:8", "kv:4", "batch", "threads", "pinned_threads", "prefix_cache",
                      "prefill_chunk"}),
    preload=("numpy", "knowledge_base.engines._openvino_running"),
    modules=("openvino", "nncf"),
    devices=frozenset({"cpu"}),
    extra="openvino",
    sources=("https://docs.openvino.ai", "https://github.com/openvinotoolkit/openvino",
             "https://github.com/openvinotoolkit/nncf"),
)  # fmt: skip

# model_types of _openvino_graph._WRITERS, here so that asking needs no torch; a test compares the two.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": _shared.AT_LEAST_ONE,
    "pinned": _shared.TRUE,
    "batch": _shared.AT_LEAST_ONE,
    "kv_bits": _shared.KV_BITS,
    "prefix_cache": _shared.TRUE,  # these two are the server's: one batch after the other keeps and interrupts nothing
    "prefill_chunk": _shared.AT_LEAST_ONE,
}
SERVES = "openvino_genai"  # the module that answers several requests at once


def find() -> str | None:
    """Return why this engine cannot run here, or None. Imports nothing."""
    return _shared.missing(ENGINE.modules, "openvino")


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return _shared.versions(ENGINE.modules)


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    return _shared.why_not_written(model, ARCHITECTURES, "OpenVINO graph")


def export(session: Session, folder: Path) -> None:
    """Write openvino_model.xml and .bin, config.json and the tokenizer's own files, as OpenVINO GenAI reads them.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine or a structure the graph has no form for.
    """
    _shared.require_storage("openvino", session.storage, {"openvino"})
    from knowledge_base.engines import _openvino_writer
    from knowledge_base.engines._openvino_library import FILE

    folder.mkdir(parents=True, exist_ok=True)
    _openvino_writer.write(session, folder / FILE)
    write_json(folder / "config.json", json.loads(session.model.config.to_json_string(use_diff=True)))
    if session.tokenizer is not None:
        session.tokenizer.save_pretrained(folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run on the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine has no way to honour, "load_error"
            when files are missing, damaged or not this engine's.
    """
    path = _checked(folder, runtime)
    from knowledge_base.engines import _openvino_running, _pinning

    _pinning.pin(runtime)

    return _openvino_running.OpenvinoRunning(path, threads=runtime.get("threads"), kv_bits=runtime.get("kv_bits"))


def open_server(folder: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> Server:
    """Load an artefact into OpenVINO GenAI's continuous batching, which answers `batch` requests at once.

    Raises:
        OneByOneOnly: OpenVINO GenAI is not installed, or has no paged attention for this graph.
        CandidateFailed: as `open_artefact`.
    """
    path = _checked(folder, runtime)
    if why := _shared.missing([SERVES], ENGINE.extra):
        from knowledge_base.engines._serving import OneByOneOnly

        raise OneByOneOnly(why)
    from knowledge_base.engines import _openvino_server, _pinning

    _pinning.pin(runtime)

    return _openvino_server.served(path, runtime, context_tokens, texts)


def _checked(folder: Path, runtime: Mapping[str, Any]) -> Path:
    """Return the graph of an artefact whose runtime this engine can honour."""
    from knowledge_base.engines._openvino_library import FILE, WEIGHTS

    _shared.require_runtime("openvino", runtime, _RUNTIME)
    _shared.require_files(folder, (FILE, WEIGHTS))
    return folder / FILE
