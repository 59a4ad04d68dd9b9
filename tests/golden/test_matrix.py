"""The scarcity view as it was accepted: what is known of techniques and resources changes only where a diff shows it."""

from __future__ import annotations

from pathlib import Path

from goldens import accepted

from knowledge_base.field.matrix import matrix
from planner.reports.knowledge.matrix import as_markdown


def test_the_matrix_is_the_accepted_one() -> None:
    text = as_markdown(matrix()) + "\n"
    assert text == accepted(Path(__file__).parent / "matrix.md", text)
