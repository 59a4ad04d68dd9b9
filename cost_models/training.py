"""What training or fine-tuning a model takes on one device: memory, time, energy, carbon and money, each with its reason.

    setup = TrainingSetup(method="lora", batch=4, sequence_tokens=1024, checkpointing=True)
    training_memory(model, setup).total.mid          bytes at the highest moment of a step
    training_cost(model, setup, hardware, tokens=1e8)  that, seconds, joules, grams and dollars

Counts follow from the model's shapes; what autograd keeps for the backward pass follows from its rules (a frozen matrix
needs no input, a trained one does), after Korthikanti et al., arXiv:2205.05198, adapted to gated feed-forward parts,
grouped heads and fused attention. Ranks, links and pipelines are in cost_models/distributed.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cost_models.catalogue import electricity_price, grid_carbon
from cost_models.demand import DTYPE_BYTES
from cost_models.efficiency import rate
from cost_models.roofline import causal_pairs, power_w
from cost_models.terms.energy_j_per_token import device_power
from knowledge_base.errors import BadInput
from knowledge_base.types import Hardware, Model, Value

WHOLE = ("full", "lomo", "galore", "mezo")  # methods that move every parameter
METHODS = (*WHOLE, "lora", "qlora", "scale", "bias", "prompt")  # scale: IA3, Adapter v2; prompt: prefixes, Adapter
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
# Bits for one stored weight, group scales included.
BASE_BITS = {
    "nf4": 4 + 32 / 64,  # a float32 scale for 64 weights: arXiv:2305.14314
    "nf4_double": 4 + 8 / 64 + 32 / (64 * 256),  # scales in 8 bits, a float32 for 256 of them: same paper, 4.127
    "int4": 4 + (16 + 4) / 128,  # GPTQ: a float16 scale and a 4-bit zero for 128 weights
    "int8": 8.0,
}
# Bytes of states for one trained value, besides those told by the state's dtype: (values, bytes each; None: state_dtype).
OPTIMISERS: dict[str, tuple[float, float | None]] = {
    "adamw": (2, None),
    "adam_8bit": (2, 1 + 4 / 256),  # a float32 scale for a block of 256: arXiv:2110.02861, as bitsandbytes keeps it
    "adam_4bit": (2, 0.5 + 4 / 128),  # arXiv:2309.01507
    "lion": (1, None),
    "momentum": (1, None),
    "sgd": (0, None),
    "adafactor": (0, None),  # a row and a column for each matrix: arXiv:1804.04235; counted from the shapes
}
# For one logit not cut into chunks: float32 logits, their log-probabilities and the gradient, alive at once.
LOGIT_BYTES = 12.0
LOSS_CHUNKS = 8  # what torchtune and Liger cut the loss into
RUNTIME_BYTES = 1.0e9  # driver context, libraries and their buffers on an accelerator, outside the allocator
LOST_RATIO = 0.04  # of the memory that comes and goes in a step, lost between the allocator's blocks
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
# 80 % half-widths of parts, as ratios: counts are sure, what a framework keeps is less so.
DOUBT = {"activations": 0.18, "logits": 0.25, "workspace": 0.5, "runtime": 0.5, "fragmentation": 1.0}
COUNT_DOUBT = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """How a model is trained. `batch` sequences go through at once; `gradient_accumulation` such batches make one step.

    Without `state_dtype` the optimiser's states have the dtype of what is trained, as torch's optimisers do;
    mixed precision is `master_weights=True, state_dtype="float32"`.
    """

    method: str = "full"  # one of METHODS
    optimiser: str = "adamw"  # one of OPTIMISERS
    weight_dtype: str = "bfloat16"  # also of activations
    gradient_dtype: str | None = None  # None: that of what is trained
    state_dtype: str | None = None
    master_weights: bool = False  # a float32 copy of every trained parameter
    base_format: str | None = None  # one of BASE_BITS; None: as weight_dtype says, "nf4" for qlora
    batch: int = 1
    sequence_tokens: int = 512
    padding_ratio: float = 0.0  # of all positions; packing makes it 0
    gradient_accumulation: int = 1
    checkpointing: bool = False  # each layer keeps its input alone and is computed again: arXiv:1604.06174
    flash_attention: bool = True
    compiled: bool = False
    chunked_cross_entropy: bool = False
    rank: int = 16  # of LoRA or GaLore
    targets: tuple[str, ...] = ("q", "v")  # the matrices with adapters
    adapter_dtype: str = "float32"  # as PEFT keeps adapters, whatever the base
    adapter_dropout: bool = False
    repeated_kv: bool = True  # before attention, for all heads; False: its kernel takes grouped keys and values
    fused_qkv: bool = False  # one matrix for queries, keys and values, whose whole output stays alive
    frozen_input_bytes: float = 0.0  # for each input value of a packed matrix; old bitsandbytes keeps 2 or 4
    gradient_buckets: bool = False  # room for all gradients is held all the time: DDP, DeepSpeed, accumulation
    fused_optimiser: bool = False  # each gradient is used and dropped at once, as in arXiv:2306.09782
    offload_states: bool = False  # states and master copies are in the host's memory
    offload_activations: bool = False  # so are the layers' checkpoints

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("optimiser", self.optimiser, tuple(OPTIMISERS))
        for name in ("weight_dtype", "gradient_dtype", "state_dtype", "adapter_dtype"):
            if (dtype := getattr(self, name)) is not None:
                _one_of(name, dtype, tuple(DTYPE_BYTES))
        if self.base_format is not None:
            _one_of("base_format", self.base_format, tuple(BASE_BITS))
            if self.method in WHOLE:
                raise BadInput(
                    f"method `{self.method}` changes every weight, so the base cannot be kept in {self.base_format}",
                    hint="train adapters on it: method qlora", where="base_format",
                )  # fmt: skip
        for name in ("batch", "sequence_tokens", "gradient_accumulation", "rank"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}", hint="mend it", where=name)
        if not 0 <= self.padding_ratio < 1:
            raise BadInput(
                f"padding_ratio must be from 0 to below 1, got {self.padding_ratio:g}", hint="packing makes it 0",
                where="padding_ratio",
            )  # fmt: skip
        for target in self.targets:
            _one_of("targets", target, MATRICES)
        if not self.targets and not self.whole and self.method != "prompt":
            raise BadInput(f"method `{self.method}` has no matrix to adapt", hint="name targets", where="targets")
        if self.gradient_accumulation > 1 and (self.fused_optimiser or self.method == "lomo"):
            raise BadInput(
                "gradients that are used and dropped at once cannot be accumulated",
                hint="gradient_accumulation 1, or another method", where="gradient_accumulation",
            )  # fmt: skip

    @property
    def packed(self) -> str | None:
        """The format the frozen base is kept in; None: that of `weight_dtype`."""
        return self.base_format or ("nf4" if self.method == "qlora" else None)

    @property
    def whole(self) -> bool:
        """Every parameter moves."""
        return self.method in WHOLE

    @property
    def tokens(self) -> int:
        """Positions that go through at once."""
        return self.batch * self.sequence_tokens


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTime:
    """Seconds of one optimiser step, useful tokens for each second, seconds of all tokens asked for."""

    step: Value
    tokens_per_s: Value
    total: Value
    parts: Mapping[str, float]  # of the step; they add up to it
    flop: float  # of the step, recomputation included


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """All resources of a training run on one device."""

    memory: TrainingMemory
    fits: bool
    time: TrainingTime
    energy_j: Value
    carbon_gco2e: Value
    cost_usd: Value


def _one_of(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise BadInput(f"unknown {what} `{name}`", hint=f"known: {', '.join(known)}", where=what)


def value(mid: float, doubt: float, because: str, source: str = "analytic") -> Value:
    """Return a figure with an 80 % interval of `doubt` to both sides, in log space."""
    return Value(mid=mid, low=mid * math.exp(-doubt), high=mid * math.exp(doubt), source=source, because=because)


# ---------------------------------------------------------------- counts


def check_model(model: Model, setup: TrainingSetup) -> None:
    """Refuse what the formulas do not hold for.

    Raises:
        BadInput: layers without attention, or sequences beyond the model's context.
    """
    if model.attention_layers < model.layers:
        raise BadInput(
            f"`{model.name}` has layers without attention, whose training memory has no formula here",
            hint="measure one step, or train a model with attention in every layer", where="model",
        )  # fmt: skip
    if setup.sequence_tokens > model.max_context_tokens:
        raise BadInput(
            f"{setup.sequence_tokens} tokens are beyond the context of `{model.name}`, {model.max_context_tokens}",
            hint="shorten sequence_tokens", where="sequence_tokens",
        )  # fmt: skip
    if "gate" in setup.targets and not model.gated_ffn:
        raise BadInput(
            f"`{model.name}` has no gate matrix to adapt", hint="leave `gate` out of targets", where="targets"
        )


def matrix_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Return (inputs, outputs) of a layer's matrices by name; those of one expert where there are several."""
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    shapes = {"q": (model.hidden_size, q), "k": (model.hidden_size, kv), "v": (model.hidden_size, kv)}
    shapes |= {"o": (q, model.hidden_size), "up": (model.hidden_size, model.ffn_size)}
    if model.gated_ffn:
        shapes["gate"] = (model.hidden_size, model.ffn_size)
    return {**shapes, "down": (model.ffn_size, model.hidden_size)}


