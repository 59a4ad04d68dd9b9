"""The nouns everyone shares: frozen values that flow through the loop, and what a technique and an engine declare.

Units are in the names; SI base units inside. Validation of what a person wrote happens at the edge
(planner/spec); these types hold what is already known to be good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from knowledge_base.build_memory import CALIBRATED, PLAIN, TRAINED, BuildMemory
from knowledge_base.serde import UNSAID, digest

if TYPE_CHECKING:
    from knowledge_base.quality import Loss

# ---------------------------------------------------------------- what is given


class Changing:
    """A frozen record without slots of which searches make millions, each like another but for some values."""

    def but(self, **changes: Any) -> Self:
        """Return this with other values: `dataclasses.replace` in a fraction of its time.

        Raises:
            TypeError: there is no such value.
        """
        values = vars(self)
        changed = values | changes
        if len(changed) > len(values):
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(changes.keys() - values.keys()))}")
        other = object.__new__(type(self))
        object.__setattr__(other, "__dict__", changed)
        return other


@dataclass(frozen=True, kw_only=True)
class Model(Changing):
    """A language model as its config.json and safetensors headers describe it; nothing is loaded.

    `digest` covers config, tokenizer and weight files, so it keys caches. Counts are in parameters. Of an
    encoder-decoder, layers, heads and sizes are those of the decoder, counts those of both.
    """

    name: str
    source: str  # folder, or hub id "org/name"
    revision: str | None = None
    digest: str = ""
    architecture: str  # config.json's model_type: "llama", "gpt2", "mamba", ...
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    vocab_size: int
    max_context_tokens: int
    params_total: int
    params_active: int  # read for each token: all but the experts not chosen
    linear_params: int  # 2-D weights inside the layers: what weight techniques act on
    embedding_params: int
    tied_embeddings: bool
    gated_ffn: bool = True
    experts: int = 0
    experts_active: int = 0
    sliding_window_tokens: int | None = None
    window_share: float = 1.0  # of the KV cache, what lies in layers with that window; the others see everything
    attention_layers: int  # layers that hold a KV cache; 0 for a pure state-space model
    kv_values_per_layer: float | None = None  # numbers cached for a token, where heads do not tell: latent attention
    latent_rank: int = field(
        default=0, metadata=UNSAID
    )  # of them, those that keys and values of all heads are made from
    state_bytes: int = 0  # recurrent state for each sequence (state-space models)
    weight_dtype: str  # "float32" | "bfloat16" | "float16" | ...: the most common dtype in the file
    weight_bytes: int  # bytes of all tensors on disk
    kind: str = "decoder"  # "decoder" | "encoder" (one pass, no cache) | "encoder_decoder"
    encoder_layers: int = 0
    encoder_params: int = 0  # of linear_params, what only prompts go through: encoder, keys, values of cross-attention
    quantised_format: str = ""  # of the layers' matrices, where not in weight_dtype: "int4", "mxfp4", ...
    quantised_bytes: int = 0  # bytes of the layers' matrices then, scales and matrices left as they were included
    draft: Model | None = field(default=None, metadata=UNSAID)  # a smaller one, same tokenizer, that guesses its tokens
    step_losses: tuple[KnownLoss, ...] = field(
        default=(), metadata=UNSAID
    )  # what was found of single steps on this model

    @property
    def vocabulary_tables(self) -> int:
        """How many are stored: the embedding's, and an output head's of its own, which an encoder is not counted with."""
        return 1 if self.tied_embeddings or self.kind == "encoder" else 2

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds for one token, all layers; of an encoder-decoder, for one of prompt or output."""
        if self.kind == "encoder":
            return 0
        each = 2 * self.kv_heads * self.head_size if self.kv_values_per_layer is None else self.kv_values_per_layer
        return round(self.attention_layers * each)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A file of requests: when each came, how long its prompt and its answer were. Rows are read by planner/load."""

    file: str  # as the spec writes it, told from the spec's folder
    requests: int = 0
    digest: str = ""  # SHA-256 of the rows, so that another name is no other load
    replayed: bool = True  # at its own times; otherwise only its lengths are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What the model is asked to do. Lengths in tokens, those of a conversation's first turn; of a trace, its own."""

    prompt_tokens: int  # the median
    output_tokens: int  # the median
    prompt_tokens_p95: int | None = None  # None: all are alike
    concurrency: int = 1
    requests_per_s: float | None = None  # arriving by chance; None: each client asks when it has its last answer
    output_tokens_p95: int | None = field(default=None, metadata=UNSAID)  # None: all are alike
    shared_prefix_tokens: int = field(default=0, metadata=UNSAID)  # of each prompt, the same in all
    turns: int = field(default=1, metadata=UNSAID)  # requests of a conversation, each with all before it in its prompt
    trace: Trace | None = field(default=None, metadata=UNSAID)

    @property
    def longest_tokens(self) -> int:
        """Tokens of prompt and answer together at the end of a conversation, of 95th-percentile lengths."""
        prompt = self.prompt_tokens_p95 or self.prompt_tokens
        output = self.output_tokens_p95 or self.output_tokens
        return self.turns * (prompt + output) - (self.turns - 1) * self.shared_prefix_tokens

    @property
    def loaded(self) -> bool:
        """Whether requests arrive, follow each other or are replayed: more than one batch after the other tells."""
        return self.requests_per_s is not None or self.turns > 1 or self.trace is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What an engine reaches on one device with one weight format, by measurements there; takes the priors' place.

    The standard deviations are those of the logarithms. `n`: measurements of this very format; 0 where the engine's
    others tell. `metrics`: those that were fitted; rates that only others tell of are the priors still.
    """

    engine: str
    weight_format: str
    compiled: bool
    weights_bytes_per_s: float  # bytes/s reading weights from memory, unpacking included
    read_log_sd: float  # of the logarithm
    flop_per_s: float  # flop/s in prefill
    flop_log_sd: float  # of the logarithm
    kernel_s: float  # seconds to start an operator
    step_s: float  # seconds beside them, each step
    overhead_log_sd: float  # of the logarithm of both
    runtime_bytes: float  # of memory, without a model
    runtime_log_sd: float  # of the logarithm
    n: int
    metrics: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LawCheck:
    """How a machine's fitted laws (`Reached`) predict one metric of what was left out of their fit, beside the priors.

    Median absolute errors.
    """

    metric: str
    n: int
    before_ratio: float  # by the priors, 0.1 is 10 %
    after_ratio: float  # by the laws
    kept: bool  # the laws are in use; otherwise the priors predict better


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One processor with its own memory. A dtype absent from `flop_per_s` is unknown, never guessed."""

    name: str
    kind: str  # "cpu" | "gpu"
    memory_bytes: int
    memory_bytes_per_s: float
    flop_per_s: Mapping[str, float]  # by dtype; multiply and add counted as two
    cores: int | None = None
    cache_bytes: int | None = None  # last level; None: not known, or no matter
    idle_w: float | None = None
    busy_w: float | None = None
    link_bytes_per_s: float | None = None  # to its neighbours in the machine, one way; None: not known
    features: frozenset[str] = frozenset()
    source: str = ""  # where the figures come from: "measured 2026-11-21", a URL
    reached: tuple[Reached, ...] = ()  # by engines, by leanplan calibrate and by measured plans


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine: its devices, memory and prices. `fingerprint` tells two machines apart."""

    name: str
    devices: tuple[Device, ...]
    host_memory_bytes: int
    host_assumed: bool = False  # that is not known: as much as its devices have
    memory_limit_bytes: int  # cgroup or ulimit, else host_memory_bytes
    disk_bytes_per_s: float | None = None  # reading a file of which nothing is in memory; None: not known
    host_link_bytes_per_s: float | None = None  # from its memory to the accelerator, one way; None: not known
    devices_per_machine: int = 8  # that links join; more are several machines
    network_bytes_per_s: float | None = None  # between those, one way; None: not known
    price_usd_per_h: float | None = None
    owned: bool = False  # that price is what buying it comes to over its life: electricity is paid besides
    electricity_usd_per_kwh: float | None = None
    grid_gco2e_per_kwh: float | None = None
    pue: float = 1.0
    energy_counters: tuple[str, ...] = ()  # "rapl", "nvml"; empty: energy can only be modelled
    fingerprint: str = ""
    measured: bool = False  # probed here, rather than read from the catalogue

    @property
    def rented(self) -> bool:
        """Whether its hourly price holds its electricity."""
        return self.price_usd_per_h is not None and not self.owned

    @property
    def device(self) -> Device:
        """The device the model runs on: the first GPU, else the CPU."""
        return next((d for d in self.devices if d.kind == "gpu"), self.devices[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One limit on one metric. The value is in the metric's own SI unit.

    `relative` limits are ratios to the measured baseline: 0.5 means half of the baseline's figure.
    `source` "any" lets a modelled figure count where the machine cannot measure it.
    """

    metric: str  # a name in METRICS
    statistic: str  # "p50" | "p95" | "mean"
    bound: str  # "max" | "min"
    value: float
    level: str = "error"  # "error" | "warn" | "off"
    relative: bool = False
    source: str = "measured"  # "measured" | "any"
    text: str = field(default="", compare=False)  # as the person wrote it: "50 ms"
    line: int | None = field(default=None, compare=False)  # of the spec file

    @property
    def label(self) -> str:
        """`ttft_p95`: the metric as a spec names it."""
        from knowledge_base.metrics import METRICS

        metric = METRICS[self.metric]
        return f"{metric.label}_{self.statistic}" if metric.sampled else metric.label


