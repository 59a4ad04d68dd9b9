"""The page of errors says of every missed target by how much it is missed and which term is to blame."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import prediction_error
from tools import error_tables
from tools.reference import predictions

KNOWN = json.loads(prediction_error.WRITTEN.read_text(encoding="utf-8"))


@pytest.fixture
def section() -> dict:
    """One section with nothing missed."""
    known = copy.deepcopy(KNOWN["committed rows"])
    for left_out in ("unseen devices", "unseen models"):
        for row in known[left_out]["quantities"].values():
            row |= dict.fromkeys(error_tables.FIGURES, 0.01)
        known[left_out]["whole"] |= {name: 0.9 for name, *_ in error_tables.WHOLE}
        known[left_out]["whole"] |= {name: 0.99 for name, _ in error_tables.RANKS} | {"too_low": 0.02}
    return known


@pytest.mark.parametrize("title", ["committed rows", "all rows"])
def test_every_cross_of_the_tables_has_a_row_with_its_term(title: str) -> None:
    found = list(error_tables.missed(KNOWN[title]))
    tables = prediction_error.as_markdown(KNOWN[title])
    assert len(found) == tables.count("✗") > 0
    assert all(miss.blame and miss.by for miss in found)


def test_what_is_met_is_not_told_as_missed(section: dict) -> None:
    assert list(error_tables.missed(section)) == []


def test_a_miss_says_by_how_much_and_which_groups_are_furthest_off(section: dict) -> None:
    of = section["unseen devices"]
    of["quantities"]["peak memory"]["median"] = 0.071
    of["groups"] = [
        {"metric": "memory", "family": "near", "hardware": "cpu", "n": 90, "median": 0.06},
        {"metric": "memory", "family": "far", "hardware": "cpu", "n": 10, "median": 0.5},
        {"metric": "memory", "family": "met", "hardware": "cpu", "n": 900, "median": 0.04},
    ]
    (miss,) = error_tables.missed(section)
    assert (miss.left_out, miss.quantity, miss.figure, miss.target, miss.by) == (
        "devices", "peak memory", "7.1%", "≤ 5%", "2.1 points"
    )  # fmt: skip
    assert miss.furthest == "far on cpu, 50% of 10 rows; near on cpu, 6% of 90 rows"


def test_ranks_intervals_and_memory_too_low_count_as_targets(section: dict) -> None:
    section["unseen models"]["whole"] |= {"coverage": 0.84, "calibrated_rank": 0.9, "too_low": 0.1}
    found = {(miss.quantity, miss.by) for miss in error_tables.missed(section)}
    assert found == {("90 % intervals", "1.0 points"), ("rank correlation", "0.050"), ("memory told too low", "7.0 points")}  # fmt: skip


def test_a_miss_that_nothing_explains_stops_the_page(section: dict) -> None:
    section["unseen devices"]["quantities"]["decode, batch 1, dense"]["median"] = 0.2
    with pytest.raises(KeyError, match="decode, batch 1, dense"):
        list(error_tables.missed(section))


def test_the_page_has_calibration_and_fine_tuning_with_their_targets() -> None:
    text = predictions.accuracy()
    assert text.count("### Targets missed, and the term to blame") == 2
    judged = json.loads((prediction_error.HERE / "calibration_error.json").read_text(encoding="utf-8"))["calibrated"][
        "tpot_s"
    ]["n"]
    assert f"| decode | {judged} |" in text and "≤ 6% |" in text
    assert "| memory |" in text.split("## Fine-tuning")[1]
