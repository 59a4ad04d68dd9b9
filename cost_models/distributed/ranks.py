"""How a model is laid over ranks, and what each of them holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_models.demand import DTYPE_BYTES
from cost_models.training import (
    UNTARGETED,
    TrainingMemory,
    TrainingSetup,
    assemble,
    base_bytes,
    check_model,
    highest,
    matrix_shapes,
    moments,
    packed_bits,
    state_bytes,
    trained_params,
)
from knowledge_base.errors import BadInput
from knowledge_base.types import Model

GATHERED_LAYERS = 2  # whole layers a rank holds under ZeRO-3: the one at work and the next (arXiv:2304.11277)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many ways each kind of parallelism splits. `zero_stage` 3 is what FSDP calls full sharding."""

    data: int = 1
    tensor: int = 1  # heads and feed-forward widths: arXiv:1909.08053
    pipeline: int = 1  # layers, one forward and one backward in turn: arXiv:1811.06965, 2104.04473
    sequence: int = 1  # positions, swapped for heads around attention: arXiv:2309.14509
    expert: int = 1  # experts, within the data ranks: arXiv:2006.16668
    zero_stage: int = 0  # 1: states, 2: gradients too, 3: weights too are split over data ranks: arXiv:1910.02054

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.data * self.sequence * self.tensor * self.pipeline

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights before ZeRO: over these gradients are summed."""
        return self.data * self.sequence


def check_layout(model: Model, setup: TrainingSetup, layout: Layout) -> None:
    """Refuse a layout that cannot be run.

    Raises:
        BadInput: something does not divide, there are more stages than layers, or experts are split that do not exist.
    """
    check_model(model, setup)
    for name in ("data", "tensor", "pipeline", "sequence", "expert"):
        if getattr(layout, name) < 1:
            raise BadInput(f"{name} must be at least 1, got {getattr(layout, name)}", hint="mend it", where=name)
    if layout.zero_stage not in (0, 1, 2, 3):
        raise BadInput(f"zero_stage must be 0, 1, 2 or 3, got {layout.zero_stage}", hint="mend it", where="zero_stage")
    if layout.pipeline > model.layers:
        raise BadInput(
            f"{layout.pipeline} pipeline stages are more than the {model.layers} layers of `{model.name}`",
            hint="use fewer stages", where="pipeline",
        )  # fmt: skip
    if layout.expert > 1 and model.experts < 2:
        raise BadInput(f"`{model.name}` has no experts to split", hint="leave `expert` at 1", where="expert")
    divides("tensor", layout.tensor, model.ffn_size, "feed-forward width")
    divides("tensor x sequence", layout.tensor * layout.sequence, model.heads, "heads")
    if layout.tensor % model.kv_heads:  # fewer key-value heads than ranks are repeated, if evenly
        divides("tensor", layout.tensor, model.kv_heads, "key-value heads")
    divides("sequence", layout.sequence, setup.sequence_tokens, "tokens of a sequence")
    if layout.expert > 1:
        divides("expert", layout.expert, model.experts, "experts")
        divides("expert", layout.expert, layout.data, "data ranks")


def divides(what: str, ways: int, size: int, of: str) -> None:
    """Refuse to split what does not divide.

    Raises:
        BadInput: naming it.
    """
    if size % ways:
        raise BadInput(f"{what} = {ways} does not divide the {size} {of}", hint=f"use a divisor of {size}", where=what)


def stages(model: Model, layout: Layout) -> dict[str, Model]:
    """Return the part of the model one rank of the first and of the last stage works on, before ZeRO and experts.

    Heads, feed-forward width and vocabulary are split over tensor ranks; the first stage holds the embedding, the last
    the head and the loss. Layers that do not divide are rounded up.
    """
    layers = math.ceil(model.layers / layout.pipeline)
    if layout.pipeline == 1:
        return {"only": stage(model, layers, first=True, last=True, tensor=layout.tensor)}
    return {
        "first": stage(model, layers, first=True, last=False, tensor=layout.tensor),
        "last": stage(model, layers, first=False, last=True, tensor=layout.tensor),
    }


def stage(model: Model, layers: int, *, first: bool, last: bool, tensor: int = 1) -> Model:
    """Return some layers of the model as a model of its own, split `tensor` ways."""
    table, tables = model.vocab_size * model.hidden_size, model.vocabulary_tables
    linear = model.linear_params * layers // (model.layers * tensor)
    norms = max(0, model.params_total - model.linear_params - tables * table) * layers // model.layers
    held = tables if first and last else 1 if first or last else 0
    idle = (model.params_total - model.params_active) * layers // (model.layers * tensor)
    total = linear + norms + held * (table // tensor)
    return replace(
        model, layers=layers, attention_layers=layers, heads=model.heads // tensor,
        kv_heads=max(1, model.kv_heads // tensor), ffn_size=model.ffn_size // tensor, linear_params=linear,
        params_total=total, params_active=total - idle, vocab_size=math.ceil(model.vocab_size / tensor) if last else 0,
        quantised_bytes=model.quantised_bytes * layers // (model.layers * tensor),
    )  # fmt: skip


def expert_share(model: Model, setup: TrainingSetup, part: str) -> float:
    """Return the share of one part of memory that lies in experts."""
    inside = {name: i * o for name, (i, o) in matrix_shapes(model).items() if name in ("gate", "up", "down")}
    if model.experts < 2:
        return 0.0
    params = model.layers * model.experts * sum(inside.values())
    if part == "weights":
        bits = packed_bits(model, setup) or 8 * DTYPE_BYTES[setup.weight_dtype]
        return params * bits / 8 / base_bytes(model, setup)
    if setup.whole:
        return params / model.params_total
    targets = tuple(target for target in setup.targets if target in inside)
    if setup.method in UNTARGETED or not targets:
        return 0.0
    return trained_params(model, replace(setup, targets=targets)) / trained_params(model, setup)


def rank_memory(model: Model, setup: TrainingSetup, layout: Layout) -> TrainingMemory:
    """Return the memory of the rank that needs most: one of the first stage, which holds the activations of up to
    `pipeline` micro-batches, or of the last, which holds the logits.

    Under ZeRO the sharded parts are 1/n of themselves over n data and sequence ranks; stage 3 holds two gathered layers.
    One rank's share of positions is 1/sequence. Left out: buffers of the communication library.

    Raises:
        BadInput: the layout cannot be run.
    """
    check_layout(model, setup, layout)
    found = {}
    for place, part in stages(model, layout).items():
        in_flight = min(layout.pipeline, setup.gradient_accumulation) if place == "first" else 1
        for moment, sizes in moments(part, setup, in_flight=in_flight).items():
            name = moment if layout.pipeline == 1 else f"{moment}, {place} stage"
            found[name] = _sharded(sizes, part, setup, layout)
    moment = highest(found)
    return assemble(found[moment], setup, moment, bits=packed_bits(model, setup))


_STAGE = {"optimiser states": 1, "master copies": 1, "gradients": 2, "weights": 3, "adapters": 3}  # ZeRO's, by part


def _sharded(sizes: Mapping[str, float], part: Model, setup: TrainingSetup, layout: Layout) -> dict[str, float]:
    one_at_a_time = setup.method == "lomo" or setup.fused_optimiser  # a single gradient is not split
    result = dict(sizes)
    for name, stage in _STAGE.items():
        size = sizes.get(name, 0.0)
        if layout.zero_stage >= stage and not (name == "gradients" and one_at_a_time):
            result[name] = size / layout.replicas
        else:
            result[name] = size * (1 - expert_share(part, setup, name) * (1 - 1 / layout.expert))
    for name in ("activations", "logits"):
        result[name] = sizes.get(name, 0.0) / layout.sequence
    if layout.zero_stage == 3:  # two whole layers; a rank's own share of them is counted among the weights
        gathered = base_bytes(part, setup) * min(1.0, GATHERED_LAYERS / part.layers)
        result["workspace"] += gathered * (1 - 1 / layout.replicas)
    return result


def moved_bytes(model: Model, setup: TrainingSetup, layout: Layout) -> float:
    """Return the bytes of weights and states a rank reads and writes in a step."""
    weights = base_bytes(model, setup) * 3 * setup.gradient_accumulation
    return (weights + 2 * state_bytes(model, setup)) / splits(layout)


def splits(layout: Layout) -> int:
    """Return the ways in which weights and states of a rank's part are split."""
    return layout.tensor * layout.pipeline * (layout.replicas if layout.zero_stage else 1)
