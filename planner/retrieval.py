"""Whether a plan that keeps a part of its prompts still finds what they said: facts hidden in text, asked for afterwards.

A fact is two tokens and the token that follows them, drawn from the model's own tokens; four are spread over a prompt of
the workload's length. After the prompt comes each fact's beginning, and of the four tokens that ended one, the model's
likeliest must be that fact's. Models of any size that have learnt to repeat what they read can do it, and chance is one
in four. The same weights with nothing left out answer the same questions: where they fail, nothing can be told.

Questions come after the prompt, like a conversation's next turn: hard on what chooses by the prompt's end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.types import Figure

if TYPE_CHECKING:
    from planner.isolation import Candidate

Progress = Callable[[str, float], None]
METRIC = "retrieval_ratio"
FACTS = 4  # of a prompt
KEY = 2  # tokens that ask for the one after them
FACT = KEY + 1
PROMPTS = 10
TAIL = FACTS * FACT  # tokens after the prompt
SHORTEST = 64  # tokens; facts would be all there is of shorter prompts
ABLE_RATIO = 0.5  # of the questions, what the whole must answer for anything to be told


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """What was found: the figure, or why there is none."""

    figures: Mapping[str, Figure] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def questions(text: Sequence[Sequence[int]], prompt_tokens: int, seed: int) -> list[list[int]]:
    """Return PROMPTS rows of a prompt with facts in it and TAIL tokens that ask for them, in another order.

    Args:
        text: rows of ordinary tokens, each at least `prompt_tokens` long, to hide facts in.
    """
    draw = random.Random(seed)
    known = sorted({token for row in text for token in row})
    made = []
    for number in range(PROMPTS):
        filler = list(text[number % len(text)][: prompt_tokens - TAIL])
        unused = sorted(set(known) - set(filler))
        tokens = draw.sample(unused if len(unused) >= TAIL else known, TAIL)
        facts = [tokens[i * FACT : (i + 1) * FACT] for i in range(FACTS)]
        prompt: list[int] = []
        for i, fact in enumerate(facts):  # one in each part of the text, away from its ends
            start, end = (len(filler) * j // FACTS for j in (i, i + 1))
            place = draw.randint(start + (end - start) // 4, end - (end - start) // 4)
            prompt += [*filler[start:place], *fact, *filler[place:end]]
        made.append(prompt + [token for fact in draw.sample(facts, FACTS) for token in fact])
    return made


def observe(
    candidate: Candidate, text: Path, *, prompt_tokens: int, context_tokens: int, seed: int = 0, progress: Progress | None = None
) -> Recalled:  # fmt: skip
    """Ask an opened artefact for facts, if it keeps a part of its prompts; else there is nothing to find.

    Args:
        text: .npy of int32 (rows, at least prompt_tokens); the questions are written beside it.
        context_tokens: the model's; prompts are shortened to leave room for the questions.

    Raises:
        CandidateFailed: it fails, or answers what cannot be.
    """
    import numpy

    from planner.claims import number, numbers
    from planner.data import save_windows
    from planner.statistics import mean_figure

    length = min(prompt_tokens, context_tokens - TAIL)
    if length < SHORTEST:
        return Recalled()
    rows = questions(numpy.load(text, allow_pickle=False).tolist(), length, seed)
    path = save_windows(text.with_name(f"facts-{length}-{seed}.npy"), rows)
    reply = candidate.call(
        "recall",
        {"questions": str(path), "prompt_tokens": length},
        timeout_s=candidate.limits.time_s,
        progress=progress,
    )
    if not number(reply, "asked", 0, 1):
        return Recalled()
    whole, part = (numbers(reply, name, PROMPTS * FACTS, 0, 1) for name in ("whole", "part"))
    found = f"{sum(whole):.0f} of {len(whole)}"
    if sum(whole) < ABLE_RATIO * len(whole):
        why = f"retrieval not told: with nothing left out the model itself recalls {found}"
        return Recalled(warnings=(why,))
    note = f"facts of a prompt of {length} tokens; {found} with nothing left out"
    return Recalled(figures={METRIC: mean_figure(part, seed=seed, note=note)})


def recall(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """In the candidate: answer the questions with a part of each prompt and with the whole of it.

    Payload: questions (.npy, int32 (prompts, prompt_tokens + TAIL)), prompt_tokens. Returns whether there was anything to
    ask, and for each question 1 or 0.
    """
    running = state["running"]
    if not getattr(running, "prunes", False):
        return {"asked": 0}
    import numpy

    rows = numpy.load(payload["questions"], allow_pickle=False).tolist()
    reply: dict[str, Any] = {"asked": 1, "whole": [], "part": []}
    for number, row in enumerate(rows):
        progress(f"asking for what prompt {number + 1} of {len(rows)} said", number / len(rows))
        prompt, tail = row[: payload["prompt_tokens"]], row[payload["prompt_tokens"] :]
        for name in ("whole", "part"):
            log_probs = running.log_probs_after(prompt, tail[:-1], whole=name == "whole")
            reply[name] += answered(log_probs, tail)
    return reply


def answered(log_probs: Any, tail: Sequence[int]) -> list[int]:
    """Return 1 for each question whose own answer is the likeliest of all answers, else 0.

    Args:
        log_probs: (len(tail), vocabulary); row i is what comes after i tokens of the tail.
    """
    answers = tail[KEY::FACT]
    return [int(log_probs[i * FACT + KEY][answers].argmax() == i) for i in range(len(answers))]