def _copies(model: Model, matrix: str) -> int:
    return max(model.experts, 1) if matrix in ("gate", "up", "down") else 1


def trained_params(model: Model, setup: TrainingSetup) -> float:
    """Return how many values are trained.

    LoRA: rank x (inputs + outputs) of each target (arXiv:2106.09685). Scale: a factor for each output, bias: a term.
    Prompt: ten positions of keys and values for each layer (arXiv:2303.16199).
    """
    if setup.whole:
        return float(model.params_total)
    if setup.method == "prompt":
        return float(model.layers * 10 * 2 * model.hidden_size)
    shapes = matrix_shapes(model)
    each = {
        name: setup.rank * (shapes[name][0] + shapes[name][1]) if "lora" in setup.method else shapes[name][1]
        for name in setup.targets
    }
    return float(model.layers * sum(size * _copies(model, name) for name, size in each.items()))


def base_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of the weights as they lie in memory, group scales of a packed base included.

    Packed are the matrices of the layers; embedding, head and norms stay as wide as `weight_dtype`.
    """
    size = DTYPE_BYTES[setup.weight_dtype]
    if setup.packed is None:
        return float(model.params_total * size)
    return model.linear_params * BASE_BITS[setup.packed] / 8 + (model.params_total - model.linear_params) * size


def state_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of the optimiser's states.

    GaLore (arXiv:2403.03507): for a matrix of m x n, m <= n, a projector of m x r and states of r x n; whole states for
    embedding, head and norms.
    """
    if setup.method in ("lomo", "mezo"):
        return 0.0
    values, wide = OPTIMISERS[setup.optimiser]
    width = wide or DTYPE_BYTES[setup.state_dtype or _trained_dtype(setup)]
    shapes = {name: (min(s), max(s)) for name, s in matrix_shapes(model).items()}
    copies = {name: model.layers * _copies(model, name) for name in shapes}
    if setup.optimiser == "adafactor" and setup.whole:
        rows = sum(copies[name] * (m + n) for name, (m, n) in shapes.items())
        tables = 1 if model.tied_embeddings else 2
        return 4.0 * (rows + tables * (model.vocab_size + model.hidden_size))
    if setup.optimiser == "adafactor":
        return 4.0 * trained_params(model, setup)  # too thin to gain: at most a value for each
    if setup.method == "galore":
        thin = sum(
            copies[name] * min(setup.rank, m) * (m * DTYPE_BYTES[setup.weight_dtype] + values * n * width)
            for name, (m, n) in shapes.items()
        )
        return thin + (model.params_total - model.linear_params) * values * width
    return trained_params(model, setup) * values * width


