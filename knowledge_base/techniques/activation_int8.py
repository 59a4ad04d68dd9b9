"""Multiply in 8-bit integers: int8 weights, and activations rounded to int8 as they come, one scale for each token.

Own module kind (`int8_dynamic` in _packed.py) rather than torchao's Int8DynamicActivationInt8WeightConfig. On two
cores of an AVX-512 CPU (VNNI), 394M-parameter Llama in bfloat16: torchao's decodes 6.7 tokens/s against 22.5
unquantised, since its tensor subclass goes through Python for every matrix; one 5632x2048 matrix at one row takes
0.36 ms here (torch._int_mm and the rounding), 1.3 ms in bfloat16; at 256 rows 18 ms against 36 ms. And its tensors are
subclasses, which plain safetensors files cannot hold.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="8-bit weights and activations, multiplied in integers",
    stage="quantise",
    family="weights",
    implements=("dynamic_quantisation",),
    saves=(*_weights.SAVES, "ttft_s"),
    spends=tuple(name for name in _weights.SPENDS if name != "ttft_s"),
    needs=frozenset({"dynamic:int8"}),
    provides=frozenset({"quantised", "quantised_activations"}),
    modules=("torchao",),
    sources=("arXiv:2211.10438", "arXiv:2208.07339", "https://github.com/pytorch/ao"),
)

_SMOOTH = "https://github.com/mit-han-lab/smoothquant"
EVIDENCE = (
    Evidence(model="Llama-3.1-8B", setting="int8 weights and dynamic activations", quantity="WikiText word perplexity",
             baseline=7.3315, value=7.4535, source="https://github.com/pytorch/ao/blob/main/docs/source/workflows/inference.md"),
    Evidence(model="Llama-2-7B", setting="W8A8 with smoothing, alpha 0.85", quantity="WikiText-2 perplexity",
             baseline=5.474, value=5.515, source=_SMOOTH),
    Evidence(model="Llama-3-8B", setting="W8A8 with smoothing, alpha 0.85", quantity="WikiText-2 perplexity",
             baseline=6.138, value=6.258, source=_SMOOTH),
    Evidence(model="Transformer-LM-1.3B", setting="W8A8 vector-wise, zero point", quantity="C4 perplexity",
             baseline=15.91, value=15.94, source="https://arxiv.org/abs/2208.07339"),
    Evidence(model="OPT-13B", setting="W8A8, batch 4, 512 tokens", quantity="prefill speed-up",
             baseline=1.0, value=1.328, source="https://arxiv.org/abs/2211.10438"),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if "int8" not in hardware.device.flop_per_s:
        return f"{hardware.device.name} has no known rate of int8 arithmetic"
    return _weights.why_not(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand with 8-bit weights and int8 arithmetic; activations are rounded before each matrix."""
    demand = loss_after(demand, "dynamic_quantisation", bits=8, activation_bits=8)
    bits = _weights.int8_bits(demand.model, scale_bits=32)
    return _weights.packed(
        demand, bits=bits, weight_format="int8_dynamic", kernels=_weights.ROUNDING_KERNELS, compute_dtype="int8"
    )


def execute(session: Session) -> None:
    """Replace the layers' linear modules by ones that multiply in int8.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "activation_int8", "int8_dynamic")
