"""What a plan's clients meet when there are several of them, or when requests arrive by chance: waiting, and idle power.

The cost terms price one batch on an idle machine, which is what is measured. Here a queue stands before it: of
`workload.requests_per_s` arriving requests, or of `workload.concurrency` clients that each wait for their last answer.
Several devices hold a copy of the model each. An engine with a server of its own answers a plan's `batch` requests in
slots that share each step; any other takes batches one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models.case import Case
from cost_models.queueing import (
    Queue,
    Slots,
    Work,
    queue_of_batches,
    slots_of_arrivals,
    slots_of_clients,
    turns_of_clients,
)
from cost_models.terms import terms
from cost_models.terms._prediction import Prediction
from cost_models.terms.energy_j_per_token import device_power
from knowledge_base import units
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Hardware

if TYPE_CHECKING:
    from cost_models.predict import Figures

WAITED = ("ttft_s", "latency_s")
OF_A_BATCH = ("ttft_s", "tpot_s", "latency_s", "energy_j_per_token")  # what depends on how full batches are
OF_LOAD = (*WAITED, "throughput_tokens_per_s", "requests_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token")  # fmt: skip
P95_SD = 1.645  # standard deviations from the middle of a normal distribution to its 95th percentile


def copies(hardware: Hardware) -> int:
    """Return the devices that can each hold a copy of the model."""
    return sum(device == hardware.device for device in hardware.devices)


def falls_behind(rate: float, capacity: float) -> EnvironmentProblem:
    """Return what to say of a load beyond the capacity."""
    asked, most = (units.format(x, "requests") for x in (rate, capacity))
    return EnvironmentProblem(
        f"at {asked} it would fall behind: capacity is {most}",
        hint="lower the rate, serve larger batches, or add devices", where="--requests-per-s",
    )  # fmt: skip


def under_load(case: Case, evaluate: Callable[[Case], Figures]) -> tuple[Case, Figures, Queue]:
    """Return the plans' figures as clients meet them, with the case at the batches that are served, and the queue.

    Times of a plan that would fall behind are infinite, and it answers as much as it can.
    """
    first_turn, case = case, _following(case, kept=_kept(case, evaluate))
    full = evaluate(case)
    alone = evaluate(with_batch(case, np.ones_like(case.demand.batch))) if np.any(case.demand.batch > 1) else full
    queue, slots = _queue(case, full, alone), _slots(case, full, alone)
    if slots is not None:
        queue = replace(
            queue, batch=np.where(case.slotted, slots.running, queue.batch), busy=np.where(case.slotted, slots.busy, queue.busy),
            utilisation=np.where(case.slotted, slots.utilisation, queue.utilisation),
            capacity_per_s=np.where(case.slotted, slots.capacity_per_s, queue.capacity_per_s),
        )  # fmt: skip
    served = case if np.allclose(queue.batch, case.demand.batch) else with_batch(case, queue.batch)
    found = full if served is case else evaluate(served)
    # Memory is that of full batches, at the end of their conversations.
    largest = full if case.workload.turns == 1 else evaluate(_following(first_turn, kept=0.0, turn=case.workload.turns))
    for name in full.keys() - set(OF_A_BATCH):
        found[name] = largest[name]
    _wait(served, found, queue, alone, slots)
    return served, found, queue


def leave_out_unstable(found: Figures, queue: Queue, rate: float | None) -> None:
    """Take away what cannot be told of a single plan that would fall behind, and keep the reason."""
    if rate is not None and np.all(queue.utilisation >= 1):
        problem = falls_behind(rate, float(np.max(queue.capacity_per_s)))
        found.prevented |= {name: problem for name in OF_LOAD if found.pop(name, None)}


def with_batch(case: Case, batch: Any) -> Case:
    """Return the case with other requests in each batch, (plans,); they need not be whole."""
    return replace(case, demand=SimpleNamespace(**{**vars(case.demand), "batch": batch}))


def _following(case: Case, kept: Any, turn: float | None = None) -> Case:
    """Return the case with requests that follow each other: prompts that grow with the turns, and what is kept of them.

    Args:
        kept: share of later turns that find what was said before them, (plans,).
        turn: of all conversations, from 1; None: their mean.
    """
    workload, demand = case.workload, case.demand
    each = workload.prompt_tokens - workload.shared_prefix_tokens + workload.output_tokens  # tokens one turn adds
    before = (workload.turns - 1) / 2 if turn is None else turn - 1
    chunk = np.where(demand.prefill_step_tokens > 0, demand.prefill_step_tokens, np.inf)
    return replace(
        case,
        workload=replace(workload, prompt_tokens=workload.prompt_tokens + round(before * each)),
        rates=replace(case.rates, prefill_chunk_tokens=np.minimum(case.rates.prefill_chunk_tokens, chunk)),
        reused_tokens=demand.reused_prefix_tokens + kept * demand.reused_turn_tokens,
    )


def _kept(case: Case, evaluate: Callable[[Case], Figures]) -> Any:
    """Return the share of later turns whose slot was not given to another conversation since the turn before, (plans,).

    A slot is given away where a request waits when its answer ends. That is told of prompts that find only what all
    share, so the share is rather too low.
    """
    demand, rate = case.demand, case.workload.requests_per_s
    if not np.any(demand.reused_turn_tokens):
        return 0.0
    if rate is None:
        return np.where(demand.batch * copies(case.hardware) >= case.workload.concurrency, 1.0, 0.0)
    cold = _following(case, kept=0.0)
    full, alone = evaluate(cold), evaluate(with_batch(cold, np.ones_like(demand.batch)))
    return 1 - slots_of_arrivals(rate, _work(cold, full, alone), servers=copies(case.hardware)).waits


def _queue(case: Case, full: Figures, alone: Figures) -> Queue:
    workload, batch, count = case.workload, case.demand.batch, copies(case.hardware)
    whole_s, first_s = full["latency_s"].mid, alone["latency_s"].mid
    if workload.requests_per_s is None:
        return turns_of_clients(workload.concurrency, first_s, whole_s, batch, servers=count)
    return queue_of_batches(
        workload.requests_per_s, first_s, whole_s, batch, servers=count, variation=_variation(case, full)
    )


def _variation(case: Case, full: Figures) -> Any:
    """Return the squared coefficient of variation of requests: prompts differ, and with them the first part of one."""
    workload = case.workload
    if not workload.prompt_tokens_p95:
        return 0.0
    spread = (workload.prompt_tokens_p95 / workload.prompt_tokens - 1) / P95_SD
    return (spread * full["ttft_s"].mid / full["latency_s"].mid) ** 2


def _slots(case: Case, full: Figures, alone: Figures) -> Slots | None:
    """Return what the plans' requests meet in slots; None where no plan has any."""
    if not np.any(case.slotted):
        return None
    work, count, rate = _work(case, full, alone), copies(case.hardware), case.workload.requests_per_s
    if rate is None:
        return slots_of_clients(case.workload.concurrency, work, servers=count)
    return slots_of_arrivals(rate, work, servers=count)


