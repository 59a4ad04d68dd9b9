"""The speed rule of gguf-parser (gpustack/gguf-parser-go, MIT): two rooflines, of the weights and of the cache, added.

Its memory figure needs the GGUF file itself and is not asked for. The copy of one row of activations to the host, which
it adds, is left out: microseconds, at a rate the rows do not tell.
"""

from __future__ import annotations

import math

from benchmarks.peer_rules._asked import ONE_DEVICE, ONE_REQUEST, Answer, Asked, Peer, rule


def estimate(asked: Asked) -> Answer:
    """Return seconds a token: max(2 * params / peak, weights / bandwidth) + max(cache operations / peak, cache / bandwidth).

    8e9 parameters of 4.85 bits at 1 TB/s and 100 Tflop/s, empty cache: max(0.16 ms, 4.85 ms) = 4.85 ms
    """
    row, shape = asked.row, asked.row.shape
    if row.family != "llama_cpp":
        return "reads GGUF files only"
    if row.metric == "memory":
        return "needs the GGUF file itself"
    if row.metric != "tpot":
        return "says nothing of this quantity"
    if row.devices > 1:
        return ONE_DEVICE
    if row.batch != 1:
        return ONE_REQUEST
    if shape.experts:
        return "its rule is of dense models"
    if math.isnan(asked.flop_per_s):
        return "the device's arithmetic rate is not known"
    seen = row.prompt_tokens + row.output_tokens / 2
    cached = 2 * (seen * shape.cached_values_per_token + min(seen, shape.window_tokens) * shape.window_values_per_token)
    weights = max(2 * asked.params / asked.flop_per_s, asked.params * row.bits / 8 / asked.bytes_per_s)
    return weights + max(seen * shape.attention_flop_per_pair / asked.flop_per_s, cached / asked.bytes_per_s)


PEER = Peer(
    name="gguf-parser", how="rule in our own words", source="https://github.com/gpustack/gguf-parser-go", answers=rule(estimate)
)  # fmt: skip
