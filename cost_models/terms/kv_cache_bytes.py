"""Memory of the KV cache (and recurrent state) at full length."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.roofline import cache_bytes
from cost_models.terms._prediction import Prediction

QUANTITY = "kv_cache_bytes"
USES: tuple[str, ...] = ()


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return batch x (tokens kept x bytes for each token + state bytes)."""
    case.need_decoding()
    mid = cache_bytes(case)
    return Prediction(mid=mid, log_sd=np.full_like(mid, 0.05))
