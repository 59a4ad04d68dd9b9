"""A few measurements on a device correct the law's predictions there: toy devices that differ in a known way."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from benchmarks.public_rows import committed, observed, usable
from cost_models.serving import POOLED, law_of, predict, shipped
from cost_models.serving_calibration import calibrated, most_telling, widening
from cost_models.serving_fit import Observed


@pytest.fixture(scope="module")
def table() -> Observed:
    rows = [r for r in usable(committed())[0] if (r.device, r.family, r.metric) == ("b200-sxm", "vllm", "tpot")][::5]
    return observed(rows, Counter())[0]


def device(table: Observed, **factors: float) -> Observed:
    """Return the rows as a device would measure them whose coefficients differ from the law's by some factors."""
    law = law_of(shipped(), table.family, table.tags)
    law = {name: value * factors.get(name, 1.0) for name, value in law.items()}
    return replace(table, value=predict("tpot", table.deployments, law))


def error(table: Observed, factor: np.ndarray | float) -> np.ndarray:
    law = law_of(shipped(), table.family, table.tags)
    return np.abs(np.log(predict("tpot", table.deployments, law) * factor / table.value))


def part(table: Observed, chosen: list[int]) -> Observed:
    return table.only(np.array(chosen, dtype=int))


@pytest.mark.parametrize("factors", [{"read": 0.6}, {"sequence_s": 3.0, "step_s": 3.0}, {"read": 1.3, "layer_s": 0.4}])
def test_four_rows_tell_how_a_device_differs(table: Observed, factors: dict[str, float]) -> None:
    rows = device(table, **factors)
    four = most_telling(shipped(), rows, 4)
    others = part(rows, [i for i in range(len(rows)) if i not in four])
    told = calibrated(shipped(), part(rows, four), others)
    assert np.median(error(others, told.factor)) < 0.35 * np.median(error(others, 1.0))


def test_a_device_like_the_law_keeps_its_predictions_but_is_surer_of_them(table: Observed) -> None:
    rows = device(table)
    few, many = (calibrated(shipped(), part(rows, list(range(n))), rows) for n in (1, 12))
    assert few.factor == pytest.approx(1.0)
    assert (many.log_sd <= few.log_sd + 1e-9).all()
    assert many.log_sd.mean() < 0.8 * few.log_sd.mean()


def test_what_was_measured_is_told_again(table: Observed) -> None:
    rows = device(table, read=0.5, cache=2.0)
    told = calibrated(shipped(), rows, rows)
    assert np.max(error(rows, told.factor)) < 0.1


def test_the_most_telling_rows_leave_less_unknown_than_the_first(table: Observed) -> None:
    chosen = most_telling(shipped(), table, 4)
    assert len(set(chosen)) == 4
    best, first = (calibrated(shipped(), part(table, four), table).log_sd for four in (chosen, [0, 1, 2, 3]))
    assert np.mean(best**2) < np.mean(first**2)


def test_which_rows_are_most_telling_does_not_depend_on_their_values(table: Observed) -> None:
    assert most_telling(shipped(), table, 4) == most_telling(shipped(), replace(table, value=table.value[::-1] * 7), 4)


def test_the_interval_holds_the_corrected_prediction(table: Observed) -> None:
    rows = device(table, read=0.7)
    told = calibrated(shipped(), part(rows, [0, 5, 10]), rows)
    low, high = told.interval(shipped(), "tpot", "vllm")
    assert (low < told.factor).all()
    assert (told.factor < high).all()
    assert widening(shipped(), "tpot", "never seen") == widening(shipped(), "tpot", POOLED) > 0.5


def test_columns_stay_of_one_length(table: Observed) -> None:
    assert {len(getattr(table, f.name)) for f in fields(Observed)[1:]} == {len(table)}
