"""A model that memory does not hold: built without being loaded, byte for byte the same, and compared with itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import tiny_folder

import cost_models
from knowledge_base.build_memory import loads_weights
from knowledge_base.engines import transformers
from knowledge_base.engines._safetensors_copy import copy, tensors_of
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import offload
from knowledge_base.techniques._loading import load_session
from knowledge_base.techniques._shapes import shapes_session
from knowledge_base.types import Plan, Step
from planner.foreseeing import building_bytes
from planner.reading import read_model
from search.placing import as_it_fits
from search.problem import Problem
from search.space import Space, build_space

OFFLOAD, INT8, BATCH = Step("offload", {"resident": 0.0}), Step("weight_int8"), Step("batch_size", {"count": 4})


def written(how, folder: Path, out: Path) -> dict[str, bytes]:
    """Return the files of an offloaded artefact whose session was made in one of the two ways."""
    session = how(folder, read_model(folder).model, calibration=None, seed=0, workspace=out)
    offload.execute(session, resident=0.4)
    transformers.export(session, out)
    return {"runtime": json.dumps(session.runtime).encode(), **{f.name: f.read_bytes() for f in out.iterdir()}}


# ---------------------------------------------------------------- built from shapes


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "float32"),
        ("llama_untied", "bfloat16"),
        ("gpt2", "float32"),
        ("qwen2", "float16"),
        ("mamba", "float32"),
    ],
)
def test_an_artefact_built_without_loading_is_the_same(architecture: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny_folder(architecture, dtype=dtype)
    assert written(shapes_session, folder, tmp_path / "shapes") == written(load_session, folder, tmp_path / "loaded")


def test_so_is_one_of_a_checkpoint_of_several_files(tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    parts = tmp_path / "parts"
    parts.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (parts / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, some in enumerate((names[::2], names[1::2])):
        save_file(
            {name: tensors[name] for name in some}, parts / f"part-{number}.safetensors", metadata={"format": "pt"}
        )
    index = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same, loaded = (
        written(shapes_session, parts, tmp_path / "shapes"),
        written(load_session, folder, tmp_path / "loaded"),
    )
    assert same == loaded


def test_a_copied_file_is_the_one_safetensors_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c": torch.arange(9), "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4), "ä": torch.randn(()), "small": torch.arange(5, dtype=torch.uint8), "h": torch.randn(4).half(),
    }  # fmt: skip
    (tmp_path / "from").mkdir()
    save_file(tensors, tmp_path / "from" / "model.safetensors")
    for dtype in (torch.float32, torch.float16):
        cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(cast, tmp_path / "whole", metadata={"format": "pt"})
        copy(tensors_of(tmp_path / "from"), dtype, tmp_path / "copied")
        assert (tmp_path / "copied").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_value_that_is_not_finite_is_found_while_it_is_copied(tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(4), "bad": torch.tensor([1.0, float("inf"), float("nan")])}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CandidateFailed, match="bad has 2 values that are not finite") as failed:
        copy(tensors_of(tmp_path), torch.float32, tmp_path / "copied")
    assert failed.value.kind == "non_finite"


@pytest.mark.parametrize("damage", ["other names", "another shape", "not there"])
def test_what_only_loading_explains_is_loaded(damage: str, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    facts = read_model(folder).model
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "other names":
        tensors["other"] = torch.ones(1)
    elif damage == "another shape":
        tensors[name] = tensors[name][:32].clone()
    else:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert shapes_session(tmp_path, facts, calibration=None, seed=0, workspace=tmp_path) is None


# ---------------------------------------------------------------- which builds, and what they take


def plan_of(*steps: Step) -> Plan:
    return Plan(model_digest=TOY_MODEL.digest, engine="transformers", steps=steps)


@pytest.mark.parametrize(
    ("steps", "loads"),
    [((OFFLOAD,), False), ((OFFLOAD, BATCH), False), ((INT8, OFFLOAD), True), ((BATCH,), True), ((), True)],
)
def test_weights_are_loaded_but_for_what_only_serves_them_from_elsewhere(steps: tuple[Step, ...], loads: bool) -> None:
    assert loads_weights(plan_of(*steps)) == loads


def test_what_is_not_loaded_is_not_expected_to_take_memory() -> None:
    problem = Problem(
        model=LARGE, workload=TOY_WORKLOAD, hardware=TOY_MACHINE, space=space(), budgets=(), objectives=("tpot",)
    )
    copied, loaded = building_bytes(problem.price([plan_of(OFFLOAD), plan_of(INT8, OFFLOAD)]))
    assert copied < LARGE.weight_bytes / 4 < LARGE.weight_bytes < loaded


# ---------------------------------------------------------------- what everything is compared with

LARGE = replace(
    TOY_MODEL, layers=22, attention_layers=22, hidden_size=2048, heads=32, kv_heads=4, head_size=64, ffn_size=5632,
    vocab_size=32000, linear_params=968_884_224, embedding_params=65_536_000, params_total=1_034_512_384,
    params_active=1_034_512_384, weight_bytes=4_138_049_536, max_context_tokens=2048,
)  # fmt: skip


def space(*, only: tuple[str, ...] = ("offload",)) -> Space:
    return build_space(LARGE, TOY_WORKLOAD, TOY_MACHINE, engine_names=("transformers",), only=only)


@pytest.mark.parametrize("limit_bytes", [1.2e9, 2e9, 3e9])
def test_as_much_stays_in_memory_as_surely_fits(limit_bytes: float) -> None:
    plan = as_it_fits(space(), LARGE, TOY_WORKLOAD, TOY_MACHINE, limit_bytes)
    assert plan is not None
    (step,) = plan.steps

    def most(share: float) -> float:
        plan = plan_of(Step("offload", {"resident": share}))
        return float(cost_models.estimate_many([plan], LARGE, TOY_WORKLOAD, TOY_MACHINE)["peak_memory_bytes"].high[0])

    assert most(step.knobs["resident"]) <= limit_bytes < most(step.knobs["resident"] + 0.05)


def test_nothing_fits_below_what_must_be_there_or_without_the_means() -> None:
    assert as_it_fits(space(), LARGE, TOY_WORKLOAD, TOY_MACHINE, 3e8) is None
    assert as_it_fits(space(only=("weight_int8",)), LARGE, TOY_WORKLOAD, TOY_MACHINE, 2e9) is None


def test_the_reference_is_what_counts_as_unchanged() -> None:
    plain = space()
    held = replace(plain, reference=plan_of(OFFLOAD))
    assert plain.unchanged() == held.unchanged("transformers") == plan_of()
    assert held.unchanged() == plan_of(OFFLOAD)
