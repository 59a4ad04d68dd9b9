"""The device memory of one training step at its highest moment: every part with its interval and reason.

What autograd keeps for the backward pass follows from its rules (a frozen matrix needs no input, a trained one does),
after Korthikanti et al., arXiv:2205.05198, adapted to gated feed-forward parts, grouped heads and fused attention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.demand import DTYPE_BYTES
from cost_models.training.setup import (
    UNTARGETED,
    TrainingSetup,
    base_bytes,
    check_model,
    head_outputs,
    matrix_shapes,
    packed_bits,
    state_bytes,
    trained_dtype,
    trained_params,
)
from knowledge_base.types import Model, Value

# For one logit not cut into chunks: float32 logits, their log-probabilities and the gradient, alive at once.
LOGIT_BYTES = 12.0
LOSS_CHUNKS = 8  # what torchtune and Liger cut the loss into
RUNTIME_BYTES = 1.0e9  # driver context, libraries and their buffers on an accelerator, outside the allocator
LOST_RATIO = 0.04  # of the memory that comes and goes in a step, lost between the allocator's blocks
# 80 % half-widths of parts, as ratios: counts are sure, what a framework keeps is less so.
DOUBT = {"activations": 0.18, "logits": 0.25, "workspace": 0.5, "runtime": 0.5, "fragmentation": 1.0}
COUNT_DOUBT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """Bytes on the device at the highest moment of a step. The parts add up to the total; intervals are 80 %."""

    parts: Mapping[str, Value]
    total: Value
    moment: str

    @property
    def allocated_bytes(self) -> float:
        """What the framework's allocator hands out: all but the runtime and what is lost between blocks."""
        return sum(v.mid for name, v in self.parts.items() if name not in ("runtime", "fragmentation"))


def value(mid: float, doubt: float, because: str, source: str = "analytic") -> Value:
    """Return a figure with an 80 % interval of `doubt` to both sides, in log space."""
    return Value(mid=mid, low=mid * math.exp(-doubt), high=mid * math.exp(doubt), source=source, because=because)


# ---------------------------------------------------------------- activations


def layer_activation_bytes(model: Model, setup: TrainingSetup) -> dict[str, float]:
    """Return the bytes one layer keeps for its backward pass, for each token, by operator.

    norms       their input; in float32 where a root-mean-square norm is not compiled, then also the normalised value when
                its weight is trained; means and deviations. Models without gated feed-forward parts have layer norms.
    attention   queries, keys, values, output, a normaliser for each head; without fused attention also the scores after
                softmax, in float32 and cast: 6 bytes x heads x sequence
    ffn         what the activation and the product need: 3 widths gated (2 compiled), 1 otherwise
    inputs      of trained matrices, or of adapters: a cast copy for each adapter of another dtype, a copy and a mask for
                each with dropout; with magnitudes the outputs of adapter and matrix too; of frozen packed matrices where
                the library keeps them

    Mixture of experts: the feed-forward width of the experts a token goes through, those all share among them.

    >>> from tests_support import TOY_MODEL as toy  # hidden 256, heads 8 of 32, feed-forward 768
    >>> sum(layer_activation_bytes(toy, TrainingSetup()).values()) == (16 * 256 + 8) + (8 * 256 + 4 * 8) + 8 * 768
    True

    Equal to the byte to what autograd keeps of a Llama in transformers 5, within 1 % to that of a BERT
    (tests/unit/test_training.py); masks of dropout between layers, a byte for a value on a GPU, are left out.
    """
    a = DTYPE_BYTES[setup.weight_dtype]
    h, f = model.hidden_size, _ffn_width(model)
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    if model.gated_ffn and not setup.compiled:
        norms = 2.0 * (h * (4 + (a if setup.whole or setup.method == "norm" else 0)) + 4)
    else:
        norms = 2.0 * (h * a + 8)
    keys = q if setup.repeated_kv else kv
    values = q + 2 * kv if setup.fused_qkv and model.kv_heads == model.heads else keys
    scores = 4 if setup.flash_attention else setup.sequence_tokens * (4 + a)
    attention = float(a * (2 * q + keys + values) + model.heads * scores)
    widths = (2 if setup.compiled else 3) if model.gated_ffn else 1
    return {"norms": norms, "attention": attention, "ffn": float(a * widths * f), "inputs": _inputs(model, setup, f)}


def _ffn_width(model: Model) -> float:
    """Return the feed-forward width a token goes through; of experts what is active beside attention and router."""
    chosen = model.ffn_size * max(model.experts_active, 1)
    if model.experts < 2:
        return chosen
    active = (model.linear_params - model.params_total + model.params_active) / model.layers
    projections = 2 * model.hidden_size * (model.heads + model.kv_heads) * model.head_size
    beside = projections + model.hidden_size * model.experts  # the router
    return max(chosen, (active - beside) / ((3 if model.gated_ffn else 2) * model.hidden_size))


