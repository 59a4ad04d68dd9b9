"""What a training run costs: joules, grams and dollars, beside its memory and time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cost_models.catalogue import electricity_price, grid_carbon
from cost_models.efficiency import rate
from cost_models.roofline import power_w
from cost_models.terms.energy_j_per_token import device_power
from cost_models.training.memory import TrainingMemory, training_memory, value
from cost_models.training.setup import TrainingSetup, base_bytes, state_bytes
from cost_models.training.time import MFU_LOG_SD, Z80, TrainingTime, training_time
from knowledge_base.errors import BadInput
from knowledge_base.types import Hardware, Model, Value


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """All resources of a training run on one device."""

    memory: TrainingMemory
    fits: bool
    time: TrainingTime
    energy_j: Value
    carbon_gco2e: Value
    cost_usd: Value


def training_cost(model: Model, setup: TrainingSetup, hardware: Hardware, *, tokens: float) -> TrainingCost:
    """Return memory, time, energy, carbon and money of training on `tokens` tokens on the machine's device.

    Energy is idle power plus activity (roofline.power_w) x time, never power cap x time. Money is the hourly price, and
    electricity where it is priced or the machine is not rented. The carbon of making the machine is left out.

    Raises:
        BadInput: the formulas do not hold for this model, or no tokens are asked for.
        EnvironmentProblem: the device lacks a rate, or anything to model its power from.
    """
    memory, time = training_memory(model, setup), training_time(model, setup, hardware, tokens=tokens)
    moved = base_bytes(model, setup) * 3 * setup.gradient_accumulation + 2 * state_bytes(model, setup)
    return bill(memory, time, setup, hardware, moved_bytes=moved, tokens=tokens)


def bill(
    memory: TrainingMemory, time: TrainingTime, setup: TrainingSetup, hardware: Hardware, *, moved_bytes: float,
    tokens: float, machines: int = 1,
) -> TrainingCost:  # fmt: skip
    """Return what a run costs on `machines` equal machines of one device; flop and bytes of a step are each one's.

    Raises:
        BadInput: no tokens are asked for.
        EnvironmentProblem: there is nothing to model the device's power from.
    """
    if not 0 < tokens < math.inf:
        raise BadInput(f"tokens to train on must be above 0, got {tokens:g}", hint="say how many", where="tokens")
    device = hardware.device
    idle_w, busy_w, power_doubt, note = device_power(device)
    compute_share = time.flop / (time.step.mid * rate(device, setup.weight_dtype))
    memory_share = min(1.0, moved_bytes / (time.step.mid * device.memory_bytes_per_s))
    base = 0.6 if device.kind == "cpu" else 0.35
    watts = machines * float(power_w(idle_w, busy_w, memory_share, compute_share, base=base))
    hours = time.total.mid / 3600
    kwh = watts * hours * hardware.pue / 1000
    grid, grid_source = hardware.grid_gco2e_per_kwh, "the machine's grid"
    if grid is None:
        grid, grid_source = grid_carbon()
    price, price_source = hardware.electricity_usd_per_kwh, "the machine's price"
    if price is None and not hardware.rented:
        price, price_source = electricity_price()
    rent = machines * (hardware.price_usd_per_h or 0.0) * hours
    electricity = kwh * (price or 0.0)
    doubt = Z80 * math.hypot(MFU_LOG_SD, power_doubt)
    spent = (
        []
        if hardware.price_usd_per_h is None
        else [f"${rent:.3g} {'amortised hardware' if hardware.owned else 'machine'}"]
    )
    spent += [] if price is None else [f"${electricity:.3g} electricity ({price_source})"]
    return TrainingCost(
        memory=memory,
        fits=memory.total.mid <= device.memory_bytes,
        time=time,
        energy_j=value(3600 * watts * hours, doubt, f"{watts:.0f} W for {hours:.3g} h" + (f"; {note}" if note else "")),
        carbon_gco2e=value(kwh * grid, doubt, f"{kwh:.3g} kWh at {grid:g} g/kWh ({grid_source})"),
        cost_usd=value(rent + electricity, Z80 * MFU_LOG_SD if rent > electricity else doubt, ", ".join(spent)),
    )
