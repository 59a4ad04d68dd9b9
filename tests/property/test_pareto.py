"""Laws of the Pareto mathematics, against the slow and obvious version."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from search.pareto import front, hypervolume, knee, shortfall

COSTS = hnp.arrays(
    float, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 6).map(float)
)  # small integers: ties and duplicates are common


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(a <= b) and np.any(a < b))


@given(COSTS)
def test_front_is_exactly_the_undominated(costs: np.ndarray) -> None:
    slow = [i for i, row in enumerate(costs) if not any(dominates(other, row) for other in costs)]
    assert front(costs).tolist() == slow


@given(COSTS)
def test_hypervolume_counts_dominated_cells(costs: np.ndarray) -> None:
    reference = np.full(costs.shape[1], 7.0)
    cells = itertools.product(*(range(7) for _ in range(costs.shape[1])))
    slow = sum(any(np.all(row <= np.array(cell)) for row in costs) for cell in cells)
    assert hypervolume(costs, reference) == slow


@given(COSTS)
def test_a_new_point_never_shrinks_the_hypervolume(costs: np.ndarray) -> None:
    reference = np.full(costs.shape[1], 7.0)
    assert hypervolume(costs, reference) >= hypervolume(costs[:-1], reference) if len(costs) > 1 else True


@given(COSTS)
def test_the_knee_is_a_row(costs: np.ndarray) -> None:
    assert 0 <= knee(costs) < len(costs)


@given(COSTS, st.data())
def test_as_much_less_as_a_row_falls_short_and_no_other_is_better(costs: np.ndarray, data: st.DataObject) -> None:
    loose = data.draw(hnp.arrays(bool, costs.shape[1]))
    short = shortfall(costs, loose)
    for i, row in enumerate(costs):
        others = [other for k, other in enumerate(costs) if k != i]
        surely = [other for other in others if np.all(other[~loose] <= row[~loose])]
        if not np.isfinite(short[i]):
            assert (short[i] < 0) == (
                not any(dominates(other, row) for other in others) if not loose.any() else not surely
            )
            continue
        less, more = (np.where(loose, row - short[i] + sign * 0.5, row) for sign in (-1, 1))
        assert not any(dominates(other, less) for other in others)
        assert any(np.all(other <= more) for other in others), "and no less would do"
