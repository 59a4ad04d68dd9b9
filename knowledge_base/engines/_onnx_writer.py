"""A session's model as an ONNX graph, by the model builder of ONNX Runtime GenAI.

The builder reads a checkpoint from disk, so the model is written beside and removed again. It takes what config.json says
of an architecture for granted and has written graphs that left out a window or a scaled rotation without a word: what
is known to go wrong is refused before, and every graph is run beside the model once before it counts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch

from knowledge_base.engines import _torch_artefact
from knowledge_base.engines._onnx_running import CONTEXT_TOKENS, FILE, HEAD_SIZE, WEIGHTS_BYTES, OnnxRunning
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Session

GROUP = 32  # weights that share a scale, and in 4 bits a zero point; the builder's default
# Beside the precision. Of 4 bits, zero points and a head of 8 bits halve the loss for a fortieth of the bytes; the head's
# table then serves as embedding too where the model ties them. Windows are kept by the mask, the cache is whole.
_OPTIONS = ("hf_token=false", "hf_remote=false", "windowed_kv_cache=false")
_PRECISIONS: dict[int | None, tuple[str, ...]] = {
    None: ("fp32",),
    8: ("int8", f"block_size={GROUP}"),
    4: ("int4", f"block_size={GROUP}", "algo_config=rtn", "is_symmetric=false", "matmul_mixed_precision=last_matmul:int8"),
}  # fmt: skip
_ROTATIONS = {"llama": ("default", "llama3")}  # other architectures: the first
PROBE_TOKENS = 64
# Mean KL divergence, nats a token, beyond which a graph is not this model: rounding of 16-bit models, of 8 and 4 bits.
_NOT_THIS_MODEL = {None: 0.02, 8: 0.1, 4: 1.0}


def write(session: Session, folder: Path) -> None:
    """Write the graph, its weights, genai_config.json and the tokenizer's files into `folder`.

    Raises:
        CandidateFailed: "unsupported", as `onnxruntime.export` says.
    """
    bits = session.storage.get("onnx_bits")
    if why := _why_not(session, bits):
        raise unsupported(why)
    with tempfile.TemporaryDirectory(prefix="onnx-", dir=session.workspace) as name:
        checkpoint, cache = Path(name, "checkpoint"), Path(name, "cache")
        _torch_artefact.save(session.model, session.tokenizer, checkpoint)
        if (checkpoint / _torch_artefact.STRUCTURE).exists():
            raise unsupported(
                "layers are packed, factorised or of sizes of their own, which its graphs have no form for"
            )
        _build(checkpoint, folder, cache, _PRECISIONS[bits])
    _finish(folder / FILE, session.model.config)
    _compare(session, folder, bits)


def unsupported(why: str) -> CandidateFailed:
    """Return the refusal of what has no graph."""
    return CandidateFailed("unsupported", f"no ONNX graph: {why}", hint="plan this with the transformers engine")


def _why_not(session: Session, bits: int | None) -> str | None:
    model, config = session.model, session.model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation not in _ROTATIONS.get(config.model_type, ("default",)):
        return f"the builder does not know positions of type `{rotation}` for `{config.model_type}`"
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window and window < config.max_position_embeddings:
        return f"the builder leaves out the window of {window} tokens"
    head = model.get_output_embeddings()
    if taken := next((n for n, m in model.named_modules() if _outputs(m) == config.vocab_size and m is not head), None):
        return f"the builder takes {taken} for the head: it is as wide as the vocabulary, {config.vocab_size}"
    if session.tokenizer is None:
        return "the builder needs the tokenizer's files"
    dtype = str(model.dtype).removeprefix("torch.")
    if bits is None and session.facts is not None and dtype != session.facts.weight_dtype:
        return (
            f"the steps made the weights {dtype}; ONNX Runtime's kernels for the CPU would store them in float32 again"
        )
    return None


def _outputs(module: torch.nn.Module) -> int | None:
    return getattr(module, "out_features", None)


def _build(checkpoint: Path, folder: Path, cache: Path, precision: tuple[str, ...]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            builder = _builder()
            given = (None, str(checkpoint), str(folder), precision[0], "cpu", str(cache))
            builder.create_model(*given, **builder.parse_extra_options(*given, [*_OPTIONS, *precision[1:]]))
    # The builder has no errors of its own: what it does not know of a model ends in one of these.
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise unsupported(
            f"the model builder of ONNX Runtime GenAI failed: {type(error).__name__}: {reason}"
        ) from error


def _builder() -> Any:
    """Return the builder; importing it must not change where this process finds modules, nor what it logs."""
    root = logging.getLogger()
    changed: tuple[list[Any], ...] = (sys.path, root.handlers)
    level, before = root.level, [list(held) for held in changed]
    try:
        from onnxruntime_genai.models import builder
    finally:
        root.setLevel(level)
        for held, was in zip(changed, before):
            held[:] = was
    return builder


def _finish(path: Path, config: Any) -> None:
    """Tell in the graph what a reader would have to search it for, and leave out the commit of whoever's checkout it is."""
    import onnx
    import onnxruntime_genai

    graph = onnx.load(path, load_external_data=False)
    sizes = {t.name: _bytes_of(t) for t in graph.graph.initializer}
    weights = sum(sizes.values())
    # One table as embedding and head is turned as the graph is loaded, for looking rows up.
    weights += sum(sizes.get(n.input[0], 0) for n in graph.graph.node if n.op_type == "Transpose")
    graph.producer_version = onnxruntime_genai.__version__
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    told = {CONTEXT_TOKENS: config.max_position_embeddings, HEAD_SIZE: head_size, WEIGHTS_BYTES: weights}
    for key, value in told.items():
        graph.metadata_props.add(key=key, value=str(value))
    onnx.save(graph, path)


def _bytes_of(tensor: Any) -> int:
    told = {entry.key: entry.value for entry in tensor.external_data}
    return int(told["length"]) if "length" in told else len(tensor.raw_data)


def _compare(session: Session, folder: Path, bits: int | None) -> None:
    """Run the graph once beside the model, on tokens drawn by the session's seed."""
    model, vocabulary = session.model, session.model.config.vocab_size
    tokens = numpy.random.default_rng(session.seed).integers(0, vocabulary, PROBE_TOKENS).tolist()
    running = OnnxRunning(folder, threads=torch.get_num_threads())
    try:
        found = running.log_probs(tokens[: running.context_tokens])
    except CandidateFailed as error:
        raise unsupported(f"the graph does not run: {error.message}") from error
    finally:
        running.close()
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[: len(found)]], device=model.device), use_cache=False).logits[0]
        expected = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
    apart = float((numpy.exp(expected) * (expected - found)).sum(axis=1).mean())
    if not apart <= _NOT_THIS_MODEL[bits]:
        raise unsupported(
            f"the builder's graph computes something else than the model: {apart:.2g} nats apart for each token"
        )
