"""Sends requests to a service and keeps what became of each.

Open loop (arrivals, a trace, all at once): every first request of a conversation has its time before the run begins,
and is sent then, however slow the service is. Closed loop: clients that each send their next request when they have
their last answer. What is due in the first `warm_up_s` counts for nothing; a few requests one by one come before that,
for what a service does once. The run goes on until there are `least_requests` over `least_s`, or `most_s` are over.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Workload
from planner.load import client
from planner.load.client import Answer, Endpoint
from planner.load.requests import Conversation, Words, conversations
from planner.load.trace import Row
from planner.load.watching import Used, Watch

COLD, COLD_TOKENS = 3, 16  # requests before anything is timed, and the tokens they ask for at most
HOPELESS = 100  # failures one after the other, after which the load is given up
MOST_WAITING = 4096  # requests under way at once; more and the service has long fallen behind
DRAIN_S = 10.0  # at least, for what is under way when the last request was sent
HURRY_S = 0.001  # woken this much before a request is due: sleep is coarse

Tick = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long a load goes on. Times in seconds."""

    least_s: float = 60.0
    least_requests: int = 90  # enough for an upper bound of the 95th percentile: statistics.minimal_samples
    most_s: float = 600.0
    warm_up_s: float = 5.0
    all_at_once: int = 0  # the offline scenario: so many requests, all due at the start
    seed: int = 0


@dataclass(slots=True)
class Driven:
    """What was sent and what came back. Counted is what was due from `from_s` until `until_s`, in seconds."""

    scenario: str  # "arrivals" | "trace" | "clients" | "all at once"
    answers: list[Answer] = field(default_factory=list)
    from_s: float = 0.0
    until_s: float = 0.0
    late_s: list[float] = field(default_factory=list)  # each open-loop request: sent after it was due
    stopped: str = ""  # why it ended before its time
    used: Used | None = None

    @property
    def counted(self) -> list[Answer]:
        return [a for a in self.answers if self.from_s <= a.due_s < self.until_s]


def drive(
    endpoint: Endpoint, workload: Workload, protocol: Protocol, words: Words, *, rows: Sequence[Row] = (), tick: Tick = lambda text: None,
) -> Driven:  # fmt: skip
    """Put a service under a workload and return what happened. Times of the answers are those of one clock.

    Raises:
        BadInput: the workload asks for more than the context; EnvironmentProblem: not one request could be served.
    """
    told = conversations(workload, seed=protocol.seed, rows=rows, context_tokens=endpoint.context_tokens)
    return asyncio.run(_drive(endpoint, workload, protocol, words, told, tick))


async def _drive(
    endpoint: Endpoint, workload: Workload, protocol: Protocol, words: Words, told: Iterator[Conversation], tick: Tick
) -> Driven:
    first = next(told)
    told = itertools.chain([first], told)
    async with client.session(protocol.most_s) as talk:
        run = _Run(endpoint, workload, protocol, words, talk, tick)
        await run.warm(first)
        watch = Watch(endpoint.pid)
        with watch:
            if protocol.all_at_once:
                driven = await run.open_loop("all at once", _at_once(told, protocol.all_at_once))
            elif first.at_s is None:
                driven = await run.closed_loop(told)
            elif workload.trace is not None and workload.trace.replayed:
                driven = await run.open_loop("trace", [c for c in told if (c.at_s or 0.0) < protocol.most_s])
            else:
                driven = await run.open_loop("arrivals", _in_time(told, protocol))
        driven.used = watch.used
        return driven


def _at_once(told: Iterator[Conversation], count: int) -> list[Conversation]:
    return [replace(conversation, at_s=0.0) for conversation in itertools.islice(told, count)]


def _in_time(told: Iterator[Conversation], protocol: Protocol) -> list[Conversation]:
    """Return the arrivals of a run: as many, and as long, as the protocol asks for."""
    chosen: list[Conversation] = []
    counted = 0
    for conversation in told:
        at_s = conversation.at_s or 0.0
        enough = counted >= protocol.least_requests and at_s >= protocol.warm_up_s + protocol.least_s
        if enough or at_s >= protocol.most_s:
            break
        chosen.append(conversation)
        counted += len(conversation.turns) if at_s >= protocol.warm_up_s else 0
    return chosen


