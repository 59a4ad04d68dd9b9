"""Highest memory of the serving process."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.roofline import memory_parts
from cost_models.terms._prediction import Prediction, total

QUANTITY = "peak_memory_bytes"
USES: tuple[str, ...] = ("weights_bytes", "kv_cache_bytes")


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return engine + weights + what kernels copy of them + cache + activations + logits; an encoder keeps no cache."""
    made_of = {"weights": used["weights_bytes"]}
    if case.decodes:
        made_of["KV cache"] = used["kv_cache_bytes"]
    parts = memory_parts(case) | {name: part.mid for name, part in made_of.items()}
    doubts = {"activations": 0.5, "logits": 0.5, "engine": case.rates.runtime_log_sd}
    doubts["kernels' copies of weights"] = case.rates.copies_log_sd
    parts = {name: part for name, part in parts.items() if np.any(part)}
    return total(parts, doubts | {name: part.log_sd for name, part in made_of.items()}, 0.0, inherited=tuple(made_of))
