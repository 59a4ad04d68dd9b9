"""Operational carbon for each output token."""

from __future__ import annotations

from collections.abc import Mapping

from cost_models.case import Case
from cost_models.catalogue import grid_carbon
from cost_models.terms._prediction import Prediction

QUANTITY = "carbon_gco2e_per_token"
USES: tuple[str, ...] = ("energy_j_per_token",)

J_PER_KWH = 3.6e6


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return energy x PUE x grid intensity, in grams; the making of the machine is left out."""
    energy = used["energy_j_per_token"]
    intensity, note = case.hardware.grid_gco2e_per_kwh, ""
    if intensity is None:
        intensity, source = grid_carbon("world")
        note = f"grid: world average {intensity:g} g/kWh ({source})"
    return Prediction(
        mid=energy.mid * case.hardware.pue * intensity / J_PER_KWH,
        log_sd=energy.log_sd,
        inherited_log_sd=energy.log_sd,
        note=note,
    )
