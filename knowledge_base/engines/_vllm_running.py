"""A checkpoint opened by vLLM: greedy generation step by step, full log-probabilities, memory from its own account.

Runs in vLLM's own environment: no library but numpy and vLLM is imported here. vLLM's engine is kept in this process, so
that it is watched, limited and stopped with it. Written against vLLM 0.32 as documented:
https://docs.vllm.ai/en/v0.32.0/api/vllm/entrypoints/llm/ and .../vllm/sampling_params/
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from knowledge_base.engines._running import GREEDY, Generation, Sampling, require
from knowledge_base.errors import CandidateFailed

# vLLM's switches: its engine in this process, no network, nothing told to anybody.
SWITCHES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
}  # fmt: skip
BLOCK_TOKENS = 256  # at least what any attention kernel of vLLM pages the cache by
ROOM_TOKENS = 4096  # of cache for each request of a batch, where the context is longer: more wait their turn
MOST_SCORES = 2**27  # tokens x words whose log-probabilities come as Python numbers: about 10 GB of them
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class VllmRunning:
    """An opened artefact (see `_running.Running`).

    The cache is allocated when the artefact is opened, for `batch` requests of the model's context or of ROOM_TOKENS,
    so that several candidates fit one device; what a generation used of it is told. Prefixes are not kept between
    requests: a repeated prompt costs what a new one does.
    """

    def __init__(self, folder: Path, *, batch: int) -> None:
        checkpoint = Checkpoint(folder)
        self._batch = batch
        self.vocabulary, self._context = checkpoint.vocabulary, checkpoint.context_tokens
        self._token_bytes = checkpoint.token_bytes
        self._kv_bytes = 0
        self._number = 0
        self._llm: Any = checkpoint.load(batch=batch, max_logprobs=-1, enable_prefix_caching=False)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch; see `Running.generate`.

        The engine is stepped by hand: the first token's time is when the step that made the last of them returned.
        """
        start = time.perf_counter()
        self._check(prompts, new_tokens)
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        names = [self._add(prompt, wanted) for prompt in prompts]
        made: dict[str, list[int]] = {name: [] for name in names}
        first, steps = None, 0
        for outputs in self._steps():
            for output in outputs:
                made[output.request_id] = list(output.outputs[0].token_ids)
            if first is not None:
                steps += 1
            elif all(made.values()):
                first = time.perf_counter()
        end = time.perf_counter()
        self._kv_bytes = len(prompts) * (len(prompts[0]) + new_tokens - 1) * self._token_bytes
        tokens = [made[name] for name in names]
        return Generation(tokens=tokens, ttft_s=(first or end) - start, total_s=end - start, steps=steps)

    @property
    def context_tokens(self) -> int | None:
        """See `Running.context_tokens`."""
        return self._context

    def stream(
        self, prompt: Sequence[int], new_tokens: int, *, sampling: Sampling = GREEDY, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt token by token; see `Running.stream`."""
        self._check([prompt], new_tokens)
        from vllm import SamplingParams

        wanted = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed, max_tokens=new_tokens,
            ignore_eos=True, detokenize=False,
        )  # fmt: skip
        return self._streamed(prompt, wanted, frozenset(stop))

    def _streamed(self, prompt: Sequence[int], wanted: Any, stop: frozenset[int]) -> Iterator[int]:
        name, given = self._add(prompt, wanted), 0
        try:
            for outputs in self._steps():
                for token in outputs[-1].outputs[0].token_ids[given:]:
                    given += 1
                    self._kv_bytes = (len(prompt) + given - 1) * self._token_bytes
                    yield token
                    if token in stop:
                        return
        finally:
            if self._llm is not None:
                self._llm.llm_engine.abort_request([name])  # of one that has ended nothing is left to abort

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary) log-softmax rows; see `Running.log_probs`.

        vLLM hands log-probabilities out as Python numbers, so a window may have MOST_SCORES of them.
        """
        self._check([tokens], 1)
        if len(tokens) * self.vocabulary > MOST_SCORES:
            raise CandidateFailed(
                "unsupported",
                f"scoring {len(tokens)} tokens of a vocabulary of {self.vocabulary} at once takes too much memory in vLLM",
                hint="score shorter windows",
            )
        from vllm import SamplingParams

        wanted = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True
        )  # fmt: skip
        self._add(tokens, wanted)
        done = None
        for outputs in self._steps():
            done = next((output for output in outputs if output.finished), done)
        if done is None or done.prompt_logprobs is None or done.outputs[0].logprobs is None:
            raise CandidateFailed("invalid_result", "vLLM gave no log-probabilities of the prompt")
        # The first prompt token has none; the last row is that of the token made after the prompt.
        rows = [*positions(done.prompt_logprobs)[1:], positions(done.outputs[0].logprobs)[0]]
        return dense(rows, self.vocabulary)

    def memory(self) -> dict[str, int]:
        """Return exact `weights_bytes` and the last generate's `kv_cache_bytes`."""
        self._check_open()
        return {"weights_bytes": sum(self._llm.apply_model(_stored_bytes)), "kv_cache_bytes": self._kv_bytes}

    def close(self) -> None:
        """Free the model and its cache."""
        if self._llm is None:
            return
        self._llm = None
        free_device()

    # ---------------------------------------------------------------- inside

    def _add(self, tokens: Sequence[int], wanted: Any) -> str:
        self._number += 1
        name = str(self._number)
        self._llm.llm_engine.add_request(name, {"prompt_token_ids": list(tokens)}, wanted)
        return name

    def _steps(self) -> Iterator[Any]:
        """Yield what each step of the engine gave, until every request has ended; steps that gave nothing are left out."""
        engine = self._llm.llm_engine
        while engine.has_unfinished_requests():
            if outputs := engine.step():
                yield outputs

    def _check_open(self) -> None:
        if self._llm is None:
            raise RuntimeError("this artefact was closed")

    def _check(self, prompts: Sequence[Sequence[int]], new_tokens: int, *, least: int = 1) -> None:
        self._check_open()
        require(prompts, new_tokens, context=self._context, vocabulary=self.vocabulary, least=least)


