"""Money for each output token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from cost_models.case import Case
from cost_models.catalogue import electricity_price
from cost_models.terms._prediction import Prediction, total
from knowledge_base.types import Hardware

QUANTITY = "cost_usd_per_token"
USES: tuple[str, ...] = ("throughput_tokens_per_s", "energy_j_per_token")

J_PER_KWH = 3.6e6


def basis(hardware: Hardware) -> str:
    """Return what money is counted of: figures of unlike kinds say nothing beside each other."""
    if hardware.rented:
        return "rent"
    return "buying and electricity" if hardware.owned else "electricity alone"


def paid_electricity(hardware: Hardware) -> tuple[float | None, str]:
    """Return the dollars for each kilowatt-hour that are paid beside an hourly price, None where that holds them, and a note."""
    if hardware.electricity_usd_per_kwh is not None or hardware.rented:
        return hardware.electricity_usd_per_kwh, ""
    price, source = electricity_price("world")
    missing = "" if hardware.owned else "; no hourly price of the machine"
    return price, f"electricity: world average ${price:g}/kWh ({source}){missing}"


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return hourly price / throughput + electricity price x energy x PUE.

    A rented machine's price holds its electricity, so electricity counts only when its price is given or the machine is
    not rented; then the world average is taken if none is given. Of a machine that is owned, the hourly price is that of
    buying it over the hours of its life.
    """
    hardware = case.hardware
    throughput = used["throughput_tokens_per_s"]
    parts, doubts, note = {}, {}, ""
    if hardware.price_usd_per_h is not None:
        part = "amortised hardware" if hardware.owned else "machine"
        parts[part] = hardware.price_usd_per_h / 3600 / throughput.mid
        doubts[part] = throughput.log_sd
    electricity, note = paid_electricity(hardware)
    if electricity is not None:
        energy = used["energy_j_per_token"]
        parts["electricity"] = energy.mid * hardware.pue * electricity / J_PER_KWH
        doubts["electricity"] = energy.log_sd
    result = total(parts, doubts, 0.0, note, inherited=parts)
    if np.all(result.mid > 0):
        return result
    return replace(result, log_sd=throughput.log_sd, inherited_log_sd=throughput.log_sd)
