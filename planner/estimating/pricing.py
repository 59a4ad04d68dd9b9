"""One plan priced on one machine, with the cost terms' own parts beside the figures made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from knowledge_base.metrics import METRICS
from knowledge_base.types import Estimate, Plan, Value
from planner.estimating.asking import Asked

if TYPE_CHECKING:
    from cost_models.case import Case
    from cost_models.predict import Figures
    from knowledge_base.types import Demand

PEAK = "peak_memory_bytes"
SIZES = ("memory", "network", "quality")  # resources whose figures need no run


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """What is predicted. `case` and `figures` are what the terms saw and said, as columns of one plan."""

    asked: Asked
    plan: Plan
    demand: Demand
    case: Case
    figures: Figures
    estimate: Estimate

    @property
    def values(self) -> Mapping[str, Value]:
        return self.estimate.values

    @property
    def limit_bytes(self) -> int:
        """Memory there is for the serving process."""
        return self.asked.hardware.memory_limit_bytes

    @property
    def fits(self) -> bool:
        """Whether predicted peak memory is within the machine's limit."""
        return self.values[PEAK].mid <= self.limit_bytes

    @property
    def holding(self) -> dict[str, Value]:
        """The figures that hold: all where the plan fits, else its sizes and quality, for nothing would run."""
        return {n: v for n, v in self.values.items() if self.fits or METRICS[n].resource in SIZES}


def price(asked: Asked) -> Priced:
    """Return the predictions of a plan that `check` let pass.

    Raises:
        EnvironmentProblem: the device lacks the rate of the dtype the plan computes with.
    """
    from cost_models.calibration import Features
    from cost_models.case import case_of
    from cost_models.demand import chains
    from cost_models.predict import estimate, evaluate

    plan = asked.plan
    node = chains(asked.model, asked.workload).node(plan)
    case = case_of([node], asked.workload, asked.hardware)
    return Priced(
        asked=asked, plan=plan, demand=node.demand, case=case, figures=evaluate(case, None, Features([node])),
        estimate=estimate(plan, asked.model, asked.workload, asked.hardware),
    )  # fmt: skip


def does_not_fit(priced: Priced) -> str:
    """Return the beginning of a sentence on a plan that needs more memory than there is."""
    from knowledge_base import units

    peak, limit = (units.format(v, "bytes") for v in (priced.values[PEAK].mid, priced.limit_bytes))
    return f"does not fit: peak memory {peak} of {limit}"
