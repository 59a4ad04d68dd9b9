"""Memory of the loaded weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.roofline import weights_bytes
from cost_models.terms._prediction import Prediction

QUANTITY = "weights_bytes"
USES: tuple[str, ...] = ()


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return the bytes of all stored weights: layers, embedding, head (once when tied) and the rest."""
    demand = case.demand
    parts = {
        "layers": demand.linear_bytes, "embedding": demand.embedding_bytes, "head": demand.head_stored_bytes,
        "norms and biases": demand.other_bytes,
    }  # fmt: skip
    return Prediction(mid=weights_bytes(case), log_sd=np.full_like(demand.linear_bytes, 0.02), parts=parts)
