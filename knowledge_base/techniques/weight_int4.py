"""Hold the layers' weights in 4 bits, rounded to nearest in groups that share a 16-bit scale and zero.

Needs no calibration text. Smaller groups cost bytes (5 bits a weight at 32, 4.25 at 128) and save quality.
"""

from __future__ import annotations

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="4-bit weights in groups, rounded to nearest",
    stage="quantise",
    family="weights",
    implements=("rtn",),
    knobs={"group_size": Choice(options=(32, 64, 128), default=32)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"packed:int4"}),
    provides=frozenset({"quantised"}),
    modules=("torchao",),
    sources=("arXiv:2306.00978", "https://github.com/pytorch/ao"),
)

_AWQ = "https://arxiv.org/abs/2306.00978"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="round to nearest, groups of 128", quantity="WikiText-2 perplexity",
             baseline=5.47, value=5.73, source=_AWQ),
    Evidence(model="Llama-2-13B", setting="round to nearest, groups of 128", quantity="WikiText-2 perplexity",
             baseline=4.88, value=4.98, source=_AWQ),
    Evidence(model="Llama-2-70B", setting="round to nearest, groups of 128", quantity="WikiText-2 perplexity",
             baseline=3.32, value=3.46, source=_AWQ),
    Evidence(model="LLaMA-7B", setting="q4_1: groups of 32 with scale and minimum", quantity="WikiText-2 perplexity",
             baseline=5.9066, value=6.0912, source="https://github.com/ggml-org/llama.cpp"),
    Evidence(model="Llama-3-8B-Instruct", setting="torchao int4 weight-only, groups of 128", quantity="WikiText perplexity",
             baseline=10.936, value=12.38, source="https://github.com/pytorch/ao/blob/main/torchao/prototype/awq/README.md"),
    Evidence(model="OPT-125M", setting="round to nearest, whole rows", quantity="WikiText-2 perplexity",
             baseline=27.65, value=37.28, source="https://arxiv.org/abs/2210.17323"),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this group size does not fit that model, or None."""
    return _weights.why_not_groups(model, knobs["group_size"])


def rewrite(demand: Demand, *, group_size: int) -> Demand:
    """Return the demand with 4-bit weights in the layers; a cast of the activations on either side of each matrix."""
    demand = loss_after(demand, "rtn", bits=4, group_size=group_size)
    return _weights.grouped(demand, 4, group_size)


def execute(session: Session, *, group_size: int) -> None:
    """Replace the layers' linear modules by int4 ones.

    A matrix whose inputs the group size does not divide takes smaller groups, or stays as it is; the notes say which.

    Raises:
        CandidateFailed: "unsupported", the layers hold nothing that can be packed.
    """
    from knowledge_base.techniques._packed import pack_all

    pack_all(session, "weight_int4", "int4", group_size)
