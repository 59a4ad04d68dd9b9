"""A GGUF file opened by llama.cpp: greedy generation, drafts, full logits and exact memory, through its C interface."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from ctypes import c_int8, c_int32
from pathlib import Path

import numpy

from knowledge_base.engines import _llama_abi as abi
from knowledge_base.engines._drafting import Drafter, ModelDrafts, PromptLookup, passes
from knowledge_base.engines._running import GREEDY, Generation, Sampling, require
from knowledge_base.engines._sampling import Sampler
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem

CELLS = 256  # llama.cpp pads the cache of each sequence to this
CHUNK_TOKENS = 512  # tokens it computes at once; its own default
LOGITS_BYTES = 64 * 2**20  # most that one call of log_probs' decoding may return
CACHE_TYPES = {8: abi.Q8_0, 4: abi.Q4_1}  # 8.5 and 5 bits for each value, blocks of 32
ALL_F32 = 0  # llama_ftype


class LlamaRunning:
    """An opened artefact (see `_running.Running`).

    Weights are read into private memory, not mapped, so that the process's memory shows them. A float32 file keeps
    a float32 KV cache and plain attention, so an unchanged model computes what it did (flash attention rounds keys
    and values to float16); any other file gets llama.cpp's default, float16. `kv_bits` needs flash attention.
    With `drafted`, so many tokens are guessed at once and checked in one batch: what the text repeats, else what the model
    in the file `draft` takes to be likeliest, whose cache is not quantised.
    """

    def __init__(
        self, path: Path, *, threads: int | None, kv_bits: int | None, drafted: int = 0, draft: Path | None = None
    ) -> None:
        self._library = library = abi.library()
        self._draft: LlamaRunning | None = None
        self._model: int | None = None
        self._context: int | None = None
        self._threads = threads or abi.cores()
        library.log.clear()
        params = library.llama_model_default_params()
        params.load_mode = abi.LOAD_WITHOUT_MAPPING
        params.check_tensors = True
        model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise CandidateFailed(
                "load_error",
                f"{path.name}: llama.cpp cannot load it: {library.complaint()}",
                hint="build the artefact again",
            )
        self._model = model
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        self._weights_bytes = self._loaded_bytes()
        self._limit = library.llama_model_n_ctx_train(model)
        self._layers = library.llama_model_n_layer(model)
        heads = library.llama_model_n_head_kv(model)
        size = self._head_size()
        if kv_bits and size % 32:
            self.close()
            raise CandidateFailed(
                "unsupported",
                f"heads of {size} values do not divide into cache blocks of 32",
                hint="plan without kv_bits",
            )
        if kv_bits:
            self._cache_type, self._flash = CACHE_TYPES[kv_bits], abi.FLASH_ATTENTION_ON
        elif library.llama_model_ftype(model) == ALL_F32:
            self._cache_type, self._flash = abi.F32, abi.FLASH_ATTENTION_OFF
        else:
            self._cache_type, self._flash = abi.F16, abi.FLASH_ATTENTION_AUTO
        self._cell_bytes = 2 * self._layers * library.ggml_row_size(self._cache_type, heads * size)
        self._kv_bytes = 0
        self._room = (0, 0, 0)  # sequences, tokens of each, outputs that the open context has room for
        self._length = 0  # tokens in the cache, of a text that is read alone
        self._drafted = drafted
        self._drafters: list[Drafter] = [PromptLookup()] if drafted else []
        if draft:
            self._draft_with(draft)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`."""
        start = time.perf_counter()
        self._check(prompts, new_tokens)
        if self._drafters:
            return self._generate_drafted(prompts, new_tokens, start)
        count, length = len(prompts), len(prompts[0])
        self._open_context(count, length + new_tokens, count)
        batch = self._batch
        batch.fill(
            numpy.asarray(prompts, numpy.int32).ravel(),
            positions=numpy.tile(numpy.arange(length), count),
            sequences=numpy.repeat(numpy.arange(count), length),
        )
        batch.wanted[: count * length] = 0
        batch.wanted[length - 1 : count * length : length] = 1
        token = self._decode(count).argmax(axis=1)
        columns = [token.tolist()]
        first = time.perf_counter()
        if new_tokens > 1:
            batch.fill(token, positions=numpy.full(count, length), sequences=numpy.arange(count))
            batch.wanted[:count] = 1
        for _ in range(new_tokens - 1):
            batch.tokens[:count] = token
            token = self._decode(count).argmax(axis=1)
            columns.append(token.tolist())
            batch.positions[:count] += 1
        end = time.perf_counter()
        self._kv_bytes = count * (length + new_tokens - 1) * self._cell_bytes
        tokens = [[column[row] for column in columns] for row in range(count)]
        return Generation(tokens=tokens, ttft_s=first - start, total_s=end - start, steps=new_tokens - 1)

    @property
    def context_tokens(self) -> int | None:
        """See `Running.context_tokens`."""
        return self._limit

    def stream(
        self, prompt: Sequence[int], new_tokens: int, *, sampling: Sampling = GREEDY, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt token by token; see `Running.stream`. Only greedy answers are drafted."""
        self._check([prompt], new_tokens)
        drafted = self._drafters and sampling.temperature == 0
        tokens = self._drafted_tokens(prompt, new_tokens) if drafted else self._drawn(prompt, new_tokens, sampling)
        return _until(tokens, frozenset(stop))

    def _drawn(self, prompt: Sequence[int], new_tokens: int, sampling: Sampling) -> Iterator[int]:
        sampler, unread = Sampler(sampling), prompt
        self._begin(len(prompt) + new_tokens, 1)
        for _ in range(new_tokens):
            token = sampler.draw(self._read(unread, 1)[0])
            yield token
            unread = [token]

    def _generate_drafted(self, prompts: Sequence[Sequence[int]], new_tokens: int, start: float) -> Generation:
        if len(prompts) > 1:
            raise BadInput("with drafts one prompt runs at a time", hint="give one prompt")
        tokens: list[int] = []
        times = []
        for added in self._passes(prompts[0], new_tokens):
            times.append(time.perf_counter())
            tokens += added
        return Generation(tokens=[tokens], ttft_s=times[0] - start, total_s=times[-1] - start, steps=len(times) - 1)

    def _drafted_tokens(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        return itertools.chain.from_iterable(self._passes(prompt, new_tokens))

    def _passes(self, prompt: Sequence[int], new_tokens: int) -> Iterator[list[int]]:
        """Yield the tokens each pass adds: the prompt's the first, a drafted one those it keeps."""
        self._begin(len(prompt) + new_tokens, 1 + self._drafted)
        if self._draft:
            self._draft._begin(len(prompt) + new_tokens, 1)
        first = int(self._read(prompt, 1)[0].argmax())
        yield [first]
        yield from passes(
            self._drafters, self._drafted, check=lambda tokens: self._read(tokens, len(tokens)).argmax(axis=1).tolist(),
            take_back=self._take_back, prompt=prompt, cache=None, first=first, new_tokens=new_tokens - 1,
        )  # fmt: skip

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`."""
        self._check([tokens], 0, least=0)
        chunk = min(CHUNK_TOKENS, len(tokens), max(1, LOGITS_BYTES // (4 * self.vocabulary)))
        self._open_context(1, len(tokens), chunk)
        result = numpy.empty((len(tokens), self.vocabulary), numpy.float32)
        for start in range(0, len(tokens), chunk):
            part = numpy.asarray(tokens[start : start + chunk], numpy.int32)
            positions = numpy.arange(start, start + len(part))
            self._batch.fill(part, positions=positions, sequences=numpy.zeros(len(part), int))
            self._batch.wanted[: len(part)] = 1
            logits = self._decode(len(part))
            shifted = logits - logits.max(axis=1, keepdims=True)
            result[start : start + len(part)] = shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True))
        return result

    def memory(self) -> dict[str, int]:
        """Return exact `weights_bytes` and the last generate's `kv_cache_bytes`, those of a draft counted in."""
        self._check_open()
        draft = self._draft.memory() if self._draft else {"weights_bytes": 0, "kv_cache_bytes": 0}
        return {
            "weights_bytes": self._weights_bytes + draft["weights_bytes"],
            "kv_cache_bytes": self._kv_bytes + draft["kv_cache_bytes"],
        }

    def close(self) -> None:
        """Free context and model, and those of a draft."""
        if self._draft is not None:
            self._draft.close()
        if self._context is not None:
            self._library.llama_free(self._context)
            self._context = None
        if self._model is not None:
            self._library.llama_model_free(self._model)
            self._model = None

    # ---------------------------------------------------------------- inside

    def _draft_with(self, path: Path) -> None:
        """Open a draft model beside this one.

        Raises:
            CandidateFailed: "load_error", it cannot be opened; "unsupported", another vocabulary or a shorter context.
        """
        try:
            self._draft = draft = LlamaRunning(path, threads=self._threads, kv_bits=None)
            if draft.vocabulary != self.vocabulary:
                wrong = (
                    f"has {draft.vocabulary} tokens, the model {self.vocabulary}: both must mean the same by a token"
                )
            elif draft._limit < self._limit:
                wrong = f"reads {draft._limit} tokens at most, the model {self._limit}"
            else:
                wrong = ""
            if wrong:
                raise CandidateFailed(
                    "unsupported", f"the draft {wrong}", hint="give another draft, or plan without one"
                )
        except CandidateFailed:
            self.close()
            raise
        self._drafters.append(ModelDrafts(_DraftReader(draft), draft._weights_bytes / self._weights_bytes))

    def _begin(self, tokens: int, outputs: int) -> None:
        """Start another text, alone in the context, of at most so many tokens."""
        self._open_context(1, tokens, outputs)
        self._length = self._kv_bytes = 0

    def _read(self, tokens: Sequence[int], outputs: int) -> numpy.ndarray:
        """Read on; return the logits (outputs, vocabulary) after the last tokens, valid until the next call."""
        count = len(tokens)
        self._batch.fill(
            numpy.asarray(tokens, numpy.int32), positions=numpy.arange(self._length, self._length + count),
            sequences=numpy.zeros(count, int),
        )  # fmt: skip
        self._batch.wanted[: count - outputs] = 0
        self._batch.wanted[count - outputs : count] = 1
        logits = self._decode(outputs)
        self._set_length(self._length + count)
        return logits

    def _take_back(self, count: int) -> None:
        """Forget the last tokens that were read."""
        if not count:
            return
        memory = self._library.llama_get_memory(self._context)
        if not self._library.llama_memory_seq_rm(memory, 0, self._length - count, -1):
            raise CandidateFailed(
                "unsupported", "llama.cpp cannot take back tokens of this model", hint="plan without drafts"
            )
        self._set_length(self._length - count)

    def _set_length(self, length: int) -> None:
        self._length = length
        self._kv_bytes = length * self._cell_bytes

    def _open_context(self, sequences: int, tokens: int, outputs: int) -> None:
        """Make sure the context has that much room and is empty; a larger one stays for smaller requests."""
        library = self._library
        wanted = (sequences, -(-tokens // CELLS) * CELLS, outputs)
        if self._context is None or any(have < want for have, want in zip(self._room, wanted)):
            if self._context is not None:
                library.llama_free(self._context)
                self._context = None
            sequences, tokens, outputs = (max(pair) for pair in zip(self._room, wanted))
            self._context = self._new_context(sequences, tokens, outputs)
            self._room = (sequences, tokens, outputs)
            self._batch = _Batch(sequences * tokens)
        library.llama_memory_clear(library.llama_get_memory(self._context), False)

    def _new_context(self, sequences: int, tokens: int, outputs: int) -> int:
        library = self._library
        params = library.llama_context_default_params()
        params.n_ctx = params.n_batch = sequences * tokens
        params.n_ubatch = min(CHUNK_TOKENS, sequences * tokens)
        params.n_seq_max = sequences
        params.n_outputs_max = outputs
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = self._cache_type
        params.flash_attn_type = self._flash
        library.log.clear()
        context = library.llama_init_from_model(self._model, params)
        if not context:
            raise CandidateFailed(
                "unsupported" if self._flash == abi.FLASH_ATTENTION_ON else "load_error",
                f"llama.cpp cannot make a context for {sequences} x {tokens} tokens: {library.complaint()}",
            )
        found = (
            library.llama_n_seq_max(context), library.llama_n_ctx_seq(context), library.llama_n_batch(context),
            library.llama_n_threads(context), library.llama_n_threads_batch(context),
        )  # fmt: skip
        if found != (sequences, tokens, sequences * tokens, self._threads, self._threads):
            library.llama_free(context)
            raise EnvironmentProblem(
                f"llama.cpp did not take the context settings asked for: {found}",
                hint=f"pip install xllamacpp=={abi.CHECKED[-1]}",
            )
        return context

    def _decode(self, outputs: int) -> numpy.ndarray:
        """Run the batch; return its (outputs, vocabulary) logits, valid until the next call."""
        status = self._library.llama_decode(self._context, self._batch.struct)
        if status != 0:
            raise CandidateFailed("crashed", f"llama_decode returned {status}: {self._library.complaint()}")
        pointer = self._library.llama_get_logits(self._context)
        return numpy.ctypeslib.as_array(pointer, shape=(outputs, self.vocabulary))

    def _head_size(self) -> int:
        text = ctypes.create_string_buffer(64)
        library, model = self._library, self._model
        library.llama_model_meta_val_str(model, b"general.architecture", text, len(text))
        key = text.value + b".attention.key_length"
        if library.llama_model_meta_val_str(model, key, text, len(text)) > 0:
            return int(text.value)
        return library.llama_model_n_embd(model) // library.llama_model_n_head(model)

    def _loaded_bytes(self) -> int:
        """Return the bytes of the loaded tensors, from the size of the file's tensors and the loader's log.

        Where the output matrix gets a layout of its own, a tied embedding table is in memory twice; only the log
        says so, in MiB with two digits.
        """
        stored = self._library.llama_model_size(self._model)
        buffers = (re.search(r"model buffer size = +([\d.]+) MiB", line) for line in self._library.log)
        loaded = sum(float(found[1]) for found in buffers if found) * 2**20
        return stored if loaded < 1.01 * stored + 2**16 else round(loaded)

    def _check_open(self) -> None:
        if self._model is None:
            raise RuntimeError("this artefact was closed")

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, least: int = 1) -> None:
        self._check_open()
        require(prompts, new_tokens, context=self._limit, vocabulary=self.vocabulary, least=least)


class _DraftReader:
    """A draft model and what it has read; see `_drafting.Reader`. Whoever asks it has opened its context."""

    def __init__(self, running: LlamaRunning) -> None:
        self._running = running

    def forget(self) -> None:
        """See `Reader.forget`."""
        self.take_back(self._running._length)

    def read(self, tokens: Sequence[int]) -> tuple[int, float]:
        """See `Reader.read`."""
        logits = self._running._read(tokens, 1)[0]
        token = int(logits.argmax())
        return token, 1 / float(numpy.exp(logits - logits[token]).sum())

    def take_back(self, count: int) -> None:
        """See `Reader.take_back`."""
        self._running._take_back(count)


def _until(tokens: Iterator[int], stop: frozenset[int]) -> Iterator[int]:
    """Yield tokens up to the first of `stop`, that one too."""
    for token in tokens:
        yield token
        if token in stop:
            return


class _Batch:
    """Room for a llama_batch of up to `size` tokens, its arrays owned here; every token is in one sequence."""

    def __init__(self, size: int) -> None:
        self.tokens = numpy.zeros(size, numpy.int32)
        self.positions = numpy.zeros(size, numpy.int32)
        self.wanted = numpy.zeros(size, numpy.int8)  # whose logits to return
        self._ones = numpy.ones(size, numpy.int32)
        self._sequences = numpy.arange(size, dtype=numpy.int32)
        self._pointers = numpy.zeros(size, numpy.uintp)
        self.struct = abi.Batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(ctypes.POINTER(c_int32)),
            pos=self.positions.ctypes.data_as(ctypes.POINTER(c_int32)),
            n_seq_id=self._ones.ctypes.data_as(ctypes.POINTER(c_int32)),
            seq_id=self._pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(c_int32))),
            logits=self.wanted.ctypes.data_as(ctypes.POINTER(c_int8)),
        )

    def fill(self, tokens: numpy.ndarray, *, positions: numpy.ndarray, sequences: numpy.ndarray) -> None:
        """Set the batch to these tokens, each at a position of a sequence."""
        count = len(tokens)
        self.tokens[:count] = tokens
        self.positions[:count] = positions
        self._pointers[:count] = self._sequences.ctypes.data + self._sequences.itemsize * sequences
        self.struct.n_tokens = count
