"""Energy of the device for each output token, of an encoder for each it reads: power that follows activity, times time. Never power cap x time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models.case import Case
from cost_models.roofline import power_w, request_work
from cost_models.terms._prediction import Prediction
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Device

QUANTITY = "energy_j_per_token"
USES: tuple[str, ...] = ("latency_s",)

CPU_W_PER_CORE = 4.0  # codecarbon (MIT) for a CPU it does not know: 4 W for each thread
MEMORY_W = 5.0  # codecarbon (MIT): 5 W for each DIMM of an x86 machine; at least one
IDLE_RATIO = {"cpu": 0.3, "gpu": 0.12}  # of busy power: H100 70 of 700 W, B200 about 120 of 1000 W


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return mean power x latency / (batch x counted_tokens), in joules.

    The published power cap (TDP) stands for busy power: what the device draws when memory and arithmetic are both
    fully used. The rest of the machine (fans, disks, idle GPUs) is left out.

    Raises:
        EnvironmentProblem: the device has neither a known power nor a core count to model one from.
    """
    idle_w, busy_w, doubt, note = device_power(case.device)
    latency = used["latency_s"]
    read, flop = request_work(case)
    memory_share = np.minimum(read / (latency.mid * case.rates.bytes_per_s), 1.0)
    compute_share = np.minimum(flop / (latency.mid * case.rates.peak_flop_per_s), 1.0)
    power = power_w(idle_w, busy_w, memory_share, compute_share, base=0.6 if case.device.kind == "cpu" else 0.35)
    tokens = case.demand.batch * case.counted_tokens
    return Prediction(
        mid=power * latency.mid / tokens,
        log_sd=np.hypot(latency.log_sd, doubt),
        inherited_log_sd=latency.log_sd,
        note=note,
    )


def device_power(device: Device) -> tuple[float, float, float, str]:
    """Return (idle W, busy W, standard deviation of the log of power, what was assumed).

    Raises:
        EnvironmentProblem: nothing to model power from.
    """
    note = ""
    if device.busy_w:
        busy, doubt = device.busy_w, 0.25
    elif device.kind == "cpu" and device.cores:
        busy, doubt = CPU_W_PER_CORE * device.cores + MEMORY_W, 0.7
        note = f"power of `{device.name}` is not known: {CPU_W_PER_CORE:g} W for each core and {MEMORY_W:g} W of memory assumed"
    else:
        raise EnvironmentProblem(
            f"the power of `{device.name}` is not known, so energy cannot be predicted",
            hint="leave out energy and carbon budgets and objectives, or plan for a machine with a known power",
        )
    idle = IDLE_RATIO[device.kind] * busy if device.idle_w is None else device.idle_w
    return idle, busy, doubt, note
