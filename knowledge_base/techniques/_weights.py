"""What techniques that hold the layers' weights in fewer bits predict and refuse; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from knowledge_base.types import Demand, Model

SAVES = (
    "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "tpot_s", "latency_s",
    "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
)  # fmt: skip
SPENDS = ("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "ttft_s")
# Of kinds without a kernel on the CPU: fewer bytes, and the time to unpack them at every step.
UNPACKED_SAVES = ("weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start")
UNPACKED_SPENDS = (*SPENDS, *(name for name in SAVES if name not in UNPACKED_SAVES))
# What casting (bfloat16 in, the model's dtype out) and rounding activations cost around each matrix at one token, in
# launches of an ordinary operator: decode of a 7M-parameter float32 Llama, 56 matrices, against its unpacked self.
CAST_KERNELS, ROUNDING_KERNELS = 0.5, 1.5
UNPACK_KERNELS = 8.0  # shifts, masks, scales and zeros of a kind without a kernel
_FLOAT_DTYPES = ("float32", "bfloat16", "float16")
GROUP_SIZES = (32, 64, 128)  # weights that may share a scale; what both the CPU kernel and the techniques offer


def why_not_watched(model: Model) -> str | None:
    """Return why calibration cannot see what enters the matrices of that model, or None."""
    if model.attention_layers < model.layers:
        return f"layers of {model.architecture} without attention read their weights in a way calibration cannot watch"
    return None


def why_not_again(model: Model) -> str | None:
    """Return why the weights of that model cannot be rounded, or None."""
    if (stored := model.quantised_format or model.weight_dtype) not in _FLOAT_DTYPES:
        return f"weights are already stored as {stored}; quantising twice loses far more than once"
    return None


def why_not(model: Model) -> str | None:
    """Return why the matrices of that model cannot be packed where experts are not split first, or None."""
    if why := why_not_again(model):
        return why
    if model.experts:
        return f"the {model.experts} experts are stored as 3-D weights, which this does not pack"
    return None


def why_not_groups(model: Model, group_size: int) -> str | None:
    """Return which of the model's widths the group size does not divide, or None."""
    if model.attention_layers < model.layers:
        return f"state-space layers of {model.architecture} hold matrices narrower than a group of weights"
    widths = {
        "hidden size": model.hidden_size,
        "attention width": model.heads * model.head_size,
        "feed-forward size": model.ffn_size,
    }
    for what, width in widths.items():
        if width % group_size:
            return f"groups of {group_size} do not divide the {what} {width} of {model.name}"
    return None


@cache
def fitting(row: int, group_size: int) -> int:
    """Return the size of groups that a row of so many weights gets: the largest up to the one asked for that divides it.

    >>> fitting(4096, 128), fitting(288, 128), fitting(192, 128)
    (128, 32, 64)
    """
    return max((size for size in GROUP_SIZES if size <= group_size and row % size == 0), default=group_size)


def mean_over_rows(model: Model, of: Callable[[int], float]) -> float:
    """Return the mean over the layers' weights of what follows from the length of their row, as bits do."""
    heads, kv = model.heads * model.head_size, model.kv_heads * model.head_size
    experts = max(model.experts, 1)
    matrices = (  # row length, rows
        (model.hidden_size, heads + 2 * kv + (2 if model.gated_ffn else 1) * experts * model.ffn_size),
        (heads, model.hidden_size),
        (model.ffn_size, experts * model.hidden_size),
    )
    weights = found = 0.0
    for row, rows in matrices:
        weights += row * rows
        found += row * rows * of(row)
    return found / weights


def int4_bits(group_size: int) -> float:
    """Return the stored bits for each weight: 4 and a 16-bit scale and zero for each group."""
    return grouped_bits(4, group_size)


def grouped_bits(bits: int, group_size: int) -> float:
    """Return the stored bits for each weight: its own and a 16-bit scale and zero for each group."""
    return bits + 32 / group_size


def int8_bits(model: Model, scale_bits: int = 16) -> float:
    """Return the stored bits for each weight: 8 and one scale for each output channel."""
    return 8 + scale_bits / model.hidden_size


def grouped(demand: Demand, bits: int, group_size: int) -> Demand:
    """Return the demand with 2, 3 or 4 bits and a group's share of a scale and zero for each of the layers' weights.

    Earlier steps may have left rows that groups of that size no longer divide.
    """
    kernels = CAST_KERNELS if bits == 4 else UNPACK_KERNELS
    stored = mean_over_rows(demand.model, lambda row: grouped_bits(bits, fitting(row, group_size)))
    return packed(demand, bits=stored, weight_format=f"int{bits}", kernels=kernels)


def packed(
    demand: Demand, *, bits: float, weight_format: str, kernels: float, compute_dtype: str | None = None
) -> Demand:
    """Return the demand with `bits` for each of the layers' weights, and `kernels` more launches for each matrix."""
    model = demand.model
    matrices = 4 + (3 if model.gated_ffn else 2) * max(model.experts_active, 1)  # that a token goes through
    before = demand.linear_bytes / demand.linear_params * 8
    return demand.but(
        linear_bytes=demand.linear_params * bits / 8,
        weight_format=weight_format,
        compute_dtype=compute_dtype or demand.compute_dtype,
        kernels_per_step=demand.kernels_per_step + kernels * matrices * demand.layers,
        build_bytes=demand.build_bytes + demand.linear_bytes,
        because=(*demand.because, f"layers' weights {before:.3g} -> {bits:.3g} bits each, scales included"),
    )
