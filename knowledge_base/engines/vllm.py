"""vLLM on a CUDA device: paged attention and batches that change at every step, from a plain checkpoint.

Its libraries clash with ours (it pins torch and transformers), so it lives in an environment of its own and runs there;
export happens here, with our torch. Asking anything of this file imports neither.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.engines import _environment, _shared
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Engine, Environment, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running
    from knowledge_base.engines._serving import Server, Texts

NAME = "vllm"
ENGINE = Engine(
    summary="vLLM on CUDA devices: paged attention, continuous batching",
    offers=frozenset({"batch", "prefix_cache", "prefill_chunk"}),
    preload=("numpy", "knowledge_base.engines._vllm_running"),  # no torch: it is the other environment's
    modules=("vllm",),
    devices=frozenset({"gpu"}),
    environment=Environment(requirements=("vllm==0.32.0",), disk_bytes=9_000_000_000),
    sources=("https://github.com/vllm-project/vllm", "https://docs.vllm.ai/en/v0.32.0/configuration/engine_args/"),
)
LOG_PROB_TOLERANCE = 2e-2  # float32 products on a GPU and another order of sums; not measured here for lack of one

# Decoder-only architectures that vLLM implements and the conformance suite can make.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral")

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "batch": _shared.AT_LEAST_ONE,
    "prefix_cache": _shared.TRUE,  # these two are the server's: one batch after the other keeps and interrupts nothing
    "prefill_chunk": _shared.AT_LEAST_ONE,
}


def find() -> str | None:
    """Return why this engine cannot run here, or None. Imports nothing."""
    if not _has_cuda_device():
        return "no CUDA device: vLLM runs on no other"
    return _environment.problem(NAME, ENGINE)


def _has_cuda_device() -> bool:
    """Return whether the NVIDIA driver shows a device, or a container passes one on."""
    return any(Path("/proc/driver/nvidia/gpus").glob("*")) or bool(
        Path("/dev/nvidiactl").exists() and shutil.which("nvidia-smi")
    )


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution; none where it is not installed."""
    return _environment.versions(NAME, ("vllm", "torch", "transformers"))


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    if model.architecture not in ARCHITECTURES:
        return f"architecture `{model.architecture}` is not known to run in vLLM; {', '.join(ARCHITECTURES)} are"
    return _shared.why_not_stored(model.weight_dtype)


def export(session: Session, folder: Path) -> None:
    """Write a checkpoint as transformers does: config.json, model.safetensors and the tokenizer's files.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine, or modules that a plain checkpoint cannot
            hold: packed, factorised or of sizes that config.json does not tell.
    """
    _shared.require_storage("vllm", session.storage)
    from knowledge_base.engines import _torch_artefact

    if structure := _torch_artefact.structure_of(session.model):
        name, entry = next(iter(structure.items()))
        raise CandidateFailed(
            "unsupported",
            f"a plain checkpoint has no place for {len(structure)} changed modules, first `{name}` ({entry['kind']})",
            hint="plan this step with an engine that offers it",
        )
    _torch_artefact.save(session.model, session.tokenizer, folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact on the first CUDA device and return it ready to run; only in vLLM's own environment.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine has no way to honour, "load_error"
            when files are missing or vLLM cannot load them.
    """
    _checked(folder, runtime)
    from knowledge_base.engines import _vllm_running

    return _vllm_running.VllmRunning(folder, batch=runtime.get("batch", 1))


def open_server(folder: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> Server:
    """Load an artefact on the first CUDA device and answer `batch` requests at once; only in vLLM's own environment.

    Raises:
        CandidateFailed: as `open_artefact`.
    """
    _checked(folder, runtime)
    from knowledge_base.engines import _vllm_server

    return _vllm_server.served(folder, runtime, context_tokens, texts)


def _checked(folder: Path, runtime: Mapping[str, Any]) -> None:
    """Refuse a runtime this engine cannot honour, and a folder that is no checkpoint."""
    _shared.require_runtime("vllm", runtime, _RUNTIME)
    _shared.require_files(folder, ("config.json", "model.safetensors"))
