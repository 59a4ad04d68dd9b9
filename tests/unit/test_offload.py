"""Weights read from disk as their parts run: the same answers, within the memory that was promised, at the disk's pace."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from tests_support import TOY_MACHINE
from tiny_sessions import session_of, tiny_folder

import cost_models
from knowledge_base import rules
from knowledge_base.engines import transformers
from knowledge_base.engines._disk_reading import read_into, settled
from knowledge_base.engines._torch_artefact import WEIGHTS
from knowledge_base.engines._torch_offload import PLACES, FromDisk, parts_of, stored_in, waiting
from knowledge_base.errors import CandidateFailed, EnvironmentProblem
from knowledge_base.techniques import embedding_int8, offload, weight_int4, weight_int8
from knowledge_base.types import Plan, Step, Workload
from planner.building import seal
from planner.isolation import Limits, Servers
from planner.reading import read_model

LARGE = {"hidden_size": 512, "layers": 12, "vocab_size": 2048}  # 118 MB
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6] * 2
MIB = 1 << 20


def exported(folder: Path, tiny: Path, *steps, resident: float = 0.0) -> dict:
    """Write an artefact with that share resident, after other steps; return its runtime."""
    session = session_of(tiny)
    for module, knobs in steps:
        module.execute(session, **knobs)
    offload.execute(session, resident=resident)
    transformers.export(session, folder)
    return session.runtime


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An artefact of 118 MB with all layers on disk; its manifests say so, and in the folder beside it that they are not."""
    base = tmp_path_factory.mktemp("large")
    runtime = exported(base / "offloaded", tiny_folder("llama", **LARGE))
    plan = Plan(model_digest="large", engine="transformers", steps=(Step("offload", {"resident": 0.0}),))
    (base / "unchanged").mkdir()
    for file in (base / "offloaded").iterdir():
        (base / "unchanged" / file.name).write_bytes(file.read_bytes())
    for name, how in (("offloaded", runtime), ("unchanged", {})):
        seal(base / name, plan, allocation=None, runtime=how, notes={}, versions={})
    return base


def opened(folder: Path):
    runtime = json.loads((folder / "leanplan.json").read_text())["runtime"]
    return transformers.open_artefact(folder, runtime)


