"""How hard to try: every trial count of the search in one table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Bounds of one effort level. Plans up to `exhaustive_plans` are all priced; beyond, samplers propose."""

    exhaustive_plans: int
    trials: int  # proposals of a sampler
    population: int  # proposals priced together
    batch: int  # candidates measured between two calibrations


EFFORTS = {
    "quick": Effort(exhaustive_plans=20_000, trials=1_000, population=50, batch=2),
    "normal": Effort(exhaustive_plans=60_000, trials=3_000, population=50, batch=3),
    "thorough": Effort(exhaustive_plans=200_000, trials=10_000, population=100, batch=4),
}
