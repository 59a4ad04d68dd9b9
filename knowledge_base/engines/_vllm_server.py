"""vLLM's engine as a server: requests join and leave its batch at every step, and their caches are pages of one pool.

Runs in vLLM's own environment, like `_vllm_running`, and steps the same engine in this process; vLLM's own asynchronous
engine (`AsyncLLM`) keeps it in another process, which nobody here would watch or limit. Written against vLLM 0.32 as
documented: https://docs.vllm.ai/en/v0.32.0/api/vllm/entrypoints/llm/ and .../configuration/engine_args/
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from knowledge_base.engines._serving import Texts, Wanted
from knowledge_base.engines._stepped_server import SteppedServer
from knowledge_base.engines._vllm_running import Checkpoint, free_device


def served(folder: Path, runtime: Mapping[str, Any], context_tokens: int, texts: Texts) -> SteppedServer:
    """Return a server of a checkpoint on the first CUDA device.

    Raises:
        CandidateFailed: "load_error".
    """
    checkpoint, slots = Checkpoint(folder), int(runtime.get("batch", 1))
    context = min(context_tokens, checkpoint.context_tokens)
    llm = checkpoint.load(batch=slots, context_tokens=context, **settings(runtime, slots))
    return SteppedServer(_Engine(llm), texts, slots=slots, context_tokens=context, vocabulary=checkpoint.vocabulary)


def settings(runtime: Mapping[str, Any], slots: int) -> dict[str, Any]:
    """Return vLLM's settings for the runtime keys that are a server's.

    >>> settings({"prefill_chunk": 128}, 8)
    {'enable_prefix_caching': False, 'enable_chunked_prefill': True, 'max_num_batched_tokens': 128}
    """
    found: dict[str, Any] = {"enable_prefix_caching": bool(runtime.get("prefix_cache"))}
    if chunk := runtime.get("prefill_chunk"):  # a step has a token of each running answer at least
        found |= {"enable_chunked_prefill": True, "max_num_batched_tokens": max(chunk, slots)}
    return found


class _Engine:
    """See `_stepped_server.Stepped`."""

    def __init__(self, llm: Any) -> None:
        self._llm: Any = llm

    @property
    def busy(self) -> bool:
        return bool(self._llm.llm_engine.has_unfinished_requests())

    def begin(self, number: int, wanted: Wanted, stop: frozenset[int]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = wanted.sampling
        asked = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed, max_tokens=wanted.new_tokens,
            stop_token_ids=sorted(stop), ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self._llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(wanted.prompt)}, asked)

    def step(self) -> Iterator[tuple[int, list[int], bool]]:
        for output in self._llm.llm_engine.step():
            yield int(output.request_id), list(output.outputs[0].token_ids), output.finished

    def drop(self, number: int) -> None:
        self._llm.llm_engine.abort_request([str(number)])

    def close(self) -> None:
        self._llm = None
        free_device()
