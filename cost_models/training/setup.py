"""How a model is trained, and what follows from its shapes alone: trained parameters, bytes of the base, of states."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.demand import DTYPE_BYTES
from knowledge_base import units
from knowledge_base.errors import BadInput
from knowledge_base.types import Model

WHOLE = ("full", "lomo", "galore", "mezo")  # methods that move every parameter
# scale: IA3, Adapter v2; norm: the norms' weights; prompt: positions in front of every layer's keys and values; soft_prompt:
# in front of the input alone
METHODS = (*WHOLE, "lora", "qlora", "scale", "bias", "norm", "prompt", "soft_prompt")
UNTARGETED = (*WHOLE, "norm", "prompt", "soft_prompt")  # methods that do not choose among the matrices
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
    magnitudes: bool = False  # of LoRA: a trained length for each output beside its direction, DoRA
    virtual_tokens: int = 10  # of prompt and soft_prompt
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
        for name in ("batch", "sequence_tokens", "gradient_accumulation", "rank", "virtual_tokens"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, got {getattr(self, name)}", hint="mend it", where=name)
        if not 0 <= self.padding_ratio < 1:
            raise BadInput(
                f"padding_ratio must be from 0 to below 1, got {self.padding_ratio:g}", hint="packing makes it 0",
                where="padding_ratio",
            )  # fmt: skip
        for target in self.targets:
            _one_of("targets", target, MATRICES)
        if not self.targets and self.method not in UNTARGETED:
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


def _one_of(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise BadInput(f"unknown {what} `{name}`", hint=f"known: {', '.join(known)}", where=what)


# ---------------------------------------------------------------- counts


def check_model(model: Model, setup: TrainingSetup) -> None:
    """Refuse what the formulas do not hold for.

    Raises:
        BadInput: no decoder or encoder with the usual attention in every layer, or sequences beyond the model's context.
    """
    unlike = {
        "layers without attention": model.attention_layers < model.layers,
        "latent attention": model.kv_values_per_layer is not None,
        "an encoder beside its decoder": model.kind == "encoder_decoder",
    }
    for what, there in unlike.items():
        if there:
            raise BadInput(
                f"`{model.name}` has {what}, whose training memory has no formula here",
                hint=f"{_counted(model, setup)}; measure one step, or train a model with the usual attention in every layer", where="model",
            )  # fmt: skip
    if setup.whole and model.quantised_format.startswith("int"):
        raise BadInput(
            f"the matrices of `{model.name}` come as integers ({model.quantised_format}), which cannot be trained",
            hint="train adapters on them: lora; or take the model before it was quantised", where="base_format",
        )  # fmt: skip
    if setup.sequence_tokens > model.max_context_tokens:
        raise BadInput(
            f"{setup.sequence_tokens} positions are beyond the context of `{model.name}`, {model.max_context_tokens}",
            hint="shorten sequence_tokens", where="sequence_tokens",
        )  # fmt: skip
    if "gate" in setup.targets and not model.gated_ffn:
        raise BadInput(
            f"`{model.name}` has no gate matrix to adapt", hint="leave `gate` out of targets", where="targets"
        )


def _counted(model: Model, setup: TrainingSetup) -> str:
    """Return what its parameters alone tell of a model whose activations have no formula."""
    parts = {"weights": base_bytes(model, setup)}
    if setup.method == "full" and setup.optimiser != "adafactor":  # whose states follow from the layers' shapes
        parts["gradients"] = model.params_total * DTYPE_BYTES[setup.gradient_dtype or trained_dtype(setup)]
        parts["optimiser states"] = state_bytes(model, setup)
        parts["master copies"] = 4.0 * model.params_total if setup.master_weights else 0.0
    told = ", ".join(f"{name} {units.format(size, 'bytes')}" for name, size in parts.items() if size)
    return f"beside activations it takes {told}"


def head_outputs(model: Model) -> int:
    """Return how many logits a token has; an encoder is trained for its hidden states, with a head of a few classes."""
    return 0 if model.kind == "encoder" else model.vocab_size


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

    LoRA: rank x (inputs + outputs) of each target (arXiv:2106.09685), with magnitudes one more for each output
    (arXiv:2402.09353). Scale: a factor for each output, bias: a term. Prompt: keys and
    values of some positions for each layer (arXiv:2303.16199), soft prompt: their hidden states (arXiv:2104.08691).
    """
    if setup.whole:
        return float(model.params_total)
    if setup.method == "norm":
        return float((2 * model.layers + 1) * model.hidden_size)
    if setup.method == "soft_prompt":
        return float(setup.virtual_tokens * model.hidden_size)
    if setup.method == "prompt":
        return float(model.layers * setup.virtual_tokens * 2 * model.kv_heads * model.head_size)
    shapes = matrix_shapes(model)
    thin = setup.rank if "lora" in setup.method else 0
    whole_outputs = 1 if setup.magnitudes or not thin else 0
    each = {name: thin * sum(shapes[name]) + whole_outputs * shapes[name][1] for name in setup.targets}
    return float(model.layers * sum(size * _copies(model, name) for name, size in each.items()))


def packed_bits(model: Model, setup: TrainingSetup) -> float | None:
    """Return the bits of each weight of the layers' matrices where they are packed, scales included; None: they are not.

    A checkpoint that comes quantised is trained on as it is stored; methods that move every weight unpack it.
    """
    if model.quantised_bytes and not setup.whole:
        return 8 * model.quantised_bytes / model.linear_params
    return BASE_BITS[setup.packed] if setup.packed else None


def base_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of the weights as they lie in memory, group scales of a packed base included.

    Packed are the matrices of the layers; embedding, head and norms stay as wide as `weight_dtype`.
    """
    size, bits = DTYPE_BYTES[setup.weight_dtype], packed_bits(model, setup)
    if bits is None:
        return float(model.params_total * size)
    return model.linear_params * bits / 8 + (model.params_total - model.linear_params) * size


def state_bytes(model: Model, setup: TrainingSetup) -> float:
    """Return the bytes of the optimiser's states.

    GaLore (arXiv:2403.03507): for a matrix of m x n, m <= n, a projector of m x r and states of r x n; whole states for
    embedding, head and norms.
    """
    if setup.method in ("lomo", "mezo"):
        return 0.0
    values, wide = OPTIMISERS[setup.optimiser]
    width = wide or DTYPE_BYTES[setup.state_dtype or trained_dtype(setup)]
    shapes = {name: (min(s), max(s)) for name, s in matrix_shapes(model).items()}
    copies = {name: model.layers * _copies(model, name) for name in shapes}
    if setup.optimiser == "adafactor" and setup.whole:
        rows = sum(copies[name] * (m + n) for name, (m, n) in shapes.items())
        return 4.0 * (rows + model.vocabulary_tables * (model.vocab_size + model.hidden_size))
    if setup.optimiser == "adafactor":
        return 4.0 * trained_params(model, setup)  # too thin to gain: at most a value for each
    if setup.method == "galore":
        thin = sum(
            copies[name] * min(setup.rank, m) * (m * DTYPE_BYTES[setup.weight_dtype] + values * n * width)
            for name, (m, n) in shapes.items()
        )
        return thin + (model.params_total - model.linear_params) * values * width
    return trained_params(model, setup) * values * width


def trained_dtype(setup: TrainingSetup) -> str:
    return setup.weight_dtype if setup.whole else setup.adapter_dtype
