"""The vLLM engine where there is no GPU: what it says of itself, what it refuses, the checkpoint it writes.

On a machine with a CUDA device and vLLM installed (`leanplan doctor --install vllm`) the last test runs it, in its own
environment, through a candidate process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from knowledge_base.engines import _environment, _vllm_running, vllm
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Model, Plan, Session
from planner.serving.texts import Texts
from planner.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "llama", dtype="bfloat16", layers=2)


@pytest.fixture
def session(model: Path, tmp_path: Path) -> Session:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return Session(
        model=loaded, tokenizer=tokenizer, facts=None, calibration=None, seed=0, workspace=tmp_path  # type: ignore[arg-type]
    )  # fmt: skip


# ---------------------------------------------------------------- what it says of itself


def test_without_a_cuda_device_nobody_is_told_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "_has_cuda_device", lambda: False)
    assert vllm.find() == "no CUDA device: vLLM runs on no other"


def test_with_one_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(vllm, "_has_cuda_device", lambda: True)
    monkeypatch.setenv(_environment.VARIABLE, str(tmp_path))
    assert vllm.find() == "not installed: it lives in an environment of its own; leanplan doctor --install vllm"
    assert vllm.versions() == {}
    home = tmp_path / "vllm"
    home.mkdir()
    assert "half made" in str(vllm.find())
    told = {
        "name": "vllm",
        "requirements": ["vllm==0.1.0"],
        "versions": {"vllm": "0.1.0", "torch": "2.0.0", "pip": "1"},
    }
    (home / _environment.MARK).write_text(json.dumps(told))
    assert "other versions than vllm==" in str(vllm.find())
    assert vllm.versions() == {"vllm": "0.1.0", "torch": "2.0.0"}
    (home / _environment.MARK).write_text(
        json.dumps(told | {"requirements": list(vllm.ENGINE.environment.requirements)})
    )
    assert vllm.find() is None


def model_facts(**changes: Any) -> Model:
    from dataclasses import replace

    from tests_support import TOY_MODEL

    return replace(TOY_MODEL, **changes)


def test_it_accepts_what_vllm_implements() -> None:
    assert vllm.accepts(model_facts(weight_dtype="bfloat16")) is None
    assert "`mamba` is not known" in str(vllm.accepts(model_facts(architecture="mamba")))
    assert "stored as int8" in str(vllm.accepts(model_facts(weight_dtype="int8")))


# ---------------------------------------------------------------- the checkpoint


def test_it_writes_a_checkpoint_that_transformers_loads_with_equal_logits(session: Session, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "artefact"
    vllm.export(session, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "bfloat16"
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, session.model(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("the plan")["input_ids"] == session.tokenizer("the plan")["input_ids"]


def test_it_refuses_what_a_plain_checkpoint_cannot_hold(session: Session, tmp_path: Path) -> None:
    session.storage["gguf_type"] = "q4_k"
    with pytest.raises(CandidateFailed, match="no storage choice `gguf_type`") as raised:
        vllm.export(session, tmp_path / "a")
    assert raised.value.kind == "unsupported"
    session.storage.clear()
    from knowledge_base.registry import techniques

    techniques.get("weight_int8").execute(session)
    with pytest.raises(CandidateFailed, match=r"changed modules, first `model\.layers\.0"):
        vllm.export(session, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("runtime", "words"),
    [({"threads": 2}, "unknown runtime key `threads`"), ({"batch": 0}, "`batch` is 0, expected an integer"),
     ({"prefix_cache": 1}, "`prefix_cache` is 1, expected true"), ({"prefill_chunk": 0}, "`prefill_chunk` is 0")],
)  # fmt: skip
def test_it_refuses_what_it_cannot_honour(runtime: dict[str, Any], words: str, tmp_path: Path) -> None:
    openers = (vllm.open_artefact, lambda folder, runtime: vllm.open_server(folder, runtime, 256, Texts(folder)))
    for opener in openers:
        with pytest.raises(CandidateFailed, match=words):
            opener(tmp_path, runtime)
        with pytest.raises(CandidateFailed, match=r"holds no config\.json"):
            opener(tmp_path, {})


def test_what_a_server_is_asked_for_becomes_vllms_settings() -> None:
    from knowledge_base.engines._vllm_server import settings

    assert settings({}, 4) == {"enable_prefix_caching": False}
    assert settings({"prefix_cache": True, "batch": 4}, 4) == {"enable_prefix_caching": True}
    asked = settings({"prefill_chunk": 4}, 16)
    assert asked["enable_chunked_prefill"] and asked["max_num_batched_tokens"] == 16  # one of each running answer


def test_config_json_tells_the_checkpoint(model: Path, tmp_path: Path) -> None:
    found = _vllm_running.Checkpoint(model)
    config = json.loads((model / "config.json").read_text())
    assert found.vocabulary == config["vocab_size"] and found.context_tokens == config["max_position_embeddings"]
    assert found.token_bytes == _vllm_running.cache_bytes_per_token(config, 2)  # bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": None}))
    with pytest.raises(CandidateFailed, match="tells no vocab_size"):
        _vllm_running.Checkpoint(tmp_path)


# ---------------------------------------------------------------- arithmetic of what vLLM gives


def test_the_cache_is_that_of_the_models_heads(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert _vllm_running.cache_bytes_per_token(config, 2) == 2 * 2 * 2 * 32 * 2  # k and v, layers, heads, size, bytes
    gpt2 = {"n_layer": 3, "n_head": 4, "n_embd": 64}
    assert _vllm_running.cache_bytes_per_token(gpt2, 4) == 2 * 3 * 4 * 16 * 4
    with pytest.raises(CandidateFailed, match="num_hidden_layers"):
        _vllm_running.cache_bytes_per_token({}, 2)


def test_log_probabilities_become_rows() -> None:
    flat = SimpleNamespace(  # the fields of vLLM's FlatLogprobs; the first position of a prompt has none
        start_indices=[0, 0, 4], end_indices=[0, 4, 7], token_ids=[2, 0, 1, 2, 1, 0, 2], logprobs=[-1.0, -2, -3, -1, -4, -5, -6]
    )  # fmt: skip
    rows = _vllm_running.positions(flat)
    assert rows[0] == ([], [])
    found = _vllm_running.dense(rows[1:], 3)
    assert found.dtype == numpy.float32
    assert found.tolist() == [[-2, -3, -1], [-5, -4, -6]]
    with pytest.raises(CandidateFailed, match="left words out"):
        _vllm_running.dense(rows[1:], 4)


# ---------------------------------------------------------------- the real thing


@pytest.fixture(scope="module")
def candidate(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if why := vllm.find():
        pytest.skip(why)
    from knowledge_base.techniques._loading import load_session
    from planner.isolation import Limits, Servers
    from planner.reading import read_model

    place = tmp_path_factory.mktemp("vllm")
    facts = read_model(str(model)).model
    vllm.export(load_session(model, facts, calibration=None, seed=0, workspace=place), place / "artefact")
    limits = Limits(memory_bytes=32 * 2**30, time_s=900, disk_bytes=8 * 2**30)
    with Servers() as servers:
        with servers.start(vllm.ENGINE.preload, folder=place / "work", limits=limits, log=place / "log.txt") as started:
            opened = {"folder": str(place / "artefact"), "engine": "vllm", "runtime": {"batch": 2}}
            started.call("open", opened, timeout_s=600)
            yield SimpleNamespace(call=started.call, place=place, plan=Plan(model_digest=facts.digest, engine="vllm"))


@pytest.mark.gpu
def test_it_generates_and_scores_as_transformers_does(candidate: Any, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompts = numpy.random.default_rng(0).integers(1, 250, size=(4, 16)).astype(numpy.int32)
    numpy.save(candidate.place / "prompts.npy", prompts)
    given = {"prompts": str(candidate.place / "prompts.npy"), "prompt_tokens": 16, "new_tokens": 8}
    rows = candidate.call("tokens", given | {"count": 2}, timeout_s=300)["tokens"]
    for prompt, made in zip(prompts, rows):
        with torch.inference_mode():
            ids = torch.tensor([[*prompt.tolist(), *made]])
            scores = torch.log_softmax(oracle(ids).logits[0].float(), dim=-1)[15:-1]
        short = scores.max(dim=-1).values - scores[range(8), made]
        assert float(short.max()) < 0.1, "bfloat16 there, float32 here"
    samples = candidate.call("block", given | {"batch": 2, "first": 0, "repetitions": 2}, timeout_s=300)["samples"]
    assert all(s["tokens"] == [8, 8] and s["steps"] == 7 and 0 < s["ttft_s"] < s["total_s"] for s in samples)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [{}, {"prefix_cache": True}, {"prefill_chunk": 16}], ids=str)
def test_it_answers_side_by_side_what_it_answers_one_by_one(
    model: Path, tmp_path: Path, runtime: dict[str, Any]
) -> None:
    if why := vllm.find():
        pytest.skip(why)
    from concurrent.futures import ThreadPoolExecutor
    from urllib.request import Request, urlopen

    from knowledge_base.techniques._loading import load_session
    from planner import building
    from planner.isolation import Limits
    from planner.reading import read_model
    from planner.serving import JSON, started

    facts = read_model(str(model)).model
    vllm.export(load_session(model, facts, calibration=None, seed=0, workspace=tmp_path), tmp_path / "artefact")
    plan = Plan(model_digest=facts.digest, engine="vllm")
    building.seal(
        tmp_path / "artefact",
        plan,
        allocation=None,
        runtime={"batch": 3, **runtime},
        notes={},
        versions=vllm.versions(),
    )
    prompts = numpy.random.default_rng(0).integers(1, 250, size=(3, 40)).tolist()
    limits = Limits(memory_bytes=32 * 2**30, time_s=900, disk_bytes=8 * 2**30)
    with started(tmp_path / "artefact", limits=limits) as service, ThreadPoolExecutor(3) as pool:

        def answer(prompt: list[int]) -> dict[str, Any]:
            body = json.dumps({"prompt": prompt, "max_tokens": 8, "ignore_eos": True}).encode()
            with urlopen(Request(f"{service.url}/v1/completions", body, JSON), timeout=300) as response:
                told: dict[str, Any] = json.loads(response.read())
            return {"usage": told["usage"], "text": told["choices"][0]["text"]}

        assert service.slots == 3 and not service.why_one_by_one
        alone = [answer(prompt) for prompt in prompts]
        assert all(one["usage"]["completion_tokens"] == 8 for one in alone)
        assert list(pool.map(answer, prompts)) == alone
