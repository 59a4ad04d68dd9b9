"""One fact about how techniques compose, and how it is said."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from knowledge_base.rules import conditions

FORBIDDING = ("conflicts", "redundant")
TELLING = ("synergy", "weakens", "note")
RELATIONS = ("before", *FORBIDDING, "requires", *TELLING)
SELECTORS = ("topic", "family", "stage", "provides")  # kinds written before a colon; a name stands alone
_SAID = {  # (relation, whether it is about two) -> the sentence
    ("before", True): "{a} comes before {b}",
    ("conflicts", True): "{a} cannot be combined with {b}",
    ("conflicts", False): "{a} cannot be used",
    ("redundant", True): "{a} makes {b} redundant",
    ("redundant", False): "{a} has nothing to do",
    ("requires", True): "{a} requires {b}",
    ("requires", False): "{a} requires {condition}",
    ("synergy", True): "{a} and {b} gain together",
    ("synergy", False): "{a} gains",
    ("weakens", True): "{a} takes from the gain of {b}",
    ("weakens", False): "{a} gains less",
    ("note", True): "{a} and {b}",
    ("note", False): "{a}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A fact about two steps, or about one where `b` is empty. See the package for what the fields mean."""

    id: str
    a: str
    relation: str
    b: str = ""
    condition: str = ""
    effect: str
    source: str
    fact: int | None = None  # number of the published fact it states; None: ours
    where: str = field(default="", compare=False)  # file:line

    @property
    def parsed(self) -> conditions.Condition:
        """The condition, ready to be asked."""
        return conditions.parse(self.condition)

    @property
    def checked(self) -> bool:
        """Whether a machine decides when it applies; else it is only told with `a`."""
        return self.relation != "note" and bool(self.b or self.condition)

    @property
    def when(self) -> str:
        """The condition as it is told: without the letters of the two sides."""
        return re.sub(r"\b[ab]\.", "", self.condition)

    @property
    def sentence(self) -> str:
        """The rule in words, about whatever it selects; without its source."""
        return self.of(in_words(self.a), in_words(self.b))

    def of(self, a: str, b: str, *, is_open: bool = False) -> str:
        """Return the rule as said of two steps, or of one where `b` is empty.

        `is_open`: its condition is not known to hold.
        """
        condition = self.when
        said = _SAID[self.relation, bool(b)].format(a=a, b=b, condition=condition)
        if self.relation == "requires" and not b:
            said += ", which is not known here" if is_open else ""
        elif condition:
            said = f"if {condition}: {said}" if is_open else f"{said} where {condition}"
        return f"{said}: {self.effect}"


def in_words(selector: str) -> str:
    """Return what a selector means: `gptq`, a step of stage `compress`; nothing for an empty one."""
    kind, _, value = selector.rpartition(":")
    if kind == "provides":
        return f"a step that provides `{value}`"
    if kind:
        return f"a step of {kind} `{value}`"
    return f"`{value}`" if value else ""
