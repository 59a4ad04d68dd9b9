"""Keep the keys and values of past tokens in 8 or 4 bits instead of 16 or 32."""

from __future__ import annotations

import math
from collections.abc import Mapping

from knowledge_base.build_memory import SHAPES
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

GROUP = 32  # channels of one head that share a scale; as in engines/_torch_cache.py and llama.cpp's formats
ACTIVATION_BYTES = {"float32": 4}

TECHNIQUE = Technique(
    summary="8- or 4-bit KV cache, quantised for each token and head",
    stage="serve",
    family="kv_cache",
    implements=("kv_cache_quant",),
    knobs={"bits": Choice(options=(8, 4), default=8)},
    saves=("kv_cache_bytes", "peak_memory_bytes"),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "ttft_s", "tpot_s", "latency_s",
            "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token"),
    needs=frozenset({"kv:8", "kv:4"}),
    provides=frozenset({"kv_quantised"}),
    memory=SHAPES,
    sources=("arXiv:2402.02750", "https://huggingface.co/blog/kv-cache-quantization"),
)  # fmt: skip

_QWEN = "https://github.com/QwenLM/Qwen"
_LMDEPLOY = "https://github.com/InternLM/lmdeploy/blob/main/docs/en/quantization/kv_quant.md"
_KIVI = "https://github.com/jy-yuan/KIVI/blob/main/docs/long_bench.md"
EVIDENCE = (
    Evidence(model="Qwen-7B-Chat", setting="int8 KV, 1024 tokens, batch 16", quantity="memory, GB", baseline=31.7, value=22.3, source=_QWEN),
    Evidence(model="Llama-2-7B-chat", setting="KV int8", quantity="MMLU, %", baseline=35.64, value=35.58, source=_LMDEPLOY),
    Evidence(model="Llama-2-7B-chat", setting="KV int4", quantity="MMLU, %", baseline=35.64, value=34.79, source=_LMDEPLOY),
    Evidence(model="Llama-2-7B-chat", setting="KV int8, A100", quantity="requests/s, relative", baseline=1.0, value=1.27, source=_LMDEPLOY),
    Evidence(model="Mistral-7B-Instruct-v0.2", setting="KIVI 4-bit", quantity="LongBench, %", baseline=43.54, value=43.53, source=_KIVI),
)  # fmt: skip

# (log perplexity ratio, its standard deviation). EVIDENCE: 8 bits cost nothing that shows, 4 bits about 1 %; a Llama
# of 7 M parameters measured with this engine on held-out text gave -0.0003 and 0.0108.
_LOSS = {8: (1e-4, 1e-3), 4: (1e-2, 1e-2)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers == 0:
        return f"`{model.architecture}` has no KV cache: its state does not grow with the text"
    return None


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting is refused for that model, or None."""
    if knobs["bits"] == 4 and model.head_size % 2:
        return f"heads of odd size {model.head_size} cannot be packed two values to a byte"
    return None


def bytes_per_token(model: Model, bits: int) -> float:
    """Return the bytes the quantised cache holds for one token, all layers.

    Each group of 32 channels (the whole head where 32 does not divide it) has a float16 scale; 4 bits add a
    float16 low.

    >>> from types import SimpleNamespace
    >>> bytes_per_token(SimpleNamespace(head_size=128, kv_values_per_token=128), 8)
    136.0
    """
    groups = model.head_size // GROUP if model.head_size % GROUP == 0 else 1
    for_head = model.head_size * bits / 8 + groups * (2 if bits == 8 else 4)
    return model.kv_values_per_token / model.head_size * for_head


def rewrite(demand: Demand, *, bits: int) -> Demand:
    """Return the demand with a smaller cache, and the work of packing and unpacking it."""
    model = demand.model
    loss, sd = _LOSS[bits]
    unpacked = 2 * model.kv_heads * model.head_size * ACTIVATION_BYTES.get(demand.compute_dtype, 2)
    return demand.but(
        kv_bytes_per_token=bytes_per_token(model, bits),
        activation_bytes_per_token=demand.activation_bytes_per_token + unpacked,  # one layer at a time
        kernels_per_step=demand.kernels_per_step + 24 * model.attention_layers,
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, sd),
        because=(*demand.because, f"KV cache in {bits} bits, unpacked a layer at a time for attention"),
    )


def execute(session: Session, *, bits: int) -> None:
    """Ask the engine for a quantised cache."""
    session.runtime["kv_bits"] = bits
