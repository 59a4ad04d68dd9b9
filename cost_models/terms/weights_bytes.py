"""Memory of the loaded weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models import offloading
from cost_models.case import Case
from cost_models.engine_memory import beside_bytes
from cost_models.roofline import weights_bytes
from cost_models.terms._prediction import Prediction

QUANTITY = "weights_bytes"
USES: tuple[str, ...] = ()


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return the bytes of all weights held in memory: layers, embedding, head (once when tied) and the rest.

    Some engines hold more than is stored: what the processor cannot compute with in a wider type, a tied table twice.
    """
    demand, beside = case.demand, beside_bytes(case)
    saved = offloading.saved_bytes(case)
    parts = {
        "layers": demand.linear_bytes - saved, "embedding": demand.embedding_bytes, "head": demand.head_stored_bytes,
        "norms and biases": demand.other_bytes,
    }  # fmt: skip
    if np.any(beside):
        parts["in a wider type, or a second time"] = beside
    return Prediction(
        mid=weights_bytes(case) + beside - saved, log_sd=np.full_like(demand.linear_bytes, 0.02), parts=parts
    )
