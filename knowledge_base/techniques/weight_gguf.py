"""Store weights in one of llama.cpp's block formats.

A row is cut into blocks of 32 or 256 weights that share scales; llama.cpp multiplies with the blocks as they are.
Every matrix of the layers gets the chosen type, the embedding and output tables at least 6 bits (they are few bytes
of a large model, and all output passes through them), vectors stay float32. A row that does not divide into a
type's blocks takes the next wider type that fits, as llama.cpp's own converter does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from knowledge_base.techniques import _weights
from knowledge_base.techniques._quality import loss_after
from knowledge_base.types import Choice, Demand, Evidence, Hardware, Model, Session, Technique, Workload

_OFFERED = ("q2_k", "iq3_s", "q3_k", "iq4_xs", "iq4_nl", "q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "f16")
TECHNIQUE = Technique(
    summary="llama.cpp block formats: 3 to 8 bits, multiplied without unpacking to memory",
    stage="quantise",
    family="weights",
    implements=("gguf",),
    knobs={"type": Choice(options=_OFFERED, default="q4_k")},
    saves=("weights_bytes", "artefact_bytes", "peak_memory_bytes", "network_bytes_per_start", "tpot_s", "latency_s",
           "throughput_tokens_per_s", "energy_j_per_token", "carbon_gco2e_per_token", "cost_usd_per_token"),
    spends=("perplexity", "quality_loss_ratio", "agreement_ratio", "kl_divergence_nats", "build_s"),
    needs=frozenset({"gguf"}),
    provides=frozenset({"quantised"}),
    modules=("xllamacpp", "gguf"),
    sources=("https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md",
             "https://github.com/ggml-org/llama.cpp/pull/1684"),
)  # fmt: skip

_SCORES = "https://github.com/ggml-org/llama.cpp/blob/master/tools/perplexity/README.md"
_SCORES_70B = (
    "https://github.com/ggerganov/llama.cpp/blob/0a21ad6e3f457f81ad6af43b95856bf7064a9ef9/examples/perplexity/README.md"
)
_SPEED = "https://github.com/ggml-org/llama.cpp/blob/311c2c9f0e/tools/quantize/README.md"
EVIDENCE = (
    *(
        Evidence(model="Llama-3-8B", setting=f"{name}, no importance matrix", quantity="WikiText-2 perplexity",
                 baseline=6.233160, value=value, source=_SCORES)
        for name, value in (("q8_0", 6.234284), ("q6_K", 6.253382), ("q5_K_S", 6.336598), ("q4_K_S", 6.500529),
                            ("q4_0", 6.700147), ("q3_K_S", 7.863786))
    ),
    *(
        Evidence(model="Llama-2-70B", setting=name, quantity="WikiText-2 perplexity", baseline=3.4313, value=value,
                 source=_SCORES_70B)
        for name, value in (("Q6_K", 3.4367), ("Q5_K_S", 3.4483), ("Q4_K_S", 3.4852), ("Q4_0", 3.5550),
                            ("Q3_K_S", 3.7019))
    ),
    *(
        Evidence(model="Llama-2-7B", setting=name, quantity="WikiText-2 perplexity ratio", baseline=1.0, value=value,
                 source=_SCORES)
        for name, value in (("q8_0", 1.000689), ("q6_K", 1.002406), ("q4_K_M", 1.014242))
    ),
    *(
        Evidence(model="Llama-3.1-8B", setting=f"{name}, hardware not stated", quantity="decode tokens/s, 128 tokens",
                 baseline=29.17, value=value, source=_SPEED)
        for name, value in (("Q8_0", 50.93), ("Q6_K", 58.67))
    ),
)  # fmt: skip

# Bits a weight takes and weights that share a block: size of the block_* structs in ggml/src/ggml-common.h.
BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_1": 6.0, "q5_0": 5.5, "q5_k": 5.5,
    "q4_0": 4.5, "q4_k": 4.5, "iq4_nl": 4.5, "iq4_xs": 4.25, "q3_k": 3.4375, "iq3_s": 3.4375, "q2_k": 2.625,
}  # fmt: skip
BLOCK = {
    "q8_0": 32, "q5_1": 32, "q5_0": 32, "q4_0": 32, "iq4_nl": 32, "q6_k": 256, "q5_k": 256, "q4_k": 256, "iq4_xs": 256,
    "q3_k": 256, "iq3_s": 256, "q2_k": 256,
}  # fmt: skip
_WIDER = {
    "q6_k": "q8_0",
    "q5_k": "q5_1",
    "q4_k": "q5_0",
    "q3_k": "q4_0",
    "iq4_xs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "q2_k": "q4_0",
}

# The published mix nearest to one type in every matrix, where llama.cpp offers mixes only.
_PUBLISHED = {"q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}
_F16_LOG_SD = 3e-4  # of log perplexity: rounding to 11 significant bits, as in weight_dtype
# Multiply-adds a core could do while it quantises one weight: measured ns for each weight x 98 GFLOP/s (EPYC).
_BUILD_FLOP = {"f16": 350, "q8_0": 330, "q6_k": 3_100, "q5_k": 6_400, "q4_k": 7_800, "q4_0": 250, "q3_k": 1_500,
               "q2_k": 7_000, "iq3_s": 36_000, "iq4_xs": 42_000, "iq4_nl": 42_000}  # fmt: skip


def stored_type(type: str, row: int) -> str:
    """Return the type a matrix with rows of `row` weights gets: the chosen one, or the next wider that divides it.

    >>> stored_type("q4_k", 4096), stored_type("q4_k", 896), stored_type("q4_k", 100)
    ('q4_k', 'q5_0', 'f16')
    """
    while row % BLOCK.get(type, 1):
        type = _WIDER.get(type, "f16")
    return type


def table_type(type: str) -> str:
    """Return the type of the embedding and output tables: at least 6 bits."""
    return type if BITS[type] >= BITS["q6_k"] else "q6_k"


def bits_per_weight(model: Model, type: str) -> float:
    """Return the mean bits of the layers' weights, each matrix in the type its rows allow."""
    return _weights.mean_over_rows(model, lambda row: BITS[stored_type(type, row)])


