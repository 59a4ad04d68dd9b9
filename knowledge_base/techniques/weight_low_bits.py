"""Hold the layers' weights in 2 or 3 bits, rounded to nearest in groups that share a 16-bit scale and zero.

The plain baseline below 4 bits: needs no calibration text, and loses much. No kernel of PyTorch's multiplies 2 or 3 bits,
so weights are unpacked at every step: this saves memory and costs time.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="2- or 3-bit weights in groups, rounded to nearest; unpacked at every step",
    stage="quantise",
    family="weights",
    implements=("rtn",),
    knobs={"bits": Choice(options=(2, 3), default=3), "group_size": Choice(options=(32, 64), default=32)},
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,
    needs=frozenset({"packed:int2", "packed:int3"}),
    provides=frozenset({"quantised"}),
    modules=("torchao",),
    sources=("arXiv:2210.17323", "https://github.com/pytorch/ao"),
)

_GPTQ, _GPTQ_FOR_LLAMA = "https://arxiv.org/abs/2210.17323", "https://github.com/qwopqwop200/GPTQ-for-LLaMa"
EVIDENCE = tuple(
    Evidence(model=model, setting="3 bits, whole rows", quantity="WikiText-2 perplexity", baseline=baseline, value=value,
             source=source)
    for model, baseline, value, source in (
        ("OPT-350M", 22.0, 64.57, _GPTQ),
        ("BLOOM-560M", 22.42, 57.08, _GPTQ),
        ("BLOOM-3B", 13.48, 39.36, _GPTQ),
        ("BLOOM-7.1B", 11.37, 17.38, _GPTQ),
        ("LLaMA-7B", 5.68, 25.54, _GPTQ_FOR_LLAMA),
        ("LLaMA-13B", 5.09, 11.40, _GPTQ_FOR_LLAMA),
    )
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, bits: int, group_size: int) -> Demand:
    """Return the demand with 2- or 3-bit weights in the layers, unpacked at every step."""
    demand = loss_after(demand, "rtn", bits=bits, group_size=group_size)
    return _weights.grouped(demand, bits, group_size)


def execute(session: Session, *, bits: int, group_size: int) -> None:
    """Replace the layers' linear modules by int2 or int3 ones.

    A matrix whose inputs the group size does not divide takes smaller groups, or stays as it is; the notes say which.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_low_bits", f"int{bits}", group_size)
