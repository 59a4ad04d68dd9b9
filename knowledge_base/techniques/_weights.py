"""What techniques that hold the layers' weights in fewer bits predict and refuse; no torch here."""

from __future__ import annotations

from dataclasses import replace

from knowledge_base.types import Demand, Model

SAVES = (
    "weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "tpot_s", "latency_s",
    "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token",
)  # fmt: skip
SPENDS = ("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "ttft_s")
# What casting (bfloat16 in, the model's dtype out) and rounding activations cost around each matrix at one token, in
# launches of an ordinary operator: decode of a 7M-parameter float32 Llama, 56 matrices, against its unpacked self.
CAST_KERNELS, ROUNDING_KERNELS = 0.5, 1.5
_FLOAT_DTYPES = ("float32", "bfloat16", "float16")


def why_not(model: Model) -> str | None:
    """Return why the weights of that model cannot be packed, or None."""
    if model.weight_dtype not in _FLOAT_DTYPES:
        return f"weights are already stored as {model.weight_dtype}; quantising twice loses far more than once"
    if model.experts:
        return f"the {model.experts} experts are stored as 3-D weights, which packed linear modules cannot hold"
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


def int4_bits(group_size: int) -> float:
    """Return the stored bits for each weight: 4 and a 16-bit scale and zero for each group."""
    return 4 + 32 / group_size


def int8_bits(model: Model, scale_bits: int = 16) -> float:
    """Return the stored bits for each weight: 8 and one scale for each output channel."""
    return 8 + scale_bits / model.hidden_size


def packed(
    demand: Demand, *, bits: float, weight_format: str, kernels: float, compute_dtype: str | None = None
) -> Demand:
    """Return the demand with `bits` for each of the layers' weights, and `kernels` more launches for each matrix."""
    matrices = 7 if demand.model.gated_ffn else 6
    before = demand.linear_bytes / demand.linear_params * 8
    return replace(
        demand,
        linear_bytes=demand.linear_params * bits / 8,
        weight_format=weight_format,
        compute_dtype=compute_dtype or demand.compute_dtype,
        kernels_per_step=demand.kernels_per_step + kernels * matrices * demand.layers,
        build_bytes=demand.build_bytes + demand.linear_bytes,
        because=(*demand.because, f"layers' weights {before:.3g} -> {bits:.3g} bits each, scales included"),
    )
