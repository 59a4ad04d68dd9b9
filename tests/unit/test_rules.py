"""Composition rules: the facts are readable and sourced, and what they forbid, need and order is what they say."""

import itertools
import random

import pytest

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.registry import techniques
from knowledge_base.types import STAGES, Step

HEADER = "id,a,relation,b,condition,effect,source\n"


@pytest.fixture
def rule_file(tmp_path, monkeypatch):
    """Put other rules in place of the shipped ones."""

    def clear():
        for table in (rules.load_rules, rules.before_edges, rules._ranks, rules._verdict, rules._missing):
            table.cache_clear()

    def write(rows: str) -> None:
        path = tmp_path / "rules.csv"
        path.write_text(HEADER + rows, encoding="utf-8")
        monkeypatch.setattr(rules, "_FILE", path)
        clear()

    yield write
    monkeypatch.undo()
    clear()


def every_step():
    for name, module in techniques.all().items():
        knobs = module.TECHNIQUE.knobs
        for values in itertools.product(*(choice.options for choice in knobs.values())):
            yield Step(name, dict(zip(knobs, values, strict=True)))


def test_every_rule_has_a_source_and_a_unique_id():
    shipped = rules.load_rules()
    assert len(shipped) > 20
    assert len({rule.id for rule in shipped}) == len(shipped)
    for rule in shipped:
        assert "://" in rule.source or ".py" in rule.source, rule.id


def test_two_of_one_family_and_twice_the_same_are_refused():
    by_family = {}
    for step in every_step():
        by_family.setdefault(techniques.get(step.technique).TECHNIQUE.family, []).append(step)
    for steps in by_family.values():
        for a, b in itertools.combinations(steps, 2):
            assert rules.conflict((a, b)), (a, b)


@pytest.mark.parametrize(
    ("a", "b", "rule"),
    [
        (Step("torch_compile"), Step("kv_cache_quantised", {"bits": 8}), "compile-kv"),
        (Step("torch_compile"), Step("prompt_lookup", {"tokens": 4}), "compile-lookup"),
        (Step("low_rank", {"keep": 0.8}), Step("prune_wanda", {"sparsity": 0.5}), "rank-sparsity"),
        (Step("prompt_lookup", {"tokens": 4}), Step("batch_size", {"count": 4}), "lookup-batch"),
        (Step("prompt_lookup", {"tokens": 4}), Step("batch_size", {"count": 1}), None),
        (Step("prune_wanda", {"sparsity": 0.5}), Step("prune_width", {"keep": 0.75}), None),
    ],
)
def test_pairs(a, b, rule):
    for pair in ((a, b), (b, a)):  # a conflict does not depend on the order of writing
        sentence = rules.conflict(pair)
        if rule is None:
            assert sentence is None
        else:
            assert sentence.startswith("`")
            assert f"[{rule}; " in sentence


def test_a_conflict_stays_whatever_is_added():
    steps = list(every_step())
    pick = random.Random(0)
    for _ in range(300):
        some = pick.sample(steps, 3)
        if rules.conflict(some[:2]):
            assert rules.conflict(some)


def test_recovery_needs_damage():
    recover = Step("recover_lora", {"steps": 20})
    assert "requires a step of stage `compress`" in rules.missing((recover,))
    assert rules.missing((recover, Step("weight_dtype", {"dtype": "bfloat16"})))
    for name in ("prune_wanda", "prune_width", "drop_layers", "low_rank"):
        assert rules.missing((recover, Step(name))) is None


def test_order_is_by_stage_then_rules_whatever_the_writing_order():
    names = ["recover_lora", "batch_size", "prune_wanda", "weight_dtype", "prune_width", "drop_layers"]
    expected = ["weight_dtype", "drop_layers", "prune_width", "prune_wanda", "recover_lora", "batch_size"]
    for shuffled in itertools.permutations(names):
        assert [step.technique for step in rules.order([Step(n) for n in shuffled])] == expected


def test_order_keeps_every_before_edge_and_stage():
    place = {step.technique: i for i, step in enumerate(rules.order([Step(name) for name in techniques.names()]))}
    for earlier, later, rule in rules.before_edges():
        assert place[earlier] < place[later], rule
    stages = [STAGES.index(techniques.get(name).TECHNIQUE.stage) for name in sorted(place, key=place.get)]
    assert stages == sorted(stages)


def test_unknown_technique_is_named_with_its_neighbours():
    for ask in (rules.order, rules.conflict, rules.missing):
        with pytest.raises(BadInput, match="Did you mean `prune_wanda`"):
            ask([Step("prune_wnada")])


def test_advice_tells_what_a_pair_gains_and_what_one_does_not():
    steps = [
        Step("kv_cache_quantised", {"bits": 8}),
        Step("batch_size", {"count": 4}),
        Step("prune_wanda", {"sparsity": 0.5}),
    ]
    assert {"kv-batch", "wanda-dense"} <= {rule.id for rule in rules.advice(steps)}
    alone = [steps[0], Step("batch_size", {"count": 1})]
    assert "kv-batch" not in {rule.id for rule in rules.advice(alone)}


@pytest.mark.parametrize(
    ("text", "a", "b", "holds"),
    [
        ("", {}, {}, True),
        ("b.count > 1", {}, {"count": 2}, True),
        ("b.count > 1", {}, {"count": 1}, False),
        ("b.count > 1", {}, {}, False),
        ("a.bits <= 4 and b.type == q4_k", {"bits": 4}, {"type": "q4_k"}, True),
        ("a.bits <= 4 and b.type == q4_k", {"bits": 8}, {"type": "q4_k"}, False),
        ("a.type != q4_k", {"type": "q8_0"}, {}, True),
    ],
)
def test_conditions(text, a, b, holds):
    assert all(clause(a, b) for clause in rules.parse_condition(text)) is holds


@pytest.mark.parametrize(
    "text", ["count > 1", "b.count", "b.type < q4_k", "__import__('os')", "b.count > 1 or a.x > 2"]
)
def test_unreadable_conditions_are_refused(text):
    with pytest.raises(BadInput):
        rules.parse_condition(text)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x,low_rank,excludes,prune_wanda,,why,src", "unknown relation `excludes`"),
        ("x,low_rank,conflicts,prune_wanda,,why,", "lacks"),
        ("x,low_rank,conflicts,,,why,src", "lacks"),
        ("x,low_rank,before,prune_wanda,a.keep > 0.5,why,src", "takes no condition"),
        ("x,low_rank,note,,,why,src\nx,low_rank,note,,,why,src", "used twice"),
    ],
)
def test_damaged_rule_files_are_refused(rule_file, row, message):
    rule_file(row + "\n")
    with pytest.raises(BadInput, match=message):
        rules.load_rules()


def test_a_circle_is_found_and_shown(rule_file):
    rule_file("x,prune_width,before,low_rank,,why,src\ny,low_rank,before,prune_width,,why,src\n")
    with pytest.raises(BadInput, match=r"circle: (low_rank -> prune_width|prune_width -> low_rank)"):
        rules.order([Step("low_rank"), Step("prune_width")])


def test_a_rule_against_the_stages_is_a_circle(rule_file):
    rule_file("x,recover_lora,before,prune_width,,why,src\n")
    with pytest.raises(BadInput, match="circle"):
        rules.order([Step("recover_lora")])
