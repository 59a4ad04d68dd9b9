"""Time per output token after the first: one decode step over the tokens it yields."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cost_models import offloading
from cost_models.case import Case
from cost_models.roofline import decode_parts, few_rows_log_sd
from cost_models.terms._prediction import Prediction, total

QUANTITY = "tpot_s"
USES: tuple[str, ...] = ()

# Of what a machine gives a step minutes apart: neighbours, clocks. Processors share memory with their neighbours: after a
# calibration, decode of 51 plans minutes later was 15 % off in one direction (benchmarks/calibration_error.py, 2026-11).
MACHINE_LOG_SD = {"cpu": 0.2, "gpu": 0.1}
ACCEPTANCE_LOG_SD = 0.5  # of the gain from speculation: it depends on the text


def predict(case: Case, used: Mapping[str, Prediction]) -> Prediction:
    """Return step seconds / tokens kept for each step."""
    case.need_decoding()
    kept = case.demand.tokens_per_step
    parts = {name: part / kept for name, part in decode_parts(case).items()}
    doubts = {"engine overhead": case.rates.overhead_log_sd, "KV cache": 0.5, offloading.PART: 0.0}
    step = total(parts, doubts, np.hypot(case.rates.weights_log_sd, few_rows_log_sd(case)))
    acceptance = ACCEPTANCE_LOG_SD * np.log(np.maximum(kept, 1.0))
    machine = np.hypot(MACHINE_LOG_SD[case.device.kind], offloading.log_sd(case, kept * step.mid))
    return Prediction(
        mid=step.mid,
        log_sd=np.hypot(np.hypot(step.log_sd, machine), acceptance),
        step_log_sd=acceptance,
        parts=parts,
        note=offloading.note(case),
    )