# ---------------------------------------------------------------- the same answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "steps"),
    [
        ("llama", ()), ("gpt2", ()), ("mixtral", ()), ("mamba", ()),
        ("llama", ((weight_int8, {}),)), ("llama", ((embedding_int8, {"bits": 8}),)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("resident", [0.0, 0.4])
def test_answers_are_those_of_the_model_in_memory(architecture, steps, resident, tmp_path):
    runtime = exported(tmp_path, tiny_folder(architecture), *steps, resident=resident)
    plain, offloaded = (transformers.open_artefact(tmp_path, how) for how in ({}, runtime))
    for running in (offloaded, plain):
        running.generate([PROMPT, PROMPT[::-1]], 4)
    assert offloaded.generate([PROMPT], 12).tokens == plain.generate([PROMPT], 12).tokens
    assert numpy.array_equal(offloaded.log_probs(PROMPT), plain.log_probs(PROMPT))
    offloaded.close()
    plain.close()


def test_parts_may_run_in_another_order_or_not_at_all(tmp_path):
    runtime = exported(tmp_path, tiny_folder())
    running = transformers.open_artefact(tmp_path, runtime)
    model, parts = running._model, runtime["offload"]
    from safetensors.torch import load_file

    state = load_file(tmp_path / WEIGHTS)
    mlps = [part for part in parts if part.endswith("mlp")]
    x = torch.randn(1, 3, model.config.hidden_size)
    for order in (mlps, mlps[::-1], mlps[1:3], [mlps[2]] * 3, mlps[::2], mlps):
        for part in order:
            up, gate, down = (state[f"{part}.{name}_proj.weight"] for name in ("up", "gate", "down"))
            expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            assert torch.allclose(model.get_submodule(part)(x), expected, atol=1e-5), (order, part)
    running.close()


def test_a_part_that_fails_gives_its_place_back(tmp_path):
    runtime = exported(tmp_path, tiny_folder())
    running = transformers.open_artefact(tmp_path, runtime)
    part = running._model.get_submodule(runtime["offload"][1])
    for _ in range(5):
        with pytest.raises(RuntimeError):
            part(torch.randn(1, 1, 7))
    assert len(running.generate([PROMPT], 3).tokens[0]) == 3
    running.close()


def test_closing_lets_go_of_file_and_thread(tmp_path):
    runtime = exported(tmp_path, tiny_folder())

    def held() -> int:
        """How many descriptors this process has of the artefact's file."""
        return sum(link.exists() and link.samefile(tmp_path / WEIGHTS) for link in Path("/proc/self/fd").iterdir())

    threads = threading.active_count()
    assert held() == 0
    running = transformers.open_artefact(tmp_path, runtime)
    running.generate([PROMPT], 3)
    assert held() == 1 and threading.active_count() == threads + 1
    running.close()
    running.close()
    assert held() == 0 and threading.active_count() == threads


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("resident", [0.0, 0.5])
def test_memory_is_what_is_resident_and_two_places(resident, tmp_path):
    runtime = exported(tmp_path, tiny_folder("llama", **LARGE), resident=resident)
    stored = stored_in(tmp_path / WEIGHTS)
    out = {p: sum(t.bytes for n, t in stored.items() if n.startswith(f"{p}.")) for p in runtime["offload"]}
    running = transformers.open_artefact(tmp_path, runtime)
    running.generate([PROMPT], 2)
    held = running.memory()["weights_bytes"]
    running.close()
    exact = sum(t.bytes for t in stored.values()) - sum(out.values()) + PLACES * max(out.values())
    assert exact <= held <= exact + 2**17  # places are whole pages, and rotary frequencies are not in the file
    facts = read_model(tiny_folder("llama", **LARGE)).model
    demand = Plan(model_digest=facts.digest, engine="transformers", steps=(Step("offload", {"resident": resident}),))
    figures = cost_models.estimate_many([demand], facts, Workload(prompt_tokens=16, output_tokens=2), TOY_MACHINE)
    assert held == pytest.approx(figures["weights_bytes"].mid[0], rel=0.02)
    assert figures["artefact_bytes"].mid[0] == pytest.approx(sum(f.stat().st_size for f in tmp_path.iterdir()), rel=0.2)


@pytest.mark.timeout(600)
def test_a_model_larger_than_its_memory_runs_under_the_limit(large, tmp_path):
    """The limit is the planner's, enforced on the process: over it, the process is killed."""
    prompts = tmp_path / "prompts.npy"
    numpy.save(prompts, numpy.array([PROMPT], dtype=numpy.int32))
    block = {
        "prompts": str(prompts),
        "prompt_tokens": len(PROMPT),
        "new_tokens": 6,
        "batch": 1,
        "first": 0,
        "repetitions": 2,
    }
    served = {"prompts": str(prompts), "prompt_tokens": len(PROMPT), "new_tokens": 6, "count": 1}

    def serve(servers: Servers, folder: Path, limit: int) -> tuple[list[int], int, int]:
        limits = Limits(memory_bytes=limit, time_s=300, disk_bytes=64 * MIB)
        preload = transformers.ENGINE.preload
        with servers.start(preload, folder=tmp_path / "work", limits=limits, log=tmp_path / "log.txt") as candidate:
            manifest = json.loads((folder / "leanplan.json").read_text())
            what = {"folder": str(folder), "engine": "transformers", "runtime": manifest["runtime"]}
            framework = candidate.call("open", what, timeout_s=200)["framework_bytes"]
            candidate.call("block", block, timeout_s=200)
            return candidate.call("tokens", served, timeout_s=200)["tokens"][0], candidate.peak_bytes, framework

    with Servers() as servers:
        tokens, most, framework = serve(servers, large / "unchanged", 8 << 30)
        weights = (large / "unchanged" / WEIGHTS).stat().st_size
        assert most > framework + weights
        limit = framework + 5 * weights // 6
        with pytest.raises(CandidateFailed) as failed:
            serve(servers, large / "unchanged", limit)
        assert failed.value.kind == "oom_host"
        again, peak, _ = serve(servers, large / "offloaded", limit)
    assert again == tokens
    assert peak <= limit


# ---------------------------------------------------------------- the disk's pace


def cached_bytes(path: Path) -> int:
    """How much of a file the system holds in memory."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as whole,
    ):
        pages = -(-len(whole) // mmap.PAGESIZE)
        marks = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(byte := ctypes.c_char.from_buffer(whole))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(whole)), marks) == 0, os.strerror(
            ctypes.get_errno()
        )
        del byte
    return mmap.PAGESIZE * sum(mark & 1 for mark in marks)


def test_a_read_fills_its_place_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "data"
    data = os.urandom(8 * MIB + 5)
    path.write_bytes(data)
    assert cached_bytes(path) >= len(data)
    with path.open("rb") as file:
        settled(file.fileno())
        if cached_bytes(path):
            pytest.skip("this file system keeps its files in memory")
        place = bytearray(6 * MIB + 1)
        read_into(file.fileno(), memoryview(place), 7)
        assert place == data[7 : 7 + len(place)]
        assert cached_bytes(path) < 3 * MIB  # but for what the system read ahead
        with pytest.raises(OSError, match="ends 3 bytes too early"):
            read_into(file.fileno(), memoryview(bytearray(10)), len(data) - 7)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_predicted_time_holds_the_measured_one(large):
    """With the disk's rate of that minute: whoever else uses the machine slows both."""
    facts = read_model(tiny_folder("llama", **LARGE)).model
    plan = Plan(model_digest=facts.digest, engine="transformers", steps=(Step("offload", {"resident": 0.0}),))
    running = opened(large / "offloaded")
    disk: FromDisk = running._offloaded
    out = sum(tensor.stored.bytes for part in disk._parts for tensor in part)

    def reading_s() -> float:
        began = time.perf_counter()
        for number in range(len(disk._parts)):
            disk._thread.submit(disk._fill, number, 0).result()
        return time.perf_counter() - began

    seconds, measured = [], []
    for _ in range(7):
        seconds.append(reading_s())
        disk._coming.clear()  # what was read ahead was read over
        disk._free = list(range(PLACES))
        made = running.generate([PROMPT], 5)
        measured.append((made.total_s - made.ttft_s) / 4)
    running.close()
    machine = replace(TOY_MACHINE, disk_bytes_per_s=out / statistics.median(seconds))
    found = cost_models.estimate_many([plan], facts, Workload(prompt_tokens=16, output_tokens=5), machine)["tpot_s"]
    assert found.low[0] <= statistics.median(measured) <= found.high[0], (found, seconds, measured)


def test_waiting_is_what_computing_does_not_hide():
    facts = read_model(tiny_folder("llama", **LARGE)).model
    workload = Workload(prompt_tokens=16, output_tokens=8)

    def tpot(machine, share: float = 0.0, engine: str = "transformers"):
        steps = (Step("offload", {"resident": share}),) if share < 1 else ()
        plan = Plan(model_digest=facts.digest, engine=engine, steps=steps)
        return cost_models.estimate(plan, facts, workload, machine).values["tpot_s"]

    slow, fast = (replace(TOY_MACHINE, disk_bytes_per_s=rate) for rate in (1e9, 1e15))
    left = 4 * facts.linear_params
    assert tpot(slow).mid == pytest.approx(left / 1e9)
    assert "waiting for weights" in tpot(slow).because
    assert tpot(fast).mid == tpot(fast, 1.0).mid
    assert tpot(slow, 0.5).mid == pytest.approx(left / 2 / 1e9, rel=0.05)
    with pytest.raises(EnvironmentProblem, match="how fast toy machine reads from its disk is not known"):
        cost_models.estimate_many(
            [Plan(model_digest=facts.digest, engine="transformers", steps=(Step("offload", {"resident": 0.0}),))],
            facts, workload, replace(TOY_MACHINE, disk_bytes_per_s=None),
        )["tpot_s"]  # fmt: skip


# ---------------------------------------------------------------- refusals


def test_weights_kept_in_another_form_are_refused(tmp_path):
    session = session_of(tiny_folder())
    weight_int4.execute(session, group_size=32)
    with pytest.raises(CandidateFailed, match="Int4Linear keeps its weights in another form"):
        offload.execute(session, resident=0.0)


def test_layers_that_share_weights_are_refused():
    session = session_of(tiny_folder())
    layers = session.model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(CandidateFailed, match="share their weights"):
        parts_of(session.model)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"offload": []}, "expected a list of names"),
        ({"offload": ["model.layers.0.mlp", "model.layers.0.mlp"]}, "each once"),
        ({"offload": [3]}, "expected a list of names"),
        ({"offload": "model.layers.0.mlp"}, "expected a list of names"),
        ({"offload": ["model.layers.99.mlp"]}, "no weights of `model.layers.99.mlp`"),
        ({"offload": [""]}, "expected a list of names"),
        ({"offload": ["model.layers.0.mlp"], "compile": True}, "does not go with torch.compile"),
        ({"offload": ["model.layers.0.mlp"], "ffn_keep": 0.5}, "neurons chosen by the prompt"),
    ],
)
def test_a_runtime_it_cannot_honour_is_refused(runtime, words, tmp_path):
    exported(tmp_path, tiny_folder())
    with pytest.raises(CandidateFailed, match=words):
        transformers.open_artefact(tmp_path, runtime)


