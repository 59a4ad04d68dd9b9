"""The rules of llmfit (AlexsJones/llmfit, MIT), from its fit.rs and models.rs of 2026, with our bandwidths for its table.

Decoding a dense model reads its weights at 0.55 of the bandwidth. A mixture of experts has two parts: the active
experts' bytes, and everything else counted at a fitted 3.2 bytes a parameter (1.43 for gpt-oss) whatever its type; both
at the full bandwidth, less a penalty where the model fills more than 0.6 of the memory. Prompts: 0.35 of the 16-bit
rate. Memory: bytes a parameter by format, a 16-bit cache, half a gigabyte.
"""

from __future__ import annotations

import math
import re

from benchmarks.peer_rules._asked import ONE_DEVICE, ONE_REQUEST, Answer, Asked, Peer, rule

READ_SHARE = 0.55
PROMPT_SHARE = 0.35
FIXED_BYTES = {"gpt-oss-120b": 1.43, "gpt-oss-20b": 1.43}
OTHER_FIXED_BYTES = 3.2
EASY_FILL, LEAST_PENALTY = 0.6, 0.3  # share of memory without a penalty; the strongest penalty
OVERHEAD_BYTES = 0.5e9
FORMATS = (  # pattern of the weight format, bytes a parameter when timing, and when adding up memory
    (r"^(bf|f|fp)16", 2.0, 2.0), (r"^q8_0", 1.0, 1.05), (r"^q6_k", 0.75, 0.8), (r"^q5_k", 0.625, 0.68), (r"q4_k|^q4_0", 0.5, 0.58),
    (r"^q3_k", 0.375, 0.48), (r"^q2_k", 0.25, 0.37), (r"mxfp4", 0.53, 0.53), (r"awq|int4", 0.5, 0.5), (r"int8", 1.0, 1.0),
    (r"^q4$|4bit", 0.5, 0.55), (r"^q6$|6bit", 0.75, 0.75), (r"^q8$|8bit", 1.0, 1.0),
)  # fmt: skip


def estimate(asked: Asked) -> Answer:
    """Return the row's seconds or bytes by llmfit's rules.

    7e9 parameters in Q4_K_M at 1 TB/s: 7e9 * 0.5 / (0.55 * 1e12) = 6.4 ms a token
    """
    row = asked.row
    if row.devices > 1:
        return ONE_DEVICE
    if row.batch != 1:
        return ONE_REQUEST
    bytes_each = _bytes_each(asked.record["weight_dtype"])
    if bytes_each is None:
        return "not a weight format of its table"
    timed, stored = bytes_each
    if row.metric == "tpot":
        return (
            _expert_token_s(asked, stored)
            if row.shape.experts
            else asked.params * timed / (READ_SHARE * asked.bytes_per_s)
        )
    if row.metric == "ttft":
        rate = asked.flop_per_s
        return (
            "the device's arithmetic rate is not known"
            if math.isnan(rate)
            else 2 * asked.active_params * row.prompt_tokens / (PROMPT_SHARE * rate)
        )
    if row.metric == "memory":
        return asked.params * stored + _cache_bytes(asked) + OVERHEAD_BYTES
    return "says nothing of this quantity"


def _bytes_each(dtype: str) -> tuple[float, float] | None:
    return next(((timed, stored) for pattern, timed, stored in FORMATS if re.search(pattern, dtype.lower())), None)


def _expert_token_s(asked: Asked, stored: float) -> float:
    """Return seconds a token of a mixture of experts takes: active experts and, dearer, all else."""
    n, shape = asked.sizes, asked.row.shape
    gated_ffn = 3 * n["hidden_size"]
    experts = n["layers"] * n["experts_active"] * gated_ffn * n["expert_ffn_size"]
    attention = 2 * n["hidden_size"] * n["head_size"] * (n["heads"] + n["kv_heads"])
    shared = gated_ffn * n["shared_ffn_size"] + n["experts"] * n["hidden_size"]
    fixed = n["layers"] * (attention + shared) + 2 * n["vocab_size"] * n["hidden_size"]
    filled = asked.params * stored / asked.memory_bytes
    idle = 1 - n["experts_active"] / n["experts"]
    penalty = max(1 - (filled - EASY_FILL) * idle, LEAST_PENALTY) if EASY_FILL <= filled <= 1 else 1.0
    return (experts * stored + fixed * FIXED_BYTES.get(shape.name, OTHER_FIXED_BYTES)) / (asked.bytes_per_s * penalty)


def _cache_bytes(asked: Asked) -> float:
    n, row = asked.sizes, asked.row
    return 2 * 2 * n["attention_layers"] * n["kv_heads"] * n["head_size"] * (row.prompt_tokens + row.output_tokens)


PEER = Peer(
    name="llmfit", how="rules in our own words: its binary is in no package index that answers here",
    source="https://github.com/AlexsJones/llmfit", answers=rule(estimate),
)  # fmt: skip
