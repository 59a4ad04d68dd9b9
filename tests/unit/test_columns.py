"""Columns changed in turn: the same as taking every error off every later column at once, whatever the width."""

from __future__ import annotations

import pytest
import torch

from knowledge_base.techniques._columns import each_column


def problem(inputs: int, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(inputs)
    x = torch.randn(4 * inputs, inputs, generator=chance, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x / len(x) + 0.1 * torch.eye(inputs, dtype=torch.float64))
    factor = torch.linalg.cholesky(inverse, upper=True)
    return torch.randn(inputs, outputs, generator=chance, dtype=torch.float64), factor


def one_by_one(columns: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of arXiv:2210.17323 with blocks of one column, rounding to integers."""
    work, rounded = columns.clone(), torch.empty_like(columns)
    for j in range(len(work)):
        rounded[j] = work[j].round()
        error = (work[j] - rounded[j]) / factor[j, j]
        for k in range(j + 1, len(work)):
            work[k] -= error * factor[j, k]
    return rounded


@pytest.mark.parametrize("inputs", [1, 2, 31, 32, 33, 64, 100, 200])
def test_errors_are_taken_off_all_later_columns(inputs: int) -> None:
    columns, factor = problem(inputs)
    expected, found = one_by_one(columns, factor), torch.empty_like(columns)

    def changed(number: int) -> torch.Tensor:
        found[number] = columns[number].round()
        return found[number]

    each_column(columns, factor, changed)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("inputs", "run"), [(256, 128), (300, 128), (192, 64), (400, 32)])
def test_a_run_begins_with_all_of_it_up_to_date(inputs: int, run: int) -> None:
    columns, factor = problem(inputs)
    final, seen = torch.empty_like(columns), torch.empty_like(columns)
    alone = columns.clone()

    def changed(number: int) -> torch.Tensor:
        if number % run == 0:
            seen[number : number + run] = columns[number : number + run]
        final[number] = columns[number].round()
        return final[number]

    each_column(columns, factor, changed)
    for first in range(0, inputs, run):  # what the columns before it, and only they, take off
        before = alone.clone()
        for j in range(first):
            before[j + 1 :] -= factor[j, j + 1 :, None] * ((before[j] - final[j]) / factor[j, j])
        assert torch.allclose(seen[first : first + run], before[first : first + run], atol=1e-9), first