def _inputs(model: Model, setup: TrainingSetup, f: float) -> float:
    a, h, q = DTYPE_BYTES[setup.weight_dtype], model.hidden_size, model.heads * model.head_size
    shared = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "ffn", "up": "ffn"}  # matrices that see the same input
    widths = {"qkv": h, "o": q, "ffn": h, "down": f}
    frozen = setup.frozen_input_bytes * sum(widths.values()) if packed_bits(model, setup) else 0.0
    if setup.whole:
        return float(a * (2 * h + f))  # the attention's output is kept by attention already
    outs = {"q": q, "k": model.kv_heads * model.head_size, "v": model.kv_heads * model.head_size, "o": h, "down": h}
    adapter, outputs = DTYPE_BYTES[setup.adapter_dtype], sum(outs.get(t, f) for t in setup.targets)
    if setup.method == "scale":
        return float(frozen + adapter * outputs)
    if "lora" not in setup.method:
        return float(frozen)
    thin = adapter * setup.rank * len(setup.targets) + ((a + adapter) * outputs if setup.magnitudes else 0)
    own = adapter != a or setup.adapter_dropout  # each adapter keeps an input of its own
    each = adapter + (1 if setup.adapter_dropout else 0)
    groups = {t: shared.get(t, t) for t in setup.targets}
    if own and not setup.fused_qkv:
        kept = sum(each * widths[group] for group in groups.values())
    elif own:
        qkv = 1 if "qkv" in groups.values() else 0
        kept = each * (h * qkv + sum(widths[group] for group in groups.values() if group != "qkv"))
    else:
        kept = sum(each * widths[group] for group in set(groups.values()) if group != "o")
    return float(frozen + kept + thin)


def stored_activation_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes all layers keep when the loss is reached."""
    a, h = DTYPE_BYTES[setup.weight_dtype], model.hidden_size
    ends = h * (4 + 2 * a)  # the embedding's output and the last norm
    if setup.method == "mezo":
        return float(setup.tokens * ends)
    layer = min(a * h, _layer(model, setup)) if setup.checkpointing else _layer(model, setup)
    held = 0.0 if setup.offload_activations and setup.checkpointing else model.layers * layer
    return setup.tokens * (held + ends)


def _layer(model: Model, setup: TrainingSetup) -> float:
    return sum(layer_activation_bytes(model, setup).values())


def logits_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of logits and loss: 12 for a logit, or those in 16 bits and 4 more for one chunk of eight."""
    a = DTYPE_BYTES[setup.weight_dtype]
    if setup.method == "mezo":
        each = a + 4.0
    elif setup.chunked_cross_entropy:
        each = a + 4 / LOSS_CHUNKS
    else:
        each = LOGIT_BYTES
    return setup.tokens * head_outputs(model) * each


# ---------------------------------------------------------------- memory


def training_memory(model: Model, setup: TrainingSetup) -> TrainingMemory:
    """Return the device memory of one step at its highest moment, which is one of three:

        loss            all activations and the logits; of the gradients only the head's, unless room for all is held
        last layer      (with checkpointing) all checkpoints and one layer computed again
        end of backward all gradients and one layer's activations

    Between them memory moves along a line, so one of the three is the highest. Left out: the optimiser's temporaries.

    Raises:
        BadInput: the formulas do not hold for this model, or the sequence is beyond its context.
    """
    check_model(model, setup)
    found = moments(model, setup)
    moment = highest(found)
    return assemble(found[moment], setup, moment, bits=packed_bits(model, setup))


