"""Waiting against a small discrete-event simulation, exact results of queueing theory, and their laws."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.queueing import (
    Work,
    affine,
    erlang_c,
    queue_of_batches,
    shared_service,
    slots_of_arrivals,
    slots_of_clients,
    tail,
    turns_of_clients,
)


def simulated(rate: float, first_s: float, whole_s: float, batch: int, servers: int) -> tuple[float, float, float]:
    """Return (mean wait, its 95th percentile, mean batch) of 60,000 requests before servers that take what waits."""
    draw = random.Random(1)
    arrivals = list(itertools.accumulate(draw.expovariate(rate) for _ in range(60_000)))
    lines = [arrivals] if batch == 1 else [arrivals[i::servers] for i in range(servers)]  # batches: dealt out in turn
    waits, batches = [], 0
    for line in lines:
        free = [0.0] * (servers if batch == 1 else 1)
        i = 0
        while i < len(line):
            start = max(heapq.heappop(free), line[i])
            j = i + 1
            while j < len(line) and j - i < batch and line[j] <= start:
                j += 1
            waits += [start - arrived for arrived in line[i:j]]
            heapq.heappush(free, start + float(affine(first_s, whole_s, batch, j - i)))
            i, batches = j, batches + 1
    return float(np.mean(waits)), float(np.quantile(waits, 0.95)), len(waits) / batches


@pytest.mark.parametrize("load", [0.1, 0.4, 0.7, 0.9])
@pytest.mark.parametrize(
    ("batch", "whole_s", "servers"), [(1, 1.0, 1), (4, 1.6, 1), (8, 3.0, 1), (16, 1.0, 1), (1, 1.0, 4)]
)
def test_response_times_are_those_of_a_simulation(batch: int, whole_s: float, servers: int, load: float) -> None:
    rate = load * servers * batch / whole_s
    found = queue_of_batches(rate, 1.0, whole_s, batch, servers=servers)
    wait, wait_p95, served = simulated(rate, 1.0, whole_s, batch, servers)
    service = affine(1.0, whole_s, batch, served)
    assert found.batch == pytest.approx(served, rel=0.03)
    assert found.wait_s + service == pytest.approx(wait + service, rel=0.12)
    assert found.wait_p95_s + service == pytest.approx(wait_p95 + service, rel=0.16)


def test_exact_results_of_one_server() -> None:
    for load in (0.2, 0.5, 0.8):
        assert queue_of_batches(load, 1.0, 1.0, 1).wait_s == pytest.approx(load / (2 * (1 - load)))  # M/D/1
        assert queue_of_batches(load, 1.0, 1.0, 1, variation=1.0).wait_s == pytest.approx(load / (1 - load))  # M/M/1
    # P(wait > t) = load e^{-(1 - load) t} of M/M/1 crosses 5 % at ln(0.8 / 0.05) / 0.2
    assert tail(0.8, 5.0, 25.0) == pytest.approx(np.log(0.8 / 0.05) / 0.2)


@given(load=st.floats(0.01, 0.98), more=st.floats(1.001, 1.5), batch=st.integers(1, 64), grows=st.floats(1, 8))
def test_more_requests_wait_longer_and_few_hardly_at_all(load: float, more: float, batch: int, grows: float) -> None:
    rate = load * batch / grows
    few, here, fuller = (queue_of_batches(r, 1.0, grows, batch) for r in (1e-6, rate, rate * more))
    assert few.wait_s < 1e-5 and few.wait_p95_s == 0 and few.batch == pytest.approx(1, abs=1e-5)
    assert 0 <= here.wait_s <= fuller.wait_s
    assert here.batch <= fuller.batch * (1 + 1e-9)
    assert here.busy <= 1 and here.batch <= batch


@given(load=st.floats(1.0, 1e9), batch=st.integers(1, 64))
def test_beyond_the_capacity_there_is_no_finite_wait(load: float, batch: int) -> None:
    found = queue_of_batches(load * batch, 1.0, 1.0, batch)
    assert np.isinf(found.wait_s) and np.isinf(found.wait_p95_s) and found.utilisation >= 1


@given(clients=st.integers(1, 500), batch=st.integers(1, 64), servers=st.integers(1, 8), grows=st.floats(1, 8))
def test_clients_obey_littles_law(clients: int, batch: int, servers: int, grows: float) -> None:
    found = turns_of_clients(clients, 1.0, grows, batch, servers=servers)
    response = found.wait_s + affine(1.0, grows, batch, found.batch)
    assert clients == pytest.approx(float(found.capacity_per_s * found.busy * response))
    assert found.wait_p95_s >= found.wait_s - 1e-9
    more = turns_of_clients(clients + 1, 1.0, grows, batch, servers=servers)
    assert more.wait_s + affine(1.0, grows, batch, more.batch) >= response - 1e-9


def simulated_sharing(rate: float, residence_s: np.ndarray) -> tuple[float, float]:
    """Return (mean response, its 95th percentile) of 20,000 equal requests that share a server, in small steps of time."""
    draw = random.Random(2)
    now, coming, running, done = 0.0, draw.expovariate(rate), [], []  # running: [arrived, work left]
    while len(done) < 20_000:
        each = residence_s[min(len(running), len(residence_s)) - 1] if running else np.inf
        ends = min((left for _, left in running), default=np.inf) * each
        step = min(ends, coming - now)
        now += step
        for request in running:
            request[1] -= step / each
        done += [now - arrived for arrived, left in running if left <= 1e-9]
        running = [request for request in running if request[1] > 1e-9]
        if now >= coming:
            running.append([now, 1.0])
            coming = now + draw.expovariate(rate)
    return float(np.mean(done)), float(np.quantile(done, 0.95))


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
def test_shared_service_is_that_of_a_simulation(load: float) -> None:
    residence = 1.0 + 0.15 * np.arange(40)  # 40 requests at once stay seven times as long as one
    rate = load * 40 / residence[-1]
    found = shared_service(rate, residence)
    assert found is not None
    mean, p95 = simulated_sharing(rate, residence)
    assert found.mean / rate == pytest.approx(mean, rel=0.05)  # Little's law
    assert found.seen_p95(residence) == pytest.approx(p95, rel=0.25)


@given(base=st.floats(1e-3, 1e3), slope=st.floats(1e-4, 10), states=st.integers(1, 300), load=st.floats(1e-6, 0.999))
def test_shared_service_is_a_distribution_that_moves_up_with_the_rate(
    base: float, slope: float, states: int, load: float
) -> None:
    residence = base * (1 + slope * np.arange(states))
    capacity = float(np.max(np.arange(1, states + 1) / residence))
    found, less = shared_service(load * capacity, residence), shared_service(load / 2 * capacity, residence)
    assert found is not None and less is not None
    assert found.at.sum() == pytest.approx(1)
    assert found.mean >= less.mean
    assert found.mean / (load * capacity) >= residence[0] * (1 - 1e-6)  # no response is shorter than alone
    assert found.seen_p95(residence) >= residence[0]
    assert shared_service(capacity, residence) is None


# ---------------------------------------------------------------- slots that share each step

SHORT = Work(
    prompt_s=0.05, full_prompt_s=0.8, step_s=0.02, full_step_s=0.025, slots=16, prompt_tokens=500, output_tokens=128
)
LONG = Work(
    prompt_s=0.3, full_prompt_s=2.4, step_s=0.01, full_step_s=0.03, slots=8, prompt_tokens=500, output_tokens=64
)
PIECES = replace(LONG, pieces=4)
FEW = Work(
    prompt_s=0.1, full_prompt_s=0.4, step_s=0.01, full_step_s=0.014, slots=4, prompt_tokens=500, output_tokens=64
)

# Answers so short that they end before the other prompts are read.
ONE, TWO, SIX = (replace(LONG, output_tokens=tokens) for tokens in (1, 2, 6))
# Prompts that cost little more by the dozen; pieces so small that the answers' tokens take longer; a prompt in a step of its own.
CHEAP = replace(LONG, prompt_s=0.05, full_prompt_s=0.1, prompt_tokens=32)
STEEP = Work(
    prompt_s=0.05,
    full_prompt_s=0.4,
    step_s=0.02,
    full_step_s=0.06,
    slots=8,
    prompt_tokens=64,
    output_tokens=64,
    pieces=4,
)
APART = replace(LONG, prompt_s=0.03, full_prompt_s=0.24, step_s=0.02, full_step_s=0.04, apart=1.0)


def served_in_slots(work: Work, count: int, rate: float = 0.0, clients: int = 0) -> tuple[float, ...]:
    """Return mean and 95th percentile to the first token and to the last, and requests a second, step by step."""
    draw = random.Random(1)
    token_s = (work.full_prompt_s - work.prompt_s) / max(work.slots - 1, 1) / work.prompt_tokens  # along with a prompt
    due = deque(itertools.accumulate(draw.expovariate(rate) for _ in range(count)) if rate else [0.0] * clients)
    at_s, waiting, reading, running, first, whole = 0.0, deque(), deque(), [], [], []
    while len(whole) < count:
        while due and due[0] <= at_s:
            waiting.append(due.popleft())
        while waiting and len(reading) + len(running) < work.slots:
            reading.append([waiting.popleft(), work.pieces])
        if not reading and not running:
            at_s = due[0]
            continue
        step_s = float(work.step_among(len(running))) if running else 0.0
        piece_s = work.prompt_s / work.pieces + len(running) * token_s
        at_s += (work.prompt_s + step_s if work.apart else max(piece_s, step_s)) if reading else step_s
        for request in running:
            request[1] -= 1
        if reading:
            reading[0][1] -= 1
            if not reading[0][1]:
                came, _ = reading.popleft()
                first.append(at_s - came)
                running.append([came, work.output_tokens - 1])
        ended = [came for came, left in running if left <= 0]
        running = [request for request in running if request[1] > 0]
        whole += [at_s - came for came in ended]
        due.extend([at_s] * len(ended) if clients else [])
    cold = count // 20
    figures = ((f(found[cold:])) for found in (first, whole) for f in (np.mean, lambda v: np.quantile(v, 0.95)))
    return (*map(float, figures), count / at_s)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("work", [SHORT, LONG, PIECES, FEW, ONE, TWO, SIX, CHEAP, STEEP, APART])
def test_arrivals_meet_in_slots_what_they_meet_in_a_simulation(work: Work, load: float) -> None:
    rate = load * float(slots_of_arrivals(1e-6, work).capacity_per_s)
    found = slots_of_arrivals(rate, work)
    first, first_p95, whole, whole_p95, _ = served_in_slots(work, 3000, rate=rate)
    assert found.first_s == pytest.approx(first, rel=0.2)
    assert found.whole_s == pytest.approx(whole, rel=0.15)
    assert found.whole_p95_s == pytest.approx(whole_p95, rel=0.2)
    assert first_p95 / 2 < found.first_p95_s < 1.5 * first_p95  # beside waiting for a slot, it is found or it is not


@pytest.mark.parametrize("clients", [1, 4, 8, 16])
@pytest.mark.parametrize("work", [LONG, PIECES, ONE, TWO, SIX, CHEAP, STEEP, APART])
def test_clients_meet_in_slots_what_they_meet_in_a_simulation(work: Work, clients: int) -> None:
    found = slots_of_clients(clients, work)
    first, first_p95, whole, whole_p95, rate = served_in_slots(work, 800, clients=clients)
    assert found.capacity_per_s == pytest.approx(rate, rel=0.03)
    assert (found.whole_s, found.whole_p95_s) == pytest.approx((whole, whole_p95), rel=0.03)
    assert (found.first_s, found.first_p95_s) == pytest.approx((first, first_p95), rel=0.3)


def test_slots_are_told_of_many_plans_at_once_as_of_each() -> None:
    works = (SHORT, LONG, PIECES, FEW, replace(FEW, slots=1, full_prompt_s=0.1, full_step_s=0.01))
    names = ("prompt_s", "full_prompt_s", "step_s", "full_step_s", "slots", "prompt_tokens", "output_tokens", "pieces")
    together = Work(**{name: np.array([getattr(work, name) for work in works]) for name in names})
    for rate in (0.3, 1.2, 50.0):
        many = slots_of_arrivals(rate, together)
        for i, work in enumerate(works):
            one = slots_of_arrivals(rate, work)
            for name in ("first_s", "whole_p95_s", "running", "waits", "utilisation", "capacity_per_s"):
                assert getattr(many, name)[i] == pytest.approx(float(getattr(one, name)))
    assert np.isinf(many.whole_s).all() and (many.utilisation >= 1).all()


def test_pieces_trade_the_own_first_token_for_the_others_tokens() -> None:
    whole, pieces = (slots_of_clients(8, work) for work in (LONG, PIECES))
    assert pieces.first_s > whole.first_s
    assert (pieces.whole_s - pieces.first_s) < (whole.whole_s - whole.first_s)
    assert pieces.capacity_per_s > whole.capacity_per_s  # tokens that come along with prompts need no step of their own


def test_one_slot_is_a_single_server() -> None:
    one = replace(FEW, slots=1, full_prompt_s=0.1, full_step_s=0.01)
    service = 0.1 + 63 * 0.01
    for load in (0.2, 0.6, 0.9):
        found, exact = slots_of_arrivals(load / service, one), queue_of_batches(load / service, service, service, 1)
        assert found.whole_s == pytest.approx(exact.wait_s + service)


@given(
    load=st.floats(0.01, 0.999), more=st.floats(1.0001, 1.2), prompt=st.floats(1e-3, 3), wide=st.floats(1, 16), slots=st.integers(1, 16),
    step=st.floats(1e-3, 0.1), steep=st.floats(1, 16), tokens=st.integers(1, 200), output=st.integers(1, 200), pieces=st.integers(1, 8),
    apart=st.booleans(),
)  # fmt: skip
def test_a_fuller_server_answers_no_sooner_and_longer_answers_come_no_sooner(
    load: float, more: float, prompt: float, wide: float, slots: int, step: float, steep: float, tokens: int, output: int, pieces: int,
    apart: bool,
) -> None:  # fmt: skip
    work = Work(
        prompt_s=prompt, full_prompt_s=prompt * min(wide, slots), step_s=step, full_step_s=step * min(steep, slots), slots=slots,
        prompt_tokens=tokens, output_tokens=output, pieces=min(pieces, tokens), apart=float(apart),
    )  # fmt: skip
    capacity = float(slots_of_arrivals(1e-9, work).capacity_per_s)
    here, fuller = (slots_of_arrivals(rate * capacity, work) for rate in (load, min(load * more, 0.9995)))
    for name in ("first_s", "whole_s"):
        assert float(getattr(here, name)) <= float(getattr(fuller, name)) * (1 + 1e-6), name
    assert here.first_s <= here.whole_s <= here.whole_p95_s and here.first_s <= here.first_p95_s
    longer = slots_of_clients(slots, replace(work, output_tokens=output + 1))
    assert float(slots_of_clients(slots, work).whole_s) <= float(longer.whole_s) * (1 + 1e-6)


def test_many_servers_of_single_requests_seldom_keep_one_waiting() -> None:
    # M/M/8 at an offered load of 2: C = 2^8 / 8! x 8 / 6 / (sum of 2^k / k! below 8 + that) = 0.0011
    found = queue_of_batches(2.0, 1.0, 1.0, 1, servers=8, variation=1.0)
    term = 2.0**8 / math.factorial(8) * 8 / 6
    waits = term / (sum(2.0**k / math.factorial(k) for k in range(8)) + term)
    assert erlang_c(8, 0.25) == pytest.approx(waits)
    assert found.wait_s < 2 * waits / (8 * 0.75) and found.wait_p95_s == 0
