"""Store weights in ONNX Runtime's blocks of 4 or 8 bits.

A row of a matrix is cut into blocks of 32 weights that share a float32 scale, and in 4 bits a 4-bit zero point; rounded to
nearest, without data. The kernel rounds what enters a matrix to 8 bits and multiplies integers. The head has 8 bits
either way. Of embeddings only the table of a 4-bit model that ties it to the head is rounded, as the head is: the
runtime looks rows up in no other table of 8 bits, so every other one stays float32, of which only the rows that are
looked up are ever read. Vectors, the cache and all other arithmetic are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from knowledge_base.build_memory import BuildMemory
from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

TECHNIQUE = Technique(
    summary="4- or 8-bit blocks of ONNX Runtime, multiplied as integers",
    stage="quantise",
    family="weights",
    implements=("rtn",),
    knobs={"bits": Choice(options=(4, 8), default=4)},
    saves=_weights.SAVES,
    spends=_weights.SPENDS,
    needs=frozenset({"onnx"}),
    provides=frozenset({"quantised"}),
    # The builder reads the model again from disk, and hands its float32 form to the quantiser as a whole.
    memory=BuildMemory(models=7.0),
    modules=("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir"),
    extra="onnxruntime",
    sources=(
        "https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits",
        "https://github.com/microsoft/onnxruntime-genai/blob/main/src/python/py/models/README.md",
    ),
)

_AWQ = "https://arxiv.org/abs/2306.00978"
EVIDENCE = (
    Evidence(model="Llama-2-7B", setting="round to nearest to 4 bits, groups of 128", quantity="WikiText-2 perplexity",
             baseline=5.47, value=5.73, source=_AWQ),
    Evidence(model="Llama-2-13B", setting="round to nearest to 4 bits, groups of 128", quantity="WikiText-2 perplexity",
             baseline=4.88, value=4.98, source=_AWQ),
)  # fmt: skip

GROUP = 32
_FLOAT = 32.0  # bits


def block_bits(bits: int, row: int, *, zeros: bool) -> float:
    """Return the stored bits for each weight of rows of that length; the last block is filled up.

    >>> block_bits(4, 4096, zeros=True), block_bits(8, 4096, zeros=False)
    (5.125, 9.0)
    """
    blocks = ceil(row / GROUP)
    return 8 * (blocks * (GROUP * bits / 8 + 4) + zeros * ceil(blocks * bits / 8)) / row


def bits_per_weight(model: Model, bits: int) -> float:
    """Return the mean stored bits of the layers' weights."""
    return _weights.mean_over_rows(model, lambda row: block_bits(bits, row, zeros=bits == 4))


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    return _weights.why_not_again(model)


def legal(knobs: Mapping[str, int], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting does not fit that model, or None."""
    widths = (model.hidden_size, model.heads * model.head_size, model.ffn_size)
    odd = next((width for width in widths if ceil(width / GROUP) % 2), None)
    if knobs["bits"] == 4 and odd:
        return f"rows of {odd} are an odd number of blocks of {GROUP}, whose 4-bit zero points the builder cannot pack"
    return None


def rewrite(demand: Demand, *, bits: int) -> Demand:
    """Return the demand with the layers in `bits`, the head in 8, and the rest in float32.

    Beside what was there the graph stores the cosines and sines of every position: a head's size of float32 each.
    """
    model = demand.model
    old_bits = 8 * demand.linear_bytes / demand.linear_params
    stored = bits_per_weight(model, bits)
    head = block_bits(8, model.hidden_size, zeros=bits == 4)
    shared = bits == 4 and not demand.head_stored_bytes
    rotations = 4 * model.max_context_tokens * model.head_size
    demand = loss_after(demand, "rtn", bits=bits, group_size=GROUP)
    return demand.but(
        linear_bytes=demand.linear_params * stored / 8,
        embedding_bytes=demand.embedding_bytes * (head if shared else _FLOAT) / old_bits,
        head_stored_bytes=0.0 if shared else demand.head_read_bytes * head / old_bits,
        head_read_bytes=demand.head_read_bytes * head / old_bits,
        other_bytes=demand.other_bytes * _FLOAT / old_bits + rotations,
        kv_bytes_per_token=4.0 * model.kv_values_per_token,
        activation_bytes_per_token=4.0 * (3 * model.ffn_size + 4 * model.hidden_size),
        weight_format=f"int{bits}",
        compute_dtype="int8",
        build_bytes=demand.build_bytes + 3 * demand.linear_bytes,
        because=(
            *demand.because,
            f"layers' weights {old_bits:.3g} -> {stored:.4g} bits each, head in {head:.3g}, "
            f"embeddings in {head if shared else _FLOAT:.3g}",
        ),
    )


def execute(session: Session, *, bits: int) -> None:
    """Ask the engine's export for these bits."""
    session.storage["onnx_bits"] = bits