def test_a_damaged_file_is_refused(tmp_path):
    runtime = exported(tmp_path, tiny_folder())
    weights = tmp_path / WEIGHTS
    whole = weights.read_bytes()
    for data, words in (
        (whole[:4], "cannot be read"),
        ((2**63).to_bytes(8, "little") + whole[8:], "header is longer"),
        (whole[:-1000], "does not lie in the file|cannot be loaded"),
        (whole.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1), "cannot be read|cannot be loaded"),
    ):
        weights.write_bytes(data)
        with pytest.raises(CandidateFailed, match=words) as failed:
            transformers.open_artefact(tmp_path, runtime)
        assert failed.value.kind == "load_error"


def test_a_file_that_shrinks_while_it_is_served_ends_the_request(tmp_path):
    runtime = exported(tmp_path, tiny_folder())
    running = transformers.open_artefact(tmp_path, runtime)
    running.generate([PROMPT], 2)
    os.truncate(tmp_path / WEIGHTS, 4096)
    with pytest.raises(CandidateFailed, match="weights cannot be read: the file ends"):
        running.generate([PROMPT], 4)
    running.close()


def test_what_does_not_go_with_it_is_known_before_it_is_built():
    out = Step("offload", {"resident": 0.5})
    for other in (
        Step("torch_compile"),
        Step("ffn_prompt_neurons", {"keep": 0.5}),
        Step("weight_int4", {"group_size": 32}),
    ):
        assert rules.conflict([out, other]), other
    for other in (Step("batch_size", {"count": 4}), Step("prompt_lookup", {"tokens": 4}), Step("weight_int8")):
        assert not rules.conflict([out, other]), other


def test_beside_a_cpu_everything_waits_on_disk(tmp_path):
    runtime = exported(tmp_path, tiny_folder())
    found = waiting(runtime["offload"], tmp_path / WEIGHTS, torch.device("cpu"))
    assert set(found.values()) == {"disk"} and list(found) == runtime["offload"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: weights wait on its host")
def test_beside_an_accelerator_answers_are_the_same(tmp_path):
    runtime = exported(tmp_path, tiny_folder(), resident=0.4)
    plain, offloaded = (transformers.open_artefact(tmp_path, how) for how in ({}, runtime))
    assert offloaded.generate([PROMPT], 12).tokens == plain.generate([PROMPT], 12).tokens
    assert offloaded.memory()["weights_bytes"] < plain.memory()["weights_bytes"]
    offloaded.close()
    plain.close()
