"""Composition rules as laws: whatever the rules, the engine says what a slow and obvious reading of them says."""

import itertools

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.rules import Composition, Rule
from knowledge_base.rules.members import Member
from knowledge_base.types import STAGES, Step

NAMES = tuple("pqrstu")
TAGS = ("x", "y")
CONDITIONS = ("", "a.bits <= 4", "b.bits > 4 and a.bits <= 4", "engine == vllm", "workload.concurrency > 8")
CONTEXTS = st.fixed_dictionaries(
    {}, optional={"engine": st.sampled_from(("vllm", "other")), "workload.concurrency": st.sampled_from((1, 64))}
)


@st.composite
def worlds(draw):
    """Members and rules about them; nothing in them is real."""
    members = {}
    for name in NAMES:
        stage = draw(st.sampled_from((*STAGES[2:5], None)))
        family = draw(st.sampled_from(("f", "g", None)))
        tags = draw(st.sets(st.sampled_from(TAGS)))
        groups = {f"provides:{tag}" for tag in tags}
        groups |= {f"{kind}:{value}" for kind, value in (("stage", stage), ("family", family)) if value}
        members[name] = Member(
            id=name, executable=True, stage=stage, family=family, names=frozenset({name}), groups=frozenset(groups),
            knobs=frozenset({"bits"}),
        )  # fmt: skip
    return members, draw(st.lists(one_rule(members), max_size=6, unique_by=lambda rule: rule.id))


def one_rule(members):
    selectors = sorted({selector for member in members.values() for selector in member.selectors})

    def build(id, a, relation, b, condition):
        if relation == "before":
            condition = ""
        elif relation == "requires" or not b:
            condition = "" if "b." in condition else condition
        if not b and not condition:
            condition = "engine == vllm"
        return Rule(id=id, a=a, relation=relation, b=b, condition=condition, effect="so", source=f"https://of.{id}")

    return st.sampled_from(rules.RELATIONS).flatmap(
        lambda relation: st.builds(
            build,
            st.text("abc", min_size=3, max_size=3),
            st.sampled_from(selectors),
            st.just(relation),
            st.sampled_from(selectors if relation == "before" else (*selectors, "")),
            st.sampled_from(CONDITIONS),
        )
    )


def composed(world):
    """Return the engine, unless the rules go round in a circle."""
    try:
        return Composition(*world)
    except BadInput as error:
        assume("circle" not in error.message)
        raise


plans = st.lists(
    st.builds(Step, st.sampled_from(NAMES), st.sampled_from(({}, {"bits": 4}, {"bits": 8}))),
    max_size=4, unique_by=lambda step: step.technique,
)  # fmt: skip


def holds(condition, a, b, context):
    """A condition read plainly: True, False, or None where it cannot be told."""
    compare = {"<=": lambda x, y: x <= y, ">": lambda x, y: x > y, "==": lambda x, y: x == y}
    answers = []
    for clause in filter(None, condition.split(" and ")):
        left, sign, right = clause.split()
        found = {"a": a, "b": b}[left[0]].get(left[2:]) if left[1] == "." else context.get(left)
        answers.append(None if found is None else compare[sign](found, type(found)(right)))
    return False if False in answers else None if None in answers else True


def broken(composition, steps):
    """Return (rule, steps) of everything a plan breaks, by reading every rule for every pair of its steps."""
    found = set()
    meant = {
        (selector, step): selector in composition.members[step.technique].selectors
        for step in steps
        for rule in composition.rules
        for selector in (rule.a, rule.b)
    }
    for rule in composition.rules:
        for a in (step for step in steps if meant[rule.a, step]):
            others = [b for b in steps if b is not a and meant[rule.b, b]]
            if rule.relation in ("conflicts", "redundant"):
                partners = others if rule.b else [Step("")]
                found |= {
                    (rule.id, frozenset({a.technique, b.technique} - {""}))
                    for b in partners
                    if holds(rule.condition, a.knobs, b.knobs, composition.context)
                }
            elif rule.relation == "requires":
                held = holds(rule.condition, a.knobs, {}, composition.context)
                if (held is True and not others) if rule.b else held is False:
                    found.add((rule.id, frozenset({a.technique})))
    families = [(composition.members[step.technique].family, step.technique) for step in steps]
    for (f, a), (g, b) in itertools.combinations(families, 2):
        if f and f == g:
            found.add(("one-of-a-family", frozenset({a, b})))
    return found