def _work(case: Case, full: Figures, alone: Figures) -> Work:
    demand = case.demand
    new = np.maximum(case.workload.prompt_tokens - case.reused_tokens, 1.0)
    step = np.where(demand.prefill_step_tokens > 0, demand.prefill_step_tokens, np.inf)
    return Work(
        prompt_s=alone["ttft_s"].mid, full_prompt_s=full["ttft_s"].mid, step_s=alone["tpot_s"].mid,
        full_step_s=full["tpot_s"].mid, slots=demand.batch, prompt_tokens=new, output_tokens=np.full_like(new, case.workload.output_tokens),
        pieces=np.maximum(np.ceil(new / step), 1.0), apart=np.zeros_like(new) + case.apart, variation=np.zeros_like(new) + _variation(case, alone),
    )  # fmt: skip


def _wait(case: Case, found: Figures, queue: Queue, alone: Figures, slots: Slots | None) -> None:
    """Put waiting into times, the load into throughput, and idle power into energy; terms made of them follow."""
    tokens, count = case.counted_tokens, copies(case.hardware)
    with np.errstate(invalid="ignore"):
        told = _in_slots(alone, slots, queue, tokens) if slots is not None else {}
        for name in WAITED:
            found[name] = _waited(found[name], queue.wait_s, queue.wait_p95_s, queue)
        for name, prediction in told.items():
            found[name] = _where(case.slotted, prediction, found[name])
    rate = case.workload.requests_per_s
    throughput = found["throughput_tokens_per_s"]
    if rate is None:
        found["throughput_tokens_per_s"] = replace(throughput, mid=queue.capacity_per_s * queue.busy * tokens)
    else:
        none = np.zeros_like(throughput.mid)
        found["throughput_tokens_per_s"] = Prediction(
            mid=none + np.minimum(rate, queue.capacity_per_s) * tokens,
            log_sd=none,
            inherited_log_sd=none,
            note="as they arrive",
        )
    if "energy_j_per_token" in found:
        idle_w = device_power(case.device)[0]
        idle = count * idle_w * (1 - queue.busy) / found["throughput_tokens_per_s"].mid
        active = found["energy_j_per_token"]
        parts = {"requests": active.mid, "idle": idle}
        found["energy_j_per_token"] = replace(active, mid=active.mid + idle, parts=parts)
    for name in ("requests_per_s", "carbon_gco2e_per_token", "cost_usd_per_token"):
        if name in found:
            found[name] = terms.get(name).predict(case, found)