class _Run:
    """One load while it runs."""

    def __init__(
        self, endpoint: Endpoint, workload: Workload, protocol: Protocol, words: Words, talk: Any, tick: Tick
    ) -> None:
        self.endpoint, self.protocol, self.words, self.talk, self.tick = endpoint, protocol, words, talk, tick
        self.clients = workload.concurrency
        self.shared = words.take(workload.shared_prefix_tokens)
        self.answers: list[Answer] = []
        self.answered = 0
        self.failing = 0  # requests that failed since the last answer
        self.began = time.perf_counter()

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.began

    async def warm(self, conversation: Conversation) -> None:
        """Send a few requests one after the other: they are no part of the load, and tell whether it can be served.

        Raises:
            EnvironmentProblem: the first is not answered.
        """
        for number in range(COLD):
            self.tick(f"warming up: request {number + 1} of {COLD}")
            first = conversation.turns[0]
            await self._converse(
                Conversation(0.0, (replace(first, output_tokens=min(first.output_tokens, COLD_TOKENS)),)), 0.0
            )
            if failure := self.answers[0].failure:
                raise EnvironmentProblem(
                    f"the first request was not served: {failure}", where=self.endpoint.url,
                    hint="the load is completions of token-id prompts, streamed; see the service's own log",
                )  # fmt: skip
        self.answers.clear()
        self.answered = 0

    # ------------------------------------------------------------ open loop

    async def open_loop(self, scenario: str, chosen: list[Conversation]) -> Driven:
        """Send each conversation when it is due."""
        last_s = max((c.at_s or 0.0 for c in chosen), default=0.0)
        warm_up_s = 0.0 if scenario == "all at once" else self.protocol.warm_up_s
        if scenario == "trace" and last_s < 3 * warm_up_s:  # too short to spare any of it
            warm_up_s = 0.0
        driven = Driven(scenario, self.answers, from_s=warm_up_s)
        self.began = time.perf_counter() + 0.05
        tasks: set[asyncio.Task] = set()
        try:
            for conversation in chosen:
                prompt = self._prompt(conversation)
                body = client.payload(self.endpoint, prompt, conversation.turns[0].output_tokens)
                due_s = conversation.at_s or 0.0
                if due_s - HURRY_S > self.now_s:
                    await asyncio.sleep(due_s - HURRY_S - self.now_s)
                while self.now_s < due_s:
                    await asyncio.sleep(0)
                driven.late_s.append(self.now_s - due_s)
                task = asyncio.create_task(self._converse(conversation, due_s, (prompt, body)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await asyncio.sleep(0)  # it is sent now, not after those that are due at once with it
                self._tell(len(tasks), due_s, last_s)
                if scenario != "all at once" and len(tasks) > MOST_WAITING:
                    driven.stopped = f"{len(tasks)} requests were under way at once"
                elif self.failing >= HOPELESS:
                    driven.stopped = f"the last {self.failing} requests all failed"
                if driven.stopped:
                    break
            driven.until_s = max(self.now_s, last_s + 1e-6)
            left_s = self.protocol.most_s if scenario == "all at once" else max(DRAIN_S, self.protocol.least_s)
            if tasks:
                await asyncio.wait(tasks, timeout=left_s)
            if scenario == "all at once":
                driven.until_s = max((a.token_s[-1] for a in self.answers if a.answered), default=driven.until_s) + 1e-6
        finally:
            await _cancelled(tasks)
        return driven

    # ------------------------------------------------------------ closed loop

    async def closed_loop(self, told: Iterator[Conversation]) -> Driven:
        """Let the clients ask until there is enough."""
        driven = Driven("clients", self.answers, from_s=self.protocol.warm_up_s)
        self.began = time.perf_counter()
        stop = asyncio.Event()

        async def one_client() -> None:
            for conversation in told:
                if stop.is_set():
                    return
                await self._converse(conversation, None, stop=stop)

        tasks = {asyncio.create_task(one_client()) for _ in range(self.clients)}
        try:
            while not self._enough() and not all(task.done() for task in tasks):
                await asyncio.sleep(0.05)
                self._tell(self.clients, self.now_s, self.protocol.warm_up_s + self.protocol.least_s)
                if self.failing >= HOPELESS:
                    driven.stopped = f"the last {self.failing} requests all failed"
                    break
            driven.until_s = self.now_s
            stop.set()
            await asyncio.wait(tasks, timeout=max(DRAIN_S, self.protocol.least_s))
        finally:
            await _cancelled(tasks)
        return driven

    def _enough(self) -> bool:
        begun_s, now_s = self.protocol.warm_up_s, self.now_s
        if now_s >= self.protocol.most_s:
            return True
        if now_s < begun_s + self.protocol.least_s:
            return False
        return sum(a.answered and a.due_s >= begun_s for a in self.answers) >= self.protocol.least_requests

    # ------------------------------------------------------------ one conversation

    def _prompt(self, conversation: Conversation) -> list[int]:
        return self.shared + self.words.take(conversation.turns[0].new_tokens - len(self.shared))

    async def _converse(
        self, conversation: Conversation, due_s: float | None, ready: tuple[list[int], bytes] | None = None, stop: asyncio.Event | None = None
    ) -> None:  # fmt: skip
        """Send the requests of a conversation, each when the answer before it is there; it ends where one fails.

        Args:
            due_s: when the first is due; None: now. `ready`: its prompt and its body, made before it was due.
        """
        said, body = ready or (self._prompt(conversation), b"")
        for number, turn in enumerate(conversation.turns):
            if number:
                said = said + self.words.take(turn.new_tokens)
            if number or not ready:
                body = client.payload(self.endpoint, said, turn.output_tokens)
            answer = Answer(
                due_s=due_s if due_s is not None and not number else self.now_s,
                prompt_tokens=len(said), asked_tokens=turn.output_tokens,
            )  # fmt: skip
            self.answers.append(answer)
            await client.ask(self.talk, self.endpoint, body, answer, self.began)
            self.answered += answer.answered
            self.failing = 0 if answer.answered else self.failing + 1
            if answer.failure or (stop and stop.is_set()):
                if answer.failure and stop:
                    await asyncio.sleep(0.1)  # a client that is refused does not hammer at the door
                return
            # The protocol gives text, not tokens: others stand for the answer, as many, but not in the service's cache.
            said = said + self.words.take(answer.tokens)

    def _tell(self, under_way: int, at_s: float, last_s: float) -> None:
        self.tick(f"{at_s:.0f} of {last_s:.0f} s: {self.answered} answers, {under_way} requests under way")


async def _cancelled(tasks: set[asyncio.Task]) -> None:
    """End what is still under way: its requests are abandoned, and say so."""
    left = list(tasks)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
