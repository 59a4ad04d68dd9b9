"""Time to make the artefact from the unchanged model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "build_s"
LEARNS = "build"  # of every step, whatever it changes of serving
USES: tuple[str, ...] = ("artefact_bytes",)

DISK_BYTES_PER_S = 0.5e9  # a prior for local SSDs, checksums included
START_S = 0.4  # reading the request, checking and sealing the artefact; modules are loaded before the clock starts


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return start + reading the model and writing the artefact + the steps' arithmetic and traffic."""
    demand, rates = case.demand, case.rates
    artefact = used["artefact_bytes"].mid
    parts = {
        "start": np.full_like(artefact, START_S),
        "files": 2 * artefact / DISK_BYTES_PER_S,
        "arithmetic": demand.build_flop / rates.flop_per_s,
        "traffic": demand.build_bytes / rates.bytes_per_s,
    }
    return Prediction(mid=sum(parts.values()), log_sd=np.full_like(artefact, 0.8), parts=parts)