# ---------------------------------------------------------------- what is chosen


@dataclass(frozen=True, slots=True)
class Step:
    """One technique with every knob set."""

    technique: str
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.technique, tuple(sorted(self.knobs.items()))))

    def __str__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in sorted(self.knobs.items()))
        return f"{self.technique}({knobs})" if knobs else self.technique


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLoss:
    """What a step alone costs one model, as was found on it: instead of what is published of others."""

    step: Step
    log_ratio: float  # natural logarithm of perplexity over the unchanged model's
    log_sd: float  # its standard deviation
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An engine and the steps that lead from the model as it came to something that serves tokens."""

    model_digest: str
    engine: str
    steps: tuple[Step, ...] = ()

    @property
    def id(self) -> str:
        """Ten hex digits of the plan's canonical JSON: equal plans have equal ids, from any way in."""
        return digest(self)[:10]

    @property
    def words(self) -> str:
        """`llama_cpp: weight_gguf(type=q4_k) + threads(count=2)`."""
        return f"{self.engine}: {' + '.join(str(s) for s in self.steps) or 'unchanged'}"

    def step(self, technique: str) -> Step | None:
        """Return the step of that technique, if the plan has it."""
        return next((s for s in self.steps if s.technique == technique), None)


# ---------------------------------------------------------------- what knowledge declares


