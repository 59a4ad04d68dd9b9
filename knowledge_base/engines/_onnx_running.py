"""An ONNX graph of a language model opened by ONNX Runtime: greedy generation, streams, full logits. No torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from knowledge_base.engines._running import GREEDY, Generation, Sampling, require
from knowledge_base.engines._sampling import Sampler
from knowledge_base.errors import CandidateFailed

if TYPE_CHECKING:
    import onnxruntime

FILE, DATA = "model.onnx", "model.onnx.data"
# Metadata of model.onnx, written by _onnx_writer: what its nodes do not tell without reading them all.
CONTEXT_TOKENS, HEAD_SIZE, WEIGHTS_BYTES = "leanplan.context_tokens", "leanplan.head_size", "leanplan.weights_bytes"
LOGITS_BYTES = 64 * 2**20  # most that one pass may return where only the last position, or all bit by bit, is wanted
_QUIET = 4  # ONNX Runtime's severity "fatal": what is wrong comes as an exception


class OnnxRunning:
    """An opened artefact (see `_running.Running`).

    Weights that the processor's kernels want in another order are copied as they are loaded, 4-bit ones with sums of
    their blocks beside (an eighth more); `weights_bytes` is what the graph stores and, of a table that is both embedding
    and head in float32, the second copy in the other order. Others stay in the mapped file, so that of a table of
    embeddings only the rows that are looked up come into memory.
    """

    def __init__(self, folder: Path, *, threads: int | None) -> None:
        for name in (FILE, DATA):
            if not (folder / name).is_file():
                raise CandidateFailed("load_error", f"{folder.name} holds no {name}", hint="build the artefact again")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        try:
            session = onnxruntime.InferenceSession(
                str(folder / FILE), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
            told = session.get_modelmeta().custom_metadata_map
            self._limit, self._head_size, self._weights_bytes = (
                int(told[key]) for key in (CONTEXT_TOKENS, HEAD_SIZE, WEIGHTS_BYTES)
            )
        except KeyError as error:
            raise CandidateFailed(
                "load_error", f"{folder.name}/{FILE} was not written by Leanplan", hint="build the artefact again"
            ) from error
        except Exception as error:  # the library's own share no base class
            if isinstance(error, MemoryError):
                raise
            raise CandidateFailed(
                "load_error", f"{folder.name}: ONNX Runtime cannot load it: {sentence(error)}", hint="build it again"
            ) from error
        self._session: onnxruntime.InferenceSession | None = session
        self.vocabulary = int(next(out.shape[-1] for out in session.get_outputs() if out.name == "logits"))
        self._kv_bytes = 0

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`."""
        start = time.perf_counter()
        self._check(prompts, new_tokens)
        passes = self._passes(len(prompts), len(prompts[0]) + new_tokens - 1)
        token = passes.last(numpy.asarray(prompts, numpy.int64)).argmax(axis=1)
        columns = [token.tolist()]
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = passes.last(token[:, None]).argmax(axis=1)
            columns.append(token.tolist())
        end = time.perf_counter()
        self._kv_bytes = passes.cache_bytes
        tokens = [[column[row] for column in columns] for row in range(len(prompts))]
        return Generation(tokens=tokens, ttft_s=first - start, total_s=end - start, steps=new_tokens - 1)

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
        passes = self._passes(1, len(prompt) + new_tokens - 1)
        self._kv_bytes = passes.cache_bytes
        tokens = list(prompt)
        for _ in range(new_tokens):
            token = sampler.draw(passes.last(numpy.asarray([tokens], numpy.int64))[0])
            yield token
            if token in stop:
                return
            tokens = [token]

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`."""
        self._check([tokens], 0, least=0)
        passes = self._passes(1, len(tokens))
        at_once = max(1, LOGITS_BYTES // (4 * self.vocabulary))
        result = numpy.empty((len(tokens), self.vocabulary), numpy.float32)
        for start in range(0, len(tokens), at_once):
            logits = passes.all(numpy.asarray([tokens[start : start + at_once]], numpy.int64))[0]
            logits -= logits.max(axis=1, keepdims=True)
            result[start : start + at_once] = logits - numpy.log(numpy.exp(logits).sum(axis=1, keepdims=True))
        return result

    def memory(self) -> dict[str, int]:
        """Return `weights_bytes`, exact but for what the class says, and the last generate's exact `kv_cache_bytes`."""
        self._opened()
        return {"weights_bytes": self._weights_bytes, "kv_cache_bytes": self._kv_bytes}

    def close(self) -> None:
        """Free the model."""
        self._session = None

    # ---------------------------------------------------------------- inside

    def _passes(self, batch: int, tokens: int) -> _Passes:
        return _Passes(self._opened(), batch, tokens, self._head_size, self.vocabulary)

    def _opened(self) -> onnxruntime.InferenceSession:
        if self._session is None:
            raise RuntimeError("this artefact was closed")
        return self._session

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, least: int = 1) -> None:
        self._opened()
        require(prompts, new_tokens, context=self._limit, vocabulary=self.vocabulary, least=least)


class _Passes:
    """Forward passes over a growing text, its keys and values in arrays owned here and written where they lie."""

    def __init__(
        self, session: onnxruntime.InferenceSession, batch: int, tokens: int, head_size: int, vocabulary: int
    ) -> None:
        import onnxruntime

        self._session, self._batch, self._vocabulary = session, batch, vocabulary
        self._seen = 0
        heads = {put.name: put.shape[1] for put in session.get_inputs() if put.name.startswith("past_key_values.")}
        self._cache = {
            name: numpy.empty((batch, count, tokens, head_size), numpy.float32) for name, count in heads.items()
        }
        self.cache_bytes = sum(part.nbytes for part in self._cache.values())
        # The same arrays are what is read and what is written, so nothing is copied as the text grows.
        self._speaking, self._silent = session.io_binding(), session.io_binding()
        for binding in (self._speaking, self._silent):
            for name, part in self._cache.items():
                bind(binding.bind_input, name, part)
                bind(binding.bind_output, name.replace("past_key_values", "present"), part)
        self._options = onnxruntime.RunOptions()
        self._options.only_execute_path_to_fetches = True  # no head where no logits are asked for

    def last(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Append int64 (batch, tokens); return float32 (batch, vocabulary), the logits after the last.

        The graph makes logits of every position it sees, so of a long prompt they are left out, but for the last.
        """
        if 4 * ids.size * self._vocabulary > LOGITS_BYTES and ids.shape[1] > 1:
            self._run(self._silent, ids[:, :-1])
            ids = ids[:, -1:]
        return self.all(ids)[:, -1]

    def all(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Append int64 (batch, tokens); return float32 (batch, tokens, vocabulary), the logits after each."""
        logits = numpy.empty((*ids.shape, self._vocabulary), numpy.float32)
        bind(self._speaking.bind_output, "logits", logits)
        self._run(self._speaking, ids)
        return logits

    def _run(self, binding: onnxruntime.IOBinding, ids: numpy.ndarray) -> None:
        ids = numpy.ascontiguousarray(ids)
        mask = numpy.ones((self._batch, self._seen + ids.shape[1]), numpy.int64)
        bind(binding.bind_input, "input_ids", ids)
        bind(binding.bind_input, "attention_mask", mask)
        try:
            self._session.run_with_iobinding(binding, self._options)
        except Exception as error:  # the library's own share no base class
            raise CandidateFailed("crashed", f"ONNX Runtime failed: {sentence(error)}") from error
        self._seen += ids.shape[1]


def bind(method: Any, name: str, array: numpy.ndarray) -> None:
    """Let a graph read or write an array where it lies, by a method of its IOBinding; the array must outlive the pass."""
    method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def sentence(error: Exception) -> str:
    """Return what ONNX Runtime says is wrong, on one line, without the number of its error."""
    text = " ".join(str(error).split())
    return text.rpartition("[ONNXRuntimeError] : ")[2][:300] or type(error).__name__
