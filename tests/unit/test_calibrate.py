"""Calibration on machines whose truth is known: it learns, stays honest, and survives JSON."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from cost_models import calibrate
from cost_models.calibration import _NAMES, Calibration, Features, softened, unsoftened
from cost_models.demand import chains
from cost_models.error_report import as_text, error_report
from cost_models.predict import Z, estimate, estimate_many
from cost_models.terms import terms
from knowledge_base.serde import plain, restore
from knowledge_base.types import Figure, Measurement, Plan, Step

PLANS = [
    Plan(model_digest="toy", engine=engine, steps=tuple(s for s in steps if s))
    for engine in ("transformers", "llama_cpp")
    for steps in itertools.product(
        (
            None,
            Step("drop_layers", {"count": 1, "by": "influence"}),
            Step("drop_layers", {"count": 2, "by": "influence"}),
        ),
        (None, Step("weight_dtype", {"dtype": "bfloat16"})),
        (None, Step("batch_size", {"count": 2}), Step("batch_size", {"count": 4})),
    )
]


def truths(seed: int, metric: str = "tpot_s") -> np.ndarray:
    """Return what a made-up machine would measure: our prior bent by effects drawn as the prior says, and noise."""
    draw = random.Random(seed)
    prior = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)[metric]
    sd = np.log(prior.high / prior.mid) / Z
    machine = draw.gauss(0, 0.6)
    engines = {"transformers": draw.gauss(0, 0.45), "llama_cpp": draw.gauss(0, 0.45)}
    kinds = {key: draw.gauss(0, 0.45) for key in itertools.product(engines, (True, False))}
    names = sorted({name for p in PLANS for step in p.steps for name in (step.technique, str(step))})
    steps = {name: draw.gauss(0, 0.28 if "(" in name else 0.39) for name in names}
    noise = [draw.gauss(0, 0.03) for _ in PLANS]
    shift = [
        s * (
            machine + engines[p.engine] + kinds[p.engine, p.step("weight_dtype") is None]
            + sum(steps[step.technique] + steps[str(step)] for step in p.steps)
        ) + e
        for p, s, e in zip(PLANS, sd, noise, strict=True)
    ]  # fmt: skip
    return prior.mid * np.exp(shift)


def measured(values: np.ndarray, chosen: list[int], metric: str = "tpot_s") -> list[Measurement]:
    return [
        Measurement(
            plan=PLANS[i], key=str(i), hardware_fingerprint="toy",
            figures={metric: Figure(value=float(values[i]), low=float(values[i]), high=float(values[i]), n=5)},
        )
        for i in chosen
    ]  # fmt: skip


def fit(values: np.ndarray, chosen: list[int], metric: str = "tpot_s") -> Calibration:
    return calibrate.fit(measured(values, chosen, metric), TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)


def test_no_measurement_no_correction() -> None:
    calibration = fit(truths(0), [])
    assert not calibration.corrections
    prior = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)
    same = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)
    assert all(np.array_equal(prior[name].mid, same[name].mid) for name in prior)


def test_failed_and_modelled_figures_teach_nothing() -> None:
    from knowledge_base.types import Failure

    good = measured(truths(0), [0, 1, 2])
    failed = [replace(m, failure=Failure(kind="crashed", stage="measure", message="gone")) for m in good]
    modelled = [
        replace(m, figures={"energy_j_per_token": Figure(value=9.0, low=9.0, high=9.0, n=1, source="modelled")})
        for m in good
    ]
    assert not calibrate.fit([*failed, *modelled], TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE).corrections


def test_errors_and_intervals_shrink_and_stay_honest() -> None:
    errors: dict[int, list[float]] = {}
    widths: dict[int, list[float]] = {}
    covered: dict[int, list[bool]] = {}
    for seed in range(30):
        values = truths(seed)
        order = random.Random(seed).sample(range(len(PLANS)), len(PLANS))
        for n in (0, 1, 4, 12):
            calibration = fit(values, order[:n]) if n else None
            figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)["tpot_s"]
            unseen = order[n:]
            errors.setdefault(n, []).append(float(np.median(np.abs(np.log(figures.mid / values))[unseen])))
            widths.setdefault(n, []).append(float(np.median(np.log(figures.high / figures.low)[unseen])))
            inside = (figures.low <= values) & (values <= figures.high)
            covered.setdefault(n, []).extend(inside[unseen].tolist())
    typical = [statistics.mean(errors[n]) for n in (0, 1, 4, 12)]
    wide = [statistics.mean(widths[n]) for n in (0, 1, 4, 12)]
    assert typical == sorted(typical, reverse=True)
    assert all(after <= 1.01 * before for before, after in pairwise(wide)), wide  # of 30 draws
    assert wide[-1] < wide[0] / 3
    assert typical[-1] < 0.06 < 0.15 < typical[0]
    for n, inside in covered.items():
        assert 0.7 <= statistics.mean(inside) <= 0.97, (n, statistics.mean(inside))


def test_a_common_factor_is_learned_from_one_measurement_of_each_engine() -> None:
    prior = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["tpot_s"].mid
    calibration = fit(2 * prior, [0, len(PLANS) // 2])
    figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)
    assert np.all(np.abs(figures["tpot_s"].mid / (2 * prior) - 1) < 0.35)
    # what was learned of a step's time reaches what is made of it
    before = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["latency_s"].mid
    assert np.all(figures["latency_s"].mid > 1.3 * before)
    assert np.array_equal(
        figures["ttft_s"].mid, estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["ttft_s"].mid
    )


def test_quality_is_learned_step_by_step() -> None:
    prior = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["quality_loss_ratio"].mid
    truth = (1 + prior) ** 2 - 1  # every step costs twice as much in log space
    dropped = [i for i, p in enumerate(PLANS) if p.step("drop_layers")]
    chosen = [i for i in dropped if PLANS[i].engine == "transformers"]
    calibration = fit(truth, chosen, "quality_loss_ratio")
    figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)["quality_loss_ratio"]
    other = [i for i in dropped if PLANS[i].engine == "llama_cpp"]  # the engine has no part in it
    assert np.all(np.abs(np.log1p(figures.mid[other]) / np.log1p(truth[other]) - 1) < 0.2)
    unchanged = PLANS.index(Plan(model_digest="toy", engine="transformers"))
    assert figures.low[unchanged] == figures.mid[unchanged] == figures.high[unchanged] == 0


def test_no_loss_is_corrected_into_a_gain() -> None:
    """However much less than predicted some plans lost: what that says of others is never that they lose nothing."""
    prior = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["quality_loss_ratio"].mid
    losing = np.flatnonzero(prior > 0)
    learned = fit((1 + prior) ** 0.5 - 1, losing.tolist(), "quality_loss_ratio")
    correction = learned.corrections["quality_loss_ratio"]
    far = replace(correction, coefficients=tuple(-5.0 for _ in correction.coefficients))
    calibration = replace(learned, corrections={"quality_loss_ratio": far})
    figures = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)["quality_loss_ratio"]
    assert np.all(figures.mid[losing] > 0)
    assert np.all(figures.mid[losing] < prior[losing])


@given(st.floats(1e-4, 5.0), st.floats(-3.0, 3.0), st.floats(-3.0, 3.0))
def test_softened_shifts_keep_their_order_and_are_told_from_their_errors(predicted, one, other) -> None:
    low, high = (float(softened(predicted, shift)) for shift in sorted((one, other)))
    assert -predicted <= low <= high
    if low > -0.9 * predicted:
        assert unsoftened(predicted, low) == pytest.approx(min(one, other), rel=1e-6, abs=1e-12)


def test_another_model_of_the_machine_helps() -> None:
    other = replace(
        TOY_MODEL, digest="other", linear_params=4 * TOY_MODEL.linear_params, weight_bytes=4 * TOY_MODEL.weight_bytes
    )
    prior = estimate_many(PLANS, other, TOY_WORKLOAD, TOY_MACHINE)["tpot_s"].mid
    group = (measured(1.8 * prior, [0, 5, 9, 20, 30]), other, TOY_WORKLOAD)
    calibration = calibrate.fit([], TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, others=[group])
    ours = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)["tpot_s"]
    learned = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)["tpot_s"]
    assert np.all(learned.mid > 1.3 * ours.mid)
    assert np.median(learned.high / learned.low) < np.median(ours.high / ours.low)


def test_survives_json() -> None:
    calibration = fit(truths(3), [0, 7, 11, 19])
    again = restore(Calibration, json.loads(json.dumps(plain(calibration))))
    a = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)
    b = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, again)
    assert all(np.array_equal(a[name].high, b[name].high) for name in a)


def test_one_plan_and_many_agree_when_calibrated_and_say_so() -> None:
    calibration = fit(truths(3), [0, 7, 11, 19])
    many = estimate_many(PLANS, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)
    one = estimate(PLANS[5], TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE, calibration)
    for name, value in one.values.items():
        assert (value.mid, value.low, value.high) == pytest.approx(
            (many[name].mid[5], many[name].low[5], many[name].high[5]), rel=1e-12
        )
    assert one.values["tpot_s"].source == "calibrated"
    assert one.values["weights_bytes"].source == "analytic"


def test_error_report_by_hand() -> None:
    values = truths(1)
    pairs = [
        (estimate(PLANS[i], TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE), m)
        for i, m in enumerate(measured(values, list(range(8))))
    ]
    row = error_report(pairs)["tpot_s"]
    errors = [abs(e.values["tpot_s"].mid / m.figures["tpot_s"].value - 1) for e, m in pairs]
    assert row["n"] == 8
    assert math.isclose(row["median_abs_ratio"], statistics.median(errors))
    assert math.isclose(row["worst_abs_ratio"], max(errors))
    assert 0 <= row["coverage"] <= 1 and -1 <= row["rank_correlation"] <= 1
    assert "tpot_s" in as_text(error_report(pairs))
    assert error_report([]) == {}


def test_prediction_loads_neither_torch_nor_scikit_learn() -> None:
    script = (
        "import sys; from tests_support import *; import cost_models; from knowledge_base.types import Plan\n"
        "cost_models.estimate(Plan(model_digest='toy', engine='transformers'), TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE)\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'scipy', 'optuna'} & set(sys.modules)))"
    )
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_what_changes_nothing_of_serving_is_not_credited_with_its_speed() -> None:
    """An importance matrix leaves bytes and speed as they are: what was measured of a plan with it tells of its format."""
    form, matrix, threads = (
        Step("weight_gguf", {"type": "q4_k"}),
        Step("importance_matrix", {}),
        Step("thread_count", {"count": 1}),
    )
    node = chains(TOY_MODEL, TOY_WORKLOAD).node(
        Plan(model_digest="toy", engine="llama_cpp", steps=(matrix, form, threads))
    )
    for metric, there in (("tpot_s", False), ("build_s", True)):
        effects = Features([node]).of(terms.get(metric))
        counted = {_NAMES[i] for i, share in zip(effects.ids, effects.shares, strict=True) if share > 0}
        assert ("technique:importance_matrix" in counted) is there
        assert {"technique:weight_gguf", "technique:thread_count"} <= counted
