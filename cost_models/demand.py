"""What a plan asks of any machine: the unchanged model's demand, rewritten by each step of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from operator import attrgetter

from cost_models.efficiency import absorbs_latents, kv_bytes_per_value
from cost_models.engine_memory import stored_dtype
from knowledge_base.registry import techniques
from knowledge_base.types import Demand, KnownLoss, Model, Plan, Step, Workload

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
# Operators of one decoder layer that an engine starts one after the other: 2 norms, 7 matrices, rotary, cache
# update, attention, activation, 2 residual sums, less what every engine fuses.
KERNELS_PER_LAYER = 14
# Families whose recurrence transformers goes through token by token, as long as no kernels made for it are installed, and the
# launches of each layer for each token: 0.1 ms on one EPYC core in Mamba and RWKV of width 512, own measurement 2026-11.
LOOPED = ("mamba", "falcon_mamba", "jamba", "rwkv", "recurrent_gemma")
SCAN_KERNELS = 2.5
KERNELS_PER_STEP = 4  # embedding, last norm, head, choice of the token


@lru_cache(maxsize=64)
def demand_of(model: Model, workload: Workload, engine: str) -> Demand:
    """Return what the unchanged model asks of any machine under that engine.

    Parameters are counted as the model's own figures say: `linear_params` in the layers (all experts),
    `vocab_size x hidden_size` in the head (stored once when tied, read either way), the rest in `other`.
    Arithmetic counts only the experts a token goes through:

        linear_flop_per_token = 2 (linear_params - (params_total - params_active))
        attention_flop_per_token_pair = 4 attention_layers heads head_size      (scores and weighted sum; _attention)

    A tied head is as large as the table it shares. An encoder's prompt tokens see each other both ways, twice the
    pairs of causal attention, and no head is applied. Of an encoder-decoder, prompt tokens go through the encoder and
    the keys and values of cross-attention, output tokens through the rest of the decoder; both leave their keys and
    values in its cache. Matrices that came quantised keep their bytes, others have those of the type in which the
    engine stores them.

    Activations live at once in prefill: gate, up and product of the feed-forward part and four hidden states
    (measured on Qwen2.5: the gap between memory and cache is close to three feed-forward widths).
    Left out: biases, norms and softmax arithmetic (below 1 %).
    """
    dtype = model.weight_dtype if model.quantised_bytes else stored_dtype(engine, model.weight_dtype)
    wider = DTYPE_BYTES.get(dtype, 1) / DTYPE_BYTES.get(model.weight_dtype, 1)
    size = DTYPE_BYTES.get(dtype) or model.weight_bytes / model.params_total
    head_params = model.embedding_params if model.tied_embeddings else model.vocab_size * model.hidden_size
    linear_bytes = float(model.quantised_bytes or model.linear_params * size)
    embedding_bytes = model.embedding_params * size
    head_stored = (model.vocabulary_tables - 1) * head_params * size
    compute = dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16"
    idle_params = model.params_total - model.params_active
    activation_size = DTYPE_BYTES[compute]
    head_read = 0 if model.kind == "encoder" else head_params
    encoder_share = model.encoder_params / model.linear_params
    pair_flop, expanding_flop, expanded_values = _attention(model, engine)
    return Demand(
        model=model,
        workload=workload,
        engine=engine,
        linear_params=float(model.linear_params),
        linear_bytes=linear_bytes,
        embedding_bytes=embedding_bytes,
        head_stored_bytes=head_stored,
        head_read_bytes=head_read * size,
        other_bytes=max(0.0, model.weight_bytes * wider - linear_bytes - embedding_bytes - head_stored),
        weight_format=model.quantised_format or dtype,
        compute_dtype=compute,
        linear_flop_per_token=2.0 * (model.linear_params - idle_params),
        head_flop_per_token=2.0 * head_read,
        attention_flop_per_token_pair=pair_flop,
        prompt_share=encoder_share or 1.0,
        output_share=1 - encoder_share,
        prompt_pairs_ratio=_prompt_pairs_ratio(model),
        prompt_passes=1 + model.encoder_layers / model.layers if model.kind == "encoder_decoder" else 1.0,
        kernels_per_prompt_token=SCAN_KERNELS * (model.layers - model.attention_layers)
        if _loops(model, engine)
        else 0.0,
        kv_bytes_per_token=float(model.kv_values_per_token * (kv_bytes_per_value(engine) or activation_size)),
        expanding_flop_per_token=expanding_flop,
        expanded_bytes_per_token=2 * expanded_values * activation_size,
        activation_bytes_per_token=float((3 * model.ffn_size + 4 * model.hidden_size) * activation_size),
        layers=float(model.layers),
        kernels_per_step=float(KERNELS_PER_LAYER * model.layers + KERNELS_PER_STEP),
        batch=1,
    )


def _loops(model: Model, engine: str) -> bool:
    return engine == "transformers" and model.architecture in LOOPED


def _attention(model: Model, engine: str) -> tuple[float, float, float]:
    """Return attention's flop for each pair, and flop and numbers of the keys and values made anew for each cached token.

        usual:      4 heads head_size for each pair; nothing is made anew
        latent:     the same, and 2 rank heads (key + value) flop for heads (key + value) numbers, in transformers
        absorbed:   2 heads (2 rank + rotary) for each pair: queries meet the latent vectors themselves, in other engines

    Latent attention: arXiv:2405.04434, section 2.1. All layers together.
    """
    heads = float(model.attention_layers * model.heads)
    pair = 4 * heads * model.head_size
    if not model.latent_rank:
        return pair, 0.0, 0.0
    rotary = (model.kv_values_per_layer or 0.0) - model.latent_rank  # of the key, cached as it is
    if absorbs_latents(engine):
        return 2 * heads * (2 * model.latent_rank + rotary), 0.0, 0.0
    both = 2.0 * model.head_size  # key and value
    return pair, 2 * model.latent_rank * heads * (both - rotary), heads * both


def _prompt_pairs_ratio(model: Model) -> float:
    if model.kind == "decoder":
        return 1.0
    return 2.0 * (model.encoder_layers / max(model.attention_layers, 1) if model.encoder_layers else 1.0)


def apply_steps(demand: Demand, steps: Iterable[Step]) -> Demand:
    """Return the demand after every step's rewrite, in order.

    Raises:
        BadInput: a step names an unknown technique.
    """
    known = {loss.step: loss for loss in demand.model.step_losses}
    for step in steps:
        demand = _rewritten(demand, step, known.get(step))
    return demand


def _rewritten(before: Demand, step: Step, known: KnownLoss | None) -> Demand:
    """Return the demand after a step's rewrite, with the loss that was found of the step on this model, if there is one."""
    after = techniques.get(step.technique).rewrite(before, **step.knobs)
    if known is None:
        return after
    as_found = {"mid": known.log_ratio, "low": known.log_ratio, "high": known.log_ratio, "sd": known.log_sd}
    return after.but(
        perplexity_ratio=before.perplexity_ratio * math.exp(known.log_ratio),
        perplexity_log_sd=math.hypot(before.perplexity_log_sd, known.log_sd),
        losses=(*before.losses, *(replace(loss, **as_found) for loss in after.losses[len(before.losses) :])),
        because=(*after.because, known.because),
    )


