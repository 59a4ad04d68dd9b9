"""What a rank sends over the links in a step of training, or of decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cost_models.demand import DTYPE_BYTES
from cost_models.distributed.links import (
    NOTHING,
    Cluster,
    Link,
    Traffic,
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    send,
)
from cost_models.distributed.ranks import Layout, check_layout, divides, expert_share, stages
from cost_models.training import TrainingSetup, base_bytes, gradient_bytes, trained_params
from knowledge_base.types import Model


def step_traffic(model: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> dict[str, Traffic]:
    """Return what one rank sends in an optimiser step, by kind of parallelism. Kinds that are not used are absent.

        tensor    2 all-reduces of the hidden states for each layer forward, 2 backward      arXiv:1909.08053
        sequence  all-to-all of queries, keys, values and output, forward and backward       arXiv:2309.14509
        expert    tokens to their experts and back, forward and backward                     arXiv:2006.16668
        pipeline  hidden states on, gradients back, for each micro-batch                     arXiv:2104.04473
        data      all-reduce of gradients; ZeRO-1 and 2: reduce-scatter and all-gather, the same bytes; ZeRO-3: weights
                  gathered forward and backward besides, half as much again                  arXiv:1910.02054

    Checkpointing repeats what the forward pass sends within a layer. ZeRO-2 and 3 reduce for each micro-batch.

    Raises:
        BadInput: the layout cannot be run.
    """
    check_layout(model, setup, layout)
    part = list(stages(model, layout).values())[-1]
    a, micro = DTYPE_BYTES[setup.weight_dtype], setup.gradient_accumulation
    hidden = setup.tokens / layout.sequence * model.hidden_size * a
    passes = part.layers * micro * (3 if setup.checkpointing and setup.method != "mezo" else 2)
    t, experts = layout.tensor, cluster.link(layout.tensor * layout.sequence * layout.expert)
    found = {
        "tensor": all_reduce(hidden, t, cluster.link(t)).times(2 * passes),
        "sequence": _heads_exchange(model, setup, layout, cluster).times(passes),
        "expert": all_to_all(hidden * max(1, model.experts_active), layout.expert, experts).times(2 * passes),
        "pipeline": send(hidden, cluster.link(layout.ranks)).times(micro * min(2, layout.pipeline - 1)),
        "data": _gradient_traffic(part, setup, layout, cluster),
    }  # fmt: skip
    return {name: traffic for name, traffic in found.items() if traffic.bytes}


def _heads_exchange(model: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> Traffic:
    heads = 2 * (model.heads + model.kv_heads) * model.head_size / layout.tensor  # queries, output, keys, values
    size = setup.tokens / layout.sequence * heads * DTYPE_BYTES[setup.weight_dtype]
    return all_to_all(size, layout.sequence, cluster.link(layout.tensor * layout.sequence))


def _gradient_traffic(part: Model, setup: TrainingSetup, layout: Layout, cluster: Cluster) -> Traffic:
    if layout.replicas == 1:
        return NOTHING
    every = replace(setup, fused_optimiser=False, method="full" if setup.method == "lomo" else setup.method)
    link, micro = cluster.link(layout.tensor * layout.replicas), setup.gradient_accumulation
    gradients, weights = gradient_bytes(part, every), base_bytes(part, setup)
    trained = weights if setup.whole else trained_params(part, setup) * DTYPE_BYTES[setup.adapter_dtype]
    if setup.method == "mezo":  # each rank takes the step by itself from one number: arXiv:2305.17333
        trained = 0.0

    def over(ranks: int, share: Callable[[str], float]) -> Traffic:
        summed = gradients * share("gradients")
        if layout.zero_stage == 0:
            return all_reduce(summed, ranks, link)
        if layout.zero_stage == 3:
            gathered = all_gather(weights * share("weights"), ranks, link)  # forward, and again backward
            return reduce_scatter(summed, ranks, link).times(micro) + gathered.times(2 * micro)
        reduced = reduce_scatter(summed, ranks, link).times(micro if layout.zero_stage == 2 else 1)
        return reduced + all_gather(trained * share("adapters"), ranks, link)

    def inside(name: str) -> float:
        return expert_share(part, setup, name)

    if layout.expert == 1:
        return over(layout.replicas, lambda name: 1.0)
    dense = over(layout.replicas, lambda name: 1 - inside(name))
    return dense + over(layout.replicas // layout.expert, lambda name: inside(name) / layout.expert)


def decode_traffic(model: Model, *, batch: int, tensor: int, link: Link) -> Traffic:
    """Return what one rank sends for one decode step under tensor parallelism: for each token of each request
    2 all-reduces of a hidden state for each layer, and the gathering of logits. Values of 16 bits.

    Raises:
        BadInput: the ranks do not divide the heads.
    """
    divides("tensor", tensor, model.heads, "heads")
    states = all_reduce(2.0 * batch * model.hidden_size, tensor, link).times(2 * model.layers)
    return states + all_gather(2.0 * batch * model.vocab_size, tensor, link)
