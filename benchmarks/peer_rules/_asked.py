"""A measured row as a peer is asked about it: what Leanplan reads out of it, and the names it was published under."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.public_rows import DATA, Row, device_facts

Answer = float | str  # the row's quantity in its unit, or why the peer has none
ONE_DEVICE = "knows one device only"
ONE_REQUEST = "knows one request at a time only"


@dataclass(frozen=True, slots=True)
class Asked:
    """One measured row."""

    row: Row
    record: Mapping[str, str]  # as published

    @property
    def sizes(self) -> Mapping[str, float]:
        """The model's sizes as its config.json has them; 0 where it has none."""
        return _sizes()[self.row.shape.name]

    @property
    def params(self) -> float:
        """All parameters of the model."""
        shape = self.row.shape
        return shape.dense_params + shape.expert_params + shape.embedding_params

    @property
    def active_params(self) -> float:
        """Parameters one token goes through, its row of the embedding table left out."""
        shape = self.row.shape
        return shape.dense_params + shape.expert_params * shape.experts_active / max(shape.experts, 1)

    @property
    def bytes_per_s(self) -> float:
        """Published memory bandwidth of one device."""
        return self._facts["memory_bytes_per_s"]

    @property
    def flop_per_s(self) -> float:
        """Published 16-bit matrix rate of one device; nan where nobody published one."""
        rates = (self._facts[f"{kind}_flop_per_s"] for kind in ("bfloat16", "float16"))
        return next((rate for rate in rates if not math.isnan(rate)), math.nan)

    @property
    def memory_bytes(self) -> float:
        """Memory of one device."""
        return self._facts["memory_bytes"]

    @property
    def _facts(self) -> Mapping[str, float]:
        facts = device_facts(self.row.device)
        assert facts is not None, "rows of unknown devices are left out by public_rows"
        return facts


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: how it was run and where what it does is written down."""

    name: str
    how: str
    source: str
    answers: Callable[[Sequence[Asked], Path], Iterator[Answer]]  # one for each row, in order; a folder for its files
    recorded: Callable[[Path], bool] = lambda folder: (
        False
    )  # whether answers would be read from a record: no time to tell


def rule(estimate: Callable[[Asked], Answer]) -> Callable[[Sequence[Asked], Path], Iterator[Answer]]:
    """Return how a published rule answers rows: each on its own, without files."""
    return lambda asked, folder: (estimate(one) for one in asked)


@lru_cache(maxsize=1)
def _sizes() -> dict[str, dict[str, float]]:
    with (DATA / "model_shapes.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["model"]: {k: float(v or 0) for k, v in row.items() if k not in ("pattern", "model", "source")}
            for row in csv.DictReader(file)
        }
