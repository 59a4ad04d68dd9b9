"""Highest memory of the serving process."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.roofline import memory_parts
from cost_models.terms._prediction import Prediction, total

QUANTITY = "peak_memory_bytes"
USES: tuple[str, ...] = ("weights_bytes", "kv_cache_bytes")


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return engine + weights + cache + activations."""
    weights, cache = used["weights_bytes"], used["kv_cache_bytes"]
    parts = {**memory_parts(case), "weights": weights.mid, "KV cache": cache.mid}
    doubts = {"weights": weights.log_sd, "KV cache": cache.log_sd, "activations": 0.5, "engine": 0.25}
    return total(parts, doubts, 0.0, inherited=("weights", "KV cache"))
