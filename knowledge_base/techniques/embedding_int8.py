"""Hold the table of token embeddings and the output head in 8 or 4 bits.

8 bits have one scale for each token, 4 bits a scale and zero for each group. A tied table is stored once, read by rows on
the way in and multiplied on the way out. Of a small model with a large vocabulary this is the largest saving there is.
"""

from __future__ import annotations

import math
from typing import Any

from knowledge_base.techniques import _weights
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

GROUP_SIZE = 32

TECHNIQUE = Technique(
    summary="embedding table and output head in 8 or 4 bits",
    stage="quantise",
    family="embedding",
    implements=("embedding_quantisation",),
    knobs={"bits": Choice(options=(4, 8), default=8)},
    saves=_weights.UNPACKED_SAVES,
    spends=_weights.UNPACKED_SPENDS,  # of 4 bits in a tied table; 8 bits have a kernel
    needs=frozenset({"packed:table"}),
    provides=frozenset({"quantised_embedding"}),
    modules=("torchao",),
    sources=(
        "https://github.com/pytorch/ao",
        "https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
    ),
)

EVIDENCE: tuple[Evidence, ...] = ()

# ln(perplexity ratio) and its spread: measured on the shipped model, whose table is a seventh of its parameters; no
# published figure is comparable, and what a head loses hangs on the vocabulary.
_LOSS = {8: (0.0005, 0.002), 4: (0.011, 0.02)}


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this cannot be done to that model, or None."""
    if model.kind != "decoder":
        return f"the tables of {model.architecture} are shared in ways this does not know"
    return _weights.why_not_again(model)


def legal(knobs: dict, model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting does not fit that model, or None."""
    if knobs["bits"] == 4 and model.hidden_size % GROUP_SIZE:
        return f"groups of {GROUP_SIZE} do not divide the hidden size {model.hidden_size} of {model.name}"
    return None


def rewrite(demand: Demand, *, bits: int) -> Demand:
    """Return the demand with table and head in fewer bits.

    A tied table of 4 bits has no kernel: as a head it is unpacked to 16 bits at every step, written once and read once.
    Positions, which some models count among the embeddings, stay as they are.
    """
    model = demand.model
    tied = not demand.head_stored_bytes  # an earlier step may have given the head weights of its own
    table = model.vocab_size * model.hidden_size
    stored = table / 8 * (8 + 16 / model.hidden_size if bits == 8 else _weights.grouped_bits(4, GROUP_SIZE))
    before = demand.embedding_bytes / model.embedding_params
    read = stored + 4 * table if tied and bits == 4 else stored
    loss, spread = _LOSS[bits]
    return demand.but(
        embedding_bytes=demand.embedding_bytes - before * table + stored,
        head_stored_bytes=0.0 if tied else stored,
        head_read_bytes=read if demand.head_read_bytes else 0.0,
        kernels_per_step=demand.kernels_per_step + 2 * _weights.CAST_KERNELS,
        build_bytes=demand.build_bytes + demand.embedding_bytes + demand.head_stored_bytes,
        perplexity_ratio=demand.perplexity_ratio * math.exp(loss),
        perplexity_log_sd=math.hypot(demand.perplexity_log_sd, spread),
        because=(*demand.because, f"embedding table and head {8 * before:.3g} -> {8 * stored / table:.3g} bits each"),
    )


def execute(session: Session, *, bits: int) -> None:
    """Replace the embedding and the head.

    Raises:
        CandidateFailed: "unsupported", the model has no plain table and head, or they are tied with a bias.
    """
    from torch import nn

    from knowledge_base.errors import CandidateFailed
    from knowledge_base.techniques._kinds import module_class

    model = session.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    scale = _scale(table)
    if not isinstance(table, nn.Embedding) or not isinstance(head, nn.Linear) or scale is None:
        raise CandidateFailed(
            "unsupported", f"the tables of {type(model).__name__} are {type(table).__name__} and {type(head).__name__}, "
            "which no packed table can take the place of",
        )  # fmt: skip
    tied = table.weight.data_ptr() == head.weight.data_ptr()
    if tied and head.bias is not None:
        raise CandidateFailed("unsupported", "a head with a bias of its own cannot share a packed table")
    spec = {} if bits == 8 else {"group_size": GROUP_SIZE}
    packed = module_class(f"int{bits}_table").from_weight(table.weight.data, None, **spec)
    packed.scale = scale
    last = packed if tied else module_class(f"int{bits}").from_weight(head.weight.data, head.bias, **spec)
    for old, new in ((table, packed), (head, last)):
        model.set_submodule(next(name for name, module in model.named_modules() if module is old), new)
    session.notes["embedding_int8.tied"] = tied


def _scale(table: Any) -> float | None:
    """Return what a table multiplies its rows by; None where it does something unknown."""
    from torch import nn

    if type(table) is nn.Embedding:
        return 1.0
    scale = getattr(table, "embed_scale", None)
    return None if scale is None else float(scale)