def _trained_dtype(setup: TrainingSetup) -> str:
    return setup.weight_dtype if setup.whole else setup.adapter_dtype


# ---------------------------------------------------------------- activations


def layer_activation_bytes(model: Model, setup: TrainingSetup) -> dict[str, float]:
    """Return the bytes one layer keeps for its backward pass, for each token, by operator.

    norms       their input; in float32 where a root-mean-square norm is not compiled, then also the normalised value when
                its weight is trained; means and deviations. Models without gated feed-forward parts have layer norms.
    attention   queries, keys, values, output, a normaliser for each head; without fused attention also the scores after
                softmax, in float32 and cast: 6 bytes x heads x sequence
    ffn         what the activation and the product need: 3 widths gated (2 compiled), 1 otherwise
    inputs      of trained matrices, or of adapters: a cast copy for each adapter of another dtype, a copy and a mask for
                each with dropout; of frozen packed matrices where the library keeps them

    Mixture of experts: the feed-forward width of the experts a token goes through.

    >>> from tests_support import TOY_MODEL as toy  # hidden 256, heads 8 of 32, feed-forward 768
    >>> sum(layer_activation_bytes(toy, TrainingSetup()).values()) == (16 * 256 + 8) + (8 * 256 + 4 * 8) + 8 * 768
    True

    Equal to the byte to what autograd keeps of a Llama in transformers 5 (tests/unit/test_training.py).
    """
    a = DTYPE_BYTES[setup.weight_dtype]
    h, f = model.hidden_size, model.ffn_size * max(model.experts_active, 1)
    q, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    if model.gated_ffn and not setup.compiled:
        norms = 2.0 * (h * (4 + (a if setup.whole else 0)) + 4)
    else:
        norms = 2.0 * (h * a + 8)
    keys = q if setup.repeated_kv else kv
    values = q + 2 * kv if setup.fused_qkv and model.kv_heads == model.heads else keys
    scores = 4 if setup.flash_attention else setup.sequence_tokens * (4 + a)
    attention = float(a * (2 * q + keys + values) + model.heads * scores)
    widths = (2 if setup.compiled else 3) if model.gated_ffn else 1
    return {"norms": norms, "attention": attention, "ffn": float(a * widths * f), "inputs": _inputs(model, setup, f)}


