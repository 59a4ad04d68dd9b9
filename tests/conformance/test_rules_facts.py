"""Every published fact on how techniques compose is stated by a rule, with its source; counts are committed numbers."""

import csv
import itertools
from pathlib import Path

import pytest

from knowledge_base import rules
from knowledge_base.field import field
from knowledge_base.rules.reading import PUBLISHED_FACTS
from knowledge_base.rules.rule import FORBIDDING
from knowledge_base.types import Step

COLLECTED = Path(__file__).resolve().parents[3] / "shared" / "data" / "composition.csv"
STATED = [rule for rule in rules.load_rules() if rule.fact]


def test_every_fact_is_stated():
    assert {rule.fact for rule in STATED} == set(range(1, PUBLISHED_FACTS + 1))


def test_as_many_are_checked_by_a_machine_as_was_promised():
    checked = {rule.fact for rule in STATED if rule.checked}
    only_told = {rule.fact for rule in STATED} - checked
    assert (len(checked), len(only_told)) == (88, 14)
    for rule in STATED:
        assert rule.effect and rule.source, rule.id


@pytest.mark.parametrize("number", [31, 32, 33, 34, 35, 36, 44, 47, 49, 51, 67, 69, 73, 74, 75, 77, 80, 83, 85, 93, 94])
def test_what_only_shrinks_a_gain_forbids_nothing(number):
    relations = {rule.relation for rule in STATED if rule.fact == number}
    assert relations <= {"weakens", "note", "synergy"}, relations


@pytest.mark.skipif(not COLLECTED.exists(), reason="the collected facts are not beside this checkout")
def test_a_rule_cites_the_source_of_its_fact():
    with COLLECTED.open(encoding="utf-8", newline="") as file:
        collected = {int(row["id"]): row["source_url"] for row in csv.DictReader(file)}
    assert collected.keys() == set(range(1, PUBLISHED_FACTS + 1))
    for rule in STATED:
        assert rule.source == collected[rule.fact], rule.where


def test_what_was_published_together_is_a_legal_plan():
    composed = [row for row in field().evidence if len(row.steps) > 1]
    assert len(composed) > 20
    for row in composed:
        assert rules.composition().violations(row.steps) == (), row.where


def test_every_rule_about_two_can_come_to_pass():
    """What is ordered, gained or lost together must be legal together: else the rule would never be heard."""
    engine = rules.composition()
    for rule in engine.rules:
        if rule.b and rule.relation not in FORBIDDING:
            pairs = itertools.product(engine.meaning(rule.a), engine.meaning(rule.b))
            assert any(a != b and not engine.conflict((Step(a), Step(b))) for a, b in pairs), rule.where
