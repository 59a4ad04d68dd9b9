"""What engines hold in memory for weights: what the table says of them, what follows from it, and what processes take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import tiny_folder

import cost_models
from cost_models.demand import demand_of
from cost_models.engine_memory import TABLE, held, stored_dtype
from knowledge_base.field.overlay import table
from knowledge_base.registry import engines
from knowledge_base.types import Hardware, Model, Plan, Workload
from planner import building
from planner.isolation import Limits, Servers
from planner.reading import read_model

MADE = {"hidden_size": 512, "layers": 12, "vocab_size": 8192}  # 33 M parameters


def figures(model: Model, engine: str, machine: Hardware = TOY_MACHINE, workload: Workload = TOY_WORKLOAD):
    plan = Plan(model_digest=model.digest, engine=engine, steps=())
    return cost_models.estimate_many([plan], model, workload, machine)


def of_dtype(dtype: str, *, tied: bool = False) -> Model:
    size = 4 if dtype == "float32" else 2
    params = TOY_MODEL.params_total
    return replace(TOY_MODEL, weight_dtype=dtype, weight_bytes=size * params, tied_embeddings=tied)


def able(*features: str) -> Hardware:
    device = TOY_MACHINE.device
    rates = device.flop_per_s | dict.fromkeys(("float32", "bfloat16", "float16"), 1e12)
    return replace(TOY_MACHINE, devices=(replace(device, features=frozenset(features), flop_per_s=rates),))


def test_every_engine_of_the_table_is_one() -> None:
    assert {row["engine"] for row in table(TABLE)} - {"*"} <= set(engines.names())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_an_engine_stores_in_float32_weighs_what_a_float32_model_does(dtype: str) -> None:
    assert (stored_dtype("onnxruntime", dtype), stored_dtype("transformers", dtype)) == ("float32", dtype)
    narrow, wide = of_dtype(dtype), of_dtype("float32")
    demands = [demand_of(model, TOY_WORKLOAD, "onnxruntime") for model in (narrow, wide)]
    assert demands[0] == replace(demands[1], model=narrow)
    for name in ("weights_bytes", "peak_memory_bytes", "artefact_bytes", "tpot_s"):
        assert figures(narrow, "onnxruntime")[name].mid == pytest.approx(figures(wide, "onnxruntime")[name].mid)
        assert figures(narrow, "transformers")[name].mid < figures(wide, "transformers")[name].mid


def test_a_table_that_is_embedding_and_head_is_held_twice_and_stored_once() -> None:
    tied = of_dtype("float32", tied=True)
    found, plain = figures(tied, "onnxruntime", able()), figures(tied, "transformers", able())
    again = 4 * tied.embedding_params
    assert found["weights_bytes"].mid[0] == pytest.approx(plain["weights_bytes"].mid[0] + again)
    assert found["artefact_bytes"].mid[0] == plain["artefact_bytes"].mid[0]


def test_what_a_processor_cannot_compute_with_is_widened() -> None:
    model = of_dtype("bfloat16", tied=True)
    with_it, without = (figures(model, "openvino", able(*f)) for f in (("avx2", "avx512f"), ("avx2",)))
    stored = float(model.weight_bytes)
    assert with_it["weights_bytes"].mid[0] == pytest.approx(stored, rel=0.01)
    assert without["weights_bytes"].mid[0] > 1.5 * stored
    assert without["artefact_bytes"].mid[0] == with_it["artefact_bytes"].mid[0]
    assert held("openvino", "float16", able("asimd", "asimddp").device).held_ratio == 1


def test_copies_are_memory_and_no_weights() -> None:
    model = replace(
        of_dtype("float32"), linear_params=10**9, params_total=10**9, params_active=10**9, weight_bytes=4 * 10**9
    )
    found, plain = figures(model, "openvino"), figures(model, "llama_cpp")
    assert found["weights_bytes"].mid[0] == plain["weights_bytes"].mid[0]
    more = found["peak_memory_bytes"].mid[0] - plain["peak_memory_bytes"].mid[0]
    assert more > held("openvino", "float32", TOY_MACHINE.device).copies_ratio * 4 * model.linear_params


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["transformers", "llama_cpp", "onnxruntime", "openvino"])
def test_what_a_process_takes_is_what_was_predicted(engine: str, dtype: str, tmp_path: Path) -> None:
    from planner.probes import linux_cpu

    module = engines.get(engine)
    if why := module.find():
        pytest.skip(why)
    folder = tiny_folder("llama", dtype=dtype, **MADE)
    model, workload = read_model(folder).model, Workload(prompt_tokens=64, output_tokens=16)
    plan = Plan(model_digest=model.digest, engine=engine, steps=())
    numpy.save(tmp_path / "prompts.npy", numpy.arange(256, dtype=numpy.int32).reshape(4, 64))
    limits = Limits(memory_bytes=4 << 30, time_s=300, disk_bytes=2 << 30)
    with Servers() as servers:
        built = building.build(
            servers, plan, model, model_folder=folder, out=tmp_path / "artefact", workspace=tmp_path / "work",
            log=tmp_path / "build.txt", limits=limits,
        )  # fmt: skip
        what = {"folder": str(built.folder), "engine": engine, "runtime": dict(built.runtime)}
        block = {
            "prompts": str(tmp_path / "prompts.npy"), "prompt_tokens": 64, "new_tokens": 16, "batch": 1, "first": 0,
            "repetitions": 2,
        }  # fmt: skip
        log = tmp_path / "serve.txt"
        with servers.start(module.ENGINE.preload, folder=tmp_path / "serve", limits=limits, log=log) as candidate:
            candidate.call("open", what, timeout_s=200)
            candidate.reset_peak()
            candidate.call("block", block, timeout_s=200)
            peak = candidate.peak_bytes
            weights = candidate.call("memory", {}, timeout_s=60)["memory"]["weights_bytes"]
    found = figures(model, engine, able(*linux_cpu.find()["features"]), workload)
    assert weights == pytest.approx(found["weights_bytes"].mid[0], rel=0.02)
    assert built.bytes == pytest.approx(found["artefact_bytes"].mid[0], rel=0.05)
    expected = found["peak_memory_bytes"]
    assert expected.low[0] <= peak <= expected.high[0], (peak, expected)
