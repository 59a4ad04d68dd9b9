"""Store and compute in 16-bit floating point instead of 32."""

from __future__ import annotations

import math

from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

TECHNIQUE = Technique(
    summary="16-bit floating-point weights, activations and KV cache",
    stage="prepare",
    family="dtype",
    implements=("weight_dtype",),
    knobs={"dtype": Choice(options=("bfloat16", "float16"), default="bfloat16")},
    saves=("weights_bytes", "kv_cache_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "tpot_s",
           "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token"),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s", "ttft_s"),
    provides=frozenset({"half_precision"}),
    sources=("arXiv:1905.12322", "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/finetune_lora.md"),
)  # fmt: skip

_LITGPT = "https://github.com/Lightning-AI/litgpt/blob/main/tutorials/finetune_lora.md"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="bf16-mixed (float32 weights) -> bf16-true", quantity="inference memory, GB",
             baseline=40.21, value=13.52, source=_LITGPT),
    Evidence(model="StableLM-3B", setting="bf16-mixed (float32 weights) -> bf16-true", quantity="inference memory, GB",
             baseline=21.43, value=7.3, source=_LITGPT),
)  # fmt: skip

# Standard deviation of log perplexity: rounding to 8 (bfloat16) or 11 (float16) significant bits.
_LOG_SD = {"bfloat16": 2e-3, "float16": 3e-4}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.weight_dtype != "float32":
        return f"weights are stored in {model.weight_dtype}, not in float32"
    return None


def rewrite(demand: Demand, *, dtype: str) -> Demand:
    """Return the demand with every weight, cached key and value, and activation in `dtype`."""
    share = BYTES[dtype] / BYTES[demand.model.weight_dtype]
    note = "; slow on CPUs without float16 arithmetic" if dtype == "float16" else ""
    return demand.but(
        linear_bytes=demand.linear_bytes * share,
        embedding_bytes=demand.embedding_bytes * share,
        head_stored_bytes=demand.head_stored_bytes * share,
        head_read_bytes=demand.head_read_bytes * share,
        other_bytes=demand.other_bytes * share,
        kv_bytes_per_token=demand.kv_bytes_per_token * share,
        activation_bytes_per_token=demand.activation_bytes_per_token * share,
        weight_format=dtype,
        compute_dtype=dtype,
        build_bytes=demand.build_bytes + demand.linear_bytes + demand.embedding_bytes,
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, _LOG_SD[dtype]),
        because=(*demand.because, f"{demand.model.weight_dtype} -> {dtype}: half the bytes for each number{note}"),
    )


def execute(session: Session, *, dtype: str) -> None:
    """Round every floating-point weight to `dtype`; buffers outside the checkpoint keep their precision.

    Raises:
        CandidateFailed: "non_finite", a weight is beyond the range of `dtype`.
    """
    import torch

    from knowledge_base.errors import CandidateFailed

    wanted = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    model = session.model
    stored = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in stored}}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        tensor.data = tensor.data.to(wanted)
        if not torch.isfinite(tensor.data).all():
            raise CandidateFailed("non_finite", f"`{name}` has values beyond the range of {dtype}", hint="use bfloat16")
    model.config.dtype = wanted
