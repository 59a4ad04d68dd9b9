"""Which matrix gets how many bits: the least loss of quality within a size, solved exactly (PuLP).

A multiple-choice knapsack, with measured sensitivities s and stored bytes b of matrix m at option o:

    minimise sum s[m, o] x[m, o]  subject to  sum b[m, o] x[m, o] <= budget,  sum over o of x[m, o] = 1,  x in {0, 1}

Losses are added up, as in HAWQ-V2 (arXiv:1911.03852): how errors of two matrices interact is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_base.errors import BadInput, EnvironmentProblem, NoFeasiblePlan

Sensitivities = Mapping[str, Mapping[str, Mapping[str, float]]]  # module -> bits -> loss_increase, bytes, params


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Bits for each module, and what they are predicted to cost. `loss_increase_nats` is for each token."""

    bits: Mapping[str, int]
    loss_increase_nats: float
    bytes: int
    average_bits: float | None  # stored bits for each weight; None where the sensitivities do not tell the weights
    status: str  # "optimal" | "best in time"


def allocate_bits(
    sensitivities: Sensitivities,
    *,
    budget_bytes: float | None = None,
    average_bits: float | None = None,
    time_limit_s: float = 10.0,
) -> Allocation:
    """Return the allocation with the least predicted loss within `budget_bytes`, or `average_bits` for each weight.

    Raises:
        BadInput: not exactly one of the budgets, or sensitivities without what they need.
        NoFeasiblePlan: the smallest options together are larger than the budget; says by how much.
        EnvironmentProblem: the solver found nothing in `time_limit_s`.
    """
    if not sensitivities or (budget_bytes is None) == (average_bits is None):
        raise BadInput(
            "an allocation needs measured sensitivities and exactly one of budget_bytes and average_bits",
            hint="measure sensitivities first (calibration.data in the spec)",
        )
    weights = _weights(sensitivities)
    if budget_bytes is None:
        if weights is None:
            raise BadInput("these sensitivities do not tell `params`", hint="give budget_bytes, or measure them anew")
        budget_bytes = weights * average_bits / 8  # type: ignore[operator]
    budget = math.floor(budget_bytes + 1e-6)
    options = {module: _useful(choices) for module, choices in sensitivities.items()}
    smallest = sum(choices[0][1] for choices in options.values())
    if smallest > budget:
        raise NoFeasiblePlan(
            f"no allocation fits {budget} bytes: every matrix at its smallest takes {smallest}, "
            f"short by {smallest - budget}",
            hint=f"allow at least {8 * smallest / weights:.2f} bits for each weight"
            if weights
            else f"allow {smallest} bytes",
        )
    chosen, status = _solve(options, budget, time_limit_s)
    size = sum(int(sensitivities[m][str(b)]["bytes"]) for m, b in chosen.items())
    return Allocation(
        bits=chosen,
        loss_increase_nats=sum(sensitivities[m][str(b)]["loss_increase"] for m, b in chosen.items()),
        bytes=size,
        average_bits=8 * size / weights if weights else None,
        status=status,
    )


def _weights(sensitivities: Sensitivities) -> int | None:
    """Return the number of weights of all modules, or None where a module does not tell it."""
    counts = [next(iter(choices.values())).get("params") for choices in sensitivities.values()]
    return None if None in counts else int(sum(counts))  # type: ignore[arg-type]


def _useful(choices: Mapping[str, Mapping[str, float]]) -> list[tuple[int, int, float]]:
    """Return (bits, bytes, loss) by rising bytes, without options that another beats in both."""
    rows = sorted((int(c["bytes"]), float(c["loss_increase"]), int(bits)) for bits, c in choices.items())
    kept: list[tuple[int, int, float]] = []
    for size, loss, bits in rows:
        if not kept or loss < kept[-1][2]:
            kept.append((bits, size, loss))
    return kept


def _solve(
    options: Mapping[str, list[tuple[int, int, float]]], budget: int, time_limit_s: float
) -> tuple[dict[str, int], str]:
    import pulp

    # Solvers work to absolute tolerances near 1e-7: losses are scaled to sum to 1e6, bytes to whole units.
    top = sum(max(loss for _, _, loss in choices) for choices in options.values()) or 1.0
    unit = math.gcd(*(size for choices in options.values() for _, size, _ in choices)) or 1
    problem = pulp.LpProblem("bits", pulp.LpMinimize)
    take = {
        (m, i): problem.add_variable(f"x_{row}_{i}", cat="Binary")
        for row, (m, choices) in enumerate(options.items())
        for i in range(len(choices))
    }
    problem += pulp.lpSum(1e6 * options[m][i][2] / top * x for (m, i), x in take.items())
    problem += pulp.lpSum(options[m][i][1] // unit * x for (m, i), x in take.items()) <= budget // unit
    for m, choices in options.items():
        problem += pulp.lpSum(take[m, i] for i in range(len(choices))) == 1
    try:
        problem.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, threads=1))
    except pulp.PulpSolverError as error:
        raise EnvironmentProblem(
            f"the solver cannot run: {error}", hint="pip install highspy, PuLP's solver here"
        ) from error
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise EnvironmentProblem(
            f"the solver found no allocation in {time_limit_s:g} s", hint="give it more time, or allow more bytes"
        )
    chosen = {m: choices[max(range(len(choices)), key=lambda i: take[m, i].value())] for m, choices in options.items()}
    optimal = problem.sol_status == pulp.LpSolutionOptimal
    assert sum(size for _, size, _ in chosen.values()) <= budget
    return {m: bits for m, (bits, _, _) in chosen.items()}, "optimal" if optimal else "best in time"
