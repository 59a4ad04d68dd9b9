"""What a machine lacks for a method is told only where it is known: by its compute capability, never by a missing figure."""

from __future__ import annotations

import pytest
from tests_support import TOY_MODEL

from cost_models.catalogue import find_machine
from knowledge_base.field import field
from planner.advising.known import _unmet


@pytest.mark.parametrize(
    ("method", "machine", "lacks"),
    [
        ("fp8", "rtx-4090", False),
        ("fp8", "a100-sxm", True),
        ("llm_int8", "rtx-4090", False),  # the catalogue lists no rate of int8 for it, and it computes in int8
        ("nvfp4", "h100-sxm", True),
        ("nvfp4", "b200-sxm", False),
    ],
)
def test_a_gpu_lacks_what_its_generation_lacks(method: str, machine: str, lacks: bool) -> None:
    assert bool(_unmet(field().method(method), TOY_MODEL, find_machine(machine))) == lacks
