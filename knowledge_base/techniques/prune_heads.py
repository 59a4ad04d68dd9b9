"""Remove attention heads and let the remaining ones make up for them.

What goes is a whole group: a key-value head with the query heads that read it (a single head where each has its own),
so groups stay as wide as they were and the KV cache shrinks with the weights. Groups go one after another, each time the
one whose removal changes the attention's output least when the others compensate (`_structure.shrinking`); the output
matrix gets the least-squares correction.

With `where="each"` every layer keeps the same number, so config.json describes a dense model that every engine runs.
`"weakest"` removes as many in total, wherever the output changes least against the state it is added to; its layers
differ, which structure.json describes.
"""

from __future__ import annotations

import itertools
from typing import Any

from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="remove attention heads, with their keys and values: a smaller model and cache",
    stage="compress",
    family="head_count",
    implements=("head_pruning",),
    knobs={
        "keep": Choice(options=(0.5, 0.75, 0.875), default=0.75),
        "where": Choice(options=("each", "weakest"), default="each"),
    },
    saves=(
        "weights_bytes", "kv_cache_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "ttft_s",
        "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
    ),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs_calibration=True,
    sources=("arXiv:1905.10650", "arXiv:2302.04089"),
)  # fmt: skip

_PPL = "WikiText-2 perplexity"
_COLLECTION = "https://github.com/Zephyr271828/llm-pruning-collection-fork"
EVIDENCE = tuple(
    Evidence(model="Llama-3.1-8B", setting=setting, quantity=_PPL, baseline=14.31, value=value, source=_COLLECTION)
    for setting, value in (
        ("FLAP 20% (heads and channels), seq 128", 19.32), ("FLAP 30% (heads and channels), seq 128", 24.5),
    )
)  # fmt: skip


def kept_groups(groups: int, keep: float) -> int:
    """Return how many groups of heads stay.

    >>> kept_groups(8, 0.75), kept_groups(4, 0.875), kept_groups(2, 0.5)
    (6, 4, 1)
    """
    return max(round(keep * groups), 1)


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers < model.layers:
        return f"{model.architecture} has layers without attention, so no head can go everywhere"
    if model.kv_heads < 2:
        return "all query heads share one key-value head, which must stay"
    if model.kv_values_per_layer is not None:
        return "its layers keep something other than the keys and values of heads"
    return None


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if kept_groups(model.kv_heads, knobs["keep"]) >= model.kv_heads:
        return f"keep={knobs['keep']} of {model.kv_heads} groups of heads rounds to all of them"
    return None


def rewrite(demand: Demand, *, keep: float, where: str) -> Demand:
    """Return the demand with fewer attention parameters, a smaller cache and fewer scores.

    removed = layers * hidden_size * head_size * 2 (query heads removed + key-value heads removed)
    """
    model = demand.model
    kept = kept_groups(model.kv_heads, keep)
    share = kept / model.kv_heads
    per_layer = 2 * model.hidden_size * model.head_size * (model.heads + model.kv_heads) * (1 - share)
    removed = demand.layers * per_layer
    left = 1 - removed / demand.linear_params
    smaller = model.but(
        heads=model.heads * kept // model.kv_heads, kv_heads=kept,
        linear_params=round(model.linear_params - removed), params_total=round(model.params_total - removed),
        params_active=round(model.params_active - removed),
    )  # fmt: skip
    demand = loss_after(demand, "flap", sparsity=1 - left)
    return demand.but(
        model=smaller,
        linear_params=demand.linear_params - removed,
        linear_bytes=demand.linear_bytes * left,
        linear_flop_per_token=demand.linear_flop_per_token - 2 * removed,
        attention_flop_per_token_pair=demand.attention_flop_per_token_pair * share,
        kv_bytes_per_token=demand.kv_bytes_per_token * share,
        build_flop=demand.build_flop
        + (2 if where == "weakest" else 1) * 16_384 * 4 * demand.linear_params
        + 8 * demand.layers * (model.heads * model.head_size) ** 3,
        because=(
            *demand.because,
            f"{kept} of {model.kv_heads} groups of heads{' on average' if where == 'weakest' else ''}: "
            f"{1 - left:.0%} fewer weights in the layers, {1 - share:.0%} less cache",
        ),
    )


def execute(session: Session, *, keep: float, where: str) -> None:
    """Remove groups of heads in every layer, or where they are missed least, and correct the output matrices.

    Raises:
        CandidateFailed: an unknown attention, layers that differ, or nothing to remove.
    """
    import torch

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import Matrix, decoder_layers, each_layer
    from knowledge_base.techniques._structure import (
        Removal,
        attention_of,
        describe_heads,
        keep_groups,
        shrinking,
    )

    layers = decoder_layers(session.model)
    found = [attention_of(layer) for layer in layers]
    groups = found[0].groups
    if any((a.groups, a.queries, a.head_size) != (groups, found[0].queries, found[0].head_size) for a in found):
        raise CandidateFailed(
            "unsupported", "the layers' attention differs, so a share of it is not the same everywhere"
        )
    count = kept_groups(groups, keep)
    if count >= groups:
        raise CandidateFailed("unsupported", f"keep={keep} of {groups} groups of heads rounds to all of them")

    def levels(layer: Any, matrices: list[Matrix], wanted: list[int]) -> list[Removal]:
        attention = attention_of(layer)
        out = next(m for m in matrices if m.module is attention.out)
        return list(shrinking(out.weight, out.inputs.products, attention.size, wanted))

    counts = [count] * len(layers)
    if where == "weakest":
        counts = _weakest(session, levels, groups, count)

    def change(index: int, layer: torch.nn.Module, matrices: list[Matrix]) -> None:
        if counts[index] < groups:
            removal = levels(layer, matrices, [counts[index]])[0]
            keep_groups(attention_of(layer), removal.kept, removal.weight)

    each_layer(session, change, full=True, label="prune_heads")
    describe_heads(session.model, [attention_of(layer) for layer in layers])
    session.notes["prune_heads.groups"] = [groups, counts[0]] if where == "each" else [groups, *counts]


def _weakest(session: Session, levels: Any, groups: int, count: int) -> list[int]:
    """Return how many groups each layer keeps, `count` on average, at least one.

    A layer's error is taken against what enters it, since that is what its output is added to; the error of one more
    group grows with each, so taking the cheapest next one is the best there is where it does.
    """
    from knowledge_base.techniques._blocks import decoder_layers, each_layer

    layers, energy = decoder_layers(session.model), []
    costs: list[list[float]] = []

    def see(layer: Any, args: tuple, kwargs: dict) -> None:
        energy.append(float((args[0] if args else kwargs["hidden_states"]).float().square().sum()))

    def change(index: int, layer: Any, matrices: list) -> None:
        errors = [r.error for r in levels(layer, matrices, list(range(1, groups + 1)))]
        costs.append([(b - a) / energy[index] for a, b in itertools.pairwise(errors)])

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        each_layer(session, change, full=True, label="prune_heads: what each head is worth")
    finally:
        for handle in handles:
            handle.remove()
    kept = [groups] * len(layers)
    for _ in range((groups - count) * len(layers)):
        cheapest = min((i for i in range(len(layers)) if kept[i] > 1), key=lambda i: (costs[i][groups - kept[i]], i))
        kept[cheapest] -= 1
    return kept
