"""Laws every engine keeps, on one small Llama in float32 that plain transformers computes as the oracle.

An engine that does not compute in float32 declares `LOG_PROB_TOLERANCE`, the largest difference of a
log-probability from plain transformers that is still right for the format it stores by default.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from knowledge_base.engines._pinning import chosen
from knowledge_base.errors import LeanplanError
from knowledge_base.registry import engines
from knowledge_base.types import Session

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS, NEW_TOKENS = 24, 16
PINNED = """
import json, os, sys
from pathlib import Path
from knowledge_base.registry import engines

running = engines.get(sys.argv[1]).open_artefact(Path(sys.argv[2]), {"threads": 1, "pinned": True})
running.generate([[5, 6, 7]], 4)
print(json.dumps([sorted(os.sched_getaffinity(int(task.name))) for task in Path("/proc/self/task").iterdir()]))
"""
WEIGHT_FILES = (".safetensors", ".gguf", ".bin", ".data")
FEATURES = {"kv:8": {"kv_bits": 8}, "kv:4": {"kv_bits": 4}, "lookup": {"lookup_tokens": 4}, "threads": {"threads": 1},
            "batch": {"batch": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def oracle():
    """A Llama with grouped queries, sharpened so that its choices are not ties, and the tokenizer it came with."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5.0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "models/tiny-lm", local_files_only=True)
    return SimpleNamespace(model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def prompts():
    generator = numpy.random.default_rng(0)
    return generator.integers(1, 4096, size=(3, PROMPT_TOKENS)).tolist()


@pytest.fixture(scope="module", params=engines.names())
def engine(request):
    module = engines.get(request.param)
    if why := module.find():
        pytest.skip(why)
    if module.ENGINE.environment is not None:
        pytest.skip(
            "it runs in an environment of its own, through a candidate process: tests/unit/test_environments.py"
        )
    return module


@pytest.fixture(scope="module")
def artefact(engine, oracle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artefact")
    session = Session(
        model=oracle.model, tokenizer=oracle.tokenizer, facts=None, calibration=None, seed=0, workspace=folder
    )
    engine.export(session, folder)
    return folder


@pytest.fixture
def open_with(engine, artefact):
    """Open the artefact with a runtime; everything opened is closed at the end."""
    opened = []

    def opener(runtime=None):
        opened.append(engine.open_artefact(artefact, runtime or {}))
        return opened[-1]

    yield opener
    for running in opened:
        running.close()


def tolerance(engine) -> float:
    return getattr(engine, "LOG_PROB_TOLERANCE", 1e-4)


def expected_log_probs(oracle, tokens):
    with torch.inference_mode():
        return torch.log_softmax(oracle.model(torch.tensor([tokens])).logits[0].float(), dim=-1).numpy()


def assert_greedy(oracle, prompt, tokens, slack):
    """Every token is the oracle's first choice after the tokens before it, or within `slack` of it."""
    log_probs = expected_log_probs(oracle, [*prompt, *tokens])[len(prompt) - 1 : -1]
    short = log_probs.max(axis=1) - log_probs[numpy.arange(len(tokens)), tokens]
    assert short.max() <= slack


def test_declares_what_a_plan_needs_to_know(engine):
    assert engine.ENGINE.summary
    assert engine.ENGINE.offers
    assert engine.versions()
    assert all(version for version in engine.versions().values())


def test_greedy_tokens_are_those_of_plain_transformers(engine, oracle, prompts, open_with):
    made = open_with().generate(prompts[:1], NEW_TOKENS)
    assert [len(row) for row in made.tokens] == [NEW_TOKENS]
    assert_greedy(oracle, prompts[0], made.tokens[0], 2 * tolerance(engine))


def test_a_batch_gives_each_prompt_its_own_tokens(engine, oracle, prompts, open_with):
    if "batch" not in engine.ENGINE.offers:
        pytest.skip("the engine offers no batches")
    made = open_with({"batch": 3}).generate(prompts, NEW_TOKENS)
    assert [len(row) for row in made.tokens] == [NEW_TOKENS] * 3
    for prompt, tokens in zip(prompts, made.tokens):
        assert_greedy(oracle, prompt, tokens, 2 * tolerance(engine))


def test_times_and_steps_are_those_of_the_run(prompts, open_with):
    running = open_with()
    one, many = running.generate(prompts[:1], 1), running.generate(prompts[:1], NEW_TOKENS)
    assert one.steps == 0
    assert many.steps == NEW_TOKENS - 1
    assert 0 < one.ttft_s <= one.total_s
    assert 0 < many.ttft_s < many.total_s


def test_generating_twice_gives_the_same(prompts, open_with):
    running = open_with()
    assert running.generate(prompts[:1], NEW_TOKENS).tokens == running.generate(prompts[:1], NEW_TOKENS).tokens


def test_log_probs_are_distributions_and_match_plain_transformers(engine, oracle, prompts, open_with):
    found = open_with().log_probs(prompts[0])
    assert found.dtype == numpy.float32
    assert found.shape == (PROMPT_TOKENS, 4096)
    assert numpy.exp(found.astype(numpy.float64)).sum(axis=1) == pytest.approx(1, abs=1e-4)
    assert numpy.abs(found - expected_log_probs(oracle, prompts[0])).max() <= tolerance(engine)


def test_threads_are_kept_on_cores(engine, artefact):
    if "pinned_threads" not in engine.ENGINE.offers:
        pytest.skip("the engine keeps no threads on cores")
    name = next(name for name in engines.names() if engines.get(name) is engine)
    done = subprocess.run(
        [sys.executable, "-c", PINNED, name, str(artefact)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    masks, pinned = json.loads(done.stdout.splitlines()[-1]), list(chosen(1))
    assert pinned in masks  # what computes; threads that libraries start as they are imported may stay where they are
    assert all(mask in (pinned, sorted(os.sched_getaffinity(0))) for mask in masks)


def test_scoring_does_not_disturb_generating(prompts, open_with):
    running = open_with()
    before = running.generate(prompts[:1], NEW_TOKENS).tokens
    running.log_probs(prompts[1])
    assert running.generate(prompts[:1], NEW_TOKENS).tokens == before


def test_memory_counts_what_is_stored(oracle, artefact, prompts, open_with):
    running = open_with()
    running.generate(prompts[:1], NEW_TOKENS)
    memory = running.memory()
    files = sum(f.stat().st_size for f in artefact.iterdir() if f.suffix in WEIGHT_FILES)
    assert memory["weights_bytes"] == pytest.approx(files, rel=0.02, abs=256 * 1024)  # headers, GGUF's vocabulary
    config = oracle.model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    cells = PROMPT_TOKENS + NEW_TOKENS - 1  # the last token is never read back
    assert values * cells <= memory["kv_cache_bytes"] <= 4 * values * 256  # engines may allocate in blocks of 256


@pytest.mark.parametrize("feature", FEATURES)
def test_offered_features_generate(feature, engine, prompts, open_with):
    if feature not in engine.ENGINE.offers:
        pytest.skip(f"the engine offers no {feature}")
    running = open_with(FEATURES[feature])
    batch = FEATURES[feature].get("batch", 1)
    made = running.generate(prompts[:batch], NEW_TOKENS)
    assert [len(row) for row in made.tokens] == [NEW_TOKENS] * batch
    if feature.startswith("kv:"):
        plain = open_with()
        plain.generate(prompts[:1], NEW_TOKENS)
        assert running.memory()["kv_cache_bytes"] < plain.memory()["kv_cache_bytes"]
        # the price is in what is scored, or quality would be measured on a cache nobody serves with
        assert not numpy.array_equal(running.log_probs(prompts[0]), plain.log_probs(prompts[0]))
    if feature == "lookup":
        repeated = [prompts[0][:8] * 3]
        assert running.generate(repeated, NEW_TOKENS).tokens == open_with().generate(repeated, NEW_TOKENS).tokens


def test_refuses_unknown_runtime_keys(engine, artefact):
    with pytest.raises(LeanplanError, match="warp_speed"):
        engine.open_artefact(artefact, {"warp_speed": 9})


@pytest.mark.parametrize(
    "runtime", [{"kv_bits": 3}, {"threads": 0}, {"batch": 0}, {"threads": "two"}], ids=lambda r: f"{r}"
)
def test_refuses_runtime_values_it_cannot_honour(engine, artefact, runtime):
    with pytest.raises(LeanplanError):
        engine.open_artefact(artefact, runtime)


def test_refuses_an_empty_folder(engine, tmp_path):
    with pytest.raises(LeanplanError):
        engine.open_artefact(tmp_path, {})


def test_refuses_a_truncated_file(engine, artefact, tmp_path):
    for file in artefact.iterdir():
        data = file.read_bytes()
        cut = file.suffix in WEIGHT_FILES
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if cut else data)
    with pytest.raises(LeanplanError):
        engine.open_artefact(tmp_path, {})


@pytest.mark.parametrize(
    ("prompts", "new_tokens"),
    [([], 4), ([[]], 4), ([[1, 2], [3]], 4), ([[1, 2]], 0), ([[1] * 250], 20)],
    ids=["no prompt", "empty prompt", "unequal lengths", "no output", "beyond the context"],
)
def test_refuses_requests_it_cannot_serve(open_with, prompts, new_tokens):
    with pytest.raises(LeanplanError):
        open_with().generate(prompts, new_tokens)


def test_a_closed_artefact_is_closed(engine, artefact, prompts):
    running = engine.open_artefact(artefact, {})
    running.close()
    running.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.generate(prompts[:1], 1)


@pytest.mark.promise("P13")
def test_nothing_touches_the_network(engine, oracle, prompts, tmp_path, monkeypatch):
    def refuse(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    session = Session(
        model=oracle.model, tokenizer=oracle.tokenizer, facts=None, calibration=None, seed=0, workspace=tmp_path
    )
    engine.export(session, tmp_path)
    running = engine.open_artefact(tmp_path, {})
    running.generate(prompts[:1], 2)
    running.close()


def test_exporting_twice_gives_the_same_bytes(engine, oracle, artefact, tmp_path):
    session = Session(
        model=oracle.model, tokenizer=oracle.tokenizer, facts=None, calibration=None, seed=0, workspace=tmp_path
    )
    engine.export(session, tmp_path)
    first, second = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in (artefact, tmp_path))
    assert first == second
