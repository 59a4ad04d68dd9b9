"""Columns of a matrix changed one after the other, each error made up for by the columns that follow: GPTQ, SparseGPT.

With U the upper Cholesky factor of the inverse Hessian of the inputs, changing column j from w_j to q_j leaves the error
e = (w_j - q_j) / U_jj, and every later column k gives up e U_jk (Frantar et al., arXiv:2210.17323, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_FEW = 32  # columns that take each other's errors one by one; those of more are taken together, as one product


def each_column(columns: torch.Tensor, factor: torch.Tensor, changed: Callable[[int], torch.Tensor]) -> None:
    """Exchange each column, in order, for what `changed(number)` makes of it as it stands then.

    Args:
        columns: float32 (in, out), the matrix turned over so that a column lies together. Afterwards they hold the errors.
            When a run of columns begins whose length is a power of two of at least 32, at a multiple of it, every
            error before it has been taken off all of it.
        factor: U (in, in).
        changed: returns the new column (out,), in memory of its own.
    """
    spread = factor.diagonal().tolist()

    def run(first: int, last: int) -> None:
        if last - first <= _FEW:
            for number in range(first, last):
                error = columns[number].sub_(changed(number)).div_(spread[number])
                columns[number + 1 : last].addr_(factor[number, number + 1 : last], error, alpha=-1)
            return
        middle = first + _FEW
        while 2 * (middle - first) < last - first:
            middle += middle - first
        run(first, middle)
        columns[middle:last].addmm_(factor[first:middle, middle:last].T, columns[first:middle], alpha=-1)
        run(middle, last)

    run(0, len(columns))
