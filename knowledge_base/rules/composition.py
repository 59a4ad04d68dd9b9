"""The composition engine: which steps go together, in which orders, what they still need, what may be added."""

from __future__ import annotations

import difflib
import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, pairwise

from knowledge_base.errors import BadInput
from knowledge_base.rules.conditions import NOTHING_KNOWN, Condition, Context
from knowledge_base.rules.members import Member
from knowledge_base.rules.rule import FORBIDDING, SELECTORS, Rule, in_words
from knowledge_base.types import STAGES, Step
from knowledge_base.units import quote

ONCE = Rule(
    id="once", a="", relation="conflicts", effect="a plan does each thing once", source="knowledge_base/types.py: Plan"
)
ONE_OF_A_FAMILY = Rule(
    id="one-of-a-family", a="", relation="conflicts", effect="they are alternatives: a plan holds one technique of a family",
    source="knowledge_base/types.py: Technique",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a rule says of certain steps of a plan, as a sentence that ends with its source."""

    rule: Rule
    steps: tuple[str, ...]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A step that could be added to a plan: what forbids it, and what it would need that the plan lacks."""

    name: str
    forbidden: tuple[Finding, ...]
    needs: tuple[Finding, ...]


_Placed = tuple[int, Rule, frozenset[str]]  # place among the rules, rule, what its `b` means


@dataclass(frozen=True, slots=True)
class _Case:
    """A rule that is about the steps at these places: one, or two with `a` first."""

    rule: Rule
    places: tuple[int, ...]
    condition: Condition

    def holds(self, steps: Sequence[Step], context: Context) -> bool | None:
        first, last = steps[self.places[0]].knobs, steps[self.places[-1]].knobs
        return self.condition.holds(first, last, context)

    def broken(self, steps: Sequence[Step], context: Context) -> bool | None:
        """Return whether the plan breaks the rule; None where the context does not tell."""
        held = self.holds(steps, context)
        if self.rule.relation == "requires" and not self.rule.b:  # what it requires is the condition
            return None if held is None else not held
        return held


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What can be said of a tuple of names before their knobs are known. In the order of the rules."""

    never: str | None  # why they cannot be together, whatever the knobs
    lacks: str | None  # what they need, whatever the knobs
    perhaps_never: tuple[_Case, ...]  # forbid the steps where their knobs are so
    perhaps_lacks: tuple[_Case, ...]


class Composition:
    """Everything that can be asked about steps together, for one set of steps and rules, knowing certain facts.

    A rule is enforced where its condition is known to hold. `knowing` returns the same engine knowing other facts.

    Raises:
        BadInput: a selector means nothing, a condition asks for a knob its side does not have, or `before` rules and
            stages go round in a circle; with file and line.
    """

    def __init__(self, members: Mapping[str, Member], rules: Sequence[Rule], context: Context = NOTHING_KNOWN) -> None:
        self.context = context
        self.members = dict(members)
        self.rules = tuple(rules)
        meant: dict[str, set[str]] = defaultdict(set)
        for member in self.members.values():
            for selector in member.selectors:
                meant[selector].add(member.id)
        self._meant = {selector: frozenset(names) for selector, names in meant.items()}
        self._before: dict[tuple[str, str], Rule] = {}
        # Of each name the rules with it as `a`, with their place and what their `b` means.
        self._forbids, self._requires, self._tells = (defaultdict[str, list[_Placed]](list) for _ in range(3))
        tables = {"requires": self._requires, **dict.fromkeys(FORBIDDING, self._forbids)}
        for place, rule in enumerate(self.rules):
            first, second = self._sides(rule)
            if rule.relation == "before":
                self._before |= {(a, b): rule for a in first for b in second if a != b}
                continue
            for name in first:
                tables.get(rule.relation, self._tells)[name].append((place, rule, second))
        self._ranks = self._ranked()
        self._judge = lru_cache(maxsize=65536)(self._judged)

    def knowing(self, context: Context) -> Composition:
        """Return this engine, with these facts known."""
        other = copy(self)
        other.context = context
        other._judge = lru_cache(maxsize=65536)(other._judged)
        return other

    # ---------------------------------------------------------------- tables

    def meaning(self, selector: str) -> frozenset[str]:
        """Return the names of the steps a selector means; none if it is unknown."""
        return self._meant.get(selector, frozenset())

    def about(self, name: str) -> tuple[Rule, ...]:
        """Return the rules that speak of a step on either side."""
        return tuple(rule for rule in self.rules if any(name in self.meaning(side) for side in (rule.a, rule.b)))

    def _sides(self, rule: Rule) -> tuple[frozenset[str], frozenset[str]]:
        sides = {side: self._known(selector, rule) for side, selector in (("a", rule.a), ("b", rule.b)) if selector}
        for side, knob in sorted(rule.parsed.knobs):
            if not any(knob in self.members[name].knobs for name in sides[side]):
                raise BadInput(
                    f"{quote(rule.a if side == 'a' else rule.b)} has no knob `{knob}`",
                    hint="correct the condition", where=rule.where,
                )  # fmt: skip
        return sides["a"], sides.get("b", frozenset())

    def _known(self, selector: str, rule: Rule) -> frozenset[str]:
        if selector in self._meant:
            return self._meant[selector]
        kind, colon, _ = selector.partition(":")
        if colon and kind not in SELECTORS:
            kinds = ", ".join(f"{kind}:…" for kind in SELECTORS)
            raise BadInput(f"unknown selector {quote(selector)}", hint=f"a technique, or {kinds}", where=rule.where)
        raise BadInput(f"{quote(selector)} means no technique", hint=_nearest(selector, self._meant), where=rule.where)

    def _ranked(self) -> dict[str, int]:
        """Place of every step in the one order of all: stage, then `before`, then name."""
        sorter: TopologicalSorter[str] = TopologicalSorter()
        gates = [f"stage:{stage}" for stage in STAGES]  # between two stages: all of one, the gate, all of the next
        for earlier, later in pairwise(gates):
            sorter.add(later, earlier)
        for name, member in self.members.items():
            sorter.add(name)
            if member.stage:
                place = STAGES.index(member.stage)
                sorter.add(name, gates[place])
                for later in gates[place + 1 : place + 2]:
                    sorter.add(later, name)
        for earlier, later in self._before:
            sorter.add(later, earlier)
        try:
            sorter.prepare()
        except CycleError as error:
            raise self._circle(error.args[1]) from error
        ranks: dict[str, int] = {}
        ready: list[tuple[int, str]] = []
        while sorter:
            for name in sorter.get_ready():
                heapq.heappush(ready, (self._stage(name), name))
            _, name = heapq.heappop(ready)
            if name in self.members:
                ranks[name] = len(ranks)
            sorter.done(name)
        return ranks

    def _stage(self, name: str) -> int:
        stage = self.members[name].stage if name in self.members else name.partition(":")[2]
        return STAGES.index(stage) if stage else 0

    def _circle(self, path: Sequence[str]) -> BadInput:
        # graphlib names a circle from any of its nodes; told from the smallest, it is the same each time.
        names = [name for name in path[:-1] if name in self.members]
        start = names.index(min(names))
        names = [*names[start:], *names[:start], names[start]]
        guilty = [self._before[pair] for pair in pairwise(names) if pair in self._before]
        return BadInput(
            f"`before` rules and stages go round in a circle: {' -> '.join(names)}",
            hint=f"remove one of them: {', '.join(f'{rule.id} ({rule.where})' for rule in guilty)}",
            where=guilty[0].where,
        )

    # ---------------------------------------------------------------- order

    def _unknown(self, name: str) -> BadInput:
        return BadInput(f"unknown technique {quote(name)}", hint=_nearest(name, self.members))

    def order(self, steps: Sequence[Step]) -> tuple[Step, ...]:
        """Return the steps in the order they are executed: stage, then `before` rules, then name. Deterministic.

        Raises:
            BadInput: a step's technique does not exist.
        """
        ranks = self._ranks
        try:
            return tuple(sorted(steps, key=lambda step: ranks[step.technique]))
        except KeyError as error:
            raise self._unknown(error.args[0]) from None

    def comes_before(self, a: str, b: str) -> bool:
        """Return whether a step must be executed before another, by stage or by a rule about the two."""
        first, second = self.members[a].stage, self.members[b].stage
        staged = bool(first and second) and self._stage(a) < self._stage(b)
        return staged or (a, b) in self._before

    def orders(self, steps: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
        """Yield every order that stages and `before` rules allow, one at a time; `order` is the first."""
        steps = self.order(steps)
        if not steps:
            yield ()
        for i, step in enumerate(steps):
            others = steps[:i] + steps[i + 1 :]
            if not any(self.comes_before(other.technique, step.technique) for other in others):
                for rest in self.orders(others):
                    yield (step, *rest)

    # ---------------------------------------------------------------- what goes together

    def _judged(self, names: tuple[str, ...]) -> _Verdict:
        together, needed = self._forbidden(names), self._needed(names)
        bare = tuple(Step(name) for name in names)

        def settled(cases: Sequence[_Case]) -> str | None:
            broken = (c for c in cases if not c.condition.knobs and c.broken(bare, self.context))
            return next((_sentence(case, names) for case in broken), None)

        return _Verdict(
            never=settled(together),
            lacks=settled(needed),
            perhaps_never=tuple(case for case in together if case.condition.knobs),
            perhaps_lacks=tuple(case for case in needed if case.condition.knobs),
        )

    def _forbidden(self, names: tuple[str, ...]) -> tuple[_Case, ...]:
        """Return what forbids these steps where its condition holds."""
        return (*self._cases(names, self._forbids), *self._same(names))

    def _needed(self, names: tuple[str, ...]) -> tuple[_Case, ...]:
        """Return what these steps require, where its condition holds, and none of them answers."""
        return self._cases(names, self._requires)

    def _cases(self, names: tuple[str, ...], table: Mapping[str, list[_Placed]]) -> tuple[_Case, ...]:
        """Return where rules speak of these steps, in the order of the rules."""
        for name in names:
            if name not in self.members:
                raise self._unknown(name)
        found = []
        for i, name in enumerate(names):
            for place, rule, second in table.get(name, ()):
                answers = [j for j, other in enumerate(names) if j != i and other in second]
                if not rule.b or (rule.relation == "requires" and not answers):
                    found.append((place, _Case(rule, (i,), rule.parsed)))
                elif rule.relation != "requires":
                    found += [(place, _Case(rule, (i, j), rule.parsed)) for j in answers]
        found.sort(key=lambda placed: (placed[0], placed[1].places))
        return tuple(case for _, case in found if self._possible(case, names))

    def _possible(self, case: _Case, names: tuple[str, ...]) -> bool:
        first, last = (self.members[names[place]].knobs for place in (case.places[0], case.places[-1]))
        return case.condition.possible(first, last)

    def _same(self, names: tuple[str, ...]) -> Iterator[_Case]:
        """Yield pairs that no plan holds whatever the rules say: one thing twice, two of a family."""
        for i, j in combinations(range(len(names)), 2):
            a, b = self.members[names[i]], self.members[names[j]]
            if a.id in b.names or b.id in a.names:
                yield _Case(ONCE, (i, j), ONCE.parsed)
            elif a.family and a.family == b.family:
                yield _Case(ONE_OF_A_FAMILY, (i, j), ONE_OF_A_FAMILY.parsed)

    def conflict(self, steps: Sequence[Step]) -> str | None:
        """Return one sentence with its source on why these steps cannot be one plan, or None. Their order is free."""
        names = tuple([step.technique for step in steps])
        verdict = self._judge(names)
        return verdict.never or self._broken(verdict.perhaps_never, steps, names)

    def missing(self, steps: Sequence[Step]) -> str | None:
        """Return one sentence with its source on what the plan still needs, or None."""
        names = tuple([step.technique for step in steps])
        verdict = self._judge(names)
        return verdict.lacks or self._broken(verdict.perhaps_lacks, steps, names)

    def _broken(self, cases: Sequence[_Case], steps: Sequence[Step], names: tuple[str, ...]) -> str | None:
        for case in cases:
            if case.broken(steps, self.context):
                return _sentence(case, names)
        return None

    def violations(self, steps: Sequence[Step]) -> tuple[Finding, ...]:
        """Return every rule the plan breaks, once for each set of steps: what cannot be together, then what is missing."""
        names = tuple(step.technique for step in steps)
        cases = (*self._forbidden(names), *self._needed(names))
        return _findings(((case, False) for case in cases if case.broken(steps, self.context)), names)

    def advice(self, steps: Sequence[Step]) -> tuple[Finding, ...]:
        """Return what is worth knowing of a plan: rules whose condition is open as "if …", then gains, losses, notes."""
        names = tuple(step.technique for step in steps)
        cases = (*self._forbidden(names), *self._needed(names))
        told = [(case, True) for case in cases if case.broken(steps, self.context) is None]
        for case in self._cases(names, self._tells):
            if (holds := case.holds(steps, self.context)) is not False:
                told.append((case, holds is None))
        return _findings(told, names)

    def additions(self, partial: Sequence[Step]) -> tuple[Addition, ...]:
        """Return every step that could be added to a plan, with its knobs left open, and what stands against it."""
        there = {step.technique for step in partial}
        found = []
        for name, member in self.members.items():
            if member.stage and name not in there:
                new = [finding for finding in self.violations((*partial, Step(name))) if name in finding.steps]
                needs = tuple(finding for finding in new if finding.rule.relation == "requires")
                found.append(Addition(name=name, forbidden=tuple(f for f in new if f not in needs), needs=needs))
        return tuple(found)


def _findings(cases: Iterable[tuple[_Case, bool]], names: Sequence[str]) -> tuple[Finding, ...]:
    """Return cases as findings, one for each rule and set of steps; with each, whether its condition is open."""
    found: dict[tuple[str, frozenset[int]], Finding] = {}
    for case, is_open in cases:
        finding = Finding(
            rule=case.rule,
            steps=tuple(names[place] for place in case.places),
            sentence=_sentence(case, names, is_open=is_open),
        )
        found.setdefault((case.rule.id, frozenset(case.places)), finding)
    return tuple(found.values())


def _sentence(case: _Case, names: Sequence[str], *, is_open: bool = False) -> str:
    """Return what a rule says of these steps, with its source; `is_open`: its condition is not known to hold."""
    rule = case.rule
    first, *others = (f"`{names[place]}`" for place in case.places)
    second = others[0] if others else in_words(rule.b)  # of a step that is missing there are only words
    return f"{rule.of(first, second, is_open=is_open)} [{rule.id}; {rule.source}]"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=2)
    return f"Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else "leanplan ls techniques"
