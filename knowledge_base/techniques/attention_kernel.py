"""Compute attention with FlashAttention-3 on NVIDIA's Hopper GPUs.

PyTorch's own attention, which transformers takes unless told otherwise, is FlashAttention-2 already wherever a GPU has
it, so only the third generation, written for Hopper's asynchronous units, is another kernel there. On the CPU PyTorch's
own beats plain matrix products and softmax wherever the two were compared, so there is nothing to choose.
"""

from __future__ import annotations

from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="attention by FlashAttention-3, on Hopper GPUs",
    stage="serve",
    family="attention_kernel",
    implements=("flash_attention",),
    saves=("ttft_s", "latency_s", "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token",
           "cost_usd_per_token"),
    needs=frozenset({"attention_kernel"}),
    provides=frozenset({"exact_attention"}),
    lossless=True,
    modules=("flash_attn_interface",),
    sources=("arXiv:2407.08608", "https://github.com/Dao-AILab/flash-attention"),
)  # fmt: skip

_PAPER = "https://arxiv.org/abs/2407.08608"
EVIDENCE = (
    Evidence(model="attention alone", setting="forward in 16 bits, H100, over FlashAttention-2, the lowest", quantity="speed-up",
             baseline=1.0, value=1.5, source=_PAPER),
    Evidence(model="attention alone", setting="forward in 16 bits, H100, over FlashAttention-2, the highest", quantity="speed-up",
             baseline=1.0, value=2.0, source=_PAPER),
)  # fmt: skip

_SPEED_UP = 1.5  # of attention: the lowest published


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model on that machine, or None."""
    if "sm_90" not in hardware.device.features:
        return f"FlashAttention-3 is written for NVIDIA's Hopper GPUs, and this is {hardware.device.name}"
    if model.attention_layers == 0:
        return f"`{model.architecture}` has no attention"
    if model.weight_dtype not in ("bfloat16", "float16"):
        return f"the kernel computes in 16 bits, and the weights come in {model.weight_dtype}"
    return None


def rewrite(demand: Demand) -> Demand:
    """Return the demand with less to do for each pair of tokens: what the kernel saves is told as arithmetic."""
    return demand.but(
        attention_flop_per_token_pair=demand.attention_flop_per_token_pair / _SPEED_UP,
        because=(*demand.because, f"attention {_SPEED_UP:g} times as fast by FlashAttention-3"),
    )


def execute(session: Session) -> None:
    """Ask the engine for the kernel when it opens the artefact."""
    session.runtime["attention"] = "flash_attention_3"
