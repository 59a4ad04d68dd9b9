"""What methods cost in quality: the shipped fit is the fit of the shipped evidence, and plain Python reads it right."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from tests_support import TOY_MODEL, TOY_WORKLOAD

from cost_models import quality_fit
from cost_models.demand import demand_of
from knowledge_base import quality
from knowledge_base.quality import compose, expected_loss, family_of
from knowledge_base.techniques._quality import loss_after


@pytest.fixture(scope="module")
def published() -> list[quality_fit.Figure]:
    return quality_fit.published()


@pytest.fixture(scope="module")
def shipped() -> dict:
    return json.loads(quality_fit.FITS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("group", quality.GROUPS)
def test_the_shipped_fit_is_that_of_the_shipped_evidence(group: str, published: list, shipped: dict) -> None:
    fit = shipped["groups"][group]
    again = quality_fit.fit_group(group, [f for f in published if f.group == group])
    for name in ("names", "flat", "families", "params"):
        assert again[name] == fit[name]
    assert again["coefficients"] == pytest.approx(fit["coefficients"], rel=1e-3, abs=1e-3)
    for row, known in zip(again["covariance"], fit["covariance"], strict=True):
        assert row == pytest.approx(known, rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_the_shipped_widths_are_those_of_models_left_out(published: list, shipped: dict) -> None:
    again = quality_fit.build(published)
    assert again["families"] == shipped["families"]
    assert again["methods"].keys() == shipped["methods"].keys()
    for method, groups in shipped["methods"].items():
        for group, said in groups.items():
            assert again["methods"][method][group] == pytest.approx(said, rel=0.02, abs=1e-4), (method, group)
    for group, fit in shipped["groups"].items():
        for name in ("reach", "reach_new_family"):
            assert again["groups"][group][name] == pytest.approx(fit[name], rel=0.02)


@pytest.mark.parametrize("group", quality.GROUPS)
def test_plain_python_tells_what_scikit_learn_tells(group: str, published: list, shipped: dict) -> None:
    own = [f for f in published if f.group == group]
    fit = shipped["groups"][group]
    names, matrix = quality_fit.design(group, own, fit["flat"])
    scale = np.array([quality_fit.prior_sd(name) for name in names])
    ridge = quality_fit.regression(matrix * scale, np.array([f.value for f in own]))
    means, sds = ridge.predict(matrix * scale, return_std=True)
    for figure, mean, sd in zip(own, means, sds, strict=True):
        told = quality.told(fit, group, figure.method, figure.knobs, figure.params, figure.family)
        assert told == pytest.approx((mean, sd), rel=2e-3, abs=2e-3), figure


def test_every_figure_of_perplexity_with_a_strength_is_used(published: list, shipped: dict) -> None:
    counted = Counter((f.method, f.group) for f in published)
    assert counted == {(m, g): said["rows"] for m, groups in shipped["methods"].items() for g, said in groups.items()}
    assert sum(counted.values()) > 480
    assert {f.family for f in published} >= {"opt", "bloom", "llama", "llama-2", "llama-3"}


def test_one_published_figure_by_hand(published: list) -> None:
    (row,) = [f for f in published if f.method == "gptq" and f.model == ("bloom", 1.1) and f.knobs["bits"] == 4]
    assert row.group == "weights"
    assert row.params == 1.1e9
    assert row.loss == pytest.approx(math.log(19.05 / 17.69), abs=1e-6)


def test_it_comes_near_what_was_published() -> None:
    for method, knobs, params, family, seen in (
        ("awq", {"bits": 4, "group_size": 128}, 6.7e9, "llama-2", 0.0235),
        ("gptq", {"bits": 3}, 2.7e9, "opt", 0.3028),
        ("gguf", {"type": "q4_k_m"}, 8e9, "llama-3", 0.0275),
        ("wanda", {"sparsity": 0.5}, 13e9, "llama-2", 0.1961),
        ("slicegpt", {"sparsity": 0.2}, 6.7e9, "opt", 0.0564),
        ("sleb", {"sparsity": 0.25}, 8e9, "llama-3", 0.979),
    ):
        loss = expected_loss(method, knobs, params, family)
        assert loss.low <= seen <= loss.high, method
        assert loss.mid == pytest.approx(seen, rel=0.5), method


@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("no_such_method", {"bits": 4}),
        ("gptq", {}),
        ("gguf", {"type": "q9_9"}),
        ("wanda", {"bits": 4}),
        ("lora", {"rank": 8}),
        ("wanda", {"sparsity": 0}),
        ("gptq", {"bits": "four"}),
        ("wanda", {"pattern": "2 of 4"}),
        ("wanda", {"pattern": "2:0"}),
    ],
)
def test_nothing_is_invented_where_nothing_was_published(method: str, knobs: dict) -> None:
    assert expected_loss(method, knobs, 7e9) is None


def test_thin_evidence_widens_the_interval_and_is_told() -> None:
    once, often = expected_loss("hqq", {"bits": 4}, 8e9), expected_loss("gptq", {"bits": 4}, 8e9)
    assert (once.n_rows, once.n_models) == (1, 1)
    assert often.n_rows > 50
    assert often.source == f"{often.n_rows} published figures of gptq on {often.n_models} models"
    assert once.high / once.mid > 1.2 * often.high / often.mid


def test_intervals_are_as_wide_as_left_out_models_showed(published: list, shipped: dict) -> None:
    inside = []
    for f in published:
        fit, seen = shipped["groups"][f.group], shipped["methods"][f.method][f.group]
        mean, sd = quality.told(fit, f.group, f.method, f.knobs, f.params, f.family)
        loss = expected_loss(f.method, f.knobs, f.params, f.family)
        reach = fit["reach" if f.family in fit["families"] else "reach_new_family"]
        assert math.asinh(loss.high / quality.SCALE) == pytest.approx(max(mean, 0) + sd * seen["spread"] * reach)
        inside.append(loss.low <= f.loss <= loss.high)
    assert sum(inside) > 0.9 * len(inside)  # these were seen in the fit, so more than the 90 % of those left out


def test_an_unknown_family_is_told_less_surely() -> None:
    known = expected_loss("gptq", {"bits": 4}, 7e9, "llama-2")
    unknown = expected_loss("gptq", {"bits": 4}, 7e9, "no-such-family")
    assert unknown == expected_loss("gptq", {"bits": 4}, 7e9)
    assert unknown.high / unknown.mid > known.high / known.mid


def test_sizes_beyond_the_evidence_are_held() -> None:
    smallest, largest = quality._fits()["groups"]["weights"]["params"]
    knobs = {"bits": 4, "group_size": 32}
    least, tiny = expected_loss("gptq", knobs, smallest), expected_loss("gptq", knobs, 7.3e6)
    assert tiny.mid == least.mid
    assert tiny.sd == pytest.approx(2 * least.sd)
    assert tiny.high - tiny.mid == pytest.approx(2 * (least.high - least.mid))
    assert tiny.low >= 0  # twice the doubt is no reason to expect a gain
    assert expected_loss("gptq", knobs, 1e13) == expected_loss("gptq", knobs, largest)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("meta-llama/Llama-2-70b-chat-hf", "llama-2"), ("Llama-3.1-8B", "llama-3"), ("huggyllama/llama-7b", "llama"),
        ("facebook/opt-125m", "opt"), ("bigscience/bloom-7b1", "bloom"), ("mistralai/Mixtral-8x7B-v0.1", "mixtral"),
        ("Llama-4-Scout-17B", ""), ("tiny-lm", ""), ("optimus-7b", ""), ("", ""), ("((((-7b", ""),
    ],
)  # fmt: skip
def test_families_are_read_off_names(name: str, family: str) -> None:
    assert family_of(name) == family


# ---------------------------------------------------------------- compositions


def losses(*parts: tuple[str, dict]) -> list[quality.Loss]:
    return [expected_loss(method, knobs, 6.7e9, "llama-2") for method, knobs in parts]


def test_losses_add_up_in_log_perplexity() -> None:
    prune, round_ = losses(("slicegpt", {"sparsity": 0.2}), ("gptq", {"bits": 4, "group_size": 128}))
    both = compose([prune, round_])
    assert both == compose([prune, round_])
    assert both.mid == pytest.approx(prune.mid + round_.mid)
    assert both.high - both.mid == pytest.approx(math.hypot(prune.high - prune.mid, round_.high - round_.mid))
    assert both.n_rows == min(prune.n_rows, round_.n_rows)
    assert both.source == f"{prune.source}; {round_.source}"


def test_what_loses_more_together_has_a_wider_interval() -> None:
    zeros, rtn = losses(("wanda", {"sparsity": 0.5}), ("rtn", {"bits": 4, "group_size": 128}))
    both = compose([zeros, rtn])
    assert quality.together(zeros, rtn)["fact"] == "3"
    assert both.high - both.mid == pytest.approx(zeros.high - zeros.mid + rtn.high - rtn.mid)


def test_what_a_source_says_of_two_methods_beats_what_it_says_of_their_groups() -> None:
    joint = losses(("sparsegpt", {"sparsity": 0.5}), ("gptq", {"bits": 4, "group_size": 128}))
    both = compose(joint)
    assert quality.together(*joint)["fact"] == "4"
    assert both.high - both.mid == pytest.approx(math.hypot(*(loss.high - loss.mid for loss in joint)))


def test_every_composition_names_what_exists() -> None:
    methods = quality._fits()["methods"]
    for pair, row in quality._pairs().items():
        assert row["effect"] in ("more", "sum")
        assert row["source"].startswith("https://")
        assert pair <= set(quality.GROUPS) or pair <= methods.keys(), row


def test_one_loss_composes_to_itself_and_none_is_refused() -> None:
    (loss,) = losses(("awq", {"bits": 3, "group_size": 128}))
    alone = compose([loss])
    assert (alone.mid, alone.low, alone.high) == pytest.approx((loss.mid, loss.low, loss.high))
    with pytest.raises(ValueError, match="no losses"):
        compose([])


# ---------------------------------------------------------------- in a plan's demand


def test_a_step_multiplies_its_loss_in() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    loss = expected_loss("rtn", {"bits": 4, "group_size": 32}, TOY_MODEL.params_total)
    after = loss_after(loss_after(demand, "rtn", bits=4, group_size=32), "rtn", bits=4, group_size=32)
    assert after.perplexity_ratio == pytest.approx(math.exp(2 * loss.mid))
    assert after.perplexity_log_sd == pytest.approx(math.sqrt(2) * loss.sd)


def test_a_step_without_a_published_loss_is_refused() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    with pytest.raises(LookupError, match="no_such_method"):
        loss_after(demand, "no_such_method", bits=4)


def test_steps_that_lose_more_together_are_told_less_surely() -> None:
    demand = demand_of(TOY_MODEL, TOY_WORKLOAD, "transformers")
    zeros, both = loss_after(demand, "wanda", sparsity=0.5), [("wanda", {"sparsity": 0.5}), ("rtn", {"bits": 4})]
    after = loss_after(zeros, "rtn", bits=4)
    assert after.perplexity_log_sd == pytest.approx(
        compose([expected_loss(m, k, TOY_MODEL.params_total) for m, k in both]).sd
    )
    assert after.perplexity_log_sd == pytest.approx(sum(loss.sd for loss in after.losses))
