"""Compile the decode step into fused kernels, with a KV cache of fixed size."""

from __future__ import annotations

from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="torch.compile of the decode step with a static KV cache",
    stage="serve",
    family="compile",
    implements=("torch_compile",),
    saves=("tpot_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
           "cost_usd_per_token"),
    spends=("peak_memory_bytes",),
    needs=frozenset({"compile"}),
    provides=frozenset({"compiled"}),
    lossless=True,
    sources=("https://github.com/huggingface/transformers/blob/main/docs/source/en/llm_optims.md",
             "https://docs.pytorch.org/docs/stable/torch.compiler.html"),
)  # fmt: skip

_NIGHTLY = "https://huggingface.co/datasets/hf-internal-testing/benchmark_results"
EVIDENCE = (
    Evidence(model="Gemma-2B", setting="static cache + torch.compile vs dynamic cache eager, GPU, 2024-08-27", quantity="decode tokens/s",
             baseline=50.709, value=81.245, source=_NIGHTLY),
    Evidence(model="Gemma-2B", setting="static cache without torch.compile vs dynamic cache, GPU, 2024-08-27", quantity="decode tokens/s",
             baseline=50.709, value=48.116, source=_NIGHTLY),
)  # fmt: skip

# Kernels left after fusion in a Llama layer: 7 matrix products, attention, and about 6 fused ones, of about 45.
_KERNELS_LEFT = 0.3


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.attention_layers == 0:
        return f"transformers offers no compilable decode step for `{model.architecture}`"
    if workload.output_tokens < 2:
        return "one output token needs no decode step"
    return None


def rewrite(demand: Demand) -> Demand:
    """Return the demand with fewer kernel launches a step. Compiling itself, up to a minute, is part of warm-up."""
    return demand.but(
        kernels_per_step=demand.kernels_per_step * _KERNELS_LEFT,
        compiled=True,
        because=(*demand.because, "decode step compiled: about a third of the kernel launches, compiled at first use"),
    )


def execute(session: Session) -> None:
    """Ask the engine to compile the decode step."""
    session.runtime["compile"] = True