def _inputs(model: Model, setup: TrainingSetup, f: int) -> float:
    a, h, q = DTYPE_BYTES[setup.weight_dtype], model.hidden_size, model.heads * model.head_size
    shared = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "ffn", "up": "ffn"}  # matrices that see the same input
    widths = {"qkv": h, "o": q, "ffn": h, "down": f}
    frozen = setup.frozen_input_bytes * sum(widths.values()) if setup.packed else 0.0
    if setup.whole:
        return float(a * (2 * h + f))  # the attention's output is kept by attention already
    if setup.method == "scale":
        outs = {"q": q, "k": model.kv_heads * model.head_size, "v": model.kv_heads * model.head_size, "o": h, "down": h}
        return float(frozen + DTYPE_BYTES[setup.adapter_dtype] * sum(outs.get(t, f) for t in setup.targets))
    if "lora" not in setup.method:
        return float(frozen)
    adapter = DTYPE_BYTES[setup.adapter_dtype]
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
    return float(frozen + kept + adapter * setup.rank * len(setup.targets))


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
    return setup.tokens * model.vocab_size * each


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
    return assemble(found[moment], setup, moment)


def highest(found: Mapping[str, Mapping[str, float]]) -> str:
    """Return the moment at which the parts are largest together."""
    return max(found, key=lambda name: sum(found[name].values()))


def assemble(sizes: Mapping[str, float], setup: TrainingSetup, moment: str) -> TrainingMemory:
    """Return the parts as values with reasons and intervals, runtime and fragmentation added, and their total."""
    coming = sum(sizes.get(name, 0.0) for name in ("gradients", "activations", "logits"))
    whole = {**sizes, "fragmentation": LOST_RATIO * coming, "runtime": RUNTIME_BYTES}
    reasons = _reasons(setup, moment)
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
    if setup.packed is None:
        return 0.0
    return float(max(i * o for i, o in matrix_shapes(model).values()) * DTYPE_BYTES[setup.weight_dtype])


