"""Hold the layers' weights as 8-bit integers with one scale for each output; activations stay in 16 bits.

Round to nearest needs no calibration: 8 bits with a scale for each channel is close to lossless at every size seen.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="8-bit weights, one scale for each output channel",
    stage="quantise",
    family="weights",
    implements=("rtn",),
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"packed:int8"}),
    provides=frozenset({"quantised"}),
    modules=("torchao",),
    sources=("arXiv:2208.07339", "https://github.com/pytorch/ao"),
)

_AO = "https://github.com/pytorch/ao/blob/main/docs/source/workflows/inference.md"
_GLM = "https://github.com/THUDM/GLM-130B/blob/main/docs/quantization.md"
EVIDENCE = (
    Evidence(model="Llama-3.1-8B", setting="int8 by row, weight-only", quantity="WikiText word perplexity",
             baseline=7.3315, value=7.3451, source=_AO),
    Evidence(model="GLM-130B", setting="int8 weight-only, round to nearest", quantity="WikiText-2 perplexity",
             baseline=10.901, value=10.904, source=_GLM),
    Evidence(model="Llama-3.1-8B", setting="int8 weight-only, vLLM, H100", quantity="decode speed-up",
             baseline=1.0, value=0.652, source=_AO),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand with 8-bit weights in the layers; a cast of the activations on either side of each matrix."""
    demand = loss_after(demand, "rtn", bits=8)
    return _weights.packed(
        demand, bits=_weights.int8_bits(demand.model), weight_format="int8", kernels=_weights.CAST_KERNELS
    )


def execute(session: Session) -> None:
    """Replace the layers' linear modules by int8 ones.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_int8", "int8")
