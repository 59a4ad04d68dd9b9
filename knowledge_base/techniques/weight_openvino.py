"""Store weights in OpenVINO's 8-bit rows or 4-bit groups, multiplied as they are.

Rounded to nearest by nncf. At 4 bits the embedding and output tables take 8 (they are few bytes of a large model, and
all output passes through them). Each row or group has a float16 scale and an integer zero; vectors stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="8- or 4-bit weights of OpenVINO, multiplied without unpacking to memory",
    stage="quantise",
    family="weights",
    implements=("rtn",),
    knobs={"bits": Choice(options=(4, 8), default=8), "group_size": Choice(options=(32, 128), default=128)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"openvino"}),
    provides=frozenset({"quantised"}),
    modules=("nncf",),
    extra="openvino",
    sources=("https://github.com/openvinotoolkit/nncf/blob/develop/docs/usage/post_training_compression/weights_compression/Usage.md",
             "https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/weight-compression.html"),
)  # fmt: skip

_NNCF = TECHNIQUE.sources[0]
EVIDENCE = (
    *(
        Evidence(model=model, setting=setting, quantity="LAMBADA perplexity", baseline=before, value=after, source=_NNCF)
        for model, setting, before, after in (
            ("dolly-v2-3b", "int8 asymmetric", 5.01, 5.07),
            ("OPT-6.7B", "int8 asymmetric", 4.25, 4.27),
            ("Llama-2-7B-chat", "int8 asymmetric", 3.28, 3.29),
            ("Llama-2-7B-chat", "int4 asymmetric, groups of 128, a fifth of the layers int8", 3.28, 3.41),
            ("RedPajama-INCITE-7B-Instruct", "int4 asymmetric, groups of 128", 4.15, 4.17),
            ("Mistral-7B-v0.1", "int4 symmetric, groups of 128", 3.1898, 3.4932),
        )
    ),
    Evidence(model="Zephyr-7B-beta", setting="int4 symmetric, groups of 128", quantity="WikiText word perplexity",
             baseline=9.82, value=10.22, source=_NNCF),
)  # fmt: skip


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not(model)


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    if knobs["bits"] == 8:
        default = TECHNIQUE.knobs["group_size"].default
        return None if knobs["group_size"] == default else "8-bit weights have one scale for each row, not for groups"
    return _weights.why_not_groups(model, knobs["group_size"])


def row_bits(row: int) -> float:
    """Return the bits of a weight in rows of 8 bits with a float16 scale and an 8-bit zero.

    >>> row_bits(128)
    8.1875
    """
    return 8 + 24 / row


def group_bits(group_size: int) -> float:
    """Return the bits of a weight in groups of 4 bits with a float16 scale and a 4-bit zero.

    >>> group_bits(32)
    4.625
    """
    return 4 + 20 / group_size


def rewrite(demand: Demand, *, bits: int, group_size: int) -> Demand:
    """Return the demand with the layers' weights in `bits` bits and the embedding and output tables in 8."""
    model = demand.model
    groups = {} if bits == 8 else {"group_size": group_size}
    demand = loss_after(demand, "rtn", bits=bits, **groups)
    tables = row_bits(model.hidden_size) / (demand.linear_bytes / demand.linear_params * 8)
    stored = row_bits(model.hidden_size) if bits == 8 else group_bits(group_size)
    demand = _weights.packed(demand, bits=stored, weight_format=f"int{bits}", kernels=0.0)
    return demand.but(
        embedding_bytes=demand.embedding_bytes * tables,
        head_stored_bytes=demand.head_stored_bytes * tables,
        head_read_bytes=demand.head_read_bytes * tables,
    )


def execute(session: Session, *, bits: int, group_size: int) -> None:
    """Ask the engine's export for these types."""
    session.storage["openvino"] = {"bits": bits, "group_size": group_size}
