"""What an opened artefact can do, whichever engine opened it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The tokens of one greedy generation and the times of it.

    Times are monotonic seconds from the call's first instruction: `ttft_s` until every sequence's first output
    token was known on the host, `total_s` until the last. `steps` counts forward passes after the prefill: with
    one token a step it is `new_tokens - 1`; a decoder that drafts needs fewer, so accepted drafts a step are
    `(new_tokens - 1) / steps - 1`.
    """

    tokens: list[list[int]]  # new tokens of each sequence, `new_tokens` long
    ttft_s: float
    total_s: float
    steps: int


class Running(Protocol):
    """An opened artefact. One at a time in a process; not safe for threads.

    There is no warm-up verb: what an engine prepares on first use (compilation, buffers) happens in the first
    `generate` of a shape, so callers run one of the same lengths and batch before they time.
    """

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Continue equal-length prompts greedily as one batch, past any end-of-text token.

        Raises:
            BadInput: no prompt, prompts of different lengths or none, or more tokens than the model's context.
        """
        ...

    def log_probs(self, tokens: Sequence[int]) -> numpy.ndarray:
        """Return float32 (len(tokens), vocabulary); row i is the log-softmax that predicts token i + 1."""
        ...

    def memory(self) -> Mapping[str, int]:
        """Return exact `weights_bytes` (each storage once) and `kv_cache_bytes` (cache at the last generate's end)."""
        ...

    def close(self) -> None:
        """Free the model and its caches; further calls are an error. Closing twice is allowed."""
        ...
