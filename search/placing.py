"""Settings of offloading that the placement program chooses: what stays in memory under a budget of it, with the batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import cost_models
from cost_models import offloading
from cost_models.case import Case, case_of
from cost_models.demand import chains
from cost_models.roofline import cache_bytes, decode_parts
from knowledge_base.errors import NoFeasiblePlan
from knowledge_base.registry import techniques
from knowledge_base.types import Budget, Hardware, Model, Plan, Step, Workload
from search.placement import Asked, Part, Placement, Tier, place
from search.space import Space

MEMORY = "peak_memory_bytes"
STEP = 0.05  # between settings: parts of a share that is rounded up may differ from the program's
WEIGHTS = frozenset({"weights"})  # engines here leave nothing else out of memory


def placed(
    engine: str,
    families: Mapping[str, Sequence[Step]],
    model: Model,
    workload: Workload,
    hardware: Hardware,
    budgets: Sequence[Budget],
) -> Iterator[tuple[str, Step]]:
    """Yield (family, step) of settings with which the model runs where it is too large for memory.

    For one request at a time, and for the batch with the most tokens for each second. They hold at the upper end of the
    predicted interval, so that what is measured is within the budget as well.
    """
    family, module = _providing("offloaded", families)
    if module is None:
        return
    limit = _limit(engine, model, workload, hardware, budgets)
    if _most(engine, (), model, workload, hardware) <= limit:
        return
    batches = {int(step.knobs["count"]): step for step in families.get(_providing("batched", families)[0], ())}
    asked = asked_for(engine, model, workload, hardware, limit, module.layer_parts(model))
    for counts in ([1], [1, *batches]):
        try:
            found = place(asked, counts)
        except NoFeasiblePlan:
            continue
        beside = (batches[found.batch],) if found.batch > 1 else ()
        for value in module.RANGE[MEMORY][1]:
            step = Step(next(iter(families[family])).technique, {"resident": value})
            fits = value < resident(asked, found) + STEP and not module.legal(step.knobs, model, workload, hardware)
            if fits and _most(engine, (step, *beside), model, workload, hardware) <= limit:
                yield family, step
                break


def as_it_fits(space: Space, model: Model, workload: Workload, hardware: Hardware, memory_bytes: float) -> Plan | None:
    """Return the unchanged model with as little left out of memory as surely makes it fit there; None: nothing would."""
    for engine, families in space.options.items():
        family, module = _providing("offloaded", families)
        if module is None:
            continue
        for value in module.RANGE[MEMORY][1]:
            step = Step(next(iter(families[family])).technique, {"resident": value})
            plan = space.plan(engine, (step,))
            fits = plan is not None and not module.legal(step.knobs, model, workload, hardware)
            if fits and _most(engine, (step,), model, workload, hardware) <= memory_bytes:
                return plan
    return None


def _providing(tag: str, families: Mapping[str, Sequence[Step]]) -> tuple[str, ModuleType | None]:
    for family, steps in families.items():
        module = techniques.get(steps[0].technique) if steps else None
        if module is not None and tag in module.TECHNIQUE.provides:
            return family, module
    return "", None


def _limit(engine: str, model: Model, workload: Workload, hardware: Hardware, budgets: Sequence[Budget]) -> float:
    """Return the bytes a plan may take: of the device, and of every budget of memory."""
    device = hardware.device
    limits = [float(device.memory_bytes if device.kind == "gpu" else hardware.memory_limit_bytes)]
    for budget in budgets:
        if budget.metric == MEMORY and budget.bound == "max":
            whole = _figures(engine, (), model, workload, hardware).mid[0] if budget.relative else 1.0
            limits.append(budget.value * whole)
    return min(limits)


def _most(engine: str, steps: tuple[Step, ...], model: Model, workload: Workload, hardware: Hardware) -> float:
    return float(_figures(engine, steps, model, workload, hardware).high[0])


def _figures(
    engine: str, steps: tuple[Step, ...], model: Model, workload: Workload, hardware: Hardware
) -> cost_models.Estimates:
    plan = Plan(model_digest=model.digest, engine=engine, steps=steps)
    return cost_models.estimate_many([plan], model, workload, hardware)[MEMORY]


def asked_for(
    engine: str,
    model: Model,
    workload: Workload,
    hardware: Hardware,
    memory_bytes: float,
    shares: Mapping[str, float],
) -> Asked:
    """Return what the program is asked for a model on a machine, of whose device it may fill so many bytes.

    Args:
        shares: of a layer's weights, by its parts; the first keeps the cache.
    """
    case = case_of([chains(model, workload).node(Plan(model_digest=model.digest, engine=engine))], workload, hardware)
    demand, rates = case.demand, case.rates
    return Asked(
        parts=tuple(_parts(case, shares)),
        tiers=_tiers(hardware, memory_bytes),
        fixed_bytes=float(
            (demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes + rates.runtime_bytes)[0]
        ),
        each_bytes=float(workload.prompt_tokens * demand.activation_bytes_per_token[0] + 4 * model.vocab_size),
        whole=True,
        overlapped=offloading.overlapped(hardware),
    )


def _parts(case: Case, shares: Mapping[str, float]) -> Iterator[Part]:
    demand, rates = case.demand, case.rates
    layers, seconds = round(float(demand.layers[0])), {name: float(s[0]) for name, s in decode_parts(case).items()}
    flop_s = float((demand.linear_flop_per_token * demand.output_share / rates.flop_per_s)[0])
    for name, share in shares.items():
        keeps = name == next(iter(shares))
        yield Part(
            name=name,
            count=layers,
            weight_bytes=share * float(demand.linear_bytes[0]) / layers,
            cache_bytes=keeps * float(cache_bytes(case)[0]) / layers,
            read_s=share * max(0.0, seconds["weights"]) / layers,
            flop_s=share * flop_s / layers,
            each_s=keeps * (seconds["KV cache"] + seconds["recurrent state"]) / layers,
            fixed_s=seconds["engine overhead"] / layers / len(shares),
        )
    yield Part(name="head", count=1, weight_bytes=0.0, read_s=seconds["head"])


def _tiers(hardware: Hardware, memory_bytes: float) -> tuple[Tier, ...]:
    disk = hardware.disk_bytes_per_s
    if hardware.device.kind != "gpu":
        assert disk is not None
        return (
            Tier(name="memory", capacity_bytes=memory_bytes),
            Tier(name="disk", capacity_bytes=math.inf, read_bytes_per_s=disk, holds=WEIGHTS),
        )
    link, host_bytes = hardware.host_link_bytes_per_s, offloading.HOST_SHARE * hardware.host_memory_bytes
    assert link is not None
    return (
        Tier(name="device", capacity_bytes=memory_bytes),
        Tier(name="host", capacity_bytes=host_bytes, read_bytes_per_s=link, holds=WEIGHTS),
        Tier(name="disk", capacity_bytes=math.inf if disk else 0.0, read_bytes_per_s=disk or link, holds=WEIGHTS),
    )


def resident(asked: Asked, found: Placement) -> float:
    """Return the share of all parts' weights that lie in the first tier."""
    first = asked.tiers[0].name
    whole = sum(part.count * part.weight_bytes for part in asked.parts)
    return sum(part.count * part.weight_bytes * found.weights[part.name][first] for part in asked.parts) / whole