def highest(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the moment at which the parts are largest together."""
    return max(found, key=lambda name: sum(found[name].values()))


def assemble(sizes: Mapping[str, float], setup: TrainingSetup, moment: str, *, bits: float | None) -> TrainingMemory:
    """Return the parts as values with reasons and intervals, runtime and fragmentation added, and their total.

    `bits` are those of each packed weight, None where the base is not packed.
    """
    coming = sum(sizes.get(name, 0.0) for name in ("gradients", "activations", "logits"))
    whole = {**sizes, "fragmentation": LOST_RATIO * coming, "runtime": RUNTIME_BYTES}
    reasons = _reasons(setup, moment, bits)
    parts = {name: value(size, DOUBT.get(name, COUNT_DOUBT), reasons[name]) for name, size in whole.items() if size > 0}
    mid = sum(part.mid for part in parts.values())
    top = max(parts, key=lambda name: parts[name].mid)
    return TrainingMemory(
        parts=parts,
        total=Value(
            mid=mid,
            low=mid - math.hypot(*(part.mid - part.low for part in parts.values())),
            high=mid + math.hypot(*(part.high - part.mid for part in parts.values())),
            source="analytic",
            because=f"highest at: {moment}; {parts[top].mid / mid:.0%} {top}",
        ),
        moment=moment,
    )


def _fixed(model: Model, setup: TrainingSetup) -> dict[str, float]:
    trained = trained_params(model, setup)
    away = setup.offload_states
    keeps_master = setup.master_weights and setup.method not in ("lomo", "mezo")
    return {
        "weights": base_bytes(model, setup),
        "adapters": 0.0 if setup.whole else trained * DTYPE_BYTES[setup.adapter_dtype],
        "optimiser states": 0.0 if away else state_bytes(model, setup),
        "master copies": 4.0 * trained if keeps_master and not away else 0.0,
        "workspace": unpacked_bytes(model, setup),
    }


def unpacked_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of the largest matrix of a packed base, unpacked for its product."""
    if packed_bits(model, setup) is None:
        return 0.0
    return float(max(i * o for i, o in matrix_shapes(model).values()) * DTYPE_BYTES[setup.weight_dtype])


def gradient_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of all gradients a step holds at its end; the largest one alone where each is used at once."""
    if setup.method == "mezo":
        return 0.0
    size = DTYPE_BYTES[setup.gradient_dtype or trained_dtype(setup)]
    if setup.method == "lomo" or setup.fused_optimiser:
        largest = max(model.vocab_size * model.hidden_size, *(i * o for i, o in matrix_shapes(model).values()))
        return size * min(float(largest), trained_params(model, setup))
    return size * trained_params(model, setup)


def moments(model: Model, setup: TrainingSetup, *, in_flight: int = 1) -> dict[str, dict[str, float]]:
    """Return the bytes of every part at each moment; `in_flight` micro-batches wait for their backward pass."""
    gradients, layer = gradient_bytes(model, setup), setup.tokens * _layer(model, setup)
    held = setup.gradient_buckets or setup.gradient_accumulation > 1
    head = head_outputs(model) * model.hidden_size * DTYPE_BYTES[setup.gradient_dtype or trained_dtype(setup)]
    if setup.chunked_cross_entropy:
        head *= 2  # one chunk's gradient is added to that of the others
    early = max(gradients, head) if held else float(head)
    early = early if setup.whole else gradients if held else 0.0
    stored, logits = in_flight * stored_activation_bytes(model, setup), logits_bytes(model, setup)
    fixed = _fixed(model, setup)
    if setup.method == "mezo":
        forward = setup.tokens * DTYPE_BYTES[setup.weight_dtype] * (2.0 * model.hidden_size + 3.0 * model.ffn_size)
        return {"loss": {**fixed, "activations": max(stored, forward), "logits": logits}}
    rest = (in_flight - 1) * stored_activation_bytes(model, setup)
    found = {
        "loss": {**fixed, "gradients": early, "activations": stored, "logits": logits},
        "end of backward": {**fixed, "gradients": gradients, "activations": rest + layer},
    }
    if setup.checkpointing:
        found["last layer"] = {**fixed, "gradients": early, "activations": stored + layer}
    return found


def _adapted(setup: TrainingSetup) -> str:
    where = "" if setup.method in UNTARGETED else f" on {', '.join(setup.targets)}"
    return f"{setup.method}{where}, {setup.adapter_dtype}"


def _reasons(setup: TrainingSetup, moment: str, bits: float | None) -> dict[str, str]:
    base = f"{bits:.3g} bits for each packed weight" if bits else setup.weight_dtype
    kept = "each layer's input" if setup.checkpointing else "what each layer's backward pass needs"
    return {
        "weights": f"all parameters, {base}",
        "adapters": _adapted(setup),
        "optimiser states": f"{setup.optimiser}, {setup.method}",
        "master copies": "float32 copies of trained parameters",
        "gradients": "one tensor at a time" if setup.fused_optimiser or setup.method == "lomo" else f"at: {moment}",
        "activations": f"{kept}, {setup.batch} x {setup.sequence_tokens} tokens",
        "logits": "in chunks" if setup.chunked_cross_entropy else "float32 logits, log-probabilities and gradient",
        "workspace": "the largest packed matrix, unpacked" if bits else "layers gathered from the other ranks",
        "fragmentation": f"{LOST_RATIO:.0%} of what comes and goes in a step",
        "runtime": "driver context and libraries",
    }
