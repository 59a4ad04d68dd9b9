"""The roofline of LLM-Viewer (hahnyuan/LLM-Viewer, MIT): every operator at the peak, one after the other.

An operator takes the longer of operations / published 16-bit peak and bytes / published bandwidth. Bytes are those of
weights, activations read and written, and the key-value cache. No efficiency, no launches, no devices beside each
other. Without its option for fused attention, as its command line runs by default; activations and cache in 16 bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from benchmarks.peer_rules._asked import ONE_DEVICE, Answer, Asked, Peer, rule

ACTIVATION_BYTES = 2.0
SOFTMAX_OPS, NORM_OPS, ADD_OPS, GATE_OPS = 5, 7, 1, 2  # for each value
Operator = tuple[float, float, float, float]  # operations, weight bytes, bytes read and written, of these written


def estimate(asked: Asked) -> Answer:
    """Return the row's seconds or bytes: the sum of the operators' rooflines, or weights, cache and activations.

    A linear layer of 4096 x 4096 in 16 bits, one token, at 1 TB/s: 33.6 MB and 16 kB of activations take 33.6 us.
    """
    row, n = asked.row, asked.sizes
    if row.devices > 1:
        return ONE_DEVICE
    if row.shape.experts or n["attention_layers"] != n["layers"]:
        return "has no such architecture among its configs"
    if math.isnan(asked.flop_per_s):
        return "the device's arithmetic rate is not known"
    weight_bytes = row.bits / 8
    whole = row.prompt_tokens + row.output_tokens
    if row.metric == "tpot":
        seen = row.prompt_tokens + row.output_tokens / 2
        return _seconds(asked, list(_layer(n, row.batch, 1, seen, weight_bytes)), weight_bytes)
    if row.metric == "ttft":
        if row.concurrent:
            return "has no requests that wait for each other"
        return _seconds(
            asked, list(_layer(n, row.batch, row.prompt_tokens, row.prompt_tokens, weight_bytes)), weight_bytes
        )
    if row.metric == "memory":
        layer = list(_layer(n, row.batch, row.prompt_tokens, row.prompt_tokens, weight_bytes))
        weights = n["layers"] * sum(weight for _, weight, _, _ in layer)
        cache = n["layers"] * 2 * row.batch * whole * ACTIVATION_BYTES * n["hidden_size"] * n["kv_heads"] / n["heads"]
        return weights + cache + sum(written for *_, written in layer)
    return "says nothing of this quantity"


def _layer(n: Mapping[str, float], batch: float, new: float, seen: float, weight_bytes: float) -> Iterator[Operator]:
    """Yield the operators of one layer that reads `new` tokens of each request and attends to `seen`."""
    hidden, tokens = n["hidden_size"], batch * new
    cached = hidden * n["kv_heads"] / n["heads"]  # values of one token's keys
    ffn = [(hidden, n["ffn_size"])] * (2 if n["gated"] else 1) + [(n["ffn_size"], hidden)]
    for rows, columns in [(hidden, hidden), (hidden, cached), (hidden, cached), (hidden, hidden), *ffn]:
        yield _operator(2 * rows * columns * tokens, rows * columns * weight_bytes, rows * tokens, columns * tokens)
    scores, read = n["heads"] * tokens * seen, batch * seen * cached
    yield _operator(2 * hidden * tokens * seen, 0.0, hidden * tokens + read, scores)
    yield _operator(2 * hidden * tokens * seen, 0.0, scores + read, hidden * tokens)
    yield _operator(SOFTMAX_OPS * scores, 0.0, scores, scores)
    for operations, inputs in [(NORM_OPS, 1), (NORM_OPS, 1), (ADD_OPS, 1), (ADD_OPS, 1), (GATE_OPS, 2)]:
        yield _operator(operations * hidden * tokens, 0.0, inputs * hidden * tokens, hidden * tokens)


def _operator(operations: float, weight_bytes: float, values_read: float, values_written: float) -> Operator:
    return (
        operations,
        weight_bytes,
        (values_read + values_written) * ACTIVATION_BYTES,
        values_written * ACTIVATION_BYTES,
    )


def _seconds(asked: Asked, layer: list[Operator], weight_bytes: float) -> float:
    n, batch = asked.sizes, asked.row.batch
    logits = batch * n["vocab_size"]
    head = _operator(
        n["hidden_size"] * logits, n["hidden_size"] * n["vocab_size"] * weight_bytes, n["hidden_size"] * batch, logits
    )
    return n["layers"] * sum(_roofline_s(asked, o) for o in layer) + _roofline_s(asked, head)


def _roofline_s(asked: Asked, operator: Operator) -> float:
    operations, weights, moved, _ = operator
    return max(operations / asked.flop_per_s, (weights + moved) / asked.bytes_per_s)


PEER = Peer(
    name="LLM-Viewer", how="rule in our own words: not in the package index here", source="https://github.com/hahnyuan/LLM-Viewer",
    answers=rule(estimate),
)  # fmt: skip
