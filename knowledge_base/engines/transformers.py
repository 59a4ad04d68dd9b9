"""PyTorch through transformers: runs every causal LM transformers knows, dense or with packed modules."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.engines import _shared
from knowledge_base.types import Engine, Model, Session

if TYPE_CHECKING:
    from knowledge_base.engines._running import Running
    from knowledge_base.engines._serving import Server, Texts
    from knowledge_base.engines._torch_running import TorchRunning

ENGINE = Engine(
    summary="PyTorch with transformers, on the CPU or the first CUDA GPU",
    offers=frozenset({
        "torch", "packed:int8", "packed:int4", "packed:int3", "packed:int2", "packed:codebook", "packed:fp8", "packed:table",
        "packed:sparse",
        "dynamic:int8", "static:int8", "factorised", "thresholded", "corrected", "split_ffn",
        "offload", "kv:8", "kv:4", "kv_eviction", "prompt_pruning", "prompt_blocks", "prompt_compression", "lookup", "draft_model", "layer_exit", "prompt_neurons", "compile", "attention_kernel", "batch", "threads", "pinned_threads",
    }),
    preload=(
        "torch", "safetensors.torch", "transformers.modeling_utils", "transformers.masking_utils",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "knowledge_base.engines._torch_running",
    ),
    modules=("torch", "transformers", "safetensors"),
    sources=("https://huggingface.co/docs/transformers", "https://pytorch.org/docs/stable"),
)  # fmt: skip


# Runtime keys: what a value must satisfy, and the words for it.
_RUNTIME = {
    "threads": _shared.AT_LEAST_ONE,
    "pinned": _shared.TRUE,
    "batch": _shared.AT_LEAST_ONE,
    "kv_bits": _shared.KV_BITS,
    "lookup_tokens": _shared.AT_LEAST_ONE,
    "draft_tokens": _shared.AT_LEAST_ONE,
    "draft_layers": _shared.AT_LEAST_ONE,
    "exit_layers": _shared.AT_LEAST_ONE,
    "exit_confidence": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "ffn_keep": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "kv_evict": (lambda v: v in ("window", "heavy_hitters", "snap"), "window, heavy_hitters or snap"),
    "kv_keep": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "prompt_keep": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "block_keep": (lambda v: type(v) is float and 0 < v < 1, "a number between 0 and 1"),
    "prompt_times": (lambda v: type(v) is int and v >= 2, "an integer of at least 2"),
    "compile": (lambda v: v is True, "true"),
    "attention": (lambda v: v == "flash_attention_3", "flash_attention_3"),
    "offload": (
        lambda v: type(v) is list and v and all(type(name) is str and name for name in v) and len(set(v)) == len(v),
        "a list of names of modules, each once",
    ),
}

_NO_POSITIONS = ("bloom", "mpt")  # how far tokens are apart is part of attention: ALiBi
_SIDE_BY_SIDE = {"threads", "pinned", "batch", "offload"}  # all that goes with answers that join and leave

# Ways to write an answer, and ways to look at less of the prompt: one of each at most.
_DRAFTS = ("lookup_tokens", "draft_tokens", "exit_layers")
_PRUNED = ("kv_evict", "prompt_keep", "block_keep", "prompt_times")
_TOGETHER = _shared.Together(
    one_of=((_DRAFTS, _shared.ONE_WAY), (_PRUNED, "both choose what is looked at of the prompt")),
    needs=(
        ("draft_layers", "draft_tokens"), ("exit_layers", "exit_confidence"), ("exit_confidence", "exit_layers"),
        ("kv_evict", "kv_keep"), ("kv_keep", "kv_evict"),
    ),
    clashes=(
        (_DRAFTS, _shared.BATCHES, "guessing tokens", _shared.OTHER_LENGTHS),
        (_DRAFTS, "compile", "guessing tokens", "torch.compile: each number of tokens is another shape to compile"),
        (("kv_bits",), "compile", "a quantised KV cache", "torch.compile: the compiled step needs a cache of fixed size"),
        (_PRUNED, "compile", "keeping a part of the prompt", "torch.compile: the compiled step needs a cache of fixed size"),
        (_PRUNED, "ffn_keep", "keeping a part of the prompt", "neurons chosen by the prompt: both are scored as they decode"),
        (_PRUNED, "attention", "keeping a part of the prompt", "an attention kernel of its own, which brings another"),
        (("attention",), "compile", "an attention kernel of its own", "torch.compile, which brings another"),
        (("ffn_keep",), _shared.BATCHES, "choosing neurons by the prompt", "batches: each prompt would choose others"),
        (("ffn_keep",), "compile", "choosing neurons by the prompt", "torch.compile: every prompt makes another model"),
        (("exit_layers",), "ffn_keep", "early exit", "neurons chosen by the prompt: each is scored in a way of its own"),
        (("offload",), "compile", "offloading", "torch.compile: compiled code holds the addresses of weights, which move"),
        (("offload",), "ffn_keep", "offloading", "neurons chosen by the prompt: what is not in memory cannot be put aside"),
    ),
)  # fmt: skip


def find() -> str | None:
    """Return why this engine cannot run here, or None. Imports nothing."""
    return _shared.missing(ENGINE.modules)


def versions() -> dict[str, str]:
    """Return the versions that decide what this engine computes, by distribution."""
    return _shared.versions(ENGINE.modules)


def accepts(model: Model) -> str | None:
    """Return why this engine cannot load the model, as a sentence, or None."""
    known = architectures()
    if known and model.architecture not in known:
        return f"architecture `{model.architecture}` is unknown to transformers {versions()['transformers']}"
    return _shared.why_not_stored(model.weight_dtype)


_TABLES = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "TEXT_ENCODING", "IMAGE_TEXT_TO_TEXT")


def causal_architectures() -> frozenset[str]:
    """Return the model_types with a causal LM class; empty when the installed release lists them elsewhere."""
    return frozenset(kind for kind, tables in architectures().items() if "CAUSAL_LM" in tables)


@functools.cache
def architectures() -> Mapping[str, frozenset[str]]:
    """Return the model_types with a class for text, and in which of _TABLES; empty as `causal_architectures`.

    Read from transformers' source, since importing its table costs over a second and predictions need it.
    """
    spec = importlib.util.find_spec("transformers")
    table = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py" if spec and spec.origin else None
    if table is None or not table.is_file():
        return {}
    wanted = {f"MODEL_FOR_{name}_MAPPING_NAMES": name for name in _TABLES}
    found: dict[str, frozenset[str]] = {}
    for node in ast.parse(table.read_text(encoding="utf-8")).body:
        for name in (t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name) and t.id in wanted):
            pairs = [n for n in ast.walk(node) if isinstance(n, ast.Tuple) and isinstance(n.elts[0], ast.Constant)]
            for kind in (str(ast.literal_eval(pair.elts[0])) for pair in pairs):
                found[kind] = found.get(kind, frozenset()) | {wanted[name]}
    return found


def export(session: Session, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer files, with replaced modules structure.json, and what drafts need.

    Raises:
        CandidateFailed: "unsupported", a storage choice of another engine, or shapes config.json cannot describe.
    """
    from knowledge_base.engines import _torch_artefact, _torch_drafting

    _shared.require_storage("transformers", session.storage, {"draft", "lens"})
    _torch_artefact.save(session.model, session.tokenizer, folder)
    _torch_drafting.save_parts(session.storage, folder)


