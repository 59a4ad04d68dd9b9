"""A build that stops where a step executes an allocation, until the planner has chosen from what was measured there."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy
import pytest

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import weight_mixed
from knowledge_base.types import Plan, Step
from planner import building
from planner.isolation import Limits, Servers
from planner.reading import read_model
from planner.tiny_models import make_tiny_model
from search.allocation import allocate

LIMITS = Limits(memory_bytes=4 << 30, time_s=240.0, disk_bytes=1 << 30)
KNOBS = {"average_bits": 4.5, "choose": "bits", "speedup": 0.0}
MIXED = Step("weight_mixed", KNOBS)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    root = tmp_path_factory.mktemp("allocated")
    folder = make_tiny_model(root / "tiny")
    model = replace(read_model(folder).model, digest="tiny")
    numpy.save(root / "calibration.npy", numpy.random.default_rng(0).integers(0, 500, (4, 32), dtype=numpy.int32))
    with Servers() as servers:

        def run(name: str, *steps: Step, **options):
            return building.build(
                servers, Plan(model_digest="tiny", engine="transformers", steps=steps), model, model_folder=folder,
                out=root / "artefacts" / name, limits=LIMITS, workspace=root / "work" / name, log=root / f"{name}.txt",
                calibration=root / "calibration.npy", **options,
            )  # fmt: skip

        yield run


@pytest.mark.slow
def test_what_is_chosen_is_built_and_builds_the_same_again(build):
    asked, shapes = [], []

    def choose(number: int, measure):
        asked.append(number)
        measured = measure(1e6)
        shapes.append(sum(next(iter(c.values()))["params"] for c in measured["parts"].values()))
        return allocate(measured["parts"], weight_mixed.budgets(measured, **KNOBS)).chosen

    steps = (Step("drop_layers", {"count": 1, "by": "influence"}), MIXED)
    made = build("chosen", *steps, allocate=choose)
    assert asked == [1]  # after the layer is gone
    allocation = building.read_manifest(made.folder)["allocation"]
    assert set(allocation.values()) > {"4"} and len(allocation) == 7 * 3
    assert made.allocation == allocation
    assert "weight_mixed.options" in made.step_s
    assert build("again", *steps, allocation=allocation).digest == made.digest
    whole = build("whole", MIXED, allocate=choose)
    assert asked == [1, 0]
    assert shapes[0] == shapes[1] * 3 // 4
    assert whole.digest != made.digest


@pytest.mark.slow
def test_everything_that_can_be_chosen_is_built_and_built_again(build):
    step = Step("weight_mixed", {"average_bits": 3.5, "choose": "everything", "speedup": 0.0})
    asked: list[dict] = []

    def choose(number: int, measure):
        asked.append(measure(5.0))
        chosen = dict.fromkeys(asked[0]["parts"], "4 zeros 0.5")
        layer = "model.layers.1."
        return chosen | {n: "removed" if ".mlp." in n else "8 keep 0.4" for n in chosen if n.startswith(layer)}

    made = build("everything", step, allocate=choose)
    assert {tuple(pair) for tie in asked[0]["ties"] for pair in tie} == {(n, "removed") for n in asked[0]["parts"]}
    manifest = building.read_manifest(made.folder)
    assert set(manifest["allocation"].values()) == {"4 zeros 0.5", "removed", "8 keep 0.4"}
    structure = json.loads((made.folder / "structure.json").read_text())
    assert {entry["kind"] for entry in structure.values()} == {"sparse_int4", "zero", "low_rank", "int8"}
    again = build("everything again", step, allocation=manifest["allocation"])
    assert again.digest == made.digest and building.verify(again.folder) == []


@pytest.mark.slow
def test_nobody_to_ask_or_nothing_that_fits_is_a_failure(build):
    with pytest.raises(CandidateFailed, match="none was given"):
        build("nobody", MIXED)

    def refuse(number: int, measure):
        raise CandidateFailed("unsupported", "too tight")

    with pytest.raises(CandidateFailed, match="too tight"):
        build("tight", MIXED, allocate=refuse)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"parts": []}',
        '{"parts": {}, "ties": [[["a", "4"]]]}',
        '{"parts": {}, "ties": [4]}',
        '{"parts": {"a": {"4": {"bytes": NaN}}}}',
        '{"parts": {"a": {"4": {"bytes": "x"}}}}',
    ],
)
def test_what_a_candidate_measured_is_checked(tmp_path, text):
    path = tmp_path / "options.json"
    with pytest.raises(CandidateFailed, match="was not measured"):
        building._measured(path)
    path.write_text(text)
    with pytest.raises(CandidateFailed, match="was not measured"):
        building._measured(path)
