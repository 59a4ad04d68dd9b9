"""What executing a technique holds in memory beside the model, declared once and used twice: forecast, and kept as a law."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knowledge_base.types import Model, Plan

ACTIVATION_BYTES_MAX = 2 << 30  # of calibration activations alive at once in the widest part of a layer
LOGIT_BYTES_MAX = 256 << 20  # of log-probabilities kept, or made at once
TOKENS_AT_ONCE = 1024  # of a training step, and of text on which changes are compared
# What the memory allocator keeps of what was given back, and modules of libraries imported for one technique.
PROCESS_BYTES = 96 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMemory:
    """Memory beside the model, at most, as multiples of sizes that are known before a build starts; all of float32.

    What does not grow with the number of layers lets a model be compressed that fills more than half of the memory;
    `models` and `graph` do grow with it.
    """

    matrices: float = 4.0  # the largest tensor of the model: one is changed at a time
    squares: float = 0.0  # products of a layer's widest inputs, (in, in)
    states: float = 0.0  # the widest vector of a layer for each calibration token, up to ACTIVATION_BYTES_MAX
    logits: float = 0.0  # the vocabulary for each of TOKENS_AT_ONCE tokens, up to LOGIT_BYTES_MAX
    graph: float = 0.0  # the widest vector of every layer for each of TOKENS_AT_ONCE tokens: what a gradient needs
    models: float = 0.0  # the whole model in its own dtype
    loaded: bool = True  # the model itself; False: only its shapes are looked at

    def bytes_for(self, model: Model, tokens: int) -> float:
        """Return the bytes a build of this model needs beside it, with so many tokens of calibration text."""
        at_once = min(tokens, TOKENS_AT_ONCE)
        attention = model.heads * model.head_size
        widest = 4 * max(model.hidden_size, attention, model.ffn_size)
        largest = 4 * max(model.hidden_size, attention) * max(model.vocab_size, model.ffn_size * max(1, model.experts))
        return (
            PROCESS_BYTES
            + self.matrices * largest
            + self.squares * widest**2 / 4
            + min(self.states * tokens * widest, ACTIVATION_BYTES_MAX)
            + self.logits * min(4 * at_once * model.vocab_size, LOGIT_BYTES_MAX)
            + self.graph * at_once * model.layers * widest
            + self.models * model.weight_bytes
        )


def loads_weights(plan: Plan) -> bool:
    """Return whether a plan's build loads the model; else its weights are copied to the artefact as they are stored.

    That is done for a plan that leaves weights out of memory when it runs, where no step looks at them.
    """
    from knowledge_base.registry import techniques

    steps = [techniques.get(step.technique).TECHNIQUE for step in plan.steps]
    return not any("offloaded" in step.provides for step in steps) or any(step.holds.loaded for step in steps)


PLAIN = BuildMemory()
SHAPES = BuildMemory(matrices=0.0, loaded=False)  # what a serving engine does at run time is written down, no more
# Layer by layer: a layer's states, its inputs' products, and where zeros are allocated the model's answers before.
CALIBRATED = BuildMemory(matrices=6.0, squares=12.0, states=12.0, logits=4.0)
# Adapters or scales: the unchanged model is asked while this one is parked on disk.
TRAINED = BuildMemory(matrices=6.0, logits=8.0, graph=16.0, models=0.5)
# Every weight: its gradient and the optimiser's two moments beside it.
FULLY_TRAINED = replace(TRAINED, models=4.0)
