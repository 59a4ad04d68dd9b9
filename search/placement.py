"""Where weights, cache and hidden states lie: on the device, in the host's memory, on disk; with the batch, solved exactly (PuLP).

FlexGen's question (Sheng et al. 2023, arXiv:2303.06865) with its cost model: each part of a layer takes the longest of
computing and of what goes over each link between two tiers, for links and device work at the same time. For one batch b,
with the shares w, c, h of a part's weights W, of its cache K for each sequence (of which a step reads R and writes N),
and of the states H that pass from layer to layer:

    minimise sum over parts of time[p]  subject to
        time[p] >= compute[p](b)
        time[p] >= sum over tiers t below link l of (w[p,t] W + b c[p,t] R + b h[t] H) / read[l]
        time[p] >= sum over tiers t below link l of (b c[p,t] N + b h[t] H) / write[l]
        bytes in tier t <= its capacity, two parts in transit to it included;  shares of each thing add up to 1

Equal parts get equal shares: the average of a best answer's is as good, for all of it is convex. So parts are counted in
groups, and 80 layers take as long as one. `whole` is how this project's engine does it: a part lies in one tier, and what
is to come is read while resident parts compute, so a step takes the longest of all computing and of each link's load.
Batches are few, so each is tried; of them the one with the least time for each token is taken.

Left out, of FlexGen: attention computed on the host, and blocks of several batches that share one read of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem, NoFeasiblePlan

Shares = Mapping[str, Mapping[str, float]]  # part -> tier -> share
EVERYTHING = frozenset({"weights", "cache", "states"})
TRANSIT = 2  # parts in memory on their way: one that computes, one that is read
COMPUTING = "computing"
GAP = 1e-7  # of a step's time that may stay unproven
SLACK = 1e-10  # of a capacity, what sums may be off by: below a byte of some GB
# What lies elsewhere though it need not, costs this share of a step's time: of equal answers the one that moves least.
NEARER = 1e-6
TIME_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Equal parts of layers, and what each holds and does in one step. Seconds are the device's."""

    name: str
    count: int
    weight_bytes: float
    cache_bytes: float = 0.0  # for each sequence, at its full length
    cache_read_bytes: float = 0.0  # for each sequence and step, in the mean
    cache_new_bytes: float = 0.0  # for each sequence and step
    state_bytes: float = 0.0  # of a sequence's hidden states, which the part takes in and gives out
    read_s: float = 0.0  # its weights from the device's memory, whatever the batch
    flop_s: float = 0.0  # its arithmetic, for each sequence; read_s hides it, or it hides read_s
    each_s: float = 0.0  # all else, for each sequence
    fixed_s: float = 0.0  # all else, whatever the batch

    def compute_s(self, batch: int) -> float:
        """Return the seconds it computes in one step."""
        return max(self.read_s, batch * self.flop_s) + batch * self.each_s + self.fixed_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A memory. The first is the device's own; each other one is behind the one before it."""

    name: str
    capacity_bytes: float
    read_bytes_per_s: float = math.inf  # towards the tier before
    write_bytes_per_s: float = math.inf  # from the tier before
    holds: frozenset[str] = EVERYTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where everything lies, and how long a step takes then."""

    batch: int
    step_s: float
    weights: Shares
    cache: Shares
    states: Mapping[str, float]  # tier -> share of the states
    used_bytes: Mapping[str, float]  # by tier, transit included
    loads_s: Mapping[str, float]  # of a step, what computes and what goes over each link, each by itself

    @property
    def s_per_token(self) -> float:
        """Seconds for each token of the batch: what is least."""
        return self.step_s / self.batch

    @property
    def bound(self) -> str:
        """What a step waits for most: COMPUTING, or the tier whose link is the busiest."""
        return max(self.loads_s, key=lambda name: self.loads_s[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be placed, and how.

    `fixed_bytes` and `each_bytes` are of the device, whatever is placed: embeddings, the runtime; logits of a sequence.
    """

    parts: Sequence[Part]
    tiers: Sequence[Tier]
    fixed_bytes: float = 0.0
    each_bytes: float = 0.0
    whole: bool = False  # each part in one tier
    overlapped: bool = True  # links and device work at once; else one after the other
    most_step_s: float = field(default=math.inf)


def place(asked: Asked, batches: Iterable[int] = (1,)) -> Placement:
    """Return the best placement: the least time for each token, over the batches.

    Raises:
        BadInput: nothing to place, or figures that are not possible.
        NoFeasiblePlan: no batch fits; says what is short, and by how much.
        EnvironmentProblem: the solver cannot run.
    """
    _check(asked, batches := sorted(set(batches)))
    found = [answer for batch in batches if (answer := _solve(asked, batch)) is not None]
    if not found:
        raise NoFeasiblePlan(
            _shortage(asked, batches[0]), hint="allow more memory, a shorter context, or a smaller batch"
        )
    return min(found, key=lambda answer: (answer.s_per_token, answer.batch))