class Checkpoint:
    """What config.json tells of a checkpoint, and how vLLM is to load it."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._folder = folder
        self.vocabulary = _first(config, "vocab_size")
        self.context_tokens = _first(config, "max_position_embeddings", "n_positions")
        self._dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        self.token_bytes = cache_bytes_per_token(config, VALUE_BYTES[self._dtype])

    def load(self, *, batch: int, context_tokens: int | None = None, **settings: Any) -> Any:
        """Return vLLM's engine for up to `batch` requests at once, each of up to `context_tokens`; None: the model's.

        Raises:
            CandidateFailed: "load_error".
        """
        os.environ.update(SWITCHES)
        from vllm import LLM

        length = {"max_model_len": context_tokens} if context_tokens else {}
        room = cache_tokens(context_tokens or self.context_tokens, batch) * self.token_bytes
        try:
            return LLM(
                model=str(self._folder), skip_tokenizer_init=True, trust_remote_code=False, dtype=self._dtype, seed=0,
                max_num_seqs=batch, disable_log_stats=True, kv_cache_memory_bytes=room, **length, **settings,
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise CandidateFailed(
                "load_error", f"{self._folder.name}: vLLM cannot load it: {error}", hint="build the artefact again"
            ) from error


def free_device() -> None:
    """Give back what `Checkpoint.load` took, once nobody holds what it returned."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def cache_bytes_per_token(config: dict[str, Any], value_bytes: int) -> int:
    """Return what one token's keys and values take in the cache.

    >>> cache_bytes_per_token({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}, 2)
    512
    """
    layers, heads = _first(config, "num_hidden_layers", "n_layer"), _first(config, "num_attention_heads", "n_head")
    size = config.get("head_dim") or _first(config, "hidden_size", "n_embd") // heads
    return 2 * layers * (config.get("num_key_value_heads") or heads) * size * value_bytes


def cache_tokens(context: int, batch: int) -> int:
    """Return the tokens the cache is allocated for: one request of the whole context, or the batch at ROOM_TOKENS each.

    >>> cache_tokens(1000, 2), cache_tokens(10**6, 2)
    (2560, 1000448)
    """
    each = -(-min(context, ROOM_TOKENS) // BLOCK_TOKENS) * BLOCK_TOKENS + BLOCK_TOKENS
    whole = -(-context // BLOCK_TOKENS) * BLOCK_TOKENS + BLOCK_TOKENS
    return max(whole, batch * each)


def positions(flat: Any) -> list[tuple[list[int], list[float]]]:
    """Return token ids and log-probabilities of every position of vLLM's FlatLogprobs."""
    ends = zip(flat.start_indices, flat.end_indices, strict=True)
    return [(flat.token_ids[start:end], flat.logprobs[start:end]) for start, end in ends]


def dense(rows: Sequence[tuple[Sequence[int], Sequence[float]]], vocabulary: int) -> numpy.ndarray:
    """Return float32 (rows, vocabulary) from token ids and their log-probabilities.

    Raises:
        CandidateFailed: "invalid_result", a word has none.
    """
    result = numpy.full((len(rows), vocabulary), numpy.nan, numpy.float32)
    for row, (ids, values) in zip(result, rows, strict=True):
        row[numpy.asarray(ids, numpy.int64)] = values
    if numpy.isnan(result).any():
        raise CandidateFailed("invalid_result", "vLLM left words out of its log-probabilities")
    return result


def _first(config: dict[str, Any], *names: str) -> int:
    """Return the first of some entries of config.json that is there: architectures call one thing by several names.

    Raises:
        CandidateFailed: "load_error", none is.
    """
    for name in names:
        if type(config.get(name)) is int:
            return int(config[name])
    raise CandidateFailed("load_error", f"config.json tells no {names[0]}", hint="build the artefact again")


def _stored_bytes(model: Any) -> int:
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return int(sum(storages.values()))