@settings(max_examples=150)
@given(worlds(), plans, CONTEXTS)
def test_violations_are_what_a_plain_reading_finds(world, steps, context):
    composition = composed(world).knowing(context)
    told = composition.violations(steps)
    assert {(f.rule.id, frozenset(f.steps)) for f in told} == broken(composition, steps)
    for finding in told:
        assert finding.sentence.endswith(f" [{finding.rule.id}; {finding.rule.source}]")
        assert all(f"`{name}`" in finding.sentence for name in finding.steps)


@settings(max_examples=100)
@given(worlds(), plans, CONTEXTS)
def test_a_plan_is_refused_exactly_where_it_breaks_a_rule(world, steps, context):
    composition = composed(world).knowing(context)
    sentences = [f.sentence for f in composition.violations(steps)]
    why = composition.conflict(steps) or composition.missing(steps)
    assert (why in sentences) if sentences else why is None


@settings(max_examples=100)
@given(worlds(), plans, st.randoms())
def test_order_is_one_and_orders_are_all(world, steps, random):
    composition = composed(world)
    shuffled = random.sample(steps, len(steps))
    ordered = composition.order(steps)
    assert composition.order(shuffled) == ordered

    def allowed(sequence):
        for first, second in itertools.combinations([step.technique for step in sequence], 2):
            stages = [composition.members[name].stage for name in (first, second)]
            if all(stages) and STAGES.index(stages[0]) > STAGES.index(stages[1]):
                return False
            first_is, second_is = (composition.members[name].selectors for name in (first, second))
            if any(r.relation == "before" and r.a in second_is and r.b in first_is for r in composition.rules):
                return False
        return True

    found = list(composition.orders(shuffled))
    assert found[0] == ordered
    assert len(found) == len(set(found))
    assert set(found) == {order for order in itertools.permutations(steps) if allowed(order)}


@settings(max_examples=100)
@given(worlds(), plans, CONTEXTS)
def test_what_may_be_added_is_what_breaks_nothing(world, steps, context):
    composition = composed(world).knowing(context)
    before = broken(composition, steps)
    additions = {addition.name: addition for addition in composition.additions(steps)}
    there = {step.technique for step in steps}
    assert additions.keys() == {name for name, m in composition.members.items() if m.stage} - there
    for name, addition in additions.items():
        after = broken(composition, [*steps, Step(name)])
        told = {(f.rule.id, frozenset(f.steps)) for f in (*addition.forbidden, *addition.needs)}
        assert told == {(rule, names) for rule, names in after if name in names}
        assert after - told <= before  # what was wrong before may have been answered by the step
        assert {f.rule.relation for f in addition.needs} <= {"requires"}


@settings(max_examples=100)
@given(worlds().flatmap(lambda world: st.tuples(st.just(world), one_rule(world[0]))), plans, CONTEXTS)
def test_a_rule_more_makes_no_illegal_plan_legal(world_and_rule, steps, context):
    (members, some), more = world_and_rule
    few = composed((members, some)).knowing(context)
    many = composed((members, [*some, more])).knowing(context)
    kept = {f.sentence for f in few.violations(steps)}
    assert kept <= {f.sentence for f in many.violations(steps)}


@settings(max_examples=100)
@given(worlds(), plans, CONTEXTS)
def test_what_is_not_known_is_told_and_never_enforced(world, steps, context):
    ignorant = composed(world)
    before = {(f.rule.id, frozenset(f.steps)) for f in ignorant.violations(steps)}
    after = {(f.rule.id, frozenset(f.steps)) for f in ignorant.knowing(context).violations(steps)}
    told = [f for f in ignorant.advice(steps) if f.rule.relation in ("conflicts", "redundant", "requires")]
    assert before <= after  # knowing more forbids more, never less
    assert after - before <= {(f.rule.id, frozenset(f.steps)) for f in told}
    for finding in told:
        assert finding.sentence.startswith("if ") or ", which is not known here: " in finding.sentence


SHIPPED = sorted(name for name, member in rules.composition().members.items() if member.stage)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SHIPPED), max_size=5, unique=True), st.randoms())
def test_the_shipped_rules_keep_the_laws(names, random):
    context = {"engine": "transformers", "calibration": "no", "model.quantised": "yes"}
    composition = rules.composition().knowing(context)
    steps = [Step(name) for name in names]
    told = composition.violations(steps)
    for finding in told:
        assert finding.rule.source in finding.sentence
    legal = not (composition.conflict(steps) or composition.missing(steps))
    assert legal is not bool(told)
    assert composition.order(random.sample(steps, len(steps))) == composition.order(steps)
    for some in itertools.islice(composition.orders(steps), 20):
        assert not any(
            composition.comes_before(later.technique, earlier.technique)
            for earlier, later in itertools.combinations(some, 2)
        )
