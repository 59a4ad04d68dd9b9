"""What drafting costs and brings, by arithmetic: for the techniques whose guesses the model checks."""

from __future__ import annotations

import math

from knowledge_base.techniques import weight_gguf
from knowledge_base.types import Demand, Model

SAVES = (
    "tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
    "cost_usd_per_token",
)  # fmt: skip
SPENDS = ("artefact_bytes", "weights_bytes", "peak_memory_bytes", "network_bytes_per_start", "build_s")
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# ---------------------------------------------------------------- the arithmetic


def tokens_for_each_step(accepted: float, drafted: int) -> float:
    """Return the tokens one check is expected to keep: those drafted before the first wrong one, and the model's own.

        (1 - a^(k + 1)) / (1 - a)      each of k drafted tokens right with chance a, independently

    Leviathan et al. 2023, arXiv:2211.17192, equation 1.

    >>> tokens_for_each_step(0.5, 2), round(tokens_for_each_step(0.8, 4), 2)
    (1.75, 3.36)
    """
    return (1 - accepted ** (drafted + 1)) / (1 - accepted)


def drafted_tokens(accepted: float, cost: float, most: int) -> int:
    """Return how many tokens are drafted where each costs so much of a pass: the last is kept with a chance above that.

    >>> drafted_tokens(0.6, 0.2, 8), drafted_tokens(0.6, 0.7, 8), drafted_tokens(0.6, 0.2, 2)
    (3, 1, 2)
    """
    return max(1, min(most, math.ceil(math.log(cost) / math.log(accepted)) - 1))


def read_bytes(demand: Demand) -> float:
    """Return the bytes of layer weights one pass for one token reads: of experts, those chosen."""
    model = demand.model
    return demand.linear_bytes * max(0.0, 1 - (model.params_total - model.params_active) / demand.linear_params)


def drafting(
    demand: Demand, *, accepted: float, most: int, draft_bytes: float, draft_flop: float, draft_kernels: float, why: str
) -> Demand:
    """Return the demand with tokens drafted one by one, each reading `draft_bytes`, and checked in one pass."""
    count = drafted_tokens(accepted, draft_bytes / (read_bytes(demand) + demand.head_read_bytes), most)
    gain = tokens_for_each_step(accepted, count)
    return demand.but(
        draft_bytes_per_step=demand.draft_bytes_per_step + count * draft_bytes,
        draft_flop_per_step=demand.draft_flop_per_step + count * draft_flop,
        draft_kernels_per_step=demand.draft_kernels_per_step + count * draft_kernels,
        tokens_per_step=demand.tokens_per_step * gain,
        verified_tokens_per_step=demand.verified_tokens_per_step + count,
        because=(*demand.because, f"{why}: about {gain:.2f} tokens a step, more where text is easy to foresee"),
    )


# ---------------------------------------------------------------- the first layers


def first_layers(model: Model, share: float) -> int:
    """Return how many layers are a share of a model's, at least one."""
    return max(1, round(share * model.layers))


def lens_bytes(demand: Demand) -> float:
    """Return the bytes of a lens: a matrix of the hidden size, with a bias."""
    model = demand.model
    return (model.hidden_size + 1) * model.hidden_size * _DTYPE_BYTES.get(demand.compute_dtype, 4)


def guess_of(demand: Demand, share: float) -> tuple[float, float, float]:
    """Return (bytes read, flop, kernels) of one token's way through the first layers, the lens and the head."""
    part = first_layers(demand.model, share) / demand.model.layers
    return (
        part * read_bytes(demand) + lens_bytes(demand) + demand.head_read_bytes,
        part * demand.linear_flop_per_token + 2 * demand.model.hidden_size**2 + demand.head_flop_per_token,
        part * demand.kernels_per_step,
    )


# ---------------------------------------------------------------- a draft model


def why_unfit(model: Model, draft: Model) -> str | None:
    """Return why a model cannot be another's draft, as far as their facts tell, or None. Left out: its tokenizer."""
    if draft.digest and draft.digest == model.digest:
        return "the draft is the model itself, and would guess no faster than that chooses"
    if draft.kind != "decoder" or draft.attention_layers < draft.layers:
        kind = "its recurrent state" if draft.kind == "decoder" else f"a model of kind `{draft.kind}`"
        return f"the draft is a `{draft.architecture}`: a refused token must be taken back, and {kind} takes none"
    if draft.vocab_size != model.vocab_size:
        return (
            f"the draft has {draft.vocab_size} tokens and the model {model.vocab_size}: both must mean the same by one"
        )
    if draft.max_context_tokens < model.max_context_tokens:
        return f"the draft reads {draft.max_context_tokens} tokens at most, the model {model.max_context_tokens}"
    if draft.weight_bytes >= model.weight_bytes:
        return f"the draft has {draft.weight_bytes} bytes of weights, no fewer than the model's {model.weight_bytes}"
    return None


def draft_bytes(demand: Demand, draft: Model) -> tuple[float, float, float]:
    """Return (bytes stored, bytes read for each token, bytes of its cache for each token of text) of a draft.

    What stores the model in a type of llama.cpp stores its draft in the same.
    """
    size = draft.weight_bytes / draft.params_total
    layers = tables = others = size
    cache = float(_DTYPE_BYTES.get(draft.weight_dtype, 4))
    if (form := demand.weight_format) in weight_gguf.BITS:
        table = weight_gguf.stored_type(weight_gguf.table_type(form), draft.hidden_size)
        layers, tables = weight_gguf.bits_per_weight(draft, form) / 8, weight_gguf.BITS[table] / 8
        others, cache = 4.0, 2.0
    head = draft.embedding_params if draft.tied_embeddings else draft.vocab_size * draft.hidden_size
    stored_tables = draft.embedding_params + (0 if draft.tied_embeddings else head)
    idle = draft.params_total - draft.params_active
    rest = max(0, draft.params_total - draft.linear_params - stored_tables) * others
    return (
        draft.linear_params * layers + stored_tables * tables + rest,
        (draft.linear_params - idle) * layers + head * tables + rest,
        draft.kv_values_per_token * cache,
    )