def _check(asked: Asked, batches: Sequence[int]) -> None:
    if not asked.parts or not asked.tiers or not batches or batches[0] < 1:
        raise BadInput("a placement needs parts, tiers and batches of at least 1", hint="give one of each")
    for tier in asked.tiers:
        if not (tier.capacity_bytes >= 0 and tier.read_bytes_per_s > 0 and tier.write_bytes_per_s > 0):
            raise BadInput(f"tier {tier.name} has a capacity below 0, or a link of no speed", hint="measure it anew")
    for part in asked.parts:
        if part.count < 1 or not 0 <= part.weight_bytes < math.inf:
            raise BadInput(f"part {part.name} has no count of at least 1, or no size", hint="count it anew")


def _shortage(asked: Asked, batch: int) -> str:
    needed = asked.fixed_bytes + batch * asked.each_bytes
    for part in asked.parts:
        needed += part.count * (part.weight_bytes + batch * part.cache_bytes)
    room = sum(tier.capacity_bytes for tier in asked.tiers)
    names = ", ".join(f"{tier.name} {units.format(tier.capacity_bytes, 'bytes')}" for tier in asked.tiers)
    short = (
        f"short by {units.format(needed - room, 'bytes')}"
        if needed > room
        else "less than what must be on each, and in transit"
    )
    if asked.most_step_s < math.inf:
        short += f", or steps take more than {units.format(asked.most_step_s, 'time')}"
    return f"a batch of {batch} takes {units.format(needed, 'bytes')}, there is room in {names}: {short}"


# ---------------------------------------------------------------- what a placement takes


@dataclass(frozen=True, slots=True)
class _Shares:
    """Shares of everything by (part, tier), of the states by tier: numbers, or the program's variables."""

    asked: Asked
    batch: int
    weights: Mapping[tuple[int, int], Any]
    cache: Mapping[tuple[int, int], Any]
    states: Mapping[int, Any]
    some: Mapping[tuple[int, int], Any]  # in whole parts: 1 where any of the group lies behind a tier

    def bytes_of(self, part: int, tier: int) -> Any:
        """Return what one part of a group keeps in a tier, in the mean."""
        of = self.asked.parts[part]
        return self.weights[part, tier] * of.weight_bytes + self.cache[part, tier] * (self.batch * of.cache_bytes)

    def loads_s(self, part: int) -> dict[str, Any]:
        """Return the seconds one part computes, and has each link busy in each direction."""
        of, batch, tiers = self.asked.parts[part], self.batch, self.asked.tiers
        found: dict[str, Any] = {COMPUTING: of.compute_s(batch)}
        for link in range(1, len(tiers)):
            behind = range(link, len(tiers))
            states = sum(self.states[t] * (batch * of.state_bytes) for t in behind)
            cache = sum(self.cache[part, t] for t in behind) * batch
            weights = sum(self.weights[part, t] for t in behind) * of.weight_bytes
            read = weights + cache * of.cache_read_bytes + states
            found[f"reading {tiers[link].name}"] = read * (1 / tiers[link].read_bytes_per_s)
            found[f"writing {tiers[link].name}"] = (cache * of.cache_new_bytes + states) * (
                1 / tiers[link].write_bytes_per_s
            )
        return found

    def lies(self, tier: int) -> Any:
        """Return the bytes in a tier, but for what is in transit."""
        asked = self.asked
        found = sum(part.count * self.bytes_of(p, tier) for p, part in enumerate(asked.parts))
        found += self.states[tier] * (self.batch * max(part.state_bytes for part in asked.parts))
        return found + (asked.fixed_bytes + self.batch * asked.each_bytes if tier == 0 else 0.0)

    def transits(self, tier: int) -> list[Any]:
        """Return the bytes in transit to a tier, if it is each part's; nothing to the last."""
        behind = range(tier + 1, len(self.asked.tiers))
        found = []
        for p, part in enumerate(self.asked.parts if behind else ()):
            if self.asked.whole:
                cache = sum(self.cache[p, t] for t in behind) * (self.batch * part.cache_bytes)
                found.append(TRANSIT * (self.some[p, tier] * part.weight_bytes + cache))
            else:
                found.append(TRANSIT * sum(self.bytes_of(p, t) for t in behind))
        return found


def priced(asked: Asked, batch: int, weights: Shares, cache: Shares, states: Mapping[str, float]) -> Placement:
    """Return a placement by its shares (part -> tier -> share), with its times and bytes."""
    parts, names = asked.parts, [tier.name for tier in asked.tiers]
    pairs = [(p, t) for p in range(len(parts)) for t in range(len(names))]
    found = _Shares(
        asked, batch,
        {(p, t): weights[parts[p].name][names[t]] for p, t in pairs},
        {(p, t): cache[parts[p].name][names[t]] for p, t in pairs},
        {t: states[name] for t, name in enumerate(names)},
        {(p, t): float(any(weights[parts[p].name][name] for name in names[t + 1 :])) for p, t in pairs},
    )  # fmt: skip
    each = [found.loads_s(p) for p in range(len(parts))]
    loads = {name: sum(part.count * seconds[name] for part, seconds in zip(parts, each)) for name in each[0]}
    longest = max if asked.overlapped else sum
    apart = sum(part.count * longest(seconds.values()) for part, seconds in zip(parts, each))
    return Placement(
        batch=batch, step_s=longest(loads.values()) if asked.whole else apart, weights=weights, cache=cache, states=states,
        used_bytes={name: found.lies(t) + max(found.transits(t), default=0.0) for t, name in enumerate(names)},
        loads_s=loads,
    )  # fmt: skip


