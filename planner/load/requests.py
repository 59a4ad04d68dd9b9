"""When each request comes and how long it is. Everything is drawn before the first is sent, from one seed.

Requests come in conversations, most of one turn. A later turn is sent when the answer before it is there, and its
prompt is all that was said before it and as much again as the first turn says beyond what all prompts share.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from knowledge_base.errors import BadInput
from knowledge_base.types import Workload
from planner.load.trace import Row

P95_SD = 1.6448536269514722  # standard deviations from the middle of a normal distribution to its 95th percentile


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: the tokens that are new in its prompt, and the tokens it asks for."""

    new_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Requests that follow each other. `at_s`: when the first is due; None: as soon as a client is free."""

    at_s: float | None
    turns: tuple[Turn, ...]


def conversations(
    workload: Workload, *, seed: int, rows: Sequence[Row] = (), context_tokens: int | None = None
) -> Iterator[Conversation]:
    """Yield a workload's conversations, without end where no trace is replayed.

    Arrivals by chance are Poisson's: exponential times between them, at the rate of conversations, requests / turns.
    Lengths given by two percentiles are log-normal through both. Lengths of a trace that is not replayed are those of
    its rows, shuffled again each time all were used. Times and lengths are drawn apart, so another rate asks for the
    same requests at other times.

    Args:
        rows: of the workload's trace.
        context_tokens: of the model, where known. Drawn lengths beyond it are cut, conversations end before it.

    Raises:
        BadInput: requests are longer than the context: a row of the trace, or those of 95th-percentile lengths.
    """
    if context_tokens is not None:
        for row in rows:
            if row.prompt_tokens + row.output_tokens > context_tokens:
                raise BadInput(
                    f"prompt {row.prompt_tokens} + output {row.output_tokens} tokens > context {context_tokens}",
                    where=f"{workload.trace.file if workload.trace else 'trace'}:{row.line}",
                    hint="leave such requests out, or serve a model with a longer context",
                )  # fmt: skip
    if workload.trace is not None and workload.trace.replayed:
        for row in rows:
            yield Conversation(row.at_s, (Turn(row.prompt_tokens, row.output_tokens),))
        return
    if not rows and context_tokens is not None and workload.longest_tokens > context_tokens:
        raise BadInput(
            f"prompts and answers of up to {workload.longest_tokens} tokens > context {context_tokens} of the model",
            where="workload", hint="ask for shorter ones, or for fewer turns",
        )  # fmt: skip
    lengths = _of_rows(rows, seed) if rows else _drawn(workload, seed, context_tokens)
    for at_s in _arrivals(workload, seed):
        yield Conversation(at_s, next(lengths))


def _arrivals(workload: Workload, seed: int) -> Iterator[float | None]:
    if workload.requests_per_s is None:
        yield from itertools.repeat(None)
        return
    chance, at_s = random.Random(f"arrivals {seed}"), 0.0
    while True:
        at_s += chance.expovariate(workload.requests_per_s / workload.turns)
        yield at_s


def _of_rows(rows: Sequence[Row], seed: int) -> Iterator[tuple[Turn, ...]]:
    chance = random.Random(f"lengths {seed}")
    while True:
        for row in chance.sample(rows, len(rows)):
            yield (Turn(row.prompt_tokens, row.output_tokens),)


def _drawn(workload: Workload, seed: int, context_tokens: int | None) -> Iterator[tuple[Turn, ...]]:
    chance = random.Random(f"lengths {seed}")
    shared = workload.shared_prefix_tokens
    while True:
        turns: list[Turn] = []
        said = shared
        while len(turns) < workload.turns:
            prompt = max(shared + 1, _length(workload.prompt_tokens, workload.prompt_tokens_p95, chance))
            output = _length(workload.output_tokens, workload.output_tokens_p95, chance)
            if context_tokens is not None and not turns:
                output = min(output, context_tokens - shared - 1)
                prompt = min(prompt, context_tokens - output)
            if context_tokens is not None and said + prompt - shared + output > context_tokens:
                break
            turns.append(Turn(prompt - shared if turns else prompt, output))
            said += prompt - shared + output
        yield tuple(turns)


def _length(p50: int, p95: int | None, chance: random.Random) -> int:
    if p95 is None:
        return p50
    return max(1, round(p50 * math.exp(chance.gauss(0, 1) * math.log(p95 / p50) / P95_SD)))


class Words:
    """The tokens that prompts are made of: stretches of a text from anywhere in it, or any tokens of the vocabulary.

    Args:
        text: token ids of a text in the service's own vocabulary; else ids are drawn.
        vocabulary: its size, where known. The first ids are left out: they are often special, and may end a text.
    """

    SPECIAL = 10  # ids at the start of a vocabulary
    SMALLEST = 250  # ids that every vocabulary has

    def __init__(self, *, seed: int, text: Sequence[int] = (), vocabulary: int | None = None) -> None:
        self._chance = random.Random(f"words {seed}")
        self._text = text
        self._ids = range(self.SPECIAL, max(vocabulary or self.SMALLEST, self.SPECIAL + 1))

    def take(self, count: int) -> list[int]:
        """Return so many tokens; others than before."""
        if not self._text:
            return self._chance.choices(self._ids, k=count)
        start = self._chance.randrange(len(self._text))
        found = list(self._text[start : start + count])
        while len(found) < count:  # on from the beginning
            found += self._text[: count - len(found)]
        return found
