"""Which option each matrix gets: the least loss of quality within budgets of bytes, memory, seconds; solved exactly (PuLP).

A multiple-choice knapsack, with the measured loss s of matrix m at option o and what it takes of each budget r:

    minimise sum s[m, o] x[m, o]  subject to  sum over m, o of a[r, m, o] x[m, o] <= budget[r] for each r,
                                              sum over o of x[m, o] = 1 for each m,  x in {0, 1}

An option is any setting of a matrix: bits, zeros, a rank, its removal. Options of several matrices may be tied, so that
all or none of them are taken: all of a layer removed, the same heads in query, key and value. Losses are added up, as in
HAWQ-V2 (arXiv:1911.03852): how errors of two matrices interact is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from knowledge_base.errors import BadInput, EnvironmentProblem, NoFeasiblePlan

LOSS = "loss_increase"
Choices = Mapping[str, Mapping[str, float]]  # option -> loss_increase and what it takes: bytes, seconds, ...
Options = Mapping[str, Choices]  # matrix -> its options
Tie = Sequence[tuple[str, str]]  # (matrix, option)s that are taken all or none

GAP = 1e-6  # of the loss: what the solver may leave unproven and still call optimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The option of each matrix, what they are predicted to cost together, and what they take of everything counted."""

    chosen: Mapping[str, str]
    loss_increase_nats: float  # for each token
    takes: Mapping[str, float]  # sums over the matrices: "bytes", "seconds", whatever all options tell
    gap: float  # share of the loss that a better allocation could at most save; 0 to GAP where it is optimal

    @property
    def optimal(self) -> bool:
        """Whether nothing better exists; else it is the best that was found in time."""
        return self.gap <= GAP


def allocate(
    options: Options, budgets: Mapping[str, float], *, ties: Iterable[Tie] = (), time_limit_s: float = 10.0
) -> Allocation:
    """Return the allocation with the least predicted loss within all budgets, each a limit on the sum of what is taken.

    Raises:
        BadInput: nothing to choose from, no budget, or options that do not tell what a budget limits.
        NoFeasiblePlan: no combination is within the budgets; says which is short, and by how much.
        EnvironmentProblem: the solver found nothing in `time_limit_s`.
    """
    if not options or not budgets:
        raise BadInput(
            "an allocation needs measured sensitivities and a budget",
            hint="measure sensitivities first (calibration.data in the spec)",
        )
    for matrix, choices in options.items():
        for option, choice in choices.items():
            if missing := sorted({LOSS, *budgets} - choice.keys()):
                raise BadInput(f"option `{option}` of {matrix} does not tell its {missing[0]}", hint="measure it anew")
    for what, budget in budgets.items():
        least = sum(min(choice[what] for choice in choices.values()) for choices in options.values())
        if least > budget + _slack(budget):
            raise NoFeasiblePlan(
                f"no allocation fits {budget:.10g} {what}: every matrix at its smallest takes {least:.10g}, "
                f"short by {least - budget:.10g}",
                hint=f"allow {least:.10g} {what}",
            )
    ties = [[(matrix, option) for matrix, option in tie] for tie in ties]
    for matrix, option in (pair for tie in ties for pair in tie):
        if option not in options.get(matrix, {}):
            raise BadInput(f"a tie names option `{option}` of {matrix}, which it lacks", hint="measure it anew")
    chosen, gap = _solve(options, budgets, ties, time_limit_s)
    taken = [options[matrix][option] for matrix, option in chosen.items()]
    counted = set.intersection(*(set(choice) for choice in taken)) - {LOSS}
    return Allocation(
        chosen=chosen,
        loss_increase_nats=sum(choice[LOSS] for choice in taken),
        takes={what: sum(choice[what] for choice in taken) for what in sorted(counted)},
        gap=gap,
    )


def _slack(budget: float) -> float:
    return 1e-9 * abs(budget)


def useful(choices: Choices, budgets: Iterable[str], tied: Iterable[str] = ()) -> list[str]:
    """Return the options that no other beats in its loss and in all budgets at once.

    Tied options stay, and beat none: whether they can be taken is not this matrix's to say.
    """
    # By loss and then by what they take, so that only an earlier option can beat a later one.
    order = sorted(choices, key=lambda o: (choices[o][LOSS], *(choices[o][what] for what in budgets)))
    tied, kept = set(tied), []
    beating: list[list[float]] = []
    for option in order:
        takes = [choices[option][what] for what in budgets]
        if option in tied:
            kept.append(option)
        elif not any(all(a <= b for a, b in zip(other, takes)) for other in beating):
            kept.append(option)
            beating.append(takes)
    return kept


def _solve(
    options: Options, budgets: Mapping[str, float], ties: Sequence[Tie], time_limit_s: float
) -> tuple[dict[str, str], float]:
    """Return the option of each matrix, and the share of the loss that is not proven to be least."""
    import pulp

    tied = {pair for tie in ties for pair in tie}
    kept = {
        matrix: useful(choices, budgets, (o for o in choices if (matrix, o) in tied))
        for matrix, choices in options.items()
    }
    # Solvers work to absolute tolerances near 1e-7: losses are scaled to sum to 1e6, budgets to about 1e4.
    top = sum(max(options[m][o][LOSS] for o in names) for m, names in kept.items()) or 1.0
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    take = {
        (m, o): problem.add_variable(f"x_{row}_{column}", cat="Binary")
        for row, (m, names) in enumerate(kept.items())
        for column, o in enumerate(names)
    }
    problem += pulp.lpSum(1e6 * options[m][o][LOSS] / top * x for (m, o), x in take.items())
    for what, budget in budgets.items():
        unit, limit = _unit([options[m][o][what] for m, o in take], budget)
        problem += pulp.lpSum(options[m][o][what] / unit * x for (m, o), x in take.items()) <= limit
    for m, names in kept.items():
        problem += pulp.lpSum(take[m, o] for o in names) == 1
    for first, *others in ties:
        for other in others:
            problem += take[first] == take[other]
    try:
        problem.solve(pulp.HiGHS(msg=False, timeLimit=time_limit_s, gapRel=GAP, threads=1))
    except pulp.PulpSolverError as error:
        raise EnvironmentProblem(
            f"the solver cannot run: {error}", hint="pip install highspy, PuLP's solver here"
        ) from error
    if problem.sol_status == pulp.LpSolutionInfeasible:
        raise NoFeasiblePlan(
            f"no allocation is within all of {', '.join(f'{v:.10g} {k}' for k, v in budgets.items())} at once",
            hint="each alone can be met: allow more of one of them",
        )
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise EnvironmentProblem(
            f"the solver found no allocation in {time_limit_s:g} s", hint="give it more time, or allow more"
        )
    chosen = {m: max(names, key=lambda o: take[m, o].value()) for m, names in kept.items()}
    for what, budget in budgets.items():
        assert sum(options[m][o][what] for m, o in chosen.items()) <= budget + _slack(budget), what
    info = problem.solverModel.getInfo()
    reached = info.objective_function_value
    return chosen, max(0.0, (reached - info.mip_dual_bound) / abs(reached)) if reached else 0.0


def _unit(takes: Sequence[float], budget: float) -> tuple[float, float]:
    """Return what to divide a budget's numbers by, and the limit then.

    Whole numbers by their common divisor, which the solver then keeps to exactly; others to a budget of 1e4, less what
    the solver may overstep.
    """
    if all(float(value).is_integer() for value in takes):
        unit = math.gcd(*map(int, takes)) or 1
        return unit, math.floor((budget + _slack(budget)) / unit)
    return budget / 1e4 or 1.0, 1e4 * (1 - 1e-10)
