"""Size of the model's files on disk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.roofline import weights_bytes
from cost_models.terms._prediction import Prediction

QUANTITY = "artefact_bytes"
USES: tuple[str, ...] = ()

TOKENIZER_BYTES_PER_ENTRY = 65.0  # tokenizer.json of byte-level BPE: 64 at 4,096 entries, 71 at 128,256 (Llama 3)


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return stored weights + tokenizer."""
    unpacked = case.demand.linear_bytes * (1 - case.demand.disk_share)  # in memory only
    parts = {"weights": weights_bytes(case) - unpacked, "tokenizer": TOKENIZER_BYTES_PER_ENTRY * case.model.vocab_size}
    mid = parts["weights"] + parts["tokenizer"]
    return Prediction(mid=mid, log_sd=np.full_like(mid, 0.02), parts=parts)
