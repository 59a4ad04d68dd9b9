"""One file for each cost term; the file name is the metric name.

A term has QUANTITY (its metric), USES (terms whose predictions it reads) and predict(case, used) -> Prediction.
Optional: SHIFT, where errors are those of log(SHIFT + value), and LEARNS, what calibration corrects: "quality", what the
plan's steps do to the model; "build", making the artefact; else what serving costs on a machine with an engine.
"""

from __future__ import annotations

from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from types import ModuleType

from knowledge_base.registry import Folder

terms = Folder("cost_models.terms", "cost term", ("QUANTITY", "USES", "predict"))


@lru_cache(maxsize=1)
def in_order() -> tuple[ModuleType, ...]:
    """Return every term, each after the terms it uses.

    Raises:
        ValueError: terms use each other in a circle.
    """
    found = terms.all()
    return order(found)


def order(found: dict[str, ModuleType]) -> tuple[ModuleType, ...]:
    """Return terms sorted so that each comes after those it uses.

    Raises:
        ValueError: terms use each other in a circle, or one uses a term that is not there.
    """
    try:
        names = tuple(TopologicalSorter({name: term.USES for name, term in found.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"cost terms use each other in a circle: {' -> '.join(error.args[1])}") from error
    if missing := set(names) - set(found):
        raise ValueError(f"no such cost term: {', '.join(sorted(missing))}")
    return tuple(found[name] for name in names)
