"""Multiply in 8-bit integers by scales fixed on calibration text: nothing is measured while the model runs.

Static W8A8. Each layer is calibrated on what the rounded ones before it give; the range of a matrix's activations is cut
where the outputs change least. It saves the search for a maximum at every token that activation_int8 pays, and loses
more where activations have outliers: smooth_quant or rotate come before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

if TYPE_CHECKING:
    from knowledge_base.techniques._blocks import Matrix

TECHNIQUE = Technique(
    summary="8-bit weights and activations, multiplied in integers by scales fixed beforehand",
    stage="quantise",
    family="weights",
    implements=("fixed_point",),
    saves=(*_weights.SAVES, "ttft_s"),
    spends=tuple(name for name in _weights.SPENDS if name != "ttft_s"),
    needs=frozenset({"static:int8"}),
    provides=frozenset({"quantised", "quantised_activations"}),
    needs_calibration=True,
    modules=("torchao",),
    sources=("arXiv:2305.10727", "arXiv:2211.10438"),
)

_IPEX = (
    "https://github.com/intel/neural-compressor/blob/master/examples/pytorch/nlp/huggingface_models/language-modeling/"
    "quantization/ptq_static/ipex/smooth_quant/README.md"
)
EVIDENCE = (
    Evidence(model="OPT-125M", setting="static W8A8 without smoothing", quantity="LAMBADA accuracy",
             baseline=0.6389, value=0.6354, source=_IPEX),
    Evidence(model="OPT-6.7B", setting="static W8A8 without smoothing", quantity="LAMBADA accuracy",
             baseline=0.8151, value=0.7944, source=_IPEX),
    Evidence(model="BLOOM-3B", setting="static W8A8 without smoothing", quantity="LAMBADA accuracy",
             baseline=0.7406, value=0.7073, source=_IPEX),
)  # fmt: skip

_ROUNDING_KERNELS = 1.0  # as _weights.ROUNDING_KERNELS, less the search for the largest activation


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if "int8" not in hardware.device.flop_per_s:
        return f"{hardware.device.name} has no known rate of int8 arithmetic"
    return _weights.why_not_watched(model) or _weights.why_not(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand with 8-bit weights and int8 arithmetic; activations are rounded before each matrix."""
    demand = loss_after(demand, "rtn", bits=8, activation_bits=8)
    matrices = 7 if demand.model.gated_ffn else 6
    bits = _weights.int8_bits(demand.model, scale_bits=32)
    demand = _weights.packed(
        demand, bits=bits, weight_format="int8_dynamic", kernels=_ROUNDING_KERNELS, compute_dtype="int8"
    )
    return demand.but(
        linear_bytes=demand.linear_bytes + 4 * matrices * demand.layers,  # the scale of each matrix's activations
        build_flop=demand.build_flop + 4 * demand.linear_params * 16_384,  # two passes over about 16k tokens
    )


def execute(session: Session) -> None:
    """Replace the layers' linear modules by ones that multiply in int8, each calibrated on the ones before it.

    A matrix that calibration never comes through stays as it is; the notes say which.

    Raises:
        CandidateFailed: no calibration text, or "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques import _packed
    from knowledge_base.techniques._blocks import each_layer
    from knowledge_base.techniques._static_module import Int8StaticLinear, best_step

    names = {id(module): name for name, module in _packed.linears(session.model).items()}
    cut: list[float] = []

    def change(index: int, layer: Any, matrices: list[Matrix]) -> None:
        for matrix in matrices:
            if (name := names.pop(id(matrix.module), None)) is None:
                continue
            peak = matrix.inputs.peaks.amax().item()
            step = best_step(matrix.weight, matrix.inputs.sample, peak)
            cut.append(127 * step / peak if peak else 1.0)
            module = Int8StaticLinear.calibrated(matrix.weight, matrix.module.bias, step)
            session.model.set_submodule(name, module)

    each_layer(session, change, full=False, label="activation_int8_static")
    session.notes["activation_int8_static.range_kept_mean"] = sum(cut) / max(len(cut), 1)
    _packed.note(session, "activation_int8_static", len(cut), list(names.values()))