def _in_slots(alone: Figures, slots: Slots, queue: Queue, tokens: int) -> dict[str, Prediction]:
    """Return the times of requests in slots: those of one alone, and what it waits for others."""
    whole, first = slots.whole_s, slots.first_s
    found = {
        name: _waited(alone[name], mean - alone[name].mid, p95 - alone[name].mid, queue)
        for name, mean, p95 in (("ttft_s", first, slots.first_p95_s), ("latency_s", whole, slots.whole_p95_s))
    }
    step = alone["tpot_s"]
    told = np.isfinite(whole) & (tokens > 1)  # of a single token there is no time between tokens: a step of one alone
    each = np.where(told, (whole - first) / max(tokens - 1, 1), step.mid)
    found["tpot_s"] = replace(step, mid=each, parts={"other requests": each - step.mid, **step.parts})
    return found


def _where(mask: Any, a: Prediction, b: Prediction) -> Prediction:
    """Return one prediction of plans of two kinds."""
    if np.all(mask):
        return a

    def chosen(name: str) -> Any:
        return np.where(mask, getattr(a, name), getattr(b, name))

    parts = {name: np.where(mask, a.parts.get(name, 0.0), b.parts.get(name, 0.0)) for name in {**a.parts, **b.parts}}
    return Prediction(
        mid=chosen("mid"), log_sd=chosen("log_sd"), step_log_sd=chosen("step_log_sd"), note=a.note or b.note, parts=parts,
        inherited_log_sd=chosen("inherited_log_sd"), p95=None if b.p95 is None or a.p95 is None else chosen("p95"),
    )  # fmt: skip


def _waited(service: Prediction, wait_s: Any, wait_p95_s: Any, queue: Queue) -> Prediction:
    """Return a time with the wait in it. An error of the service is one of the wait many times over, when nearly full."""
    mid = service.mid + wait_s
    share = np.where(np.isfinite(mid), wait_s / mid, 1.0)
    open_loop = queue.utilisation < 1
    grows = 1 + np.where(open_loop, share / np.maximum(1 - queue.utilisation, 1e-3), 0.0)
    parts = {"waiting": wait_s + np.zeros_like(mid), **(service.parts or {"service": service.mid})}
    return replace(
        service, mid=mid, parts=parts, log_sd=service.log_sd * grows, inherited_log_sd=service.inherited_log_sd * grows,
        p95=service.mid + wait_p95_s,
    )  # fmt: skip
