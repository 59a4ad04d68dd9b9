"""Plans whose steps execute an allocation, as a run builds them: measured once, built again alike, held to their speed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Plan, Step
from planner import building
from planner.cli import main
from planner.data import prepare_data
from planner.loop import Run, Settings
from planner.preparing import prepare
from planner.progress import Progress
from planner.recipe import read_recipe
from planner.spec import from_mapping
from planner.tiny_models import make_tiny_model
from planner.validation import Validator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """A folder with a tiny model, and a store that knows this machine."""
    folder = tmp_path_factory.mktemp("allocated-plans")
    make_tiny_model(folder / "model", layers=2)
    shutil.copytree(machine, folder / "store")
    return folder


def validator_of(place: Path) -> Validator:
    """Return what builds the plans of a run that begins now."""
    spec = from_mapping({
        "version": 1, "model": str(place / "model"), "objectives": ["artefact_size", "quality_loss"],
        "calibration": {"data": "bundled", "samples": 4}, "engines": ["transformers"],
        "techniques": {"only": ["weight_mixed", "prune_to_speed"]}, "workload": {"prompt_tokens": 32, "output_tokens": 8},
        "search": {"effort": "quick", "time_limit": "20 min"},
    })  # fmt: skip
    settings = Settings(run_root=place / "runs", store_root=place / "store", fresh=True)
    prepared = prepare(spec, store=settings.store_root)
    run = Run(prepared, settings, Progress(quiet=True), time.monotonic())
    assert prepared.folder is not None
    run.data = prepare_data(spec, prepared.model, prepared.folder, run.store.folder)
    run.folder = run._open_folder()
    return Validator(run)


@pytest.fixture
def validator(place: Path) -> Iterator[Validator]:
    with validator_of(place) as found:
        yield found


def mixed(validator: Validator, average_bits: float, choose: str = "bits", speedup: float = 0.0) -> Plan:
    knobs: dict[str, Any] = {"average_bits": average_bits, "choose": choose, "speedup": speedup}
    return Plan(model_digest=validator.model.digest, engine="transformers", steps=(Step("weight_mixed", knobs),))


def measured(built: building.BuildResult) -> bool:
    """Return whether the build measured what its steps can choose from."""
    return any(name.endswith(".options") for name in built.step_s)


def test_what_can_be_chosen_is_measured_once_for_all_plans_and_runs(validator: Validator, place: Path) -> None:
    bits = [validator._build(mixed(validator, average)) for average in (4.5, 3.5)]
    assert [measured(built) for built in bits] == [True, False]
    assert bits[1].bytes < bits[0].bytes
    assert measured(validator._build(mixed(validator, 3.5, "everything")))
    with validator_of(place) as later:  # another run, and an average that only a budget asks for
        assert not measured(later._build(mixed(later, 3.95)))
        everything = mixed(later, 3.0, "everything")
        built = later._build(everything)
        assert not measured(built)
        later._write_recipe(everything, built.digest, built.versions)
        recipe = later.run.folder.plan_folder(everything.id) / "plan.json"
    kept = [json.loads(path.read_text()) for path in (place / "store" / "options").glob("*.json")]
    assert len(kept) == 2
    told = {"loss_increase", "next_token_change_nats", "output_error", "bytes", "memory", "seconds"}
    assert all(told <= options["4"].keys() for found in kept for options in found["parts"].values())

    allocation = read_recipe(recipe).allocation
    assert allocation
    out = place / "built"
    assert main(["build", str(recipe), "-o", str(out), "--store", str(place / "store")]) == 0  # 0: the same digest
    assert building.verify(out) == []
    assert building.read_manifest(out)["allocation"] == allocation == building.read_manifest(built.folder)["allocation"]


def test_a_speed_that_cannot_be_had_is_refused_with_the_fastest_there_is(validator: Validator, place: Path) -> None:
    def plan(speedup: float) -> Plan:
        step = Step("prune_to_speed", {"speedup": speedup})
        return Plan(model_digest=validator.model.digest, engine="transformers", steps=(step,))

    before = set((place / "store").glob("options/*.json"))
    with pytest.raises(
        CandidateFailed, match=r"times as fast at most by removing heads and channels, 100 is asked for"
    ) as told:
        validator._build(plan(100.0))
    assert told.value.kind == "unsupported" and told.value.hint
    (path,) = set((place / "store").glob("options/*.json")) - before
    kept = json.loads(path.read_text())
    least_s = sum(min(choice["seconds"] for choice in choices.values()) for choices in kept["parts"].values())
    fastest = kept["step_s"] / (kept["step_s"] - kept["unchanged_s"] + least_s)
    assert f"{fastest:.2f} times as fast at most" in told.value.message

    made = validator._build(plan(1 + 0.8 * (fastest - 1)))
    assert not measured(made)
    assert building.verify(made.folder) == []
    whole = [max(map(int, choices)) for choices in kept["parts"].values()]
    assert sum(map(int, (made.allocation or {}).values())) < sum(whole)