def rejects(model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return None: what cannot take a type is refused knob by knob, and which models are written is the engine's."""
    return None


def legal(knobs: Mapping[str, str], model: Model, workload: Workload, hardware: Hardware) -> str | None:
    """Return why this setting means nothing for that model, or None."""
    type = knobs["type"]
    if type == "f16" and model.weight_dtype == "float16":
        return "the weights are stored as float16 already"
    if stored_type(type, model.hidden_size) != type and stored_type(type, model.ffn_size) != type:
        got = stored_type(type, model.hidden_size)
        sizes = f"neither rows of {model.hidden_size} nor of {model.ffn_size}"
        return f"{sizes} divide into blocks of {BLOCK[type]}; {type} would be {got}"
    return None


def rewrite(demand: Demand, *, type: str) -> Demand:
    """Return the demand with every weight in the bits it is stored in, vectors in float32 and a float16 KV cache.

    q4_k: blocks of 256 in 144 bytes, 4.5 bits; q6_k: 210 bytes, 6.5625 bits; q8_0: blocks of 32 in 34 bytes, 8.5.
    """
    if type == "f16":
        demand = demand.but(perplexity_log_sd=math.hypot(demand.perplexity_log_sd, _F16_LOG_SD))
    else:
        demand = loss_after(demand, "gguf", type=published(type))
    bits = bits_per_weight(demand.model, type)
    demand = written(demand, type, bits, BITS[stored_type(table_type(type), demand.model.hidden_size)])
    why = f"weights in {type}: {bits:.4g} bits each, embedding and output in {table_type(type)}"
    return demand.but(because=(*demand.because, why))


def published(type: str) -> str:
    """Return the published mix nearest to one type in every matrix."""
    return _PUBLISHED.get(type, type)


def written(demand: Demand, type: str, bits: float, table_bits: float) -> Demand:
    """Return the demand of a GGUF file with `bits` for each of the layers' weights, most like those of `type`.

    Vectors are float32, the KV cache is float16.
    """
    old_bits = 8 * demand.linear_bytes / demand.linear_params
    tables = table_bits / old_bits
    read = demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes
    return demand.but(
        linear_bytes=demand.linear_params * bits / 8,
        embedding_bytes=demand.embedding_bytes * tables,
        head_stored_bytes=demand.head_stored_bytes * tables,
        head_read_bytes=demand.head_read_bytes * tables,
        other_bytes=demand.other_bytes * BITS["f32"] / old_bits,
        kv_bytes_per_token=2.0 * demand.model.kv_values_per_token,
        weight_format=type,
        compute_dtype="float16" if type == "f16" else "int8",
        build_flop=demand.build_flop + _BUILD_FLOP[type] * demand.linear_params,
        build_bytes=demand.build_bytes + read,
    )


def execute(session: Session, *, type: str) -> None:
    """Ask the engine's export for this type; the export writes it and notes every matrix that needed a wider one."""
    session.storage["gguf_type"] = type
