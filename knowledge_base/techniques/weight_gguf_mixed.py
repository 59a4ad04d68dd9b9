"""Store each matrix and table in the llama.cpp block format that the planner allocated from measured sensitivities.

llama.cpp's own mixes (Q4_K_M and its like) give the same matrices of every model more bits. Here the loss of each matrix in
q2_k and in q4_k is measured on the model as the earlier steps leave it, the tables of the embedding and the output among
them, and told from these for the other types by how much they change the outputs; the allocation with the least loss
within the bytes is the answer of a multiple-choice knapsack (search/allocation.py):

    average_bits  for each weight of layers and tables, scales included; more only where rows do not divide into blocks
    types         "k": q2_k to q8_0, quick to round and to multiply with; "all": also iq3_s and iq4_xs, which lose less

The planner stops the build before this step to measure and to solve. After importance_matrix errors are measured, as they
are made, weighted by what enters the columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from knowledge_base.techniques import _weights, weight_gguf
from knowledge_base.techniques._quality import loss_after
from knowledge_base.techniques.weight_gguf import BITS, stored_type
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

K = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
TYPES = {"k": K, "all": ("q2_k", "iq3_s", "q3_k", "iq4_xs", *K[2:])}  # q3_k: where there is no time for iq types
ALL_BITS = 6.0  # above that, all give what k types give (benchmarks/allocation.py)

TECHNIQUE = Technique(
    summary="a llama.cpp block format for each matrix and table, allocated from measured sensitivities",
    stage="quantise",
    family="weights",
    implements=("gguf", "mixed_bits"),
    knobs={
        "average_bits": Choice(options=(3.25, 4.0, 4.75, 5.5, 6.5), default=4.75),
        "types": Choice(options=tuple(TYPES), default="k"),
    },
    saves=weight_gguf.TECHNIQUE.saves,
    spends=weight_gguf.TECHNIQUE.spends,
    needs=frozenset({"gguf"}),
    provides=frozenset({"quantised"}),
    needs_calibration=True,
    modules=("xllamacpp", "gguf"),
    sources=("https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md", "arXiv:1911.03852"),
)

# Any average can be allocated: the search adds the gentlest that meet the budgets.
RANGE = dict.fromkeys(
    ("weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start"),
    ("average_bits", tuple(bits / 20 for bits in range(168, 55, -1))),
)

EVIDENCE: tuple[Evidence, ...] = ()

# Bits for each weight that an allocation is worth: in as many more bits all matrices alike lose as much. 0.3 to 0.5 from 3 to
# 5 bits, on the shipped model (benchmarks/allocation.py).
_WORTH = 0.4
# The published type whose losses are told by bits alone, so that more bits never lose more.
_PRICED_AS = {"k": "q4_k_s", "all": "iq4_xs"}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_watched(model)


def legal(knobs: Mapping[str, Any], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    least, most = (_average(model, TYPES[knobs["types"]][i]) for i in (0, -1))
    if not least < knobs["average_bits"] < most:
        return f"{knobs['types']} types give matrices of {model.name} {least:.3g} to {most:.3g} bits for each weight"
    if knobs["types"] == "all" and knobs["average_bits"] > ALL_BITS:
        return f"above {ALL_BITS:g} bits for each weight nothing better than k types is chosen from all"
    return None


def _average(model: Model, type: str) -> float:
    """Return the mean bits of layers and tables, each in that type or the next wider one its rows allow."""
    tables = model.embedding_params + (0 if model.tied_embeddings else model.vocab_size * model.hidden_size)
    layers = weight_gguf.bits_per_weight(model, type) * model.linear_params
    return (layers + BITS[stored_type(type, model.hidden_size)] * tables) / (model.linear_params + tables)


def rewrite(demand: Demand, *, average_bits: float, types: str) -> Demand:
    """Return the demand with `average_bits` for each weight of layers and tables, vectors in float32, a float16 KV cache.

    Measuring the sensitivities is not in it: it is done once for a model and the steps before, not for a plan.
    """
    average_bits = max(average_bits, _average(demand.model, TYPES[types][0]))  # steps before may have narrowed rows
    demand = loss_after(demand, "gguf", type=_PRICED_AS[types], bits=average_bits + _WORTH)
    demand = weight_gguf.written(demand, _nearest(average_bits, types), average_bits, average_bits)
    why = f"weights in types of {average_bits:.3g} bits on average, tables among them, more where it matters most"
    return demand.but(because=(*demand.because, why))


def _nearest(average_bits: float, types: str) -> str:
    """Return the type with the bits nearest to an average; of all, iq types are chosen more often than k types as narrow."""
    offered = [type for type in TYPES[types] if types == "k" or type not in ("q3_k", "q4_k")]
    return min(offered, key=lambda type: abs(BITS[type] - average_bits))


def options(session: Session, time_limit_s: float, *, types: str) -> dict[str, Any]:
    """Return what can be chosen on the model as it is now: {"parts": {matrix: {type: {"loss_increase", "bytes", ...}}}}.

    Raises:
        CandidateFailed: no calibration text, or the model's layers are not found.
    """
    from knowledge_base.techniques._gguf_choices import BlockWays
    from knowledge_base.techniques._sensitivity import measure_sensitivities

    ways = BlockWays(TYPES[types], weighed=bool(session.storage.get("gguf_importance")))
    return {"parts": measure_sensitivities(session, ways, time_limit_s)}


def budgets(measured: Mapping[str, Any], *, average_bits: float, types: str) -> dict[str, float]:
    """Return the bytes all matrices and tables together may take, of what `options` measured; the least they can at least."""
    parts = measured["parts"].values()
    weights = sum(next(iter(choices.values()))["params"] for choices in parts)
    least = sum(min(choice["bytes"] for choice in choices.values()) for choices in parts)
    return {"bytes": max(weights * average_bits / 8, least)}


def execute(session: Session, *, average_bits: float, types: str) -> None:
    """Ask the engine's export for the types that `session.allocation` names, after checking that they are of this model.

    Raises:
        CandidateFailed: "build_error", no allocation; "unsupported", it is of another model or over `average_bits`.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import matrix_of
    from knowledge_base.techniques._sensitivity import matrices

    if not session.allocation:
        raise CandidateFailed(
            "build_error", "weight_gguf_mixed needs an allocation of types to matrices",
            hint="plan with calibration text, so that the planner can measure sensitivities",
        )  # fmt: skip
    found = {name: matrix_of(module).shape for group in matrices(session.model) for name, module in group.items()}
    unknown = [name for name in found if session.allocation.get(name) not in TYPES[types]]
    unused = sorted(set(session.allocation) - {name for name, _ in session.model.named_modules()})
    if unknown or unused:
        what = f"gives no type to `{unknown[0]}`" if unknown else f"names `{unused[0]}`, which the model lacks"
        raise CandidateFailed(
            "unsupported", f"the allocation was made for another model: it {what}", hint="allocate anew for this model"
        )
    chosen = {name: stored_type(session.allocation[name], shape[1]) for name, shape in found.items()}
    least = _mean_bits(found, {name: stored_type(TYPES[types][0], shape[1]) for name, shape in found.items()})
    if (taken := _mean_bits(found, chosen)) > max(average_bits, least) * 1.0001:
        raise CandidateFailed(
            "unsupported", f"the allocation takes {taken:.2f} bits for each weight, more than {average_bits}",
            hint="allocate anew for this model",
        )  # fmt: skip
    session.storage["gguf_type"] = _nearest(average_bits, types)  # what a draft is stored in, and the file is called
    session.storage["gguf_types"] = chosen
    session.notes["weight_gguf_mixed.average_bits"] = round(taken, 3)
    for type in sorted(set(chosen.values())):
        session.notes[f"weight_gguf_mixed.matrices.{type}"] = sum(stored == type for stored in chosen.values())


def _mean_bits(shapes: Mapping[str, Any], stored: Mapping[str, str]) -> float:
    """Return the bits for each weight of matrices (out, in) in their types."""
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(weights[name] * BITS[stored[name]] for name in shapes) / sum(weights.values())
