"""Settings made for budgets: the gentlest that is predicted to meet each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

import cost_models
from knowledge_base.registry import stands
from knowledge_base.types import Budget, Model, Plan, Step
from search.fitting import with_fitted
from search.space import build_space

# Of a billion parameters: in a toy reading weights takes no time.
LARGE = replace(
    TOY_MODEL, layers=22, attention_layers=22, hidden_size=2048, heads=32, kv_heads=4, head_size=64, ffn_size=5632,
    vocab_size=32000, linear_params=968_884_224, embedding_params=65_536_000, params_total=1_034_512_384,
    params_active=1_034_512_384, weight_bytes=4_138_049_536, max_context_tokens=2048,
)  # fmt: skip


def predicted(step: Step | None, metric: str, model: Model = TOY_MODEL) -> float:
    plan = Plan(model_digest=model.digest, engine="transformers", steps=(step,) if step else ())
    return cost_models.estimate_many([plan], model, TOY_WORKLOAD, TOY_MACHINE)[metric].mid[0]


def added(*budgets: Budget, model: Model = TOY_MODEL, only: str = "weight_mixed") -> list[Step]:
    before = build_space(model, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers",), only=(only, "weight_dtype"))
    after = with_fitted(before, model, TOY_WORKLOAD, TOY_MACHINE, budgets)
    old, new = before.options["transformers"], after.options["transformers"]
    assert old.keys() == new.keys()
    assert all(new[family][: len(steps)] == steps for family, steps in old.items())
    return [step for family, steps in new.items() for step in steps[len(old[family]) :]]


def at_most(metric: str, value: float, **more) -> Budget:
    return Budget(metric=metric, statistic="mean", bound="max", value=value, **more)


def mixed(average_bits: float, choose: str = "bits", speedup: float = 0.0) -> Step:
    return Step("weight_mixed", {"average_bits": average_bits, "choose": choose, "speedup": speedup})


def by_choice(steps: list[Step]) -> dict[str, Step]:
    assert len({step.knobs["choose"] for step in steps}) == len(steps)
    return {step.knobs["choose"]: step for step in steps}


@pytest.mark.parametrize("metric", ["artefact_bytes", "peak_memory_bytes"])
def test_the_budget_is_just_met(metric):
    harsh, gentle = (predicted(mixed(bits), metric) for bits in (3.0, 7.0))
    limit = 0.3 * harsh + 0.7 * gentle
    (step,) = added(at_most(metric, limit))
    assert step == mixed(step.knobs["average_bits"])
    assert predicted(step, metric) <= limit
    assert predicted(mixed(step.knobs["average_bits"] + 0.05), metric) > limit


def test_each_choice_gets_its_own_where_it_is_legal():
    steps = by_choice(added(at_most("artefact_bytes", predicted(mixed(3.0), "artefact_bytes") * 1.0001)))
    assert steps == {"bits": mixed(3.0), "everything": mixed(3.0, "everything")}


def test_a_budget_of_time_asks_for_the_speed_that_is_lacking():
    now = predicted(None, "tpot_s", LARGE)
    limit = now / 1.97
    assert predicted(mixed(4.5, speedup=1.0), "tpot_s", LARGE) < limit  # so it is predicted to be met with less
    steps = by_choice(added(at_most("tpot_s", limit), model=LARGE))
    assert steps["bits"] == mixed(4.5, speedup=2.0) and steps["everything"] == mixed(3.5, "everything", 2.0)
    half = added(at_most("tpot_s", 0.5, relative=True), model=LARGE, only="prune_to_speed")
    (step,) = half
    assert 2.0 < step.knobs["speedup"] <= 2.15  # what a step does besides takes its share
    rate = 1.97 * predicted(None, "throughput_tokens_per_s", LARGE)
    fast = added(Budget(metric="throughput_tokens_per_s", statistic="mean", bound="min", value=rate), model=LARGE)
    assert by_choice(fast)["bits"].knobs["speedup"] >= 2.0


def test_bytes_and_seconds_are_met_at_once():
    size = at_most("artefact_bytes", predicted(mixed(3.2, "everything"), "artefact_bytes", LARGE) * 1.0001)
    seconds = at_most("tpot_s", predicted(None, "tpot_s", LARGE) / 2.5)
    steps = [s for s in added(size, seconds, model=LARGE) if s.knobs["choose"] == "everything"]
    assert steps == [
        mixed(3.2, "everything"), mixed(3.5, "everything", 2.5), mixed(3.2, "everything", 2.5),
    ]  # fmt: skip
    assert [s for s in added(seconds, size, model=LARGE) if s.knobs["choose"] == "everything"][-1] == steps[-1]


def test_what_is_fitted_stands_when_it_is_read_again():
    for step in (mixed(3.95), mixed(4.5, speedup=1.35), Step("prune_to_speed", {"speedup": 1.3})):
        assert stands(step)
    assert not stands(mixed(3.951)) and not stands(mixed(4.5, speedup=0.7))
    assert not stands(Step("weight_mixed", {"average_bits": [4.5], "choose": "bits", "speedup": 0.0}))


def test_relative_to_the_unchanged_model_is_the_same():
    size = predicted(None, "artefact_bytes")
    assert added(at_most("artefact_bytes", 0.45, relative=True)) == added(at_most("artefact_bytes", 0.45 * size)) != []


@pytest.mark.parametrize(
    "budget",
    [
        at_most("artefact_bytes", 1.0),  # out of reach
        at_most("tpot_s", 0.0),
        at_most("artefact_bytes", 1e15),  # met as it is
        at_most("artefact_bytes", 0.4, relative=True, level="off"),
        at_most("perplexity", 1e9),
        Budget(metric="throughput_tokens_per_s", statistic="mean", bound="min", value=1.0),
        Budget(metric="throughput_tokens_per_s", statistic="mean", bound="min", value=1e15),
    ],
)
def test_nothing_is_added_where_it_cannot_help(budget):
    assert added(budget) == []


def test_what_is_there_already_is_not_added_again():
    limit = predicted(mixed(4.5), "artefact_bytes")
    assert added(at_most("artefact_bytes", limit * 1.0001)) == []
    size = at_most("artefact_bytes", 0.42, relative=True)
    assert len(added(size, size)) == 1
