"""4-bit weights at sixteen uneven levels, scaled by the largest weight of each block of 64: NF4 or FP4.

NF4's levels are quantiles of the normal distribution, which weights resemble; FP4's are those of a tiny float. Needs no
calibration text. No kernel of PyTorch's multiplies them on a CPU: weights are looked up at every step, so this saves
memory and costs time. Doubly quantised, the scales take 8 bits instead of 16.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

GROUP_SIZE = 64

TECHNIQUE = Technique(
    summary="4-bit weights at the levels of a codebook (NF4, FP4), a scale for each block; unpacked at every step",
    stage="quantise",
    family="weights",
    implements=("nf4", "fp4"),
    knobs={
        "format": Choice(options=("nf4", "fp4"), default="nf4"),
        "double_quant": Choice(options=("no", "yes"), default="no"),
    },
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,
    needs=frozenset({"packed:codebook"}),
    provides=frozenset({"quantised"}),
    sources=("arXiv:2305.14314", "https://github.com/bitsandbytes-foundation/bitsandbytes"),
)

_GPTQ_FOR_LLAMA, _QLORA = "https://github.com/qwopqwop200/GPTQ-for-LLaMa", "https://arxiv.org/abs/2305.14314"
_BLOG = "https://huggingface.co/blog/overview-quantization-transformers"
EVIDENCE = (
    Evidence(model="LLaMA-7B", setting="nf4", quantity="C4 perplexity", baseline=5.22, value=5.30, source=_GPTQ_FOR_LLAMA),
    Evidence(model="LLaMA-7B", setting="nf4, double quantisation", quantity="C4 perplexity", baseline=5.22, value=5.30,
             source=_GPTQ_FOR_LLAMA),
    Evidence(model="LLaMA-7B", setting="fp4", quantity="C4 perplexity", baseline=5.22, value=5.33, source=_GPTQ_FOR_LLAMA),
    Evidence(model="OPT, BLOOM, LLaMA and Pythia, 125M to 13B", setting="nf4, double quantisation; baseline int4",
             quantity="mean Pile perplexity", baseline=34.34, value=27.41, source=_QLORA),
    Evidence(model="OPT, BLOOM, LLaMA and Pythia, 125M to 13B", setting="fp4 e2m1; baseline int4",
             quantity="mean Pile perplexity", baseline=34.34, value=31.07, source=_QLORA),
    Evidence(model="Llama-2-13B", setting="4 bits, prompt of 512, A100", quantity="tokens/s", baseline=27.058, value=19.23,
             source=_BLOG),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why the blocks do not fit that model, or None."""
    return _weights.why_not_groups(model, min(_weights.GROUP_SIZES))


def rewrite(demand: Demand, *, format: str, double_quant: str) -> Demand:
    """Return the demand with 4-bit weights in the layers, looked up at every step."""
    demand = (
        loss_after(demand, format, double_quant=double_quant) if double_quant == "yes" else loss_after(demand, format)
    )
    # 256 scales of 8 bits share two 32-bit numbers.
    scale_bits = 8 + 64 / 256 if double_quant == "yes" else 16
    bits = _weights.mean_over_rows(demand.model, lambda row: 4 + scale_bits / _weights.fitting(row, GROUP_SIZE))
    return _weights.packed(demand, bits=bits, weight_format="nf4", kernels=_weights.UNPACK_KERNELS)


def execute(session: Session, *, format: str, double_quant: str) -> None:
    """Replace the layers' linear modules by ones that hold places in a codebook.

    A matrix whose inputs 64 does not divide takes blocks of 32, or stays as it is; the notes say which.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_nf4", "codebook", GROUP_SIZE, levels=format, double_quant=double_quant == "yes")