def gradient_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of all gradients a step holds at its end; the largest one alone where each is used at once."""
    if setup.method == "mezo":
        return 0.0
    size = DTYPE_BYTES[setup.gradient_dtype or _trained_dtype(setup)]
    if setup.method == "lomo" or setup.fused_optimiser:
        largest = max(model.vocab_size * model.hidden_size, *(i * o for i, o in matrix_shapes(model).values()))
        return size * min(float(largest), trained_params(model, setup))
    return size * trained_params(model, setup)


def moments(model: Model, setup: TrainingSetup, *, in_flight: int = 1) -> dict[str, dict[str, float]]:
    """Return the bytes of every part at each moment; `in_flight` micro-batches wait for their backward pass."""
    gradients, layer = gradient_bytes(model, setup), setup.tokens * _layer(model, setup)
    held = setup.gradient_buckets or setup.gradient_accumulation > 1
    head = model.vocab_size * model.hidden_size * DTYPE_BYTES[setup.gradient_dtype or _trained_dtype(setup)]
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


def _reasons(setup: TrainingSetup, moment: str) -> dict[str, str]:
    base = f"{BASE_BITS[setup.packed]:.3g} bits for each packed weight" if setup.packed else setup.weight_dtype
    kept = "each layer's input" if setup.checkpointing else "what each layer's backward pass needs"
    return {
        "weights": f"all parameters, {base}",
        "adapters": f"{setup.method} on {', '.join(setup.targets)}, {setup.adapter_dtype}",
        "optimiser states": f"{setup.optimiser}, {setup.method}",
        "master copies": "float32 copies of trained parameters",
        "gradients": "one tensor at a time" if setup.fused_optimiser or setup.method == "lomo" else f"at: {moment}",
        "activations": f"{kept}, {setup.batch} x {setup.sequence_tokens} tokens",
        "logits": "in chunks" if setup.chunked_cross_entropy else "float32 logits, log-probabilities and gradient",
        "workspace": "the largest packed matrix, unpacked",
        "fragmentation": f"{LOST_RATIO:.0%} of what comes and goes in a step",
        "runtime": "driver context and libraries",
    }


# ---------------------------------------------------------------- time


def step_flop(model: Model, setup: TrainingSetup) -> float:
    """Return the arithmetic of one optimiser step, multiply and add counted as two.

        forward = 2 active matrices + 2 head + attention's causal pairs         for each token: 2N (arXiv:2001.08361)
        backward = forward for the inputs' gradients + the trained share of forward for the weights'
        checkpointing adds the layers' forward; MeZO (arXiv:2305.17333) is two forwards and nothing else

    Full training without checkpointing: the 6ND rule, attention beside it.
    """
    tokens = setup.tokens * setup.gradient_accumulation
    idle = model.params_total - model.params_active
    window = float(model.sliding_window_tokens or math.inf)
    pairs = float(causal_pairs(setup.sequence_tokens, window)) / setup.sequence_tokens
    matrices, head = 2.0 * (model.linear_params - idle), 2.0 * model.vocab_size * model.hidden_size
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
    mfu = MFU[device.kind] * (1.0 if setup.compiled else EAGER_RATIO)
    passes = (3 if setup.checkpointing and setup.method != "mezo" else 2) * setup.gradient_accumulation
    weights = base_bytes(model, setup)
    bandwidth = device.memory_bytes_per_s
    compute = max(flop / (rate(device, setup.weight_dtype) * mfu), passes * weights / bandwidth)
    unpacked = (
        model.linear_params * (BASE_BITS[setup.packed] / 8 + 2 * DTYPE_BYTES[setup.weight_dtype])
        if setup.packed
        else 0.0
    )
    operators = LAYER_OPERATORS + (0 if setup.whole else ADAPTER_OPERATORS * len(setup.targets))
    launches = 0.0 if setup.compiled else passes * model.layers * operators * OPERATOR_S
    touched = 2 * state_bytes(model, setup) + 3 * trained_params(model, setup) * DTYPE_BYTES[_trained_dtype(setup)]
    parts = {
        "compute": compute,
        "unpacking": passes * unpacked / (bandwidth * UNPACK_RATIO),
        "launches": max(0.0, launches - compute) if device.kind == "gpu" else 0.0,
        "optimiser": (touched + (8 * trained_params(model, setup) if setup.master_weights else 0))
        / (bandwidth * STEP_TRAFFIC_RATIO),
    }
    return as_time(parts, flop, setup, tokens=tokens, why=f"prior: {mfu:.0%} of peak arithmetic")


def as_time(
    parts: Mapping[str, float], flop: float, setup: TrainingSetup, *, tokens: float, why: str, replicas: int = 1
) -> TrainingTime:
    """Return a step's parts as times with intervals; `replicas` take a batch each in the same step."""
    step = sum(parts.values())
    top = max(parts, key=lambda name: parts[name])
    doubt = Z80 * MFU_LOG_SD
    useful = replicas * setup.tokens * setup.gradient_accumulation * (1 - setup.padding_ratio)
    because = f"{parts[top] / step:.0%} {top}; {why}"
    return TrainingTime(
        step=value(step, doubt, because, "published"),
        tokens_per_s=value(useful / step, doubt, because, "published"),
        total=value(tokens * step / useful, doubt, because, "published"),
        parts=parts,
        flop=flop,
    )


