"""How techniques compose: which come first, which exclude, need or help each other. The facts are data.

`data/composition_rules.csv` has one fact in each row and a source for it; a folder of one's own may add more. `a` and
`b` are selectors over our techniques and all methods of the field:

    gptq                        that technique or method, or a technique that implements it
    topic:weight_quantisation   everything at or below that topic of the taxonomy
    family:weights              every technique of that family
    stage:compress              every technique of that stage
    provides:pruned             every technique that provides that tag

`relation` is one of:

    before      a is executed before b; always, without a condition
    conflicts   a and b cannot be in one plan; without b: a cannot be used
    redundant   a already does what b does; they cannot be in one plan
    requires    a plan with a must hold some b; without b: the condition is what a requires
    synergy     worth knowing: together they gain more
    weakens     worth knowing: a takes from the gain of b; without b: a gains less
    note        worth knowing, and nothing a machine could check

`condition` says when a rule holds: clauses joined by `and` over the knobs of the two steps and facts of model, machine,
workload and engine (conditions.py). A rule is enforced only where its condition is known to hold; where a knob is open
or the context does not tell, `advice` tells it as "if …".

Beside the rows, two rules follow from the types: a plan does each thing once and holds one technique of each family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import knowledge_base.techniques
from knowledge_base.field import overlay
from knowledge_base.rules import members, reading
from knowledge_base.rules.composition import Addition, Composition, Finding
from knowledge_base.rules.conditions import FACTS, NOTHING_KNOWN, Context, facts
from knowledge_base.rules.rule import RELATIONS, Rule
from knowledge_base.types import Step

__all__ = [
    "FACTS", "RELATIONS", "Addition", "Composition", "Context", "Finding", "Rule", "about", "additions", "advice", "composition",
    "conflict", "facts", "load_rules", "missing", "order", "orders", "violations",
]  # fmt: skip


def composition() -> Composition:
    """Return the engine over all techniques, methods and rules there are. A search asks it directly.

    Raises:
        BadInput: a rule file has a fault; with file and line.
    """
    return _composition(overlay.folders(), tuple(knowledge_base.techniques.__path__))


@lru_cache(maxsize=4)
def _composition(folders: tuple[Path, ...], techniques: tuple[str, ...]) -> Composition:
    """Return the engine over what lies in these folders; they are its arguments so that another set makes another."""
    files = [(reading.SHIPPED, reading.SHIPPED.name), *overlay.files(reading.SHIPPED.name)]
    return Composition(members.members(), reading.read(files))


def _knowing(context: Context) -> Composition:
    return composition().knowing(context) if context else composition()


def about(name: str) -> tuple[Rule, ...]:
    """Return the rules that speak of a technique or method, by name or with others."""
    return composition().about(name)


def load_rules() -> tuple[Rule, ...]:
    """Return every composition rule, in the order of the files."""
    return composition().rules


def order(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps in the one order they are executed in."""
    return composition().order(steps)


def orders(steps: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    """Yield every legal order of the steps, one at a time; `order` is the first."""
    return composition().orders(steps)


def conflict(steps: Sequence[Step], context: Context = NOTHING_KNOWN) -> str | None:
    """Return one sentence with its source on why these steps cannot be one plan, or None. Their order is free."""
    return _knowing(context).conflict(steps)


def missing(steps: Sequence[Step], context: Context = NOTHING_KNOWN) -> str | None:
    """Return one sentence with its source on what the plan still needs, or None."""
    return _knowing(context).missing(steps)


def violations(steps: Sequence[Step], context: Context = NOTHING_KNOWN) -> tuple[Finding, ...]:
    """Return every rule the plan breaks, as sentences with their sources."""
    return _knowing(context).violations(steps)


def advice(steps: Sequence[Step], context: Context = NOTHING_KNOWN) -> tuple[Finding, ...]:
    """Return what is worth knowing of a plan, and as "if …" the rules that the context leaves open."""
    return _knowing(context).advice(steps)


def additions(partial: Sequence[Step], context: Context = NOTHING_KNOWN) -> tuple[Addition, ...]:
    """Return every step that could be added to a plan, with what forbids it and what it would need."""
    return _knowing(context).additions(partial)
