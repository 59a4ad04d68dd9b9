"""What single steps lose on a model: found in a process of its own, told of other settings, priced in place of published losses."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.demand import apply_steps, chains, demand_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import plain, restore
from knowledge_base.types import Figure, Model, Plan, Step, Workload
from planner import data, step_losses
from planner.isolation import Limits, Servers
from planner.reading import read_model
from planner.step_losses import StepLoss, Trial, _on_scale, can_be_tried, kept, memory_bytes, with_losses

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-lm"
WORKLOAD = Workload(prompt_tokens=64, output_tokens=32)
WIDTHS = [Step("prune_width", {"keep": keep}) for keep in (0.875, 0.75, 0.67, 0.5)]
HALF = Step("weight_gguf", {"type": "q4_k"})


@pytest.fixture(scope="module")
def model() -> Model:
    return read_model(MODEL).model


@pytest.fixture(scope="module")
def observe(model, tmp_path_factory):
    """Try steps on the shipped model in a process of its own."""
    root = tmp_path_factory.mktemp("steps")
    rows = data.calibration_windows(data.bundled("calib"), MODEL, 64, 256)
    calibration = data.save_windows(root / "calibration.npy", rows)
    limits = Limits(memory_bytes=4 << 30, time_s=240.0, disk_bytes=1 << 30)
    with Servers() as servers:

        def run(*steps: Step, time_limit_s: float = 240.0):
            with servers.start((), folder=root / "work", limits=limits, log=root / "log.txt") as candidate:
                trial = Trial.of(
                    candidate, model, model_folder=MODEL, calibration=calibration, seed=0, allow_pickle=False,
                    time_limit_s=240.0,
                )  # fmt: skip
                return [trial.loss_of(step, time_limit_s=time_limit_s) for step in steps]

        yield run


def found(step: Step, loss: float, *, off: float = 0.001) -> StepLoss:
    return StepLoss(step=step, loss=Figure(value=loss, low=loss - off, high=loss + off, n=8))


def lost(model: Model, *steps: Step) -> float:
    plan = Plan(model_digest=model.digest, engine="llama_cpp", steps=steps)
    return math.log(chains(model, WORKLOAD).node(plan).demand.perplexity_ratio)


def doubt(model: Model, *steps: Step) -> float:
    plan = Plan(model_digest=model.digest, engine="llama_cpp", steps=steps)
    return chains(model, WORKLOAD).node(plan).demand.perplexity_log_sd


def test_each_step_is_tried_on_the_model_as_it_came(observe):
    gentle, refused = WIDTHS[0], Step("merge_experts", {"keep": 0.5})
    harsh = Step("prune_heads", {"keep": 0.5, "where": "each"})
    first, second, third, again = observe(gentle, refused, harsh, gentle)
    assert [each.step for each in (first, second, third)] == [gentle, refused, harsh]
    assert abs(first.loss.value) < 0.005  # the shipped model does without an eighth of its channels
    assert third.loss.low > 0.1
    assert first.loss.low <= first.loss.value <= first.loss.high and "did not see" in first.loss.note
    assert again.loss.value == first.loss.value  # nothing of the step between them is left
    assert second.loss is None and "no experts" in second.why


def test_what_does_not_end_in_time_is_left(observe):
    with pytest.raises(CandidateFailed) as stopped:
        observe(*WIDTHS, time_limit_s=0.01)
    assert stopped.value.kind == "timeout"


def test_what_was_found_is_priced_instead_of_what_is_published(model):
    mild = with_losses(model, WORKLOAD, WIDTHS, [found(WIDTHS[1], 0.01)])
    assert lost(mild, WIDTHS[1]) == pytest.approx(math.log1p(0.01))
    assert lost(mild, WIDTHS[1], HALF) == pytest.approx(math.log1p(0.01) + lost(model, HALF))
    assert doubt(mild, WIDTHS[1], HALF) < 1.1 * doubt(model, HALF) < doubt(model, WIDTHS[1], HALF)
    assert lost(model, WIDTHS[1]) > 0.1  # the model itself is as it was
    stepwise = apply_steps(demand_of(mild, WORKLOAD, "llama_cpp"), (WIDTHS[1], HALF))
    assert math.log(stepwise.perplexity_ratio) == pytest.approx(lost(mild, WIDTHS[1], HALF))
    assert any("alone costs this model" in because for because in stepwise.because)


def test_what_recovers_wins_back_a_share_of_what_was_found(model):
    mild = with_losses(model, WORKLOAD, WIDTHS, [found(WIDTHS[3], 0.04)])
    recovered = lost(mild, WIDTHS[3], Step("recover_full", {"steps": 20}))
    assert 0 < recovered < math.log1p(0.04)


def test_other_settings_are_told_and_other_techniques_are_not(model):
    steps = [*WIDTHS, Step("prune_hidden", {"keep": 0.75})]
    told = with_losses(model, WORKLOAD, steps, [found(WIDTHS[0], 0.0), found(WIDTHS[2], 0.02)])
    losses = [lost(told, step) for step in WIDTHS]
    assert losses == sorted(losses) and losses[0] < losses[1] < losses[2] < losses[3]
    assert doubt(told, WIDTHS[1]) > doubt(told, WIDTHS[0])
    assert lost(told, steps[-1]) == lost(model, steps[-1])


def test_a_gain_is_none_and_what_was_refused_tells_nothing(model):
    told = with_losses(model, WORKLOAD, WIDTHS, [found(WIDTHS[0], -0.01)])
    assert lost(told, WIDTHS[0]) == 0
    assert with_losses(model, WORKLOAD, WIDTHS, [StepLoss(step=WIDTHS[0], why="no")]) == model


@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.floats(0, 3)), min_size=1, max_size=6), st.floats(0, 5), st.floats(0, 5)
)
def test_harsher_settings_are_never_told_to_lose_less(pairs, one, other):
    xs, ys = (sorted(column) for column in zip(*pairs, strict=True))
    scale = sorted({(0.0, 0.0), *zip(xs, ys, strict=True)})
    less, more = sorted((one, other))
    assert 0 <= _on_scale(less, scale) <= _on_scale(more, scale) + 1e-9


def test_it_is_kept_whole_or_not_at_all(model, tmp_path):
    loss = found(WIDTHS[0], 0.01)
    assert restore(StepLoss, plain(loss)) == loss
    damaged = tmp_path / "damaged.json"
    assert kept(damaged) is None
    damaged.write_text('{"step": {"technique"')
    assert kept(damaged) is None
    told = with_losses(model, WORKLOAD, WIDTHS, [loss])
    assert restore(Model, plain(told)) == told and told.digest == model.digest
    assert "step_losses" not in plain(model)


def test_only_what_rewrites_the_model_itself_is_tried(model):
    assert all(map(can_be_tried, WIDTHS))
    others = ("weight_gguf", "recover_full", "prune_to_speed", "prompt_lookup", "rotate")
    assert not any(can_be_tried(Step(name)) for name in others)
    large = replace(model, weight_bytes=10**12)
    assert memory_bytes(large, WIDTHS[0]) > 2 * 10**12


def test_losses_are_of_the_next_token(model):
    import torch
    from transformers import AutoModelForCausalLM

    language_model = AutoModelForCausalLM.from_pretrained(MODEL)
    rows = torch.from_numpy(numpy.random.default_rng(0).integers(0, model.vocab_size, (3, 17)))
    losses = step_losses._losses(language_model, rows)
    expected = [language_model(row[None], labels=row[None]).loss.item() for row in rows]
    assert losses.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def run(machine, tmp_path):
    """A run of a tiny model that has not begun to measure."""
    from planner.data import prepare_data
    from planner.loop import Run, Settings
    from planner.preparing import prepare
    from planner.progress import Progress
    from planner.spec import from_mapping
    from planner.tiny_models import make_tiny_model

    shutil.copytree(machine, tmp_path / "store")
    spec = from_mapping({
        "version": 1, "model": str(make_tiny_model(tmp_path / "model", layers=2)), "engines": ["transformers"],
        "objectives": ["artefact_size", "quality_loss"], "calibration": {"data": "bundled", "samples": 4},
        "techniques": {"only": ["prune_magnitude", "prune_width"]}, "workload": {"prompt_tokens": 32, "output_tokens": 8},
    })  # fmt: skip
    settings = Settings(run_root=tmp_path / "runs", store_root=tmp_path / "store")
    prepared = prepare(spec, store=settings.store_root)
    found = Run(prepared, settings, Progress(quiet=True), time.monotonic())
    found.baseline = prepared.space.unchanged()
    found.data = prepare_data(spec, prepared.model, prepared.folder, found.store.folder)
    found.folder = found._open_folder()
    return found


def test_a_run_keeps_what_it_found_and_tries_again_what_it_could_not(run, monkeypatch):
    from planner.validation import Validator

    step = Step("prune_width", {"keep": 0.5})
    with Validator(run) as validator:
        with validator.trying_steps() as loss_of:
            late = loss_of(step, 0.01)
            assert late.loss is None and late.why.startswith("timeout")
            found = loss_of(step, 240.0)  # in another process: the first was stopped
            assert found.loss is not None and loss_of(step, 0.0) == found
        assert not list((run.folder.path / "work").glob("*-steps"))
        limits = validator._limits()
        monkeypatch.setattr(validator, "_limits", lambda: replace(limits, memory_bytes=1 << 20))
        with validator.trying_steps() as loss_of:
            assert "memory" in loss_of(Step("prune_width", {"keep": 0.75}), 240.0).why

    def nothing_may_start(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    with Validator(run) as later:
        monkeypatch.setattr(later.servers, "start", nothing_may_start)
        with later.trying_steps() as loss_of:
            assert loss_of(step, 240.0) == found
    run._learn_from([found])
    assert run.prepared.model.step_losses[0].step == step
    assert run._problem().model == run.prepared.model
