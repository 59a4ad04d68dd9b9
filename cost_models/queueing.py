"""How long requests wait for a server: closed loops of clients and Poisson arrivals, for batches and for shared service.

    queue_of_batches(rate, first_s, whole_s, batch)   servers that take up to `batch` waiting requests at a time
    turns_of_clients(clients, first_s, whole_s, batch)  the same, for clients that each wait for their last answer
    slots_of_arrivals(rate, work), slots_of_clients(clients, work)   servers whose running requests share each step
    shared_service(rate, residence_s)                 one server that all running requests share: continuous batching

All but the last take floats or arrays (one entry for each plan). A rate beyond the capacity gives infinite times: the
queue grows as long as requests come. Sources: Pollaczek 1930 and Khinchine 1932 (M/G/1); Allen 1978 and Cunneen's
two-moment correction of M/M/k; Erlang 1917; Sakasegawa 1977 (a closed form of Erlang's C, for servers of batches);
Little 1961; Chandy, Herzog and Woo 1975 (a closed network's throughput is the rate of the server that stands for it);
Wolff 1982 (Poisson arrivals see time averages).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

TAIL = 0.95
ROUNDS = 60  # of the fixed point of the mean batch; it moves by less than a percent after a dozen, unless nearly full


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """What requests meet at a server, as (plans,) arrays."""

    wait_s: Any  # mean; inf where the load is beyond the capacity
    wait_p95_s: Any
    batch: Any  # mean requests served together
    utilisation: Any  # load over capacity: above 1 the queue grows without end
    busy: Any  # share of time a server works, at most 1
    capacity_per_s: Any  # requests


def affine(first_s: Any, whole_s: Any, batch: Any, at: Any) -> Any:
    """Return the seconds of a batch of `at` requests, on the line through a batch of one and a full one."""
    slope = np.maximum(whole_s - first_s, 0.0) / np.maximum(batch - 1, 1)
    return first_s + slope * (at - 1)


def queue_of_batches(
    rate: Any, first_s: Any, whole_s: Any, batch: Any, *, servers: Any = 1, variation: Any = 0.0
) -> Queue:
    """Return the queue of Poisson arrivals before servers that take up to `batch` waiting requests at a time.

    A free server begins with whatever waits, and takes `first_s` for one request, `whole_s` for a full batch. With a
    batch of 1 and one server the mean is Pollaczek and Khinchine's, with more servers close to Allen and Cunneen's: the
    rest of the service that is under way, then the requests that do not fit the next batch. Several servers of single
    requests share a line; those of batches are dealt requests evenly, each has its own.

    Args:
        variation: squared coefficient of variation of a service; 0 where all requests are equal.

    >>> float(queue_of_batches(0.5, 1.0, 1.0, 1).wait_s)  # M/D/1 at half load waits half a service
    0.5
    >>> float(queue_of_batches(0.5, 1.0, 1.0, 1, variation=1.0).wait_s)  # M/M/1: a whole one
    1.0
    """
    capacity = servers * batch / whole_s
    load = np.asarray(rate / capacity, dtype=float)
    stable = np.minimum(load, 1 - 1e-9)
    each = np.minimum(rate, capacity) / servers
    served = np.ones_like(load)
    for _ in range(ROUNDS):
        come = each * affine(first_s, whole_s, batch, served)  # while a batch is served; none: the next one is alone
        served = np.minimum(come + np.exp(-come), batch)
    service = affine(first_s, whole_s, batch, served)
    busy = np.minimum(each * service / served, 1.0)
    line = np.where(np.asarray(batch) > 1, 1, servers)  # servers of one line
    alone = np.asarray(batch) <= 1
    queued = np.where(alone, erlang_c(servers, busy), busy)  # probability that none of them is free
    slots = line * batch
    # Probability that more wait than the next batches hold.
    over = np.where(alone, erlang_c(servers, stable), stable ** (np.sqrt(2 * (slots + 1)) - 1))
    rest = service * (1 + variation) / (line + 1)
    backlog = stable * over * whole_s * (1 + variation) / (2 * slots * (1 - stable))
    wait = queued * rest + backlog
    # Mean and variance of the wait of those that wait: what is left of a service, then a backlog that is often none.
    # Of one server with batches of one these are the exact moments (Takács 1962).
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(queued > 0, wait / queued, 0.0)
        behind = np.where(queued > 0, backlog / queued, 0.0)
        often = np.maximum(stable * over / np.maximum(queued, 1e-300), 1e-300)
    spread = (4 / np.minimum(often, 1.0) - 1) / 3
    variance = (rest**2) / 3 + behind**2 * spread
    beyond = load >= 1
    return Queue(
        wait_s=np.where(beyond, np.inf, wait), wait_p95_s=np.where(beyond, np.inf, tail(queued, mean, variance)),
        batch=served, utilisation=load, busy=busy, capacity_per_s=capacity,
    )  # fmt: skip


def erlang_c(servers: int, utilisation: Any) -> Any:
    """Return the probability that Poisson arrivals find all servers of one line busy: Erlang's C, by his recursion for B.

        B(0) = 1,   B(k) = a B(k-1) / (k + a B(k-1)),   C = B / (1 - u (1 - B)),   a = servers x utilisation u < 1

    >>> round(float(erlang_c(2, 0.5)), 4), float(erlang_c(1, 0.3))
    (0.3333, 0.3)
    """
    offered = servers * np.asarray(utilisation, dtype=float)
    lost = np.ones_like(offered)
    for count in range(1, servers + 1):
        lost = offered * lost / (count + offered * lost)
    return lost / (1 - utilisation * (1 - lost))


def tail(probability: Any, mean: Any, variance: Any) -> Any:
    """Return the 95th percentile of a wait that is 0 unless `probability`, and then a gamma with that mean and variance."""
    from scipy.special import gammaincinv

    probability, mean = np.asarray(probability, dtype=float), np.asarray(mean, dtype=float)
    waiting = (probability > 1 - TAIL) & (mean > 0)
    shape = np.where(waiting, mean**2 / np.maximum(variance, 1e-300), 1.0)
    within = np.where(waiting, 1 - (1 - TAIL) / np.maximum(probability, 1 - TAIL), 0.0)
    return np.where(waiting, gammaincinv(shape, within) * mean / shape, 0.0)


def turns_of_clients(clients: Any, first_s: Any, whole_s: Any, batch: Any, *, servers: Any = 1) -> Queue:
    """Return the queue of a closed loop: each client sends its next request as soon as the last one is answered.

    Batches are then as full as there are clients, and a request waits for its turn: 7 clients before batches of 2 are
    answered after 3.5 batches on average, the unlucky after 4.

    >>> float(turns_of_clients(7, 1.0, 1.0, 2).wait_s), float(turns_of_clients(7, 1.0, 1.0, 2).wait_p95_s)
    (2.5, 3.0)
    """
    each = np.asarray(clients / servers, dtype=float)
    served = np.clip(each, 1.0, batch)
    service = affine(first_s, whole_s, batch, served)
    turns = np.maximum(each / served, 1.0)
    capacity = servers * served / service
    busy = np.minimum(each, 1.0)
    return Queue(
        wait_s=(turns - 1) * service, wait_p95_s=(np.ceil(turns - 1e-9) - 1) * service, batch=served,
        utilisation=busy, busy=busy, capacity_per_s=capacity,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a server with slots does for a request, as (plans,) arrays. Continuous batching: Yu et al. 2022 (Orca).

    A step computes one token of each running answer, and beside them new tokens of a prompt: all of it, or one of its
    `pieces`. Prompts come one after the other, before the next tokens.
    """

    prompt_s: Any  # reading one prompt on an idle server
    full_prompt_s: Any  # reading as many as there are slots at once
    step_s: Any  # a token of one answer alone
    full_step_s: Any  # a token of each answer while all slots are taken
    slots: Any
    prompt_tokens: Any  # computed of one prompt
    output_tokens: Any
    pieces: Any = 1  # steps that one prompt is read in
    apart: Any = (
        0.0  # 1: prompts are read in steps of their own, between those of answers; 0: tokens come along with them
    )
    variation: Any = 0.0  # squared coefficient of variation of a request

    def beside(self, running: Any) -> Any:
        """Return the answers that go on while a prompt is read: the other requests, unless they end with fewer tokens."""
        return np.minimum(np.maximum(running - 1, 0), (self.output_tokens - 1) / self.pieces)

    def prompt_among(self, running: Any) -> Any:
        """Return seconds of reading a prompt, with the tokens that answers get meanwhile, while some requests are there."""
        beside = self.beside(running)
        prompts = beside * self.pieces / np.maximum(self.prompt_tokens, 1)  # as many tokens
        along = affine(self.prompt_s, self.full_prompt_s, self.slots, 1 + prompts)
        steps = self.pieces * self.step_among(np.maximum(beside, 1))  # no piece is read sooner than its answers go on
        with_it = along + np.minimum(beside, 1) * np.maximum(steps - along, 0.0)
        return np.where(self.apart, self.prompt_s + np.minimum(beside, 1) * steps, with_it)

    def step_among(self, running: Any) -> Any:
        """Return seconds of a step that only continues some answers."""
        return affine(self.step_s, self.full_step_s, self.slots, running)

    def reading_s(self, running: Any) -> Any:
        """Return how long a request waits for its first token while so many are there all the time.

        It comes as another ends. Where answers are short, that is before all the others have their first token: of 8
        requests for a single token each waits for 8 prompts.
        """
        return (running - self.beside(running)) * self.prompt_among(running)

    def answering_s(self, running: Any) -> Any:
        """Return how long its other tokens take: it gets one with each piece of others' prompts, and else in steps of answers.

        Agrawal et al. 2023 call the former piggybacked.
        """
        beside = self.beside(running)
        steps = np.maximum(self.output_tokens - 1 - beside * self.pieces, 0.0)
        return beside * self.prompt_among(running) + steps * self.step_among(running)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What requests meet at a server with slots, as (plans,) arrays. Times are inf where it falls behind."""

    first_s: Any  # mean, to the first token
    first_p95_s: Any
    whole_s: Any  # mean, to the last
    whole_p95_s: Any
    running: Any  # mean requests in slots while there are any
    waits: Any  # probability that a request waits for a slot
    utilisation: Any
    busy: Any
    capacity_per_s: Any


def slots_of_arrivals(rate: Any, work: Work, *, servers: Any = 1) -> Slots:
    """Return what Poisson arrivals meet; several servers are dealt requests evenly.

    The number of requests is a birth-death process whose deaths are the throughput of a closed loop of as many (Chandy,
    Herzog and Woo), one queue before the slots. A wait for a slot is half as long where requests are alike than where
    they are memoryless, as of one server (Pollaczek). Prompts wait for prompts as in M/D/1, and for half a step.

    >>> work = Work(
    ...     prompt_s=0.1, full_prompt_s=0.8, step_s=0.01, full_step_s=0.01, slots=8, prompt_tokens=100, output_tokens=91
    ... )
    >>> found = slots_of_arrivals(1e-9, work)
    >>> round(float(found.first_s), 6), round(float(found.whole_s), 6)
    (0.1, 1.0)
    """
    each = np.asarray(rate / np.asarray(servers, dtype=float), dtype=float)[..., None]
    slots = np.asarray(work.slots, dtype=float)[..., None]
    wide = _columns(work)
    counts = np.arange(1, int(np.max(slots)) + 1, dtype=float)
    last_slot = slots.astype(int) - 1
    reading, answering = wide.reading_s(counts), wide.answering_s(counts)
    leave = np.maximum.accumulate(np.where(counts <= slots, counts / (reading + answering), 0.0), axis=-1)
    capacity = leave[..., -1:]
    ratio = np.minimum(each / capacity, 1 - 1e-9)
    logs = np.cumsum(np.log(np.maximum(each, 1e-300) / leave), axis=-1)
    inside = counts <= slots
    logs = np.where(inside, np.concatenate([np.zeros_like(logs[..., :1]), logs[..., :-1]], axis=-1), -np.inf)
    # at[n]: relative probability of n requests, n from 0 to slots - 1; all that are more follow as a geometric series.
    top = np.max(logs, axis=-1, keepdims=True)
    at = np.exp(logs - top)
    last = np.take_along_axis(at, last_slot, axis=-1) * ratio
    beyond = last / (1 - ratio)
    whole = np.sum(at, axis=-1, keepdims=True) + beyond
    at, last, waits = at / whole, last / whole, beyond / whole
    present = np.sum(at * (counts - 1), axis=-1, keepdims=True) + slots * waits  # requests in slots
    idle = at[..., :1]
    stays_s, answering_s = (np.take_along_axis(x, last_slot, axis=-1) for x in (reading + answering, answering))
    # A request finds n others, and its answer goes on among them (Wolff).
    answer_s = np.sum(at * np.where(inside, answering, 0.0), axis=-1, keepdims=True) + waits * answering_s
    # Where all slots wait for prompts to be read, so do those before the slots: they are among the prompts ahead.
    answers = np.minimum(answering_s / np.maximum(stays_s - wide.prompt_s, 1e-300), 1.0)
    behind_answers = np.where(slots > 1, answers, 1.0)
    slot_s = behind_answers * waits / (capacity * (1 - ratio)) * (1 + wide.variation) / 2
    running = np.maximum(present / np.maximum(1 - idle, 1e-12), 1.0)
    prompt = wide.prompt_among(running)
    read = np.minimum(prompt, 1 / capacity)  # as fast as prompts are read where there is no time for anything else
    prompts = queue_of_batches(np.minimum(each, capacity), read, read, 1)
    answered = np.maximum(1 - idle - each * prompt, 0.0)  # share of the time: a step of answers must end first
    # In one slot there is no other to wait for.
    ahead, ahead_p95, step = (
        np.where(slots > 1, x, 0.0) for x in (prompts.wait_s, prompts.wait_p95_s, wide.step_among(running) * answered)
    )
    first = prompt + ahead + step / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        tail_s = np.where(waits > 1 - TAIL, np.log((1 - TAIL) / waits) / np.log(ratio) / capacity, 0.0)
    tail_s = tail_s * (1 + wide.variation) / 2
    most = np.argmax(np.cumsum(at, axis=-1) >= TAIL, axis=-1)[..., None] + 1.0  # with the request itself
    most = np.where(waits > 1 - TAIL, slots, np.minimum(most, slots))
    first_s = first + slot_s
    first_p95 = np.maximum(prompt + np.maximum(ahead_p95, tail_s) + TAIL * step, first_s)
    most_s = wide.answering_s(most)
    whole_s = first_s + answer_s
    # Late first tokens and slow answers come together where requests wait for a slot, else each by chance.
    by_chance = whole_s + np.hypot(first_p95 - first_s, np.maximum(most_s - answer_s, 0.0))
    whole_p95 = np.maximum(tail_s + prompt + most_s, by_chance)
    behind = each >= capacity
    told = dict(first_s=first_s, first_p95_s=first_p95, whole_s=whole_s, whole_p95_s=whole_p95)
    return Slots(
        **{name: np.where(behind, np.inf, value)[..., 0] for name, value in told.items()},
        running=running[..., 0], waits=np.where(behind, 1.0, waits)[..., 0], utilisation=(each / capacity)[..., 0],
        busy=np.where(behind, 1.0, 1 - idle)[..., 0], capacity_per_s=servers * capacity[..., 0],
    )  # fmt: skip


def slots_of_clients(clients: Any, work: Work, *, servers: Any = 1) -> Slots:
    """Return what a closed loop of clients meets: as many run as there are slots, and the others wait for their turn.

    Requests that are alike fall into step: a prompt is long read when the next one comes, and that is when another ends,
    so at the end of a step. Only where they vary does one wait for others' prompts, as arrivals do.

    >>> work = Work(
    ...     prompt_s=0.1, full_prompt_s=0.4, step_s=0.01, full_step_s=0.01, slots=4, prompt_tokens=100, output_tokens=91
    ... )
    >>> float(slots_of_clients(1, work).whole_s), float(slots_of_clients(1, work).first_s)
    (1.0, 0.1)
    """
    each = np.maximum(np.asarray(clients, dtype=float) / servers, 1.0)
    running = np.minimum(each, work.slots)
    reading, answering = work.reading_s(running), work.answering_s(running)
    stays = reading + answering
    leave = running / stays
    wait = (each - running) / leave
    prompt = work.prompt_among(running)
    prompts = np.minimum(leave * prompt, 1.0)  # share of the time
    most = np.where(work.variation > 0, work.beside(running) * prompt, 0.0)  # all others' at once
    ahead = np.minimum(prompts * prompt / (2 * np.maximum(1 - prompts, 1e-9)), most / 2)
    first = reading + ahead
    first_p95 = reading + np.minimum(3 * ahead, most)
    share = np.minimum(each, 1.0)
    return Slots(
        first_s=wait + first, first_p95_s=wait + first_p95, whole_s=wait + stays, whole_p95_s=wait + stays + (first_p95 - first),
        running=running, waits=np.where(each > work.slots, 1.0, 0.0), utilisation=share, busy=share,
        capacity_per_s=servers * leave,
    )  # fmt: skip


def _columns(work: Work) -> Work:
    """Return the same with room for a column of counts: (plans, 1)."""
    return Work(**{f.name: np.asarray(getattr(work, f.name), dtype=float)[..., None] for f in fields(Work)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Requests in a server they share, under Poisson arrivals. `at[n]`: probability that n are in it."""

    at: np.ndarray  # (states,) from 0
    capacity_per_s: float

    @property
    def mean(self) -> float:
        """Requests in the server, on average."""
        return float(self.at @ np.arange(len(self.at)))

    def seen(self, by_count: np.ndarray) -> float:
        """Return the mean, over arriving requests, of what depends on how many are there with it: `by_count[n - 1]`."""
        return float(self.at @ self._met(by_count))

    def seen_p95(self, by_count: np.ndarray) -> float:
        """Return its 95th percentile; `by_count` never falls."""
        return float(self._met(by_count)[np.searchsorted(np.cumsum(self.at), TAIL)])

    def _met(self, by_count: np.ndarray) -> np.ndarray:
        return by_count[np.minimum(np.arange(len(self.at)), len(by_count) - 1)]


def shared_service(rate: float, residence_s: np.ndarray) -> Shared | None:
    """Return how many requests are in a server, or None where the rate is beyond what it can serve.

    `residence_s[n - 1]` is how long a request stays while n are in it all the time, as in a closed loop of n clients; n
    requests then leave at n / residence_s[n - 1], and that is the rate of the server that stands for it under arrivals.
    More requests than `residence_s` tells of are served at its last rate.
    """
    count = np.arange(1, len(residence_s) + 1)
    leave = np.maximum.accumulate(count / residence_s)
    capacity = float(leave[-1])
    if rate >= capacity:
        return None
    # Beyond the last state each is `ratio` times as likely as the one before: as many as hold all but a millionth.
    ratio = rate / capacity
    beyond = min(int(np.ceil(np.log(1e-6 * (1 - ratio)) / np.log(ratio))), 200_000) if ratio > 0 else 0
    logs = np.concatenate([[0.0], np.cumsum(np.log(rate / leave))])
    logs = np.concatenate([logs, logs[-1] + np.log(ratio) * np.arange(1, beyond + 1)])
    weights = np.exp(logs - logs.max())
    return Shared(at=weights / weights.sum(), capacity_per_s=capacity)
