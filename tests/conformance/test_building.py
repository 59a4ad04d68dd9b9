"""Laws of building, in processes as the planner starts them: memory beside the model is bounded, progress is told.

Memory is resident memory above what the same build takes on a model of half a megabyte, so that libraries, which are
large, are not counted, and what grows with the model is.
"""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy
import pytest
from conformance.test_techniques import (
    BUILDING,
    TECHNIQUES,
    before,
    engine_for,
    legal,
    lowest,
    open_session,
    run,
)  # fmt: skip
from tiny_sessions import tiny_folder

from knowledge_base import units
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Model, Plan, Step
from planner import building
from planner.cli import main
from planner.isolation import Limits, Servers
from planner.reading import read_model
from planner.store import Store
from planner.validation import _chosen

ROWS, TOKENS = 8, 64  # of calibration text
LARGE = {"hidden_size": 512, "layers": 12, "vocab_size": 2048}  # 118 MB
LARGER = {"hidden_size": 768, "layers": 18, "vocab_size": 2048}  # 389 MB
SMALL = {"hidden_size": 64, "layers": 2}
MEMORY_OF_LIMIT = 1.6  # models
HIGH = Limits(memory_bytes=16 << 30, time_s=900, disk_bytes=16 << 30)


@pytest.fixture(scope="module")
def servers():
    with Servers() as started:
        yield started


@cache
def model_of(folder: Path) -> Model:
    return read_model(str(folder)).model


class Builder:
    """Builds plans on made models, as the planner does, in folders of its own."""

    def __init__(self, servers: Servers, folder: Path) -> None:
        self.servers, self.folder, self.workspace = servers, folder, folder / "work"
        self.calibration = folder / "calibration.npy"
        tokens = numpy.random.default_rng(0).integers(1, 500, size=(ROWS, TOKENS), dtype=numpy.int32)
        numpy.save(self.calibration, tokens)
        self.told: list[tuple[str, float]] = []

    def build(self, model_folder: Path, steps: tuple[Step, ...], *, engine: str = "transformers", **options):
        """Return what was built, or raise CandidateFailed."""
        model = model_of(model_folder)
        plan = Plan(model_digest=model.digest, engine=engine, steps=steps)
        given = {"limits": HIGH, "progress": lambda what, done: self.told.append((what, done)), **options}

        def chosen(number, measure):
            return _chosen(steps[number], measure(20.0))

        try:
            return building.build(
                self.servers, plan, model, model_folder=model_folder, out=self.folder / "out",
                workspace=self.workspace, log=self.folder / "log.txt", calibration=self.calibration,
                allocate=chosen, **given,
            )  # fmt: skip
        finally:
            shutil.rmtree(self.folder / "out", ignore_errors=True)


@pytest.fixture
def builder(servers, tmp_path):
    return Builder(servers, tmp_path)


def plan_of(name: str) -> tuple[str, tuple[Step, ...]]:
    """Return the engine and the steps with which a technique is tried, or skip."""
    steps = (*before(name), lowest(name))
    engine = engine_for(steps[-1])
    model = model_of(tiny_folder("llama", **LARGE))
    if why := engine.find() or next((w for s in steps if (w := legal(s, model))), None):
        pytest.skip(why)
    return engine.__name__.rpartition(".")[2], steps


# ---------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", BUILDING)
def test_memory_beside_the_model_is_what_was_declared(name, builder):
    engine, steps = plan_of(name)
    large, small = tiny_folder("llama", **LARGE), tiny_folder("llama", **SMALL)
    try:
        least = builder.build(small, steps, engine=engine).peak_bytes
    except CandidateFailed:  # the small model has nothing that this technique could change
        least = builder.build(small, ()).peak_bytes
    try:
        built = builder.build(large, steps, engine=engine)
    except CandidateFailed as failed:
        assert failed.kind == "unsupported", failed
        pytest.skip(failed.message)
    model = model_of(large)
    declared = max(TECHNIQUES[s.technique].TECHNIQUE.holds.bytes_for(model, ROWS * TOKENS) for s in steps)
    beside = built.peak_bytes - least - model.weight_bytes
    print(f"{name}: {units.format(beside, 'bytes')} beside the model, {units.format(declared, 'bytes')} declared")
    assert beside <= declared


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["weight_int8", "store_sparse"])
def test_a_model_larger_than_half_of_the_memory_is_compressed(name, builder):
    engine, steps = plan_of(name)
    larger = tiny_folder("llama", **LARGER)
    least = builder.build(tiny_folder("llama", **SMALL), steps, engine=engine).peak_bytes
    allowed = least + round(MEMORY_OF_LIMIT * model_of(larger).weight_bytes)
    limits = replace(HIGH, memory_bytes=allowed)
    assert model_of(larger).weight_bytes > 0.5 * (allowed - least)
    built = builder.build(larger, steps, engine=engine, limits=limits)  # stopped where it passes the limit
    assert built.peak_bytes <= allowed
    with pytest.raises(CandidateFailed) as failed:
        too_low = replace(HIGH, memory_bytes=least + round(0.8 * model_of(larger).weight_bytes))
        builder.build(larger, steps, engine=engine, limits=too_low)
    assert failed.value.kind == "oom_host"


