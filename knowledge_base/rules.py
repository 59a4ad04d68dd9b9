"""How techniques compose: which come first, which exclude, need or help each other. The facts are data.

`data/composition_rules.csv` has one fact in each row and a source for it. `a` and `b` are selectors:

    prune_width        that technique
    family:weights     every technique of that family
    stage:compress     every technique of that stage
    provides:pruned    every technique that provides that tag

`relation` is one of RELATIONS:

    before      a is executed before b
    conflicts   a and b cannot be in one plan
    redundant   a already does what b does; they cannot be in one plan
    requires    a plan with a must hold some b
    synergy     worth knowing: together they gain more
    note        worth knowing: about a alone (b empty), or about the pair

`condition` is empty or clauses joined by `and`; a clause compares one knob with a number or a word:
`b.count > 1 and a.bits <= 4`. A clause about a knob the step does not have does not hold. It is parsed here,
never evaluated as Python. `before` and `requires` hold always and take no condition.

Beside the rows, one rule follows from the types: a plan holds at most one technique of each family.
"""

from __future__ import annotations

import csv
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.registry import techniques
from knowledge_base.types import STAGES, Step, Technique

RELATIONS = ("before", "conflicts", "redundant", "requires", "synergy", "note")
_FILE = Path(__file__).parent / "data" / "composition_rules.csv"
_COMPARE = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CLAUSE = re.compile(r"([ab])\.([a-z_]+) (<=|>=|!=|==|<|>) ([\w.-]+)")

