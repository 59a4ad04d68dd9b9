"""The bandwidth rule everybody knows: a token takes as long as reading the weights it needs once."""

from __future__ import annotations

from benchmarks.peer_rules._asked import ONE_REQUEST, Answer, Asked, Peer, rule


def estimate(asked: Asked) -> Answer:
    """Return active weight bytes / (devices * bandwidth) in seconds; nothing is fitted.

        7.5e9 parameters of 16 bits, head included, at 1 TB/s: 15e9 / 1e12 = 0.015 s

    Source: Kipply, "Transformer Inference Arithmetic", 2022.
    """
    row, shape = asked.row, asked.row.shape
    if row.metric != "tpot":
        return "a rule of decoding only"
    if row.batch != 1:
        return ONE_REQUEST
    experts = shape.expert_params * shape.experts_active / max(shape.experts, 1)
    read = (shape.dense_params * row.bits + experts * row.expert_bits) / 8
    return read / (row.devices * asked.bytes_per_s)


PEER = Peer(
    name="bandwidth rule", how="rule", source="https://kipp.ly/transformer-inference-arithmetic/", answers=rule(estimate)
)  # fmt: skip