def demand_chain(plan: Plan, model: Model, workload: Workload) -> list[tuple[str, Demand]]:
    """Return the demand as it came and after each step: [("unchanged", ...), ("weight_int8", ...), ...]."""
    chain = [("unchanged", demand_of(model, workload, plan.engine))]
    for step in plan.steps:
        chain.append((str(step), apply_steps(chain[-1][1], (step,))))
    return chain


def step_read_bytes(demand: Demand) -> float:
    """Return the least bytes of layer weights one decode step reads: all of a dense model's, the chosen experts' of others."""
    idle_params = demand.model.params_total - demand.model.params_active
    return demand.linear_bytes * max(0.0, 1 - idle_params / demand.linear_params)


# ---------------------------------------------------------------- thousands of plans

NUMBERS = tuple(name for name, field in Demand.__dataclass_fields__.items() if field.type in ("float", "int"))
# Of them, what no request costs more by:
_NOT_SERVED = {"zeros_share", "build_flop", "build_bytes", "perplexity_ratio", "perplexity_log_sd"}
_served = attrgetter(
    *(name for name in NUMBERS if name not in _NOT_SERVED), "weight_format", "compute_dtype", "compiled"
)
MODEL_NUMBERS = (
    "params_total", "params_active", "experts", "experts_active", "state_bytes", "vocab_size", "hidden_size",
    "window_share",
)  # fmt: skip
_numbers = attrgetter(*NUMBERS, *(f"model.{name}" for name in MODEL_NUMBERS))