Knobs = Mapping[str, Any]
_Clauses = tuple[Callable[[Knobs, Knobs], bool], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One fact about two techniques, or about one where `b` is empty. See the module for the fields."""

    id: str
    a: str
    relation: str
    b: str
    condition: str
    effect: str
    source: str

    def holds(self, a: Knobs, b: Knobs) -> bool:
        """Return whether the condition holds for these knob settings of `a` and `b`."""
        return all(clause(a, b) for clause in parse_condition(self.condition))


def selects(selector: str, name: str, technique: Technique) -> bool:
    """Return whether a selector means that technique."""
    kind, _, value = selector.rpartition(":")
    match kind:
        case "":
            return value == name
        case "family":
            return value == technique.family
        case "stage":
            return value == technique.stage
        case "provides":
            return value in technique.provides
    raise BadInput(
        f"unknown selector `{selector}`", hint="write a technique, family:…, stage:… or provides:…", where=_FILE.name
    )


@lru_cache(maxsize=256)
def parse_condition(text: str) -> _Clauses:
    """Return the clauses of a condition as functions of the knobs of `a` and `b`; an empty text has none.

    Raises:
        BadInput: a clause is not `a.knob < value`.
    """
    return tuple(_clause(part) for part in text.split(" and ")) if text else ()


def _clause(text: str) -> Callable[[Knobs, Knobs], bool]:
    found = _CLAUSE.fullmatch(text.strip())
    if not found:
        raise BadInput(f"cannot read the condition `{text}`", hint="write for example: b.count > 1", where=_FILE.name)
    side, knob, sign, word = found.groups()
    compare = _COMPARE[sign]
    try:
        wanted: float | str = float(word)
    except ValueError:
        wanted = word
        if sign not in ("==", "!="):
            raise BadInput(
                f"`{word}` has no order in `{text}`", hint="compare words with == or !=", where=_FILE.name
            ) from None

    def clause(a: Knobs, b: Knobs) -> bool:
        knobs = a if side == "a" else b
        return knob in knobs and compare(knobs[knob], wanted)

    return clause


@lru_cache(maxsize=1)
def load_rules() -> tuple[Rule, ...]:
    """Return every composition rule, in the order of the file.

    Raises:
        BadInput: a row has an unknown relation, an unreadable condition, no source, or an id used twice.
    """
    with _FILE.open(encoding="utf-8", newline="") as file:
        rules = tuple(Rule(**row) for row in csv.DictReader(file))
    seen = set()
    for rule in rules:
        where = f"{_FILE.name}: {rule.id}"
        if rule.relation not in RELATIONS:
            raise BadInput(f"unknown relation `{rule.relation}`", hint=f"one of {', '.join(RELATIONS)}", where=where)
        if not (rule.effect and rule.source and rule.a and (rule.b or rule.relation == "note")):
            raise BadInput(
                "a rule lacks its techniques, its effect or its source", hint="fill every column", where=where
            )
        if rule.id in seen:
            raise BadInput("this id is used twice", hint="give each rule its own id", where=where)
        if rule.condition and rule.relation in ("before", "requires"):
            raise BadInput(f"`{rule.relation}` takes no condition", hint="leave the column empty", where=where)
        parse_condition(rule.condition)
        seen.add(rule.id)
    return rules


# ---------------------------------------------------------------- tables, built once


@lru_cache(maxsize=1)
def _known() -> dict[str, Technique]:
    return {name: module.TECHNIQUE for name, module in techniques.all().items()}


@lru_cache(maxsize=1)
def before_edges() -> tuple[tuple[str, str, str], ...]:
    """Return (earlier technique, later technique, rule id) for every pair a `before` row or the stages order."""
    known = _known()
    edges = [
        (a, b, "stages")
        for a, b in permutations(known, 2)
        if STAGES.index(known[a].stage) < STAGES.index(known[b].stage)
    ]
    for rule in load_rules():
        if rule.relation == "before":
            edges += [
                (a, b, rule.id)
                for a, b in permutations(known, 2)
                if selects(rule.a, a, known[a]) and selects(rule.b, b, known[b])
            ]
    return tuple(edges)


@lru_cache(maxsize=1)
def _ranks() -> dict[str, int]:
    """Place of every technique in the one order of all: stage, then `before`, then name."""
    import networkx

    known = _known()
    graph = networkx.DiGraph()
    graph.add_nodes_from(known)
    graph.add_edges_from((a, b) for a, b, _ in before_edges())
    try:
        ordered = list(
            networkx.lexicographical_topological_sort(graph, key=lambda name: (STAGES.index(known[name].stage), name))
        )
    except networkx.NetworkXUnfeasible as error:
        cycle = " -> ".join(a for a, _ in networkx.find_cycle(graph))
        raise BadInput(
            f"`before` rules go round in a circle: {cycle}", hint="remove one of them", where=_FILE.name
        ) from error
    return {name: rank for rank, name in enumerate(ordered)}


def _rank(name: str) -> int:
    try:
        return _ranks()[name]
    except KeyError:
        techniques.get(name)  # raises with the nearest names, unless the file is newer than the tables
        for table in (_known, before_edges, _ranks, _verdict, _missing):
            table.cache_clear()
        return _ranks()[name]


@lru_cache(maxsize=65536)
def _verdict(names: tuple[str, ...]) -> tuple[str | None, tuple[tuple[int, int, _Clauses, Rule], ...]]:
    """Return (why these techniques never go together, (place of a, place of b, clauses, rule) to check)."""
    for name in names:
        _rank(name)
    known = _known()
    conditional = []
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        if a == b:
            return f"`{a}` is in the plan twice", ()
        for rule in load_rules():
            if rule.relation not in ("conflicts", "redundant"):
                continue
            for (x, first), (y, second) in (((i, a), (j, b)), ((j, b), (i, a))):
                if selects(rule.a, first, known[first]) and selects(rule.b, second, known[second]):
                    if not rule.condition:
                        return _sentence(rule, first, second), ()
                    conditional.append((x, y, parse_condition(rule.condition), rule))
        if known[a].family == known[b].family:
            return f"`{a}` and `{b}` are alternatives: a plan holds one technique of family `{known[a].family}`", ()
    return None, tuple(conditional)


def _sentence(rule: Rule, a: str, b: str) -> str:
    said = f"`{a}` makes `{b}` redundant" if rule.relation == "redundant" else f"`{a}` cannot be combined with `{b}`"
    condition = re.sub(r"\b[ab]\.", "", rule.condition)
    return f"{said}{f' where {condition}' if condition else ''}: {rule.effect} [{rule.id}; {rule.source}]"


def _in_words(selector: str) -> str:
    kind, _, value = selector.rpartition(":")
    return (
        f"a step of {kind} `{value}`"
        if kind in ("family", "stage")
        else f"a step that {kind} `{value}`"
        if kind
        else f"`{value}`"
    )


@lru_cache(maxsize=65536)
def _missing(names: tuple[str, ...]) -> str | None:
    for name in names:
        _rank(name)
    known = _known()
    for name in names:
        for rule in load_rules():
            if rule.relation != "requires" or not selects(rule.a, name, known[name]):
                continue
            if not any(other != name and selects(rule.b, other, known[other]) for other in names):
                return f"`{name}` requires {_in_words(rule.b)}: {rule.effect} [{rule.id}; {rule.source}]"
    return None


# ---------------------------------------------------------------- what the search asks


def order(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps in the order they are executed: stage, then `before` rules, then name. Deterministic.

    Raises:
        BadInput: a step's technique does not exist.
    """
    return tuple(sorted(steps, key=lambda step: _rank(step.technique)))


def conflict(steps: Sequence[Step]) -> str | None:
    """Return one sentence with its source on why these steps cannot be one plan, or None. Their order is free."""
    sentence, conditional = _verdict(tuple([step.technique for step in steps]))
    for i, j, clauses, rule in conditional:
        a, b = steps[i].knobs, steps[j].knobs
        for clause in clauses:
            if not clause(a, b):
                break
        else:
            return _sentence(rule, steps[i].technique, steps[j].technique)
    return sentence


def missing(steps: Sequence[Step]) -> str | None:
    """Return one sentence with its source on what the plan still needs, or None."""
    return _missing(tuple([step.technique for step in steps]))


def advice(steps: Sequence[Step]) -> tuple[Rule, ...]:
    """Return the `synergy` and `note` rules that apply to this plan, in the order of the file."""
    known = _known()
    found = []
    for rule in load_rules():
        if rule.relation not in ("synergy", "note"):
            continue
        for step in steps:
            if not selects(rule.a, step.technique, known[step.technique]):
                continue
            others = [o for o in steps if rule.b and o is not step and selects(rule.b, o.technique, known[o.technique])]
            if (not rule.b and rule.holds(step.knobs, {})) or any(rule.holds(step.knobs, o.knobs) for o in others):
                found.append(rule)
                break
    return tuple(found)
