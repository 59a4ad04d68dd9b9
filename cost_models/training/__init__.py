"""What training or fine-tuning a model takes on one device: memory, time, energy, carbon and money, each with its reason.

    setup = TrainingSetup(method="lora", batch=4, sequence_tokens=1024, checkpointing=True)
    training_memory(model, setup).total.mid          bytes at the highest moment of a step
    training_cost(model, setup, hardware, tokens=1e8)  that, seconds, joules, grams and dollars

setup.py says how a model is trained, memory.py, time.py and bill.py what it takes. Ranks, links and pipelines are in
cost_models/distributed/.
"""

from cost_models.training.bill import TrainingCost, bill, training_cost
from cost_models.training.memory import (
    LOST_RATIO,
    RUNTIME_BYTES,
    TrainingMemory,
    assemble,
    gradient_bytes,
    highest,
    layer_activation_bytes,
    moments,
    training_memory,
    value,
)
from cost_models.training.setup import (
    BASE_BITS,
    MATRICES,
    METHODS,
    OPTIMISERS,
    UNTARGETED,
    WHOLE,
    TrainingSetup,
    base_bytes,
    check_model,
    matrix_shapes,
    packed_bits,
    state_bytes,
    trained_params,
)
from cost_models.training.time import TrainingTime, as_time, step_flop, training_time, utilisation_prior

__all__ = [
    "BASE_BITS",
    "LOST_RATIO",
    "MATRICES",
    "METHODS",
    "OPTIMISERS",
    "RUNTIME_BYTES",
    "UNTARGETED",
    "WHOLE",
    "TrainingCost",
    "TrainingMemory",
    "TrainingSetup",
    "TrainingTime",
    "as_time",
    "assemble",
    "base_bytes",
    "bill",
    "check_model",
    "gradient_bytes",
    "highest",
    "layer_activation_bytes",
    "matrix_shapes",
    "moments",
    "packed_bits",
    "state_bytes",
    "step_flop",
    "trained_params",
    "training_cost",
    "training_memory",
    "training_time",
    "utilisation_prior",
    "value",
]
