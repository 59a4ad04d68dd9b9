"""Money for each output token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cost_models.case import Case
from cost_models.catalogue import electricity_price
from cost_models.terms._prediction import Prediction, total

QUANTITY = "cost_usd_per_token"
USES: tuple[str, ...] = ("throughput_tokens_per_s", "energy_j_per_token")

J_PER_KWH = 3.6e6


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return hourly price / throughput + electricity price x energy x PUE.

    A rented machine's price holds its electricity, so electricity counts only when its price is given or the
    machine has no hourly price; then the world average is taken if none is given.
    """
    hardware = case.hardware
    throughput = used["throughput_tokens_per_s"]
    parts, doubts, note = {}, {}, ""
    if hardware.price_usd_per_h is not None:
        parts["machine"] = hardware.price_usd_per_h / 3600 / throughput.mid
        doubts["machine"] = throughput.log_sd
    electricity = hardware.electricity_usd_per_kwh
    if electricity is None and hardware.price_usd_per_h is None:
        electricity, source = electricity_price("world")
        note = f"electricity: world average ${electricity:g}/kWh ({source}); no hourly price of the machine"
    if electricity is not None:
        energy = used["energy_j_per_token"]
        parts["electricity"] = energy.mid * hardware.pue * electricity / J_PER_KWH
        doubts["electricity"] = energy.log_sd
    result = total(parts, doubts, 0.0, note, inherited=parts)
    if np.all(result.mid > 0):
        return result
    return replace(result, log_sd=throughput.log_sd, inherited_log_sd=throughput.log_sd)
