"""What a machine that was bought costs for each hour: its price over the hours it works in its life."""

from __future__ import annotations

from dataclasses import dataclass

from planner._kinds import Key, Number, Section

HOURS_PER_YEAR = 8766  # 365.25 days


@dataclass(frozen=True, slots=True, kw_only=True)
class Bought:
    """What was paid for a machine, and how long and how much it works."""

    usd: float
    years: float = 4.0  # servers are written off over three to six
    used_share: float = 1.0

    @property
    def usd_per_h(self) -> float:
        """US dollars for each hour it works, written off evenly over its life."""
        return self.usd / (self.years * HOURS_PER_YEAR * self.used_share)


BOUGHT = Section(
    Bought,
    (
        Key("usd", Number(0, 1e10), "what was paid for it, in US dollars", example="12000"),
        Key("years", Number(0.1, 30), "how long it is used"),
        Key("used_share", Number(0.001, 1), "of that time it works", example="0.3"),
    ),
    shorthand="usd",
)  # fmt: skip
BOUGHT_KEY = Key(
    "bought", BOUGHT, "the machine is one's own: its price over the hours of its life counts, and electricity",
    default=None, absent="it is not", example="{usd: 12000, years: 4, used_share: 1}",
)  # fmt: skip