def open_artefact(folder: Path, runtime: Mapping[str, Any]) -> Running:
    """Load an artefact and return it ready to run, on the first CUDA GPU if there is one, else the CPU.

    Raises:
        CandidateFailed: "unsupported" for a runtime key or value this engine or model has no way to honour,
            "load_error" when files are missing, damaged or do not fit each other.
    """
    return _opened(folder, runtime)


READS_APART = True  # its server reads a prompt in a step of its own, between two tokens of the answers


def open_server(folder: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> Server:
    """Load an artefact into a batch that answers join and leave, `batch` of them at once.

    Raises:
        OneByOneOnly: the plan or the model writes one answer at a time; CandidateFailed: as `open_artefact`.
    """
    _shared.require_runtime("transformers", runtime, _RUNTIME)
    from knowledge_base.engines._serving import OneByOneOnly

    if own := sorted(runtime.keys() - _SIDE_BY_SIDE):
        raise OneByOneOnly(f"`{own[0]}` is for sequences that begin and end together")
    from knowledge_base.engines import _torch_server

    slots = runtime.get("batch", 1)
    return _torch_server.served(_opened(folder, runtime), texts, slots=slots, context_tokens=context_tokens)


def one_by_one(model: Model) -> str | None:
    """Return why requests of a model are answered one after another, or None."""
    if model.attention_layers < model.layers:
        return f"`{model.architecture}` keeps a state of the text, where padding cannot be left out"
    if model.architecture in _NO_POSITIONS:
        return f"`{model.architecture}` takes no positions"
    return None


def _opened(folder: Path, runtime: Mapping[str, Any]) -> TorchRunning:
    _shared.require_runtime("transformers", runtime, _RUNTIME)
    _shared.require_together(runtime, _TOGETHER)
    from knowledge_base.engines import (
        _pinning,
        _torch_artefact,
        _torch_attention,
        _torch_drafting,
        _torch_offload,
        _torch_pruning,
        _torch_running,
    )

    _pinning.pin(runtime)
    device, parts, weights = _torch_artefact.best_device(), runtime.get("offload", ()), folder / _torch_artefact.WEIGHTS
    model = _torch_artefact.load(folder, device, waiting=_torch_offload.waiting(parts, weights, device))
    if "attention" in runtime:
        _torch_attention.use(model, runtime["attention"])
    return _torch_running.TorchRunning(
        model,
        threads=runtime.get("threads"),
        kv_bits=runtime.get("kv_bits"),
        decoding=_torch_drafting.decoding_of(model, folder, runtime),
        ffn_keep=runtime.get("ffn_keep"),
        compiled="compile" in runtime,
        pruning=_torch_pruning.pruning_of(model, runtime),
        offloaded=_torch_offload.offloaded(model, parts, weights, device) if parts else None,
    )