# ---------------------------------------------------------------- progress


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDING)
def test_progress_of_every_stage_rises_to_its_end(name, tmp_path):
    """A stage is what a technique calls it; those that calibrate or train visit layers or steps, and so must tell."""
    steps = (*before(name), lowest(name))
    for architecture in ("llama", "mixtral"):
        session = open_session(architecture)
        if not (why := next((w for s in steps if (w := legal(s, session.facts))), None)):
            break
    else:
        pytest.skip(why)
    run(session, steps[:-1])
    stages: dict[str, list[float]] = {}
    session.progress = lambda what, done: stages.setdefault(what, []).append(done)
    try:
        run(session, steps[-1:])
    except CandidateFailed as failed:
        assert failed.kind == "unsupported", failed
        pytest.skip(failed.message)
    if not stages and TECHNIQUES[name].TECHNIQUE.needs_calibration:  # left to the engine, as it writes its file
        engine_for(steps[-1]).export(session, tmp_path)
        assert len(stages) > 1
    for what, done in stages.items():
        assert done == sorted(done), what
        assert done[0] >= 0, what
        assert done[-1] == 1.0, what


# ---------------------------------------------------------------- going on after a break

# Training takes long enough, for a model this small, that what it gives is worth keeping.
LONG = (Step("low_rank", {"keep": 0.8}), Step("recover_full", {"steps": 20}), Step("recover_lora", {"steps": 20}))


@pytest.fixture
def killed_at(builder, monkeypatch):
    """Return a function that builds LONG and kills the candidate, without warning, once it tells of a stage."""

    def kill(stage: str, **options) -> None:
        started = builder.servers.start
        running = []

        def start(*args, **kwargs):
            running.append(started(*args, **kwargs))
            return running[-1]

        def watch(what: str, done: float) -> None:
            if what == stage and done > 0.2:
                os.kill(running[-1].pid, signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(builder.servers, "start", start)
            with pytest.raises(CandidateFailed) as failed:
                builder.build(tiny_folder("llama"), LONG, progress=watch, **options)
        assert failed.value.kind == "killed"

    return kill


def test_a_build_that_was_killed_goes_on_and_gives_the_same_artefact(builder, killed_at, tmp_path):
    unfinished = tmp_path / "unfinished"
    whole = builder.build(tiny_folder("llama"), LONG, unfinished=unfinished)
    assert "build.resumed_after_steps" not in whole.notes
    assert not unfinished.exists()
    killed_at("recover_lora", unfinished=unfinished)
    assert len(list(unfinished.iterdir())) == 1
    assert not builder.workspace.exists()
    again = builder.build(tiny_folder("llama"), LONG, unfinished=unfinished)
    assert again.notes["build.resumed_after_steps"] == 2
    assert again.digest == whole.digest
    assert again.notes["low_rank.ranks"] == whole.notes["low_rank.ranks"]
    assert not list(unfinished.iterdir())


@pytest.mark.slow
def test_another_seed_does_not_go_on_from_it_and_only_the_newest_are_kept(builder, killed_at, tmp_path):
    unfinished = tmp_path / "unfinished"
    killed_at("recover_lora", unfinished=unfinished)
    other = builder.build(tiny_folder("llama"), LONG, unfinished=unfinished, seed=1)
    assert "build.resumed_after_steps" not in other.notes
    for seed in range(2, 2 + building.UNFINISHED_MAX):
        killed_at("recover_lora", unfinished=unfinished, seed=seed)
    assert len(list(unfinished.iterdir())) == building.UNFINISHED_MAX
    anew = builder.build(tiny_folder("llama"), LONG, unfinished=unfinished)
    assert "build.resumed_after_steps" not in anew.notes


def test_what_is_no_plain_file_is_not_kept(tmp_path):
    folder, left = tmp_path / building.RESUME, tmp_path / "unfinished" / "key"
    folder.mkdir()
    (folder / "state.json").symlink_to("/etc/passwd")
    building._keep(folder, left)
    assert not left.exists()
    (folder / "state.json").unlink()
    (folder / "state.json").write_text("{}")
    building._keep(folder, left)
    assert (left / "state.json").read_text() == "{}"


def test_clean_removes_what_cut_off_builds_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(tmp_path / "store")
    for place in (store.unfinished / "key", store.folder / "measurements"):
        place.mkdir(parents=True)
        (place / "file").write_text("kept until cleaned")
    assert main(["clean", "--store", str(store.folder), "--yes"]) == 0
    assert [p.name for p in store.folder.iterdir()] == ["measurements"]
