"""Greedy decoding in fewer passes: what is guessed cheaply is checked several tokens at once. Of no engine in particular.

A drafter guesses what comes next; the model reads the guess in one pass and keeps what it would have chosen itself, so
the output is plain greedy's (speculative decoding, Leviathan et al. 2023, arXiv:2211.17192, with greedy choices), up
to ties closer than the rounding differences between one- and many-token matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

HOPE = 0.7  # what share of drafted tokens is taken to be right before any was checked
MEMORY = 0.9  # of that share, what stays with each check; the rest is what the check found
PROBE = 16  # where drafting does not pay, one pass in so many drafts all the same: the text may have changed


class Drafter(Protocol):
    """Guesses the next tokens of one text."""

    cost: float  # of one drafted token, in passes of the model

    def begin(self, prompt: Sequence[int], cache: Any) -> None:
        """Start another text; `cache`, of the engine's own kind, is that of the checking model, which has read the prompt."""
        ...

    def append(self, tokens: Sequence[int]) -> None:
        """Take in tokens that were kept."""
        ...

    def draft(self, most: int, least: float) -> list[int]:
        """Return at most so many likely next tokens, and none after one that is kept with a chance below `least`.

        The checking model's cache is left as it was.
        """
        ...


def passes(
    drafters: Sequence[Drafter],
    most: int,
    *,
    check: Callable[[Sequence[int]], list[int]],
    take_back: Callable[[int], None],
    prompt: Sequence[int],
    cache: Any,
    first: int,
    new_tokens: int,
) -> Iterator[list[int]]:
    """Yield what each pass keeps after `first`: the drafted tokens that were right, and the model's own in place of the rest.

    Of several drafters the first that has something to propose does. One more token is drafted as long as the chance that
    it will be kept, by the draft's own confidence in those before and the share that was kept of late, is above what
    drafting it costs of a pass of the model: so a bad draft costs little.

    Args:
        most: tokens drafted at once.
        check: has the model read tokens and returns its choice after each; `take_back`: has it forget so many, maybe 0.
        cache: see `Drafter.begin`.
        new_tokens: that are yielded in all.
    """
    for drafter in drafters:
        drafter.begin(prompt, cache)
    kept, missing, undrafted = [first], new_tokens, 0
    right_shares = [HOPE] * len(drafters)
    while missing:
        for drafter in drafters:
            drafter.append(kept)
        who, draft = _proposed(drafters, min(most, missing - 1), right_shares, undrafted >= PROBE)
        undrafted = 0 if draft else undrafted + 1
        chosen = check([kept[-1], *draft])
        right = next((i for i, (a, b) in enumerate(zip(draft, chosen)) if a != b), len(draft))
        take_back(len(draft) - right)
        if draft:  # those after the first wrong one tell nothing
            seen = min(right + 1, len(draft))
            right_shares[who] = MEMORY**seen * right_shares[who] + (1 - MEMORY**seen) * right / seen
        kept = chosen[: right + 1]
        missing -= len(kept)
        yield kept


def _proposed(
    drafters: Sequence[Drafter], most: int, right_shares: Sequence[float], probing: bool
) -> tuple[int, list[int]]:
    """Return who drafts, by number, and the draft; empty where it would not pay."""
    for number, (drafter, share) in enumerate(zip(drafters, right_shares)):
        if share > drafter.cost or probing:
            draft = drafter.draft(most, min(1.0, drafter.cost / max(share, 1e-6)))
            if draft:
                return number, draft
    return 0, []


class PromptLookup:
    """Guesses what followed the latest earlier occurrence of the last tokens.

    Prompt lookup decoding (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding), with the text
    so far indexed by its n-grams, so that a guess costs the same in a long text.
    """

    cost = 0.0

    def __init__(self, longest: int = 3, shortest: int = 2) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position after its latest occurrence

    def begin(self, prompt: Sequence[int], cache: Any = None) -> None:
        """See `Drafter.begin`."""
        self._tokens, self._next = [], {}
        self.append(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        """See `Drafter.append`."""
        for token in tokens:
            end = len(self._tokens)
            for size in self._sizes:
                if end >= size:
                    self._next[tuple(self._tokens[end - size :])] = end
            self._tokens.append(token)

    def draft(self, most: int, least: float = 0.0) -> list[int]:
        """Return that many likely next tokens, or none where the last tokens are new.

        Where the earlier occurrence is nearer than that, the text is taken to go on repeating itself.
        """
        for size in self._sizes:
            follows = self._next.get(tuple(self._tokens[-size:]))
            if follows is not None:
                period = len(self._tokens) - follows
                return [self._tokens[follows + i % period] for i in range(most)]
        return []


class Reader(Protocol):
    """A model that drafts for another, and the cache of what it has read."""

    def forget(self) -> None:
        """Start another text."""
        ...

    def read(self, tokens: Sequence[int]) -> tuple[int, float]:
        """Read on; return the likeliest next token and its chance."""
        ...

    def take_back(self, count: int) -> None:
        """Forget the last tokens that were read, maybe none."""
        ...


class ModelDrafts:
    """Guesses with another, smaller model, which reads the text and its own last draft."""

    def __init__(self, reader: Reader, cost: float) -> None:
        self._reader, self.cost = reader, cost
        self._text: list[int] = []
        self._read = 0  # tokens of the text the reader holds
        self._guessed: list[int] = []  # and after them, these

    def begin(self, prompt: Sequence[int], cache: Any) -> None:
        """See `Drafter.begin`. The draft reads the prompt when it is first asked, after the first token is known."""
        self._text, self._read, self._guessed = list(prompt), 0, []
        self._reader.forget()

    def append(self, tokens: Sequence[int]) -> None:
        """See `Drafter.append`."""
        right = next((i for i, (a, b) in enumerate(zip(self._guessed, tokens)) if a != b), None)
        right = min(len(self._guessed), len(tokens)) if right is None else right
        if self._read:
            self._reader.take_back(len(self._guessed) - right)
        self._read += right
        self._guessed = []
        self._text += tokens

    def draft(self, most: int, least: float) -> list[int]:
        """See `Drafter.draft`."""
        made = likeliest(self._reader.read, self._text[self._read :], most, least)
        if made:
            self._read, self._guessed = len(self._text), made[:-1]
        return made


def likeliest(
    read: Callable[[Sequence[int]], tuple[int, float]], unread: Sequence[int], most: int, least: float
) -> list[int]:
    """Return at most so many tokens, each the likeliest after those before, until their joint chance is below `least`.

    Args:
        read: reads tokens, and returns the likeliest next one with its chance.
    """
    made: list[int] = []
    chance = 1.0
    while len(made) < most and chance >= least:
        token, share = read(unread)
        chance *= share
        made.append(token)
        unread = made[-1:]
    return made
