"""What a plan would cost on a machine, without running it: arithmetic with sources, corrected by measurements.

    estimate(plan, model, workload, hardware)        one plan: values with intervals and reasons
    estimate_many(plans, model, workload, hardware)  thousands of plans: arrays
    training_cost(model, setup, hardware, tokens=…)  training or fine-tuning on one device
    distributed_cost(model, setup, layout, cluster, …)  the same over several

Names load on first use; neither needs torch, and scikit-learn is imported only by calibrate.fit.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "estimate": "cost_models.predict",
    "estimate_many": "cost_models.predict",
    "Estimates": "cost_models.predict",
    "Calibration": "cost_models.calibration",
    "terms": "cost_models.terms",
    **dict.fromkeys(("TrainingSetup", "training_cost", "training_memory", "training_time"), "cost_models.training"),
    **dict.fromkeys(("Cluster", "Layout", "Link", "distributed_cost"), "cost_models.distributed"),
}

if TYPE_CHECKING:
    from cost_models.calibration import Calibration as Calibration
    from cost_models.distributed import Cluster as Cluster
    from cost_models.distributed import Layout as Layout
    from cost_models.distributed import Link as Link
    from cost_models.distributed import distributed_cost as distributed_cost
    from cost_models.predict import Estimates as Estimates
    from cost_models.predict import estimate as estimate
    from cost_models.predict import estimate_many as estimate_many
    from cost_models.training import TrainingSetup as TrainingSetup
    from cost_models.training import training_cost as training_cost
    from cost_models.training import training_memory as training_memory
    from cost_models.training import training_time as training_time


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cost_models' has no attribute {name!r}")
