"""What an engine's files and its memory hold for a weight: in which type, how often, and which copies are made of it.

The rows of engine_memory.csv are chosen as those of efficiencies.csv are: one for the engine beats any other, then one for
the format, then one for what the processor can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models.efficiency import best_row, read_rows
from knowledge_base.field.overlay import folders
from knowledge_base.types import Device

if TYPE_CHECKING:
    from cost_models.case import Case

TABLE = "engine_memory.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is in memory for weights, as ratios to their stored bytes."""

    held_ratio: float  # of matrices that are multiplied with: 2 where the processor computes in a type twice as wide
    tied_ratio: float  # of a table that is both embedding and head, beside it
    copies_ratio: float  # of matrices that are multiplied with, beside them: the kernels' own order. Not called weights
    log_sd: float  # of copies_ratio


def held(engine: str, weight_format: str, device: Device) -> Held:
    """Return what an engine holds in memory for weights of a format on a device."""
    return _held(folders(), engine, weight_format, (*sorted(device.features), device.kind))


@lru_cache(maxsize=512)
def _held(laid: tuple[Path, ...], engine: str, weight_format: str, kinds: tuple[str, ...]) -> Held:
    # `laid`: the folders of a person's own rows, which the answer depends on.
    wanted = {"engine": (engine, "*"), "weight_format": (weight_format, "*"), "device": (*kinds, "*")}
    row = best_row(read_rows(TABLE), wanted)
    return Held(**{name: float(row[name]) for name in Held.__dataclass_fields__})


def stored_dtype(engine: str, dtype: str) -> str:
    """Return the type in which an engine's files hold an unchanged model's weights."""
    rows = (row for row in read_rows(TABLE) if row["engine"] == engine and row["weight_format"] == dtype)
    return next((row["stored_as"] for row in rows if row["stored_as"]), dtype)


def beside_bytes(case: Case) -> Any:
    """Return (plans,) bytes of weights in memory beside those that are stored: wider, or a second time."""
    demand, rates = case.demand, case.rates
    wider = (rates.held_ratio - 1) * (demand.linear_bytes + demand.head_stored_bytes)
    tied = np.where(demand.head_stored_bytes == 0, rates.tied_ratio * demand.head_read_bytes, 0.0)
    return wider + tied


def copies_bytes(case: Case) -> Any:
    """Return (plans,) bytes of the copies that kernels make of what they multiply with."""
    return case.rates.copies_ratio * (case.demand.linear_bytes + case.demand.head_read_bytes)
