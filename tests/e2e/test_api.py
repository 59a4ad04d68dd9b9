"""The Python way in gives what the file gives, and everything README prints runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner import Budget, LeanplanError, Step, estimate, plan

ROOT = Path(__file__).resolve().parents[2]
WORKLOAD = {"prompt_tokens": 64, "output_tokens": 16}


@pytest.fixture
def store(machine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(machine, tmp_path / "store")


@pytest.fixture
def profile(store: Path) -> Path:
    """This machine as it was measured, as a file."""
    (found,) = store.glob("machines/*.json")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from planner.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("api") / "model")


def test_file_and_arguments_give_the_same_plans(model: Path, tmp_path: Path, store: Path, profile: Path) -> None:
    spec = tmp_path / "leanplan.yaml"
    spec.write_text(
        f"version: 1\nmodel: {{source: {model}}}\nhardware: {profile}\nworkload: {WORKLOAD}\n"
        "budgets: {quality_loss: 20 %, peak_memory: 2 GiB}\n"
    )
    from_file = plan(spec=spec, predict=True, store=store)
    from_arguments = plan(
        model,
        hardware=profile,
        budgets={"quality_loss": "20 %", "peak_memory": "2 GiB"},
        workload=WORKLOAD,
        predict=True,
        store=store,
    )
    assert len(from_file.results) > 10
    assert [r.plan.id for r in from_file.results] == [r.plan.id for r in from_arguments.results]
    assert from_file.recommended_id == from_arguments.recommended_id is not None


def test_budgets_may_be_values(model: Path, store: Path) -> None:
    limit = Budget(metric="quality_loss_ratio", statistic="mean", bound="max", value=0.2)
    answer = plan(model, budgets=[limit], workload=WORKLOAD, predict=True, store=store)
    assert answer.budgets == (limit,)
    assert len(answer) == len(list(answer)) >= 1
    assert answer.recommended in list(answer)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hardware": None}, "hardware: None is not text"),
        ({"engine": None}, "engine: None is not text"),
        ({"steps": "weight_int8"}, "steps: not a list of steps: 'weight_int8'"),
        ({"steps": [{"technique": "weight_int8"}]}, "steps: not a list of steps"),
        ({"steps": ["weight_int9"]}, "steps: weight_int9"),
        ({"steps": ["weight_int4:group_size=7"]}, "`group_size` of `weight_int4` cannot be `7`"),
        ({"prompt": 12}, "workload: a workload has no `prompt`"),
        ({"prompt_tokens": "12"}, "must be a whole number, got 12"),
    ],
)
def test_arguments_that_cannot_be_are_told_in_a_sentence(
    model: Path, store: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(LeanplanError) as told:
        estimate(model, **({"store": store} | given))
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("given", "said"), [({"budgets": "8 GiB"}, "not budgets: '8 GiB'"), ({"model": 7}, "7 is not text")]
)
def test_a_plan_of_what_cannot_be_is_told_in_a_sentence(
    model: Path, store: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(LeanplanError) as told:
        plan(**({"model": model, "predict": True, "store": store} | given))
    assert said in str(told.value)


def test_steps_may_be_written_as_on_the_command_line(model: Path, store: Path) -> None:
    from planner.estimating.asking import read_step

    written = estimate(model, ["weight_int4:group_size=64"], store=store, **WORKLOAD)
    values = [Step("weight_int4", {"group_size": 64})]
    assert written.values == estimate(model, values, store=store, **WORKLOAD).values
    assert read_step("offload:resident=0.1") == Step("offload", {"resident": 0.1})  # one that the search fits


def test_a_predicted_set_can_be_saved_and_tabulated(model: Path, tmp_path: Path, store: Path) -> None:
    answer = plan(model, budgets={"quality_loss": "20 %"}, workload=WORKLOAD, predict=True, store=store)
    folder = answer.save(tmp_path / "saved")
    assert (folder / "result.json").is_file()
    assert (folder / "summary.md").is_file()
    frame = answer.to_dataframe()
    assert "predicted.tpot_s" in frame.columns
    assert not [c for c in frame.columns if c.startswith("measured.")]


def test_one_plan_can_be_priced(model: Path, store: Path, profile: Path) -> None:
    def priced(*steps: Step) -> Any:
        return estimate(model, steps, hardware=profile, store=store, **WORKLOAD)

    unchanged, smaller = priced(), priced(Step("weight_int8", {}))
    assert priced(Step("weight_int4")) == priced(Step("weight_int4", {"group_size": 32}))
    with pytest.raises(LeanplanError, match="`group_size` of `weight_int4` cannot be 7"):
        priced(Step("weight_int4", {"group_size": 7}))
    assert smaller.values["weights_bytes"].mid < unchanged.values["weights_bytes"].mid
    value = smaller.values["tpot_s"]
    assert value.low <= value.mid <= value.high
    assert value.because


def test_bad_arguments_are_told(store: Path) -> None:
    with pytest.raises(LeanplanError, match="either a model or a spec"):
        plan()
    with pytest.raises(LeanplanError):
        plan("/nowhere/at/all", budgets={"peak_memory": "1 GiB"}, predict=True, store=store)


@pytest.mark.slow
def test_the_readme_example_runs(tmp_path: Path) -> None:
    """Every Python block of the README, as printed, from the project's root."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        code = block.replace('"my-run"', repr(str(tmp_path / "my-run")))
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
