"""The llama.cpp engine beyond the laws of tests/conformance/test_engines.py: architectures, scoring, memory, faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from gguf_sessions import make_session

from knowledge_base.engines import _llama_abi, _llama_running, llama_cpp
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem

if why := llama_cpp.find():
    pytest.skip(why, allow_module_level=True)

TOKENS = numpy.random.default_rng(0).integers(1, 300, size=(4, 48)).tolist()
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def opened(folder: Path, architecture: str = "llama", runtime: dict | None = None, **options: object):
    """Export a tiny session into `folder`; return the session and the opened artefact."""
    session = make_session(architecture, **options)
    llama_cpp.export(session, folder)
    return session, llama_cpp.open_artefact(folder, {"threads": 1, **(runtime or {})})


def expected(session, tokens) -> numpy.ndarray:
    with torch.inference_mode():
        return torch.log_softmax(session.model(torch.tensor([tokens])).logits[0].float(), -1).numpy()


def assert_greedy(running, prompt, tokens, slack) -> None:
    """Every token is first choice after those before it, or within `slack` of it, when scored in one pass."""
    rows = running.log_probs([*prompt, *tokens])[len(prompt) - 1 : -1]
    assert (rows.max(axis=1) - rows[numpy.arange(len(tokens)), tokens]).max() <= slack


@pytest.mark.parametrize(
    ("architecture", "changes", "tolerance"),
    [
        ("llama", {}, 1e-4),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, 1e-4),
        ("llama", {"head_dim": 64, "num_key_value_heads": 8}, 1e-4),
        ("llama", {"rope_parameters": LLAMA3}, 1e-4),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}, 1e-4),
        ("mistral", {"sliding_window": None}, 1e-4),
        ("qwen2", {"rms_norm_eps": 1e-5}, 1e-4),
        ("qwen3", {}, 1e-4),
        ("gpt2", {}, 5e-3),  # llama.cpp looks GELU up in a table of float16
    ],
)
def test_float32_scores_are_those_of_transformers(tmp_path, architecture, changes, tolerance) -> None:
    session, running = opened(tmp_path, architecture, **changes)
    with torch.no_grad():
        found = running.log_probs(TOKENS[0])
    running.close()
    assert numpy.abs(found - expected(session, TOKENS[0])).max() <= tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.5), ("float16", 0.05)])
def test_16_bit_files_score_as_transformers_up_to_rounding(tmp_path, dtype, tolerance) -> None:
    session, running = opened(tmp_path, dtype=dtype)
    found = running.log_probs(TOKENS[0])
    running.close()
    assert numpy.abs(found - expected(session, TOKENS[0])).max() <= tolerance


def test_pruned_shapes_run(tmp_path) -> None:
    from knowledge_base.techniques import drop_layers, prune_width

    session = make_session(num_hidden_layers=3)
    session.calibration = torch.tensor(TOKENS)
    prune_width.execute(session, keep=0.5)
    drop_layers.execute(session, count=1)
    llama_cpp.export(session, tmp_path)
    running = llama_cpp.open_artefact(tmp_path, {"threads": 1})
    found = running.log_probs(TOKENS[0])
    running.close()
    assert numpy.abs(found - expected(session, TOKENS[0])).max() <= 1e-4


def test_fewer_bits_lose_more(tmp_path) -> None:
    losses = []
    for type in ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k"):
        session, running = opened(tmp_path / type, type=type)
        reference, found = expected(session, TOKENS[0]), running.log_probs(TOKENS[0])
        running.close()
        losses.append(float((numpy.exp(reference) * (reference - found)).sum(axis=1).mean()))  # KL divergence
    assert losses == sorted(losses) and losses[0] > 0


def test_a_batch_gives_what_one_prompt_gives(tmp_path) -> None:
    _, running = opened(tmp_path)
    together = running.generate(TOKENS, 8)
    alone = [running.generate([prompt], 8).tokens[0] for prompt in TOKENS]
    running.close()
    assert together.tokens == alone
    assert together.steps == 7


def test_a_batch_of_quantised_weights_chooses_first_choices(tmp_path) -> None:
    # Products of several rows use other kernels than of one, so only ties may fall differently.
    _, running = opened(tmp_path, type="q4_k")
    made = running.generate(TOKENS, 8)
    for prompt, tokens in zip(TOKENS, made.tokens):
        assert_greedy(running, prompt, tokens, 0.1)
    running.close()


def test_end_of_text_does_not_end_generation(tmp_path) -> None:
    session = make_session()
    with torch.no_grad():  # token 0, the end of text, is by far the likeliest after every token
        session.model.get_input_embeddings().weight.zero_()
        session.model.get_input_embeddings().weight[:, 0] = 1.0
        for layer in session.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        session.model.lm_head.weight.data.zero_()
        session.model.lm_head.weight[0, 0] = 5.0
        session.model.model.norm.weight.fill_(1.0)
    llama_cpp.export(session, tmp_path)
    running = llama_cpp.open_artefact(tmp_path, {"threads": 1})
    assert running.generate([[5, 6]], 6).tokens == [[0] * 6]
    running.close()


def test_long_texts_are_scored_in_parts(tmp_path, monkeypatch) -> None:
    _, running = opened(tmp_path)
    whole = running.log_probs(TOKENS[0])
    running.close()
    monkeypatch.setattr(_llama_running, "LOGITS_BYTES", 4 * 300 * 7)  # seven rows at a time
    running = llama_cpp.open_artefact(tmp_path, {"threads": 1})
    assert numpy.abs(running.log_probs(TOKENS[0]) - whole).max() < 1e-5
    running.close()


def test_scoring_and_generating_share_a_growing_context(tmp_path) -> None:
    _, running = opened(tmp_path)
    first = running.generate([[1, 2, 3]], 4).tokens
    scores = running.log_probs(TOKENS[0])
    running.generate(TOKENS, 100)
    assert running.generate([[1, 2, 3]], 4).tokens == first
    assert numpy.abs(running.log_probs(TOKENS[0]) - scores).max() < 1e-5
    running.close()


def test_memory_is_exact(tmp_path) -> None:
    import gguf

    session, running = opened(tmp_path / "f32")
    running.generate(TOKENS, 10)
    stored = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "f32" / llama_cpp.FILE).tensors)
    values = 4 * (48 + 9) * session.facts.kv_values_per_token
    assert running.memory() == {"weights_bytes": stored, "kv_cache_bytes": 4 * values}
    running.close()
    for runtime, dtype, bits in (
        ({}, "bfloat16", 16),
        ({"kv_bits": 8}, "float32", 8.5),
        ({"kv_bits": 4}, "float32", 5),
    ):
        _, running = opened(tmp_path / f"{bits}", dtype=dtype, runtime=runtime)
        running.generate(TOKENS, 10)
        assert running.memory()["kv_cache_bytes"] == values * bits / 8
        running.close()


def test_the_cache_holds_what_memory_says(tmp_path) -> None:
    # llama.cpp reports the size of its cache in MiB with two digits, padded to 256 cells for each sequence.
    session, running = opened(tmp_path, dtype="float16", num_key_value_heads=8, num_hidden_layers=4)
    running.generate(TOKENS, 200)
    line = next(line for line in _llama_abi.library().log if "KV buffer size" in line)
    running.close()
    assert float(line.split()[-2]) == pytest.approx(4 * 256 * session.facts.kv_values_per_token * 2 / 2**20, abs=0.01)


def test_weights_are_in_private_memory(tmp_path) -> None:
    _, running = opened(tmp_path)
    mapped = llama_cpp.FILE in Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else False
    running.close()
    assert not mapped


@pytest.mark.parametrize("part", ["empty", "foreign", "half", "header", "tensor"])
def test_damaged_files_are_load_errors(tmp_path, part) -> None:
    session = make_session()
    llama_cpp.export(session, tmp_path)
    path = tmp_path / llama_cpp.FILE
    data = bytearray(path.read_bytes())
    if part == "tensor":  # nothing but the values can tell
        data[-4096:] = b"\xff" * 4096
    damaged = {
        "empty": b"", "foreign": b"PK\x03\x04" * 50, "half": data[: len(data) // 2],
        "header": data[:8] + b"\xff" * 16 + data[24:], "tensor": data,
    }[part]  # fmt: skip
    path.write_bytes(bytes(damaged))
    with pytest.raises(CandidateFailed, match=r"llama\.cpp cannot load it: .") as caught:
        llama_cpp.open_artefact(tmp_path, {})
    assert caught.value.kind == "load_error"


def test_refuses_tokens_beyond_the_vocabulary_and_the_context(tmp_path) -> None:
    _, running = opened(tmp_path)
    for tokens, words in (([[300]], "token 300"), ([[-1]], "token -1"), ([[1] * 250], "context of 256")):
        with pytest.raises(BadInput, match=words):
            running.generate(tokens, 10)
    running.close()


def test_refuses_a_quantised_cache_of_heads_that_do_not_divide(tmp_path) -> None:
    llama_cpp.export(make_session(head_dim=16, num_attention_heads=16), tmp_path)
    with pytest.raises(CandidateFailed, match="heads of 16") as caught:
        llama_cpp.open_artefact(tmp_path, {"kv_bits": 8})
    assert caught.value.kind == "unsupported"


def test_another_binary_interface_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setitem(_llama_abi._CONTEXT_DEFAULTS, "n_ubatch", 1024)
    _llama_abi._open.cache_clear()
    try:
        why = llama_cpp.find()
        assert "has another binary interface than this adapter knows (checked 2026" in why
        assert "default of `n_ubatch` is 512, expected 1024" in why
        with pytest.raises(EnvironmentProblem, match="n_ubatch"):
            _llama_abi.library()
    finally:
        _llama_abi._open.cache_clear()


def test_every_default_is_checked(monkeypatch) -> None:
    library = _llama_abi.library()
    for struct, name in (("llama_model_default_params", "use_extra_bufts"), ("llama_context_default_params", "type_v")):
        honest = getattr(library, struct)

        def shifted(honest=honest, name=name):
            params = honest()
            setattr(params, name, not getattr(params, name))
            return params

        monkeypatch.setattr(library, struct, shifted)
        assert name in _llama_abi._layout_fault(library)
        monkeypatch.setattr(library, struct, honest)
    assert _llama_abi._layout_fault(library) is None


def test_asking_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from knowledge_base.engines import llama_cpp; from knowledge_base.techniques import weight_gguf;"
        "assert llama_cpp.find() is None; llama_cpp.versions();"
        "print([m for m in ('torch', 'numpy', 'gguf', 'xllamacpp', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_running_needs_no_torch(tmp_path) -> None:
    llama_cpp.export(make_session(), tmp_path)
    code = (
        "import sys; from pathlib import Path; from knowledge_base.engines import llama_cpp;"
        f"running = llama_cpp.open_artefact(Path({str(tmp_path)!r}), {{'threads': 1}}); running.generate([[1, 2]], 3);"
        "running.close(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False" and done.stderr == ""
