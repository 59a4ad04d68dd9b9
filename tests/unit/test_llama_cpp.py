"""The llama.cpp engine beyond the laws of tests/conformance/test_engines.py: architectures, scoring, memory, faults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from gguf_sessions import make_session
from tests_support import TOY_WORKLOAD

from cost_models.demand import demand_of
from knowledge_base.engines import _drafting, _llama_abi, _llama_running, llama_cpp
from knowledge_base.engines._running import Sampling
from knowledge_base.engines._serving import OneByOneOnly
from knowledge_base.errors import BadInput, CandidateFailed, EnvironmentProblem
from knowledge_base.techniques import _drafts, importance_matrix, weight_gguf

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
    drop_layers.execute(session, count=1, by="loss")
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
    _llama_abi.library().start()  # a server that another test opened in this process took the log
    session, running = opened(tmp_path, dtype="float16", num_key_value_heads=8, num_hidden_layers=4)
    running.generate(TOKENS, 200)
    line = next(line for line in _llama_abi.library().log if "KV buffer size" in line)
    running.close()
    assert float(line.split()[-2]) == pytest.approx(4 * 256 * session.facts.kv_values_per_token * 2 / 2**20, abs=0.01)


def test_weights_are_in_private_memory(tmp_path) -> None:
    _, running = opened(tmp_path)
    maps = Path("/proc/self/maps")
    mapped = maps.read_text() if maps.exists() else ""
    running.close()
    assert str(tmp_path) not in mapped


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


@pytest.mark.parametrize("type", ["q2_k", "iq3_s", "q3_k", "iq4_xs", "q4_0"])
def test_columns_that_matter_are_rounded_more_carefully(tmp_path, type: str) -> None:
    """The importance matrix lowers the error that activations see, and the file stays as long."""
    losses, sizes = [], []
    for weighed in (False, True):
        session = make_session(type=type)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in session.model.named_parameters():
            if "layernorm" in name:  # a few channels ten times as large as the rest: what the matrix is for
                parameter[torch.randperm(256, generator=generator)[:8]] *= 10
        reference = expected(session, TOKENS[0])
        session.calibration = torch.randint(1, 300, (8, 64), generator=generator)
        if weighed:
            importance_matrix.execute(session)
        folder = tmp_path / str(weighed)
        llama_cpp.export(session, folder)
        running = llama_cpp.open_artefact(folder, {})
        found = running.log_probs(TOKENS[0])
        running.close()
        losses.append(float((numpy.exp(reference) * (reference - found)).sum(axis=1).mean()))
        sizes.append((folder / llama_cpp.FILE).stat().st_size)
    assert losses[1] < 0.95 * losses[0]
    assert sizes[0] == sizes[1]


def test_an_importance_matrix_needs_text(tmp_path) -> None:
    session = make_session(type="q4_k")
    importance_matrix.execute(session)
    with pytest.raises(CandidateFailed, match="calibration text"):
        llama_cpp.export(session, tmp_path)


# ---------------------------------------------------------------- drafts


CYCLE = [5, 6, 7, 8] * 6


def drafted(folder: Path, *, type: str | None = None, seed: int = 0, **runtime: int):
    """Export a tiny model that soon goes round in circles, with a draft; return it opened with drafts and without.

    Seed 0 makes a draft of the model's own weights.
    """
    session, draft = (make_session(type=kind, initializer_range=0.04) for kind in (type, None))
    torch.manual_seed(seed)
    if seed:
        for parameter in draft.model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    draft.model.save_pretrained(folder / "draft-model")
    session.storage["draft"] = str(folder / "draft-model")
    llama_cpp.export(session, folder / "artefact")
    return tuple(llama_cpp.open_artefact(folder / "artefact", {"threads": 1, **more}) for more in (runtime, {}))


@pytest.fixture
def always(monkeypatch):
    """Nothing is found in the text, and drafting goes on as if it always paid: the hardest case."""
    monkeypatch.setattr(_drafting.PromptLookup, "draft", lambda self, most, least=0.0: [])
    monkeypatch.setattr(_drafting, "HOPE", 1e9)


@pytest.mark.parametrize("prompt", [*TOKENS[:2], CYCLE, [9]], ids=len)
def test_what_the_text_repeats_is_checked_and_changes_no_token(tmp_path, prompt) -> None:
    running, plain = drafted(tmp_path, lookup_tokens=4)
    ours, theirs = running.generate([prompt], 120), plain.generate([prompt], 120)
    assert ours.tokens == theirs.tokens
    assert ours.steps < 0.8 * theirs.steps  # a model that learnt nothing goes round in circles
    assert list(running.stream(prompt, 120)) == theirs.tokens[0]
    assert running.memory() == plain.memory()  # what was refused is gone
    assert numpy.array_equal(running.log_probs(prompt), plain.log_probs(prompt))
    running.close()
    plain.close()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_steps_but_no_token(tmp_path, seed, always) -> None:
    running, plain = drafted(tmp_path, seed=seed, draft_tokens=4)
    for prompt in (TOKENS[0], [9]):
        ours, theirs = running.generate([prompt], 60), plain.generate([prompt], 60)
        assert ours.tokens == theirs.tokens
        assert ours.steps < (15 if seed == 0 else 59)  # its own weights are always right: 12 passes of 5 tokens
        assert list(running.stream(prompt, 60)) == theirs.tokens[0]
        kept = plain.memory()["kv_cache_bytes"]
        assert 1.8 * kept < running.memory()["kv_cache_bytes"] <= 2 * kept  # the last draft is not read by who made it
    assert running.memory()["weights_bytes"] == 2 * plain.memory()["weights_bytes"]
    running.close()
    plain.close()


@pytest.mark.parametrize("type", ["q8_0", "q4_k"])
@pytest.mark.parametrize(
    "runtime", [{"lookup_tokens": 4}, {"draft_tokens": 4}, {"draft_tokens": 2, "kv_bits": 8}], ids=str
)
def test_drafts_of_quantised_weights_keep_first_choices(tmp_path, type, runtime) -> None:
    # Products of several rows use other kernels than of one, so only ties may fall differently.
    running, plain = drafted(tmp_path, type=type, **runtime)
    plain.close()
    for prompt in (TOKENS[0], CYCLE):
        made = running.generate([prompt], 80)
        assert made.steps < 75
        assert_greedy(running, prompt, made.tokens[0], 0.1)
    running.close()


def test_wrong_drafts_are_forgotten(tmp_path, monkeypatch) -> None:
    running, plain = drafted(tmp_path, lookup_tokens=4)
    truth = plain.generate([TOKENS[0]], 60).tokens[0]
    wrong = [(token + 1) % 300 for token in truth]
    monkeypatch.setattr(
        _drafting.PromptLookup, "draft", lambda self, most, least=0.0: wrong[(n := len(self._tokens) - 48) : n + most]
    )
    made = running.generate([TOKENS[0]], 60)
    assert made.tokens == [truth]
    assert made.steps == 59
    running.close()
    plain.close()


def test_drawn_answers_are_not_drafted(tmp_path) -> None:
    running, plain = drafted(tmp_path, lookup_tokens=4)
    sampling = Sampling(temperature=1.0, seed=3)
    assert list(running.stream(CYCLE, 20, sampling=sampling)) == list(plain.stream(CYCLE, 20, sampling=sampling))
    tokens = list(running.stream(CYCLE, 20))
    stopped = list(running.stream(CYCLE, 20, stop=tokens[7:8]))
    assert stopped == tokens[: tokens.index(tokens[7]) + 1]
    running.close()
    plain.close()


def test_a_draft_is_stored_as_its_model_is(tmp_path) -> None:
    import gguf

    for running in drafted(tmp_path, type="q4_k"):
        running.close()
    types = {
        name: {t.tensor_type for t in gguf.GGUFReader(tmp_path / "artefact" / name).tensors}
        for name in (llama_cpp.FILE, llama_cpp.DRAFT)
    }
    assert types[llama_cpp.FILE] == types[llama_cpp.DRAFT]
    facts = make_session().facts
    demand = weight_gguf.rewrite(demand_of(facts, TOY_WORKLOAD, "llama_cpp"), type="q4_k")
    stored, read, cache = _drafts.draft_bytes(demand, facts)  # a draft of the model's own size
    tensors = gguf.GGUFReader(tmp_path / "artefact" / llama_cpp.DRAFT).tensors
    assert stored == pytest.approx(sum(int(t.n_bytes) for t in tensors), rel=0.01)
    table = next(int(t.n_bytes) for t in tensors if t.name == "token_embd.weight")
    assert read == pytest.approx(stored - table, rel=0.01)  # the head is a matrix of its own
    assert cache == demand.kv_bytes_per_token


@pytest.mark.parametrize(
    "runtime",
    [{"lookup_tokens": 4, "draft_tokens": 4}, {"lookup_tokens": 4, "batch": 2}, {"draft_tokens": 0}],
    ids=str,
)
def test_refuses_settings_of_drafts_that_make_no_sense(tmp_path, runtime) -> None:
    llama_cpp.export(make_session(), tmp_path)
    with pytest.raises(CandidateFailed) as caught:
        llama_cpp.open_artefact(tmp_path, runtime)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"vocab_size": 320}, "has 320 tokens, the model 300"), ({"max_position_embeddings": 64}, "reads 64 tokens at most"), (None, "")],
)  # fmt: skip
def test_refuses_a_draft_that_does_not_fit(tmp_path, changes, words) -> None:
    llama_cpp.export(make_session(), tmp_path)
    if changes is not None:
        llama_cpp.export(make_session(**changes), tmp_path / "other")
        (tmp_path / "other" / llama_cpp.FILE).rename(tmp_path / llama_cpp.DRAFT)
    with pytest.raises(CandidateFailed, match=words or "holds no draft.gguf") as caught:
        llama_cpp.open_artefact(tmp_path, {"draft_tokens": 4})
    assert caught.value.kind == ("unsupported" if words else "load_error")


def test_one_drafted_prompt_at_a_time_in_process_and_served(tmp_path) -> None:
    llama_cpp.export(make_session(), tmp_path)
    running = llama_cpp.open_artefact(tmp_path, {"lookup_tokens": 4, "threads": 1})
    with pytest.raises(BadInput, match="one prompt"):
        running.generate(TOKENS[:2], 8)
    running.close()
    with pytest.raises(OneByOneOnly):
        llama_cpp.open_server(tmp_path, {"lookup_tokens": 4, "threads": 1}, 256, None)


def test_a_draft_that_is_gone_is_a_build_error(tmp_path) -> None:
    session = make_session()
    session.storage["draft"] = str(tmp_path / "gone")
    with pytest.raises(CandidateFailed, match="the draft cannot be read") as caught:
        llama_cpp.export(session, tmp_path)
    assert caught.value.kind == "build_error"
