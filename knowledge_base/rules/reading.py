"""Rules as they stand in files: one fact in each row, with its source. Every complaint names file and line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from knowledge_base.errors import BadInput
from knowledge_base.field.records import REPLACES, Record, is_link, lay, rows
from knowledge_base.rules.rule import RELATIONS, TELLING, Rule
from knowledge_base.units import quote

PUBLISHED_FACTS = 102  # what was collected from the literature on pairs of techniques, numbered from 1
COLUMNS = ("id", "a", "relation", "b", "condition", "effect", "source")
SHIPPED = Path(__file__).parent.parent / "data" / "composition_rules.csv"
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_OUR_FILE = re.compile(r"[a-z_]+(/[a-z_]+)*\.(py|csv)(: .+)?")


def read(files: Iterable[tuple[Path, str]]) -> tuple[Rule, ...]:
    """Return the rules of files, each given with the name that complaints call it by, a later one's over those before.

    Raises:
        BadInput: a row lacks something, has an unknown relation, a condition or source that cannot be read, a fact
            number that does not exist, or an id used before; with file and line.
    """
    layers = [
        rows(path, name, COLUMNS, ("fact", REPLACES) if place else ("fact",))
        for place, (path, name) in enumerate(files)
    ]
    return tuple(_rule(record) for record in lay(layers, key="id").values())


def _rule(record: Record) -> Rule:
    rule = Rule(
        id=record.text("id"),
        a=record.text("a"),
        relation=record.word("relation", RELATIONS),
        b=record.maybe("b"),
        condition=record.maybe("condition"),
        effect=record.text("effect"),
        source=record.text("source"),
        fact=_fact(record),
        where=record.where(),
    )
    if not _ID.fullmatch(rule.id):
        raise record.error(f"{quote(rule.id)} is not an id of a rule", hint="small letters, digits and `-`: kv-batch")
    if not (is_link(rule.source) or _OUR_FILE.fullmatch(rule.source)):
        raise record.error(
            f"{quote(rule.source)} is not a source", hint="write https://…, arXiv:NNNN.NNNNN or the file that shows it"
        )
    if rule.relation == "before" and (rule.condition or not rule.b):
        raise record.error("`before` relates two selectors and takes no condition", hint="an order holds always")
    if not rule.b and not rule.condition and rule.relation not in TELLING:
        raise record.error(f"`{rule.relation}` needs a second selector or a condition", hint="fill `b` or `condition`")
    try:
        knobs = rule.parsed.knobs
    except BadInput as error:
        raise record.error(error.message, hint=error.hint) from error
    if (not rule.b or rule.relation == "requires") and any(side == "b" for side, _ in knobs):
        raise record.error("the condition asks for a knob of b, and there is no b", hint="ask for one of a")
    return rule


def _fact(record: Record) -> int | None:
    number = record.number("fact")
    if number is None or (number == int(number) and 1 <= number <= PUBLISHED_FACTS):
        return int(number) if number else None
    raise record.error(
        f"there is no fact {record.maybe('fact')}", hint=f"1 to {PUBLISHED_FACTS}, or empty for a rule of one's own"
    )