STEPS: list[Step] = []  # every step seen, by number: numbers are quicker than steps and never leave the process
_NUMBERS: dict[Step, int] = {}
_NUMBERS_BY_OBJECT: dict[int, tuple[Step, int]] = {}  # by the Step object, which spares hashing it again


def _number(step: Step) -> int:
    known = _NUMBERS_BY_OBJECT.get(id(step))
    if known is not None and known[0] is step:
        return known[1]
    number = _NUMBERS.setdefault(step, len(STEPS))
    if number == len(STEPS):
        STEPS.append(step)
    if len(_NUMBERS_BY_OBJECT) < 100_000:
        _NUMBERS_BY_OBJECT[id(step)] = (step, number)
    return number


class Node:
    """One prefix of steps with its demand; children are longer prefixes, so shared prefixes are rewritten once."""

    __slots__ = ("_row", "_served", "children", "demand", "key", "parent", "steps")

    def __init__(
        self, demand: Demand, steps: tuple[tuple[int, float, float], ...] = (), parent: Node | None = None
    ) -> None:
        self.demand = demand
        # For each step its number in STEPS and what its rewrite added: variance to the log of perplexity, log of
        # tokens for each decode step.
        self.steps = steps
        self.parent = parent
        self._served: tuple[bool, ...] | None = None if parent else ()
        self.key = (demand.engine, demand.weight_format, demand.compute_dtype, demand.compiled)
        self.children: dict[int, Node] = {}  # by the step's number
        self._row: tuple[float, ...] | None = None

    @property
    def served(self) -> tuple[bool, ...]:
        """Whether each step changed anything of what serving costs; one that acts as it serves always may."""
        if self._served is None:
            assert self.parent is not None
            serves = techniques.get(STEPS[self.steps[-1][0]].technique).TECHNIQUE.stage == "serve"
            self._served = (*self.parent.served, serves or _served(self.demand) != _served(self.parent.demand))
        return self._served

    @property
    def row(self) -> tuple[float, ...]:
        """The demand's numbers in the order of NUMBERS + MODEL_NUMBERS, then threads and sliding window (or inf)."""
        if self._row is None:
            demand = self.demand
            window = demand.model.sliding_window_tokens
            self._row = (*_numbers(demand), demand.threads or float("inf"), window or float("inf"))
        return self._row


class Chains:
    """Demands of many plans of one model and workload, memoised by prefix of steps."""

    _LIMIT = 200_000  # nodes kept; beyond that the memo starts anew

    def __init__(self, model: Model, workload: Workload) -> None:
        self.model, self.workload = model, workload
        self._known = {_number(loss.step): loss for loss in model.step_losses}
        self._roots: dict[str, Node] = {}
        self._count = 0

    def node(self, plan: Plan) -> Node:
        """Return the plan's node.

        Raises:
            BadInput: a step names an unknown technique.
        """
        node = self._roots.get(plan.engine)
        if node is None:
            node = self._roots[plan.engine] = Node(demand_of(self.model, self.workload, plan.engine))
        for step in plan.steps:
            number = _number(step)
            node = node.children.get(number) or self._child(node, number)
        if self._count > self._LIMIT:
            self._roots.clear()
            self._count = 0
        return node

    def _child(self, node: Node, number: int) -> Node:
        step, before = STEPS[number], node.demand
        after = _rewritten(before, step, self._known.get(number))
        variance = gain = 0.0
        if after.perplexity_log_sd != before.perplexity_log_sd:
            variance = max(0.0, after.perplexity_log_sd**2 - before.perplexity_log_sd**2)
        if after.tokens_per_step != before.tokens_per_step:
            gain = abs(math.log(after.tokens_per_step / before.tokens_per_step))
        child = node.children[number] = Node(after, (*node.steps, (number, variance, gain)), node)
        self._count += 1
        return child


@lru_cache(maxsize=4)
def chains(model: Model, workload: Workload) -> Chains:
    """Return the shared memo of one model and workload."""
    return Chains(model, workload)