def training_cost(model: Model, setup: TrainingSetup, hardware: Hardware, *, tokens: float) -> TrainingCost:
    """Return memory, time, energy, carbon and money of training on `tokens` tokens on the machine's device.

    Energy is idle power plus activity (roofline.power_w) x time, never power cap x time. Money is the hourly price, and
    electricity where it is priced or the machine has no hourly price. The making of the machine is left out.

    Raises:
        BadInput: the formulas do not hold for this model, or no tokens are asked for.
        EnvironmentProblem: the device lacks a rate, or anything to model its power from.
    """
    memory, time = training_memory(model, setup), training_time(model, setup, hardware, tokens=tokens)
    moved = base_bytes(model, setup) * 3 * setup.gradient_accumulation + 2 * state_bytes(model, setup)
    return bill(memory, time, setup, hardware, moved_bytes=moved, tokens=tokens)


def bill(
    memory: TrainingMemory, time: TrainingTime, setup: TrainingSetup, hardware: Hardware, *, moved_bytes: float,
    tokens: float, machines: int = 1,
) -> TrainingCost:  # fmt: skip
    """Return what a run costs on `machines` equal machines of one device; flop and bytes of a step are each one's.

    Raises:
        BadInput: no tokens are asked for.
        EnvironmentProblem: there is nothing to model the device's power from.
    """
    if not 0 < tokens < math.inf:
        raise BadInput(f"tokens to train on must be above 0, got {tokens:g}", hint="say how many", where="tokens")
    device = hardware.device
    idle_w, busy_w, power_doubt, note = device_power(device)
    compute_share = time.flop / (time.step.mid * rate(device, setup.weight_dtype))
    memory_share = min(1.0, moved_bytes / (time.step.mid * device.memory_bytes_per_s))
    base = 0.6 if device.kind == "cpu" else 0.35
    watts = machines * float(power_w(idle_w, busy_w, memory_share, compute_share, base=base))
    hours = time.total.mid / 3600
    kwh = watts * hours * hardware.pue / 1000
    grid, grid_source = hardware.grid_gco2e_per_kwh, "the machine's grid"
    if grid is None:
        grid, grid_source = grid_carbon()
    price, price_source = hardware.electricity_usd_per_kwh, "the machine's price"
    if price is None and hardware.price_usd_per_h is None:
        price, price_source = electricity_price()
    rent = machines * (hardware.price_usd_per_h or 0.0) * hours
    electricity = kwh * (price or 0.0)
    doubt = Z80 * math.hypot(MFU_LOG_SD, power_doubt)
    money = f"${rent:.2f} machine" + ("" if price is None else f", ${electricity:.2f} electricity ({price_source})")
    return TrainingCost(
        memory=memory,
        fits=memory.total.mid <= device.memory_bytes,
        time=time,
        energy_j=value(3600 * watts * hours, doubt, f"{watts:.0f} W for {hours:.3g} h" + (f"; {note}" if note else "")),
        carbon_gco2e=value(kwh * grid, doubt, f"{kwh:.3g} kWh at {grid:g} g/kWh ({grid_source})"),
        cost_usd=value(rent + electricity, Z80 * MFU_LOG_SD if rent > electricity else doubt, money),
    )