@dataclass(frozen=True, slots=True)
class Choice:
    """A knob with a finite list of settings, in rising order where they have one."""

    options: tuple[Any, ...]
    default: Any


STAGES = ("design", "pretrain", "prepare", "compress", "recover", "finetune", "quantise", "serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One published figure. `source` is a URL or arXiv id."""

    model: str
    setting: str
    quantity: str
    baseline: float | None
    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Technique:
    """What a technique file says of itself. `saves` and `spends` are metric names.

    `family` groups alternatives of which a plan holds at most one ("weights", "kv_cache", ...).
    `needs` are capability tags an engine must offer; techniques and engines never name each other.
    `provides` are tags the plan has after this step, for other steps' composition rules.
    `implements` are the methods of the field it executes (knowledge_base/data/field/methods).
    """

    summary: str
    stage: str  # one of STAGES
    family: str
    implements: tuple[str, ...] = ()
    knobs: Mapping[str, Choice] = field(default_factory=dict)
    saves: tuple[str, ...] = ()
    spends: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()
    needs_calibration: bool = False
    lossless: bool = False
    memory: BuildMemory | None = None  # what its build holds beside the model; None: what is usual, see `holds`
    modules: tuple[str, ...] = ()  # import names it needs beyond the core, e.g. ("torchao",)
    extra: str | None = None  # the extra that installs them
    sources: tuple[str, ...] = ()

    @property
    def holds(self) -> BuildMemory:
        """What its build may hold in memory beside the model: as declared, or usual for what it works on."""
        usual = TRAINED if self.stage == "recover" else CALIBRATED if self.needs_calibration else PLAIN
        return self.memory or usual


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What is installed where an engine lives whose libraries clash with ours; `leanplan doctor --install` does it."""

    requirements: tuple[str, ...]  # exact: "vllm==0.32.0"
    disk_bytes: int  # that it takes, with all that they need in turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine file says of itself. `offers` are capability tags; `preload` is imported before forking.

    An engine with an `environment` of its own runs there, and `preload` is no other engine's: it tells its interpreter.
    """

    summary: str
    offers: frozenset[str]
    preload: tuple[str, ...]
    modules: tuple[str, ...]
    devices: frozenset[str] = frozenset({"cpu", "gpu"})  # kinds of device it computes on
    extra: str | None = None
    environment: Environment | None = None  # None: it lives with us
    sources: tuple[str, ...] = ()


# ---------------------------------------------------------------- what a plan asks of any machine


@dataclass(frozen=True, kw_only=True)
class Demand(Changing):
    """What a plan asks of *any* machine. Techniques rewrite it, cost terms read it.

    Weights are counted in three parts because techniques treat them apart: `linear` (2-D weights inside the
    layers), `embedding` (input table, one row read for each token), `head` (output matrix, read whole for
    each step; zero stored bytes when tied, but still read).
    """

    model: Model
    workload: Workload
    engine: str
    # weights
    linear_params: float
    linear_bytes: float  # stored and read for each step
    embedding_bytes: float
    head_stored_bytes: float
    head_read_bytes: float
    other_bytes: float
    zeros_share: float = (
        0.0  # of linear_params, zero where they stand: they cost as much until a format leaves them out
    )
    disk_share: float = 1.0  # of linear_bytes, what the artefact takes where it is unpacked as it is loaded
    offloaded_share: float = (
        0.0  # of linear_bytes, brought in at each step: from disk, or from the host to its accelerator
    )
    transit_bytes: float = 0.0  # of memory, for weights that are being brought in
    weight_format: str  # key of calibrated efficiencies: "float32", "bfloat16", "int8", "int4", "q4_k", ...
    compute_dtype: str  # "float32" | "bfloat16" | "float16" | "int8"
    # arithmetic, multiply and add counted as two
    linear_flop_per_token: float
    head_flop_per_token: float
    attention_flop_per_token_pair: float  # for each (query, key) pair, all layers
    # What reading a prompt and writing the output go through; only encoder-decoders and encoders differ from these.
    prompt_share: float = 1.0  # of the layers' matrices, for each prompt token
    output_share: float = 1.0  # of the layers' matrices, for each output token
    prompt_pairs_ratio: float = 1.0  # attention while reading a prompt, over that of causal attention in `layers`
    prompt_passes: float = 1.0  # launches before the first token, over those of a decode step: two stacks of layers
    kernels_per_prompt_token: float = 0.0  # launches of a recurrence that goes through its prompt one by one
    # cache and activations
    kv_bytes_per_token: float
    expanded_bytes_per_token: float = (
        0.0  # of context, written and read at each step: keys and values made from a latent cache
    )
    expanding_flop_per_token: float = 0.0  # ... and the arithmetic of making them
    activation_bytes_per_token: float  # live at once during prefill
    # execution
    layers: float
    kernels_per_step: float  # launches the host pays for
    batch: int
    threads: int | None = None  # None: all cores
    compiled: bool = False
    tokens_per_step: float = 1.0  # speculation: expected tokens for each decode step
    verified_tokens_per_step: float = 1.0  # positions one step computes
    draft_bytes_per_step: float = (
        0.0  # read to guess the tokens of a step, each guess on its own, beside the step itself
    )
    draft_flop_per_step: float = 0.0
    draft_kernels_per_step: float = 0.0
    # serving: what only shows where requests meet each other (cost_models/load.py)
    reused_prefix_tokens: float = 0.0  # of each prompt, the same in all, whose keys and values are kept
    reused_turn_tokens: float = 0.0  # ... and of a later turn's, what was said before; mean over a conversation
    prefill_step_tokens: float = 0.0  # most prompt tokens computed between two tokens of others; 0: the engine's own
    # one-off
    build_flop: float = 0.0
    build_bytes: float = 0.0
    # quality: perplexity / the unchanged model's, with the log-space standard deviation of that guess
    perplexity_ratio: float = 1.0
    perplexity_log_sd: float = 0.0
    losses: tuple[Loss, ...] = ()  # the published ones among the steps': some lose more together than apart
    eased: tuple[tuple[str, float], ...] = ()  # by group of losses, the share that stays of those of later steps
    because: tuple[str, ...] = ()  # one short clause for each step that changed something


# ---------------------------------------------------------------- what is predicted and measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A predicted figure with its interval (80 % unless said otherwise) and its reason."""

    mid: float
    low: float
    high: float
    source: str  # "analytic" | "calibrated" | "published"
    because: str = ""
    p95: float | None = None  # over requests, where waiting makes them differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted values of one plan on one machine, by metric name."""

    plan_id: str
    hardware_name: str
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A measured (or modelled) figure with its confidence interval.

    `source` is "measured" where it was observed, "modelled" where the machine cannot observe it (energy without
    counters). `samples` are the raw values in order, for sampled metrics one per repetition.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float = 0.95
    statistic: str = "mean"
    source: str = "measured"
    samples: tuple[float, ...] = ()
    p95: float | None = None  # None: n too small for a 95th percentile
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a candidate has no figures. `kind` is one of errors.FAILURE_KINDS."""

    kind: str
    stage: str  # "build" | "open" | "measure" | "quality"
    message: str
    log: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What was observed of one plan on one machine, with the record of how."""

    plan: Plan
    key: str  # content key: plan, model, data, workload, engine versions, machine
    hardware_fingerprint: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    alone: Mapping[str, Figure] | None = field(
        default=None, metadata=UNSAID
    )  # where `figures` are under load: the same of one batch after the other, on an idle machine
    failure: Failure | None = None
    artefact_digest: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)  # warm-up, repeats, seeds, data hash, lock wait, load
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    taken_at: str = ""  # wall time, a label only
    sequence: int = 0

    @property
    def collapsed(self) -> bool:
        """Whether what the model knew was lost, by what the plan made of it."""
        return self.failure is not None and self.failure.kind in ("quality_collapse", "non_finite")

    @property
    def as_alone(self) -> Measurement:
        """The measurement of one batch after the other, which is what cost terms price; itself where there was no load."""
        return replace(self, figures={**self.figures, **self.alone}, alone=None) if self.alone else self


# ---------------------------------------------------------------- what a technique works on


@dataclass(slots=True)
class Session:
    """A model being rewritten, inside a candidate process. Steps act on it in order; the engine exports it.

    `model` is the transformers module (torch), loaded in its own dtype on the CPU or GPU. Dense rewrites change
    its weights or shapes and keep `model.config` true. Packed storage replaces modules (see
    techniques/_packed.py). `runtime` collects serving choices the engine applies when it opens the artefact;
    `storage` collects how the engine's export should store weights.
    """

    model: Any
    tokenizer: Any
    facts: Model
    calibration: Any  # torch.LongTensor (samples, tokens), or None
    seed: int
    workspace: Path
    allocation: Mapping[str, str] | None = (
        None  # module name -> its option ("4 zeros 0.5"), chosen by the planner's program
    )
    runtime: dict[str, Any] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)  # facts worth telling: {"wanda.zeros_ratio": 0.5}
    progress: Callable[[str, float], None] = lambda stage, done: None  # (what, share done 0..1)
