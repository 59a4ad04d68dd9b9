"""An OpenVINO graph compiled for the CPU: greedy generation, full logits and exact memory.

One inference request with the KV cache as its state is stepped here, rather than by OpenVINO GenAI: its pipeline tells
no time of each step and returns no logits. Nothing here imports torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from knowledge_base.engines._openvino_library import CONTEXT, DTYPE, HEAD, INFO, openvino, sentence
from knowledge_base.engines._running import GREEDY, Generation, Sampling, require
from knowledge_base.engines._sampling import Sampler
from knowledge_base.errors import CandidateFailed

openvino()  # before forking: 0.5 s

ROWS = "rows"  # input: positions of the prompt whose logits are wanted
CHUNK_TOKENS = 512  # tokens computed at once when a text is scored
QUANTISED_CHUNK_TOKENS = 16  # tokens see those of their own chunk as computed, all before as the cache holds them
LOGITS_BYTES = 64 * 2**20  # most that one step of scoring may return
# Stored dtype: what OpenVINO calls it, and what a processor that computes in it says it can do.
PRECISIONS = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}
SCALE_BYTES = 8  # scale and zero, float32, of each token and head of a quantised cache


class OpenvinoRunning:
    """A compiled graph and its one request; see `_running.Running`."""

    def __init__(self, path: Path, *, threads: int | None, kv_bits: int | None) -> None:
        """Read and compile the graph.

        Raises:
            CandidateFailed: "load_error", damaged files or a graph that was not made by this engine; "unsupported", a
                cache of a kind this processor's plugin does not take.
        """
        graph = read(path)
        self._core, self._limit, self.vocabulary = graph.core, graph.context_tokens, graph.vocabulary
        settings = graph.settings(threads=threads, kv_bits=kv_bits)
        self.precision, self.cache = settings["INFERENCE_PRECISION_HINT"], settings["KV_CACHE_PRECISION"]
        self._chunk = QUANTISED_CHUNK_TOKENS if kv_bits else CHUNK_TOKENS
        self._weights_bytes = _loaded_bytes(graph.model, widened=not graph.able)
        self._cell_bytes = sum(_cell_bytes(s.get_info().data_shape, self.cache) for s in graph.model.get_variables())
        try:
            _add_rows(graph.model, graph.head)
            self._compiled: Any = self._core.compile_model(graph.model, "CPU", settings)
            taken = self._compiled.get_property("KV_CACHE_PRECISION").get_type_name()
        except RuntimeError as error:
            raise not_loadable(path, error) from error
        if taken != self.cache:
            raise CandidateFailed(
                "unsupported",
                f"OpenVINO keeps the KV cache in {taken} here, not in {self.cache}",
                hint="plan with a cache in another format",
            )
        self._request: Any = self._compiled.create_infer_request()
        self._kv_bytes = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`."""
        start = time.perf_counter()
        self._check(prompts, new_tokens)
        columns, times = [], []
        for token in self._tokens(prompts, new_tokens, lambda logits: logits.argmax(axis=1)):
            columns.append(token.tolist())
            times.append(time.perf_counter())
        tokens = [[column[row] for column in columns] for row in range(len(prompts))]
        return Generation(tokens=tokens, ttft_s=times[0] - start, total_s=times[-1] - start, steps=len(times) - 1)

    @property
    def context_tokens(self) -> int | None:
        """See `Running.context_tokens`."""
        return self._limit

    def stream(
        self, prompt: Sequence[int], new_tokens: int, *, sampling: Sampling = GREEDY, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt token by token; see `Running.stream`."""
        self._check([prompt], new_tokens)
        return self._streamed(prompt, new_tokens, Sampler(sampling), frozenset(stop))

    def _streamed(
        self, prompt: Sequence[int], new_tokens: int, sampler: Sampler, stop: frozenset[int]
    ) -> Iterator[int]:
        for token in self._tokens([prompt], new_tokens, lambda logits: numpy.array([sampler.draw(logits[0])])):
            yield int(token[0])
            if int(token[0]) in stop:
                return

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`."""
        self._check([tokens], 0, least=0)
        self._request.reset_state()
        chunk = min(self._chunk, max(1, LOGITS_BYTES // (4 * self.vocabulary)))
        result = numpy.empty((len(tokens), self.vocabulary), numpy.float32)
        for start in range(0, len(tokens), chunk):
            part = numpy.asarray([tokens[start : start + chunk]], numpy.int64)
            logits = self._step(part, start, numpy.arange(part.shape[1]))[0]
            shifted = logits - logits.max(axis=1, keepdims=True)
            result[start : start + len(shifted)] = shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))
        return result

    def memory(self) -> dict[str, int]:
        """Return exact `weights_bytes` and the last generate's `kv_cache_bytes`."""
        self._check_open()
        return {"weights_bytes": self._weights_bytes, "kv_cache_bytes": self._kv_bytes}

    def close(self) -> None:
        """Free request, compiled graph and weights."""
        self._request = self._compiled = self._core = None

    # ---------------------------------------------------------------- inside

    def _tokens(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, choose: Callable[[numpy.ndarray], numpy.ndarray]
    ) -> Iterator[numpy.ndarray]:
        """Yield each new token (batch,), chosen from the logits (batch, vocabulary) after those before it."""
        self._request.reset_state()
        tokens, length = numpy.asarray(prompts, numpy.int64), len(prompts[0])
        rows = numpy.array([length - 1])
        for past in range(length, length + new_tokens):
            token = choose(self._step(tokens, past - tokens.shape[1], rows)[:, -1])
            self._kv_bytes = len(prompts) * past * self._cell_bytes
            yield token
            tokens, rows = token[:, None], numpy.zeros(1, numpy.int64)

    def _step(self, tokens: numpy.ndarray, past: int, rows: numpy.ndarray) -> numpy.ndarray:
        """Run (batch, n) tokens after `past` others; return the logits (batch, rows, vocabulary), valid until the next."""
        count, new = tokens.shape
        inputs = {
            "input_ids": tokens,
            "attention_mask": numpy.ones((count, past + new), numpy.int64),
            "position_ids": numpy.broadcast_to(numpy.arange(past, past + new), (count, new)).copy(),
            "beam_idx": numpy.arange(count, dtype=numpy.int32),
            ROWS: rows,
        }
        try:
            return self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]
        except RuntimeError as error:
            raise CandidateFailed("crashed", f"OpenVINO stopped: {sentence(error)}") from error

    def _check_open(self) -> None:
        if self._request is None:
            raise RuntimeError("this artefact was closed")

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, least: int = 1) -> None:
        self._check_open()
        require(prompts, new_tokens, context=self._limit, vocabulary=self.vocabulary, least=least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An artefact's graph, read and not compiled."""

    core: Any
    model: Any
    head: Any  # its operator that makes logits
    context_tokens: int
    vocabulary: int
    dtype: str  # of the model before its weights were stored in fewer bits
    able: bool  # whether this processor computes in that dtype

    def settings(self, *, threads: int | None, kv_bits: int | None) -> dict[str, Any]:
        """Return what to compile it with."""
        precision = PRECISIONS[self.dtype][0] if self.able else "f32"
        # Keys and values may be float16 where nothing else can.
        cache = f"u{kv_bits}" if kv_bits else "f16" if self.dtype == "float16" else precision
        return {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads or cores(), "ENABLE_HYPER_THREADING": True,
            "INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": cache,
        }  # fmt: skip


def read(path: Path) -> Graph:
    """Read an artefact's graph.

    Raises:
        CandidateFailed: "load_error", damaged files or a graph that was not made by this engine.
    """
    core = openvino().Core()
    try:
        model = core.read_model(path)
        dtype = str(model.get_rt_info([INFO, DTYPE]).value)
        return Graph(
            core=core, model=model, dtype=dtype, context_tokens=int(model.get_rt_info([INFO, CONTEXT]).value),
            head=next(op for op in model.get_ops() if op.get_friendly_name() == HEAD),
            vocabulary=model.output("logits").get_partial_shape()[2].get_length(),
            able=PRECISIONS[dtype][1] in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
        )  # fmt: skip
    except (RuntimeError, KeyError, ValueError, StopIteration) as error:
        raise not_loadable(path, error) from error


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _add_rows(model: Any, head: Any) -> None:
    """Let the graph compute logits of asked positions only: a new input of their numbers, put before the head."""
    library = openvino()
    ops = library.opset15
    rows = ops.parameter([-1], library.Type.i64, name=ROWS)
    rows.output(0).get_tensor().set_names({ROWS})
    axis = ops.constant(1, library.Type.i64)
    head.input(0).replace_source_output(ops.gather(head.input_value(0), rows, axis).output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()


def _loaded_bytes(model: Any, *, widened: bool) -> int:
    """Return the bytes of the graph's constants as they are multiplied with, each once.

    Where the processor has no arithmetic in the dtype of 16-bit matrices (`widened`), those are float32 then. Copies in
    the order a kernel reads are OpenVINO's working memory and show in the process, not here.
    """
    total = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            total += node.get_byte_size()
            users = [i.get_node() for o in node.outputs() for i in o.get_target_inputs()]
            casts = [u for u in users if u.get_type_name() == "Convert"]
            after = [i.get_node().get_type_name() for c in casts for i in c.output(0).get_target_inputs()]
            if widened and "MatMul" in after:
                total += 2 * node.get_byte_size() - ("Gather" not in after) * node.get_byte_size()
    return total


def _cell_bytes(shape: Any, kind: str) -> int:
    """Return the bytes one token takes in a state of (batch, heads, tokens, size)."""
    heads, size = shape[1].get_length(), shape[3].get_length()
    if kind in ("u8", "u4"):
        return heads * (-(-size * int(kind[1:]) // 8) + SCALE_BYTES)
    return heads * size * (4 if kind == "f32" else 2)


def not_loadable(path: Path, error: Exception) -> CandidateFailed:
    """Return the refusal of an artefact that OpenVINO does not take."""
    return CandidateFailed(
        "load_error",
        f"{path.parent.name}/{path.name} cannot be loaded: {sentence(error)}",
        hint="build the artefact again",
    )
