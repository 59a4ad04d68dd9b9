"""OpenVINO GenAI's continuous batching over an artefact's graph, whose attention it rewrites to pages of the cache.

It is given tokens and gives tokens back; nothing here imports torch, and no file of the tokenizer's is read. Its step
holds Python's lock, so no other thread runs meanwhile; that bounds how much of a prompt one step may read.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy

from knowledge_base.engines._openvino_library import openvino, sentence
from knowledge_base.engines._openvino_running import not_loadable, read
from knowledge_base.engines._serving import OneByOneOnly, Texts, Wanted
from knowledge_base.engines._stepped_server import SteppedServer
from knowledge_base.errors import CandidateFailed

BLOCK_TOKENS = 32  # what OpenVINO pages the cache by on a CPU
STEP_TOKENS = 256  # most that one step computes where the plan does not say: OpenVINO GenAI's own choice
LEAVE_S = 0.0002  # between two steps, for other threads to wake up and take Python's lock
NO_TOKENIZER = "none"  # a folder that is not there: a tokenizer that nothing is asked of


def served(path: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> SteppedServer:
    """Return a server of an artefact's graph.

    Raises:
        OneByOneOnly: the graph does what paged attention leaves out; CandidateFailed: as `OpenvinoRunning`.
    """
    graph = read(path)
    context, slots = min(context_tokens, graph.context_tokens), int(runtime.get("batch", 1))
    if (window := _window(graph.model)) is not None and window < context:
        raise OneByOneOnly(f"layers see only the last {window} tokens, which OpenVINO's paged attention leaves out")
    settings = graph.settings(threads=runtime.get("threads"), kv_bits=runtime.get("kv_bits"))
    vocabulary = graph.vocabulary
    del graph  # the pipeline reads its own
    try:
        engine = _Pipeline(path.parent, settings, runtime, slots=slots, context_tokens=context)
    except RuntimeError as error:
        raise not_loadable(path, error) from error
    return SteppedServer(engine, texts, slots=slots, context_tokens=context, vocabulary=vocabulary)


class _Pipeline:
    """See `_stepped_server.Stepped`."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], runtime: Mapping[str, Any], *, slots: int, context_tokens: int
    ) -> None:
        openvino()  # before GenAI's package, which would load its telemetry
        import openvino_genai

        self._library: Any = openvino_genai
        plan = openvino_genai.SchedulerConfig()
        plan.max_num_seqs = slots
        plan.num_kv_blocks = slots * -(-context_tokens // BLOCK_TOKENS)  # room for all at their longest
        plan.dynamic_split_fuse = True  # tokens of answers first, then as much of prompts as a step has room for
        plan.max_num_batched_tokens = max(runtime.get("prefill_chunk", STEP_TOKENS), slots)
        plan.enable_prefix_caching = bool(runtime.get("prefix_cache"))
        tokenizer = openvino_genai.Tokenizer(str(folder / NO_TOKENIZER))
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(
            str(folder), tokenizer, plan, "CPU", **settings, sampler_num_threads=settings["INFERENCE_NUM_THREADS"]
        )
        self._handles: dict[int, Any] = {}

    @property
    def busy(self) -> bool:
        return bool(self._pipeline.has_non_finished_requests())  # those dropped included, until their cache is free

    def begin(self, number: int, wanted: Wanted, stop: frozenset[int]) -> None:
        sampling = wanted.sampling
        config = self._library.GenerationConfig(
            max_new_tokens=wanted.new_tokens, ignore_eos=not stop, eos_token_id=min(stop, default=0),
            stop_token_ids=set(stop),
        )  # fmt: skip
        if sampling.temperature > 0:
            config.do_sample = True
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.rng_seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        prompt = openvino().Tensor(numpy.array([wanted.prompt], numpy.int64))
        self._handles[number] = self._pipeline.add_request(number, prompt, config)

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        time.sleep(LEAVE_S)
        try:
            self._pipeline.step()
        except RuntimeError as error:
            raise CandidateFailed("crashed", f"OpenVINO stopped: {sentence(error)}") from error
        running = self._library.GenerationStatus.RUNNING
        for number, handle in list(self._handles.items()):
            tokens = []
            while handle.can_read():
                (output,) = handle.read().values()
                tokens += output.generated_ids
            over = handle.get_status() != running
            if over:
                del self._handles[number]
            if tokens or over:
                yield number, tokens, over

    def drop(self, number: int) -> None:
        self._handles.pop(number).cancel()

    def close(self) -> None:
        self._handles.clear()
        del self._pipeline


def _window(model: Any) -> int | None:
    """Return the fewest tokens back that a layer of the graph sees, or None: all see all.

    `_openvino_graph` hides what is further back by "column > row - window"; it compares nothing else so.
    """
    compared = [op for op in model.get_ops() if op.get_type_name() == "Greater"]
    windows = [op.input_value(1).get_node().input_value(1).get_node().get_data() for op in compared]
    return min((int(window) for window in windows), default=None)
