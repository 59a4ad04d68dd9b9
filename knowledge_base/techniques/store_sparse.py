"""Leave the zeros out of the artefact: a bit for each weight says whether it is there, and those that are follow.

Takes 1/16 + (1 - zeros) of a 16-bit model's matrices, the same for zeros anywhere and for 2:4, whose two positions of
two bits in each four weights are a bit for each weight too. Nothing is lost, and nothing but the artefact gets smaller:
it is unpacked as it is loaded, and then the model is an ordinary one.
"""

from __future__ import annotations

from typing import Any

from knowledge_base.techniques import _weights
from knowledge_base.types import Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="zeros left out of the artefact: a bit for each weight, and the weights that are not zero",
    stage="quantise",
    family="weights",
    implements=("sparse_storage",),
    saves=("artefact_bytes", "network_bytes_per_start"),
    spends=("build_s",),
    needs=frozenset({"packed:sparse"}),
    lossless=True,
    sources=("arXiv:1510.00149", "https://github.com/neuralmagic/compressed-tensors"),
)

EVIDENCE = (
    Evidence(model="AlexNet", setting="pruned, distances between weights stored, values shared, Huffman coding",
             quantity="size, MB", baseline=240, value=6.9, source="https://arxiv.org/abs/1510.00149"),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def rewrite(demand: Demand) -> Demand:
    """Return the demand with an artefact whose matrices take a bit for each weight and those that are not zero."""
    stored = demand.linear_params / 8 + demand.linear_bytes * (1 - demand.zeros_share)
    share = stored / demand.linear_bytes
    return demand.but(
        disk_share=share,
        build_bytes=demand.build_bytes + demand.linear_bytes,
        because=(
            *demand.because,
            f"zeros left out: layers' weights take {share:.0%} in the artefact, as much in memory",
        ),
    )


def execute(session: Session) -> None:
    """Replace the linear modules that have enough zeros for it by sparse ones.

    Raises:
        CandidateFailed: "unsupported", no matrix gets smaller.
    """
    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._blocks import matrix_of
    from knowledge_base.techniques._experts_module import split_experts
    from knowledge_base.techniques._packed import linears
    from knowledge_base.techniques._sparse_module import SparseLinear

    split_experts(session.model)
    names = list(linears(session.model))  # names only: a dense matrix that was replaced must not stay
    packed = 0
    module: Any
    for done, name in enumerate(names):
        module = session.model.get_submodule(name)
        weight = matrix_of(module)
        if int((weight == 0).sum()) * weight.element_size() * 8 > weight.numel():
            session.model.set_submodule(name, SparseLinear.from_weight(weight, module.bias))
            packed += 1
        session.progress("store_sparse", (done + 1) / len(names))
    if not packed:
        raise CandidateFailed(
            "unsupported", "no matrix has more zeros than a bit for each weight would take",
            hint="prune weights before this step",
        )  # fmt: skip
    session.notes["store_sparse.matrices"] = packed
