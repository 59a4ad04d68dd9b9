"""PyTorch through transformers: runs every causal LM transformers knows, dense or with packed modules."""

from __future__ import annotations

import ast
import functools
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
    summary="PyTorch with transformers, on the CPU or the first CUDA GPU",
    offers=frozenset({
        "torch", "packed:int8", "packed:int4", "dynamic:int8", "factorised",
        "kv:8", "kv:4", "lookup", "compile", "batch", "threads",
    }),
    preload=(
        "torch", "safetensors.torch", "transformers.modeling_utils", "transformers.masking_utils",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "knowledge_base.engines._torch_running",
    ),
    modules=("torch", "transformers", "safetensors"),
    sources=("https://huggingface.co/docs/transformers", "https://pytorch.org/docs/stable"),
)  # fmt: skip

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "batch": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "kv_bits": (lambda v: v in (8, 4), "8 or 4"),
    "lookup_tokens": (lambda v: type(v) is int and v >= 1, "an integer of at least 1"),
    "compile": (lambda v: v is True, "true"),
}


def find() -> str | None:
    """Return why this engine cannot run here, or None. Imports nothing."""
    missing = [name for name in ENGINE.modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed; pip install {' '.join(missing)}" if missing else None


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return {name: importlib.metadata.version(name) for name in ENGINE.modules}


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    known = causal_architectures()
    if known and model.architecture not in known:
        return f"architecture `{model.architecture}` is unknown to transformers {versions()['transformers']}"
    if model.weight_dtype not in WEIGHT_DTYPES:
        return f"weights are stored as {model.weight_dtype}; this engine starts from {', '.join(WEIGHT_DTYPES)}"
    return None


@functools.cache
def causal_architectures() -> frozenset[str]:
    """Return the model_types with a causal LM class; empty when the installed release lists them elsewhere.

    Read from transformers' source, since importing its table costs over a second and predictions need it.
    """
    spec = importlib.util.find_spec("transformers")
    table = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py" if spec and spec.origin else None
    if table is None or not table.is_file():
        return frozenset()
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        names = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        if "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES" in names:
            pairs = [n for n in ast.walk(node) if isinstance(n, ast.Tuple) and isinstance(n.elts[0], ast.Constant)]
            return frozenset(str(ast.literal_eval(pair.elts[0])) for pair in pairs)
    return frozenset()


def export(session: Session, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer files and, with replaced modules, structure.json.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine, or shapes config.json cannot describe.
    """
    from knowledge_base.engines import _torch_artefact

    if session.storage:
        raise CandidateFailed(
            "unsupported",
            f"the transformers engine has no storage choice {', '.join(f'`{k}`' for k in sorted(session.storage))}",
            hint="plan this step with an engine that offers it",
        )
    _torch_artefact.save(session.model, session.tokenizer, folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run, on the first CUDA GPU if there is one, else the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine or model has no way to honour,
            "load_error" when files are missing, damaged or do not fit each other.
    """
    for key, value in runtime.items():
        if key not in _RUNTIME:
            raise CandidateFailed(
                "unsupported",
                f"unknown runtime key `{key}`",
                hint=f"the transformers engine knows {', '.join(_RUNTIME)}",
            )
        valid, words = _RUNTIME[key]
        if not valid(value):
            raise CandidateFailed(
                "unsupported", f"runtime key `{key}` is {value!r}, expected {words}", hint="rebuild the artefact"
            )
    if "lookup_tokens" in runtime and runtime.get("batch", 1) > 1:
        raise _clash("prompt lookup", "batches: sequences would accept different numbers of tokens")
    if "compile" in runtime and "lookup_tokens" in runtime:
        raise _clash("prompt lookup", "torch.compile: each draft length is another shape to compile")
    if "compile" in runtime and "kv_bits" in runtime:
        raise _clash("a quantised KV cache", "torch.compile: the compiled step needs a cache of fixed size")

    from knowledge_base.engines import _torch_artefact, _torch_running

    model = _torch_artefact.load(folder, _torch_artefact.best_device())
    return _torch_running.TorchRunning(
        model,
        threads=runtime.get("threads"),
        kv_bits=runtime.get("kv_bits"),
        lookup_tokens=runtime.get("lookup_tokens"),
        compiled="compile" in runtime,
    )


def _clash(what: str, with_what: str) -> CandidateFailed:
    return CandidateFailed("unsupported", f"{what} does not go with {with_what}", hint="choose one of the two")
