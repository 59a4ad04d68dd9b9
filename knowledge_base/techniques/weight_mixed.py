"""Give each matrix 4, 8 or its own bits, as the planner allocated them from measured sensitivities.

The allocation is the answer of a multiple-choice knapsack (search/allocation.py): the least loss of quality,
measured one matrix at a time, within `average_bits` for each weight, scales included. 4 bits means groups of 64.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

GROUP_SIZE = 64

TECHNIQUE = Technique(
    summary="4, 8 or unchanged bits for each matrix, allocated from measured sensitivities",
    stage="quantise",
    family="weights",
    implements=("mixed_bits",),
    knobs={"average_bits": Choice(options=(5.0, 6.0), default=5.0)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"packed:int8", "packed:int4"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    modules=("torchao",),
    sources=("arXiv:1911.03852", "https://github.com/ggml-org/llama.cpp"),
)

_LLAMA_CPP = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="q4_K_M, 4.9 bits: some matrices at 6 bits", quantity="perplexity ratio",
             baseline=1.0, value=1.014242, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q4_K_S, 4.7 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.500529, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q4_K_M, 4.9 bits: some matrices at 6 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.407115, source=_LLAMA_CPP),
    Evidence(model="Llama-3-8B", setting="q5_K_M, 5.7 bits: some matrices at 6 bits", quantity="WikiText-2 perplexity",
             baseline=6.233160, value=6.288607, source=_LLAMA_CPP),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why the groups do not fit that model, or None."""
    return _weights.why_not_groups(model, GROUP_SIZE)


def rewrite(demand: Demand, *, average_bits: float) -> Demand:
    """Return the demand with `average_bits` for each weight in the layers, scales included.

    Most matrices are at 4 bits, so it is read at the pace of int4. Measuring the sensitivities is not in it: it is
    done once for a model, not for a plan.
    """
    # As if every matrix had the average, less the 0.5 bits of scales: bits placed where they matter lose no more.
    demand = loss_after(demand, "rtn", bits=average_bits - 0.5, group_size=GROUP_SIZE)
    return _weights.packed(demand, bits=average_bits, weight_format="int4", kernels=_weights.CAST_KERNELS)


def execute(session: Session, *, average_bits: float) -> None:
    """Pack each matrix in the bits `session.allocation` gives it; 16 leaves it as it is.

    A matrix split by an earlier step (low rank) takes the bits of the matrix it came from.

    Raises:
        CandidateFailed: "build_error", no allocation; "unsupported", it is of another model or over `average_bits`.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques import _packed

    if not session.allocation:
        raise CandidateFailed(
            "build_error", "weight_mixed needs an allocation of bits to matrices",
            hint="plan with calibration text, so that the planner can measure sensitivities",
        )  # fmt: skip
    modules = _packed.linears(session.model)
    bits = {name: _bits_of(name, session.allocation) for name in modules}
    unknown = [name for name, value in bits.items() if value not in (4, 8, 16)]
    unused = [name for name in session.allocation if not any(f"{m}.".startswith(f"{name}.") for m in modules)]
    if unknown or unused:
        what = f"gives no bits to `{unknown[0]}`" if unknown else f"names `{unused[0]}`, which the model lacks"
        raise CandidateFailed(
            "unsupported", f"the allocation was made for another model: it {what}", hint="allocate anew for this model"
        )
    stored = params = 0
    for done, (name, module) in enumerate(modules.items()):
        shape = _packed.matrix_of(module).shape
        params += shape.numel()
        size = _packed.packed_bytes(shape, bits[name], GROUP_SIZE)
        if bits[name] == 16 or size is None:
            stored += _packed.dense_bytes(module)
        else:
            stored += size
            _packed.pack(session.model, name, "int8" if bits[name] == 8 else "int4", GROUP_SIZE)
        session.progress("weight_mixed", (done + 1) / len(modules))
    average = 8 * stored / params
    session.notes["weight_mixed.average_bits"] = round(average, 3)
    for value in (4, 8, 16):
        session.notes[f"weight_mixed.matrices_{value}_bits"] = sum(b == value for b in bits.values())
    # Bits were chosen for the unchanged model's shapes: an earlier step that narrowed some shifts the mean a little.
    if average > average_bits * 1.05:
        raise CandidateFailed(
            "unsupported", f"the allocation takes {average:.2f} bits for each weight, more than {average_bits}",
            hint="allocate anew for this model",
        )  # fmt: skip


def _bits_of(name: str, allocation: Mapping[str, int]) -> int:
    """Return the bits of a module, or of the nearest module that holds it; 0 where there is none."""
    while name and name not in allocation:
        name = name.rpartition(".")[0]
    return allocation.get(name, 0)
