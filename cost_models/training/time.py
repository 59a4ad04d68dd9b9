"""How long a training step takes on one device, and all the tokens asked for: arithmetic at a prior share of the peak."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_models.demand import DTYPE_BYTES
from cost_models.efficiency import rate
from cost_models.roofline import causal_pairs
from cost_models.training.memory import value
from cost_models.training.setup import (
    UNTARGETED,
    TrainingSetup,
    base_bytes,
    check_model,
    head_outputs,
    packed_bits,
    state_bytes,
    trained_dtype,
    trained_params,
)
from knowledge_base.types import Device, Hardware, Model, Value

# Shares of the rate of large products with the model compiled: torchtune and Qwen on an A100; a guess for CPUs.
MFU = {"gpu": 0.70, "cpu": 0.5}
EAGER_RATIO = 0.79  # of that without compiling: torchtune, Llama-3.2-3B on an A100, 7075 of 8998 tokens/s
MFU_LOG_SD = 0.25
UNPACK_RATIO = 0.35  # of the memory bandwidth, when a packed matrix is unpacked for use
# The host's time for one operator, and operators of one pass over a layer with those of each adapter: Qwen's runs on 256
# tokens, 1.6 ms for a layer of seven adapters.
OPERATOR_S = 12e-6
LAYER_OPERATORS = 60
ADAPTER_OPERATORS = 10
STEP_TRAFFIC_RATIO = 0.7  # of the memory bandwidth, in the optimiser's pass over its states
Z80 = 1.2816  # half of an 80 % interval in standard deviations


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """Seconds of one optimiser step, useful tokens for each second, seconds of all tokens asked for."""

    step: Value
    tokens_per_s: Value
    total: Value
    parts: Mapping[str, float]  # of the step; they add up to it
    flop: float  # of the step, recomputation included


def step_flop(model: Model, setup: TrainingSetup) -> float:
    """Return the arithmetic of one optimiser step, multiply and add counted as two.

        forward = 2 active matrices + 2 head + attention's pairs                for each token: 2N (arXiv:2001.08361)
        backward = forward for the inputs' gradients + the trained share of forward for the weights'
        checkpointing adds the layers' forward; MeZO (arXiv:2305.17333) is two forwards and nothing else

    Full training without checkpointing: the 6ND rule, attention beside it.
    """
    tokens = setup.tokens * setup.gradient_accumulation
    idle = model.params_total - model.params_active
    length, share = setup.sequence_tokens, model.window_share
    windowed = float(causal_pairs(length, float(model.sliding_window_tokens or math.inf)))
    pairs = (share * windowed + (1 - share) * float(causal_pairs(length, math.inf))) / length
    if model.kind == "encoder":
        pairs *= 2  # each token sees those behind it too
    matrices, head = 2.0 * (model.linear_params - idle), 2.0 * head_outputs(model) * model.hidden_size
    attention = 4.0 * model.attention_layers * model.heads * model.head_size * pairs
    forward = matrices + head + attention
    if setup.method == "mezo":
        return tokens * 2 * forward
    adapters = 2.0 * trained_params(model, setup) if "lora" in setup.method else 0.0
    trained = matrices + head if setup.whole else 3 * adapters  # adapters go forward and backward too
    again = matrices + attention + adapters if setup.checkpointing else 0.0
    return tokens * (2 * forward + attention + trained + again)


def training_time(model: Model, setup: TrainingSetup, hardware: Hardware, *, tokens: float = 0.0) -> TrainingTime:
    """Return the time of one step on the machine's device, and of `tokens` useful tokens.

        compute    step_flop / (peak x MFU), never faster than reading the weights for each pass
        recomputation  the share of it that checkpointing adds
        unpacking  of a packed base, once for each pass over the weights
        launches   of kernels, where they outlast the work they start (eager)
        optimiser  reads and writes weights, gradients and states once for each step

    MFU is a prior for the kind of device, with a wide interval: measure one step to narrow it.

    Raises:
        BadInput: the formulas do not hold for this model.
        EnvironmentProblem: the device lacks the rate of the weights' dtype.
    """
    check_model(model, setup)
    device = hardware.device
    flop = step_flop(model, setup)
    passes = (3 if setup.checkpointing and setup.method != "mezo" else 2) * setup.gradient_accumulation
    weights = base_bytes(model, setup)
    bandwidth = device.memory_bytes_per_s
    compute = max(flop / (rate(device, setup.weight_dtype) * _mfu(setup, device)), passes * weights / bandwidth)
    bits = packed_bits(model, setup)
    unpacked = 0.0 if bits is None else model.linear_params * (bits / 8 + 2 * DTYPE_BYTES[setup.weight_dtype])
    operators = LAYER_OPERATORS + (0 if setup.method in UNTARGETED else ADAPTER_OPERATORS * len(setup.targets))
    launches = 0.0 if setup.compiled else passes * model.layers * operators * OPERATOR_S
    touched = 2 * state_bytes(model, setup) + 3 * trained_params(model, setup) * DTYPE_BYTES[trained_dtype(setup)]
    again = 1 - step_flop(model, replace(setup, checkpointing=False)) / flop
    parts = {
        "compute": compute * (1 - again),
        "recomputation": compute * again,
        "unpacking": passes * unpacked / (bandwidth * UNPACK_RATIO),
        "launches": max(0.0, launches - compute) if device.kind == "gpu" else 0.0,
        "optimiser": (touched + (8 * trained_params(model, setup) if setup.master_weights else 0))
        / (bandwidth * STEP_TRAFFIC_RATIO),
    }
    return as_time(parts, flop, setup, tokens=tokens, why=utilisation_prior(setup, device))


def utilisation_prior(setup: TrainingSetup, device: Device) -> str:
    """Return in words what share of the peak is taken."""
    return f"prior: {_mfu(setup, device):.0%} of peak arithmetic"


def _mfu(setup: TrainingSetup, device: Device) -> float:
    return MFU[device.kind] * (1.0 if setup.compiled else EAGER_RATIO)


def as_time(
    parts: Mapping[str, float], flop: float, setup: TrainingSetup, *, tokens: float, why: str, replicas: int = 1
) -> TrainingTime:
    """Return a step's parts as times with intervals; `replicas` take a batch each in the same step.

    A run is at least one step long, however few its tokens.
    """
    step = sum(parts.values())
    top = max(parts, key=lambda name: parts[name])
    doubt = Z80 * MFU_LOG_SD
    useful = replicas * setup.tokens * setup.gradient_accumulation * (1 - setup.padding_ratio)
    because = f"{parts[top] / step:.0%} {top}; {why}"
    steps = max(tokens / useful, 1.0) if tokens else 0.0
    return TrainingTime(
        step=value(step, doubt, because, "published"),
        tokens_per_s=value(useful / step, doubt, because, "published"),
        total=value(steps * step, doubt, because, "published"),
        parts=parts,
        flop=flop,
    )
