"""Bytes a machine downloads to start serving."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.terms._prediction import Prediction

QUANTITY = "network_bytes_per_start"
USES: tuple[str, ...] = ("artefact_bytes",)


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return the artefact's bytes: all of its files, once."""
    artefact = used["artefact_bytes"]
    return Prediction(mid=artefact.mid, log_sd=artefact.log_sd, inherited_log_sd=artefact.log_sd)
