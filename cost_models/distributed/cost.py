"""All resources of a run over several devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.distributed.links import Cluster, Traffic
from cost_models.distributed.pipelines import bubble_ratio
from cost_models.distributed.ranks import Layout, moved_bytes, rank_memory, splits
from cost_models.distributed.traffic import step_traffic
from cost_models.training import (
    TrainingCost,
    TrainingSetup,
    TrainingTime,
    as_time,
    bill,
    training_time,
    utilisation_prior,
)
from knowledge_base.types import Hardware, Model

HIDDEN_RATIO = 0.5  # of gradient and weight traffic, behind the backward pass: a guess between none and all


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedCost:
    """All resources of a run over several devices. `cost.memory` is that of the rank that needs most."""

    cost: TrainingCost
    traffic: Mapping[str, Traffic]
    ranks: int


def distributed_cost(
    model: Model, setup: TrainingSetup, hardware: Hardware, layout: Layout, cluster: Cluster, *, tokens: float
) -> DistributedCost:
    """Return memory, time, energy, carbon and money of a run over `layout.ranks` machines of one device like `hardware`.

    Raises:
        BadInput: the layout cannot be run.
        EnvironmentProblem: the device lacks a rate, or anything to model its power from.
    """
    memory, traffic = rank_memory(model, setup, layout), step_traffic(model, setup, layout, cluster)
    time = distributed_time(model, setup, hardware, layout, traffic, tokens=tokens)
    cost = bill(
        memory,
        time,
        setup,
        hardware,
        moved_bytes=moved_bytes(model, setup, layout),
        tokens=tokens,
        machines=layout.ranks,
    )
    return DistributedCost(cost=cost, traffic=traffic, ranks=layout.ranks)


def distributed_time(
    model: Model, setup: TrainingSetup, hardware: Hardware, layout: Layout, traffic: Mapping[str, Traffic], *,
    tokens: float,
) -> TrainingTime:  # fmt: skip
    """Return a step's time on every rank, whose traffic is `step_traffic`.

        step = one device's work / (tensor x pipeline x sequence), bubbles, and traffic: half of the data traffic hides
        behind the backward pass, the rest of it and all other kinds wait

    Raises:
        BadInput: the formulas do not hold for this model.
        EnvironmentProblem: the device lacks the rate of the weights' dtype.
    """
    alone = training_time(model, setup, hardware)
    ways = layout.tensor * layout.pipeline * layout.sequence
    shares = {
        "compute": ways, "recomputation": ways, "unpacking": layout.tensor * layout.pipeline, "launches": layout.pipeline,
        "optimiser": splits(layout),
    }  # fmt: skip
    parts = {name: s / shares[name] for name, s in alone.parts.items()}
    idle = bubble_ratio(layout.pipeline, setup.gradient_accumulation)
    parts["bubbles"] = sum(parts[name] for name in parts if name != "optimiser") * idle / (1 - idle)
    parts |= {name: t.s * (1 - HIDDEN_RATIO if name == "data" else 1) for name, t in traffic.items()}
    why = utilisation_prior(setup, hardware.device)
    if layout.ranks > 1:
        why = f"{why}; {layout.ranks} ranks; {HIDDEN_RATIO:.0%} of data traffic taken as hidden"
    return as_time(parts, alone.flop / ways, setup, tokens=tokens, why=why, replicas=layout.data)
