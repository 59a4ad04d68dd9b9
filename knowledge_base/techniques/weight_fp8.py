"""Hold the layers' weights as 8-bit floats (e4m3) with one scale for each output channel.

GPUs of compute capability 8.9 and above multiply them as they are, with activations rounded to 8-bit floats too. Other
machines unpack them to 16 bits at every step: that saves memory and costs time, and int8 is the better 8 bits there.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="8-bit floating-point weights; multiplied as they are on GPUs that can, unpacked elsewhere",
    stage="quantise",
    family="weights",
    implements=("fp8",),
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,
    needs=frozenset({"packed:fp8"}),
    provides=frozenset({"quantised", "quantised_activations"}),
    sources=("arXiv:2209.05433", "https://github.com/pytorch/ao"),
)

_AO = "https://github.com/pytorch/ao/blob/main/docs/source/workflows/inference.md"
EVIDENCE = (
    Evidence(model="Llama-3.1-8B", setting="weights and activations, scales by row", quantity="WikiText word perplexity",
             baseline=7.3315, value=7.4197, source=_AO),
    Evidence(model="Llama-3.1-8B", setting="weights and activations, vLLM, H100", quantity="decode speed-up",
             baseline=1.0, value=1.214, source=_AO),
    Evidence(model="Llama-3.1-8B", setting="weights and activations, vLLM, H100", quantity="prefill speed-up",
             baseline=1.0, value=1.464, source=_AO),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand with 8-bit floats in the layers; the loss is that of GPUs, which round activations too."""
    demand = loss_after(demand, "fp8", activation_bits=8)
    bits = _weights.int8_bits(demand.model, scale_bits=32)
    return _weights.packed(demand, bits=bits, weight_format="fp8", kernels=_weights.UNPACK_KERNELS)


def execute(session: Session) -> None:
    """Replace the layers' linear modules by ones of 8-bit floats.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_fp8", "fp8")
