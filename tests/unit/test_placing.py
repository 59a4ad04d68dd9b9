"""What the placement program makes of a budget of memory: settings that meet it, and their batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

import cost_models
from knowledge_base.registry import stands, techniques
from knowledge_base.types import Budget, Device, Hardware, Model, Plan, Step
from search.fitting import with_fitted
from search.placement import place
from search.placing import asked_for, resident
from search.space import build_space

# 4.1 GB in float32: half a second to read from the toy machine's disk of 2 GB/s for each GB left out
LARGE = replace(
    TOY_MODEL, layers=22, attention_layers=22, hidden_size=2048, heads=32, kv_heads=4, head_size=64, ffn_size=5632,
    vocab_size=32000, linear_params=968_884_224, embedding_params=65_536_000, params_total=1_034_512_384,
    params_active=1_034_512_384, weight_bytes=4_138_049_536, max_context_tokens=2048,
)  # fmt: skip
GIB = 2**30


def peak(steps: tuple[Step, ...], model: Model = LARGE, hardware: Hardware = TOY_MACHINE) -> cost_models.Estimates:
    plan = Plan(model_digest=model.digest, engine="transformers", steps=steps)
    return cost_models.estimate_many([plan], model, TOY_WORKLOAD, hardware)["peak_memory_bytes"]


def fitted(limit: float | None, hardware: Hardware = TOY_MACHINE, *, only=("offload", "batch_size"), **more) -> list:
    """Return the settings of offloading that are added for a budget of memory."""
    budgets = [Budget(metric="peak_memory_bytes", statistic="mean", bound="max", value=limit, **more)] if limit else []
    space = build_space(LARGE, TOY_WORKLOAD, hardware, engine_names=("transformers",), only=only)
    added = with_fitted(space, LARGE, TOY_WORKLOAD, hardware, budgets).options["transformers"]
    before = space.options["transformers"].get("offloading", ())
    assert added.get("offloading", ())[: len(before)] == before
    return list(added.get("offloading", ())[len(before) :])


def offload(share: float) -> Step:
    return Step("offload", {"resident": share})


@pytest.mark.parametrize("limit", [1.5 * GIB, 2 * GIB, 2.2 * GIB, 3 * GIB])
def test_a_budget_is_met_in_the_mean_and_surely(limit: float) -> None:
    found = fitted(limit)
    every = [offload(share) for share in techniques.get("offload").RANGE["peak_memory_bytes"][1]]
    by_mean = next(step for step in every if peak((step,)).mid[0] <= limit)
    surely = next(step for step in every if peak((step,)).high[0] <= limit)
    # a batch as large as four requests at a time fill shares one read of the disk
    batch = Step("batch_size", {"count": 4})
    batched = next(step for step in every if peak((step, batch)).high[0] <= limit)
    assert found == list(dict.fromkeys([by_mean, surely, batched]))
    assert all(stands(step) for step in found)


def test_a_relative_budget_is_the_same() -> None:
    whole = peak(()).mid[0]
    assert fitted(0.6, relative=True) == fitted(0.6 * whole) != []


def test_where_everything_fits_nothing_is_left_out() -> None:
    assert fitted(None) == []
    assert fitted(2 * peak(()).high[0]) == []
    assert fitted(1 * GIB / 8) == []  # out of reach
    assert fitted(3 * GIB, only=("batch_size",)) == []


def test_a_machine_too_small_for_the_model_needs_no_budget() -> None:
    small = replace(TOY_MACHINE, memory_limit_bytes=3 * GIB)
    (step, *_) = fitted(None, small, only=("offload",))
    assert peak((step,)).high[0] <= 3 * GIB


def test_a_disk_of_unknown_speed_is_not_used() -> None:
    assert fitted(3 * GIB, replace(TOY_MACHINE, disk_bytes_per_s=None)) == []


def test_the_program_predicts_what_the_cost_terms_predict() -> None:
    shares = techniques.get("offload").layer_parts(LARGE)
    asked = asked_for("transformers", LARGE, TOY_WORKLOAD, TOY_MACHINE, 3 * GIB, shares)
    for batch in (1, 4):
        found = place(asked, (batch,))
        # the technique's own shares follow the parts' order, so that a part more may be left out
        step = offload(round(20 * resident(asked, found)) / 20)
        beside = (Step("batch_size", {"count": batch}),) if batch > 1 else ()
        plan = Plan(model_digest=LARGE.digest, engine="transformers", steps=(step, *beside))
        figures = cost_models.estimate_many([plan], LARGE, TOY_WORKLOAD, TOY_MACHINE)
        assert found.step_s == pytest.approx(figures["tpot_s"].mid[0], rel=0.1)
        assert found.used_bytes["memory"] == pytest.approx(figures["peak_memory_bytes"].mid[0], rel=0.05)
        assert found.bound == "reading disk"


def test_beside_an_accelerator_weights_wait_on_the_host() -> None:
    gpu = Hardware(
        name="toy gpu", fingerprint="gpu", host_memory_bytes=3 * GIB, memory_limit_bytes=3 * GIB, host_link_bytes_per_s=25e9,
        devices=(Device(name="toy gpu", kind="gpu", memory_bytes=3 * GIB, memory_bytes_per_s=1e12, source="made up for tests",
                        flop_per_s={"float32": 2e13, "bfloat16": 1e14}),),
    )  # fmt: skip
    shares = techniques.get("offload").layer_parts(LARGE)
    asked = asked_for("transformers", LARGE, TOY_WORKLOAD, gpu, 3 * GIB, shares)
    found = place(asked, (1,))
    assert found.used_bytes["device"] <= 3 * GIB and found.used_bytes["host"] > 0 and not found.used_bytes["disk"]
    (step, *_) = fitted(None, gpu, only=("offload",))
    plan = Plan(model_digest=LARGE.digest, engine="transformers", steps=(step,))
    with_link = cost_models.estimate_many([plan], LARGE, TOY_WORKLOAD, gpu)["tpot_s"].mid[0]
    slower = cost_models.estimate_many([plan], LARGE, TOY_WORKLOAD, replace(gpu, host_link_bytes_per_s=5e9))
    assert slower["tpot_s"].mid[0] > 3 * with_link
    assert fitted(None, replace(gpu, host_link_bytes_per_s=None)) == []
