"""What an opened artefact can do, whichever engine opened it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from knowledge_base.errors import BadInput

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How each token is drawn. Temperature 0 is greedy, whatever the rest says."""

    temperature: float = 0.0
    top_p: float = 1.0  # the likeliest tokens that together have this share
    seed: int | None = None  # None: another answer each time


GREEDY = Sampling()


def require(
    prompts: Sequence[Sequence[int]], new_tokens: int, *, context: int | None, vocabulary: int, least: int = 1
) -> None:
    """Refuse a request that no engine can serve.

    Args:
        context: most tokens of prompt and output together, or None; `least`: new tokens, 0 where text is only scored.

    Raises:
        BadInput: too few new tokens, no prompt, prompts of different lengths or none, tokens beyond the context or that
            the vocabulary does not have.
    """
    if new_tokens < least:
        raise BadInput(f"{new_tokens} new tokens", hint=f"ask for at least {least}")
    lengths = {len(prompt) for prompt in prompts}
    if len(lengths) != 1 or 0 in lengths:
        raise BadInput(
            f"prompts of {sorted(lengths)} tokens cannot be run as one batch",
            hint="give at least one prompt, all of one length of at least one token",
        )
    total = lengths.pop() + new_tokens
    if context and total > context:
        raise BadInput(
            f"{total} tokens exceed the model's context of {context}", hint="shorten the prompt or the output"
        )
    if (unknown := next((t for prompt in prompts for t in prompt if not 0 <= t < vocabulary), None)) is not None:
        raise BadInput(f"token {unknown} is not in the vocabulary of {vocabulary}", hint="check the tokenizer")


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

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of prompt and output together; None: the model has no such limit."""
        ...

    def stream(
        self, prompt: Sequence[int], new_tokens: int, *, sampling: Sampling = GREEDY, stop: Collection[int] = ()
    ) -> Iterator[int]:
        """Continue one prompt and give each token as soon as it is known; closing the iterator cancels the rest.

        It ends after `new_tokens`, or after the first token of `stop`, which is given too. What cannot be served is
        refused by the call itself, before the first token is asked for.

        Raises:
            BadInput: as `generate`.
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