# ---------------------------------------------------------------- the program


def _solve(asked: Asked, batch: int) -> Placement | None:
    """Return the best placement of one batch, or None where nothing fits."""
    import pulp

    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    shares = _variables(asked, batch, problem, pulp)
    parts, tiers = asked.parts, asked.tiers
    unit_s = sum(part.count * part.compute_s(batch) for part in parts) or 1.0
    time = _time(shares, unit_s, problem, pulp)
    moved = sum(t * shares.lies(t) for t in range(1, len(tiers)))
    problem += time + moved * (NEARER / (sum(part.count * part.weight_bytes for part in parts) or 1.0))
    if asked.most_step_s < math.inf:
        problem += time <= asked.most_step_s / unit_s
    for t, tier in enumerate(tiers):
        if tier.capacity_bytes < math.inf:
            transits = shares.transits(t)
            transit = problem.add_variable(f"transit_{t}", 0) if transits else 0.0
            unit = 1e4 / (tier.capacity_bytes or 1.0)
            for each in transits:
                problem += unit * each <= unit * transit
            problem += unit * (shares.lies(t) + transit) <= unit * tier.capacity_bytes * (1 + SLACK)
    try:
        problem.solve(pulp.HiGHS(msg=False, timeLimit=TIME_LIMIT_S, gapRel=GAP, threads=1))
    except pulp.PulpSolverError as error:
        raise EnvironmentProblem(
            f"the solver cannot run: {error}", hint="pip install highspy, PuLP's solver here"
        ) from error
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    return _answer(shares)


def _variables(asked: Asked, batch: int, problem: Any, pulp: Any) -> _Shares:
    parts, tiers = asked.parts, range(len(asked.tiers))

    def shares(name: str, what: str, count: int | None = None) -> list[Any]:
        """Return a share for each tier, together 1; 0 where the tier does not hold such things. With `count`: of so many."""
        most = [float(what in asked.tiers[t].holds) * (count or 1) for t in tiers]
        kind = "Continuous" if count is None else "Integer"
        found = [problem.add_variable(f"{name}_{t}", 0, most[t], kind) * (1 / (count or 1)) for t in tiers]
        problem.addConstraint(pulp.lpSum(found) == 1)
        return found

    weights, cache, some = {}, {}, {}
    for p, part in enumerate(parts):
        for t, share in enumerate(shares(f"w_{p}", "weights", part.count if asked.whole else None)):
            weights[p, t] = share
        for t, share in enumerate(shares(f"c_{p}", "cache")):
            cache[p, t] = share
        for t in tiers if asked.whole else ():
            some[p, t] = problem.add_variable(f"some_{p}_{t}", 0, 1, "Integer")
            problem.addConstraint(pulp.lpSum(weights[p, u] for u in tiers if u > t) <= some[p, t])
    return _Shares(asked, batch, weights, cache, dict(enumerate(shares("h", "states"))), some)


def _time(shares: _Shares, unit_s: float, problem: Any, pulp: Any) -> Any:
    """Return a step's time in units: of whole parts what all take together, else the sum over the parts."""
    asked = shares.asked
    every = [(part.count, shares.loads_s(p)) for p, part in enumerate(asked.parts)]
    if asked.whole:
        every = [(1, {name: sum(count * loads[name] for count, loads in every) for name in every[0][1]})]
    times = []
    for number, (count, loads) in enumerate(every):
        time: Any = sum(loads.values()) * (1 / unit_s)
        if asked.overlapped:
            time = problem.add_variable(f"time_{number}", 0)
            for load in loads.values():
                problem.addConstraint(time >= load * (1 / unit_s))
        times.append(count * time)
    return pulp.lpSum(times)


def _answer(shares: _Shares) -> Placement:
    asked = shares.asked
    names = [tier.name for tier in asked.tiers]

    def of(found: Sequence[Any], count: int | None = None) -> dict[str, float]:
        values = [max(0.0, float(share.value())) for share in found]
        if count is not None:
            values = [round(value * count) / count for value in values]
        return {name: value / sum(values) for name, value in zip(names, values)}

    def by_part(found: Mapping[tuple[int, int], Any], whole: bool) -> dict[str, dict[str, float]]:
        return {
            part.name: of([found[p, t] for t in range(len(names))], part.count if whole else None)
            for p, part in enumerate(asked.parts)
        }

    states = of([shares.states[t] for t in range(len(names))])
    return priced(asked, shares.batch, by_part(shares.weights, asked.whole), by_part(shares.cache, False), states)
