"""The ONNX Runtime engine beyond the laws of tests/conformance/test_engines.py: architectures, scoring, bytes, faults."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from gguf_sessions import make_session
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD

from knowledge_base.engines import onnxruntime as engine
from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.techniques import weight_onnx

if why := engine.find():
    pytest.skip(why, allow_module_level=True)

from knowledge_base.engines import _onnx_running, _onnx_writer  # after the check: it needs the library

ROOT = Path(__file__).resolve().parents[2]
TOKENS = numpy.random.default_rng(0).integers(1, 300, size=(4, 48)).tolist()
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "models/tiny-lm", local_files_only=True)


def session_in(workspace: Path, architecture: str = "llama", **options: object):
    session = make_session(architecture, tokenizer=tokenizer(), **options)
    session.workspace = workspace
    return session


def opened(folder: Path, architecture: str = "llama", *, bits: int | None = None, **options: object):
    """Export a tiny session into `folder`; return the session and the opened artefact."""
    folder.mkdir(exist_ok=True)
    session = session_in(folder, architecture, **options)
    if bits:
        weight_onnx.execute(session, bits=bits)
    engine.export(session, folder)
    return session, engine.open_artefact(folder, {"threads": 1})


def expected(session, tokens) -> numpy.ndarray:
    with torch.inference_mode():
        return torch.log_softmax(session.model(torch.tensor([tokens])).logits[0].float(), -1).numpy()


def apart(session, found) -> float:
    reference = expected(session, TOKENS[0])
    return float((numpy.exp(reference) * (reference - found)).sum(axis=1).mean())  # KL divergence


@pytest.mark.parametrize(
    ("architecture", "changes", "tolerance"),
    [
        *((name, {}, {"gemma": 5e-3, "phi": 5e-3, "nemotron": 0.1}.get(name, 1e-4)) for name in engine.ARCHITECTURES),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, 1e-4),
        ("llama", {"head_dim": 64, "num_key_value_heads": 8}, 1e-4),
        ("llama", {"rope_parameters": LLAMA3}, 1e-4),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 1e-4),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, 1e-4),
    ],
)
def test_float32_scores_and_choices_are_those_of_transformers(tmp_path, architecture, changes, tolerance) -> None:
    if architecture == "mistral":
        changes = {"sliding_window": None}
    session, running = opened(tmp_path, architecture, **changes)
    found, tokens = running.log_probs(TOKENS[0]), running.generate(TOKENS[:1], 40).tokens[0]
    assert len(running.generate([TOKENS[0][:3]], 4).tokens[0]) == 4  # shorter than any window
    running.close()
    assert engine.accepts(session.facts) is None
    assert numpy.abs(found - expected(session, TOKENS[0])).max() <= tolerance
    rows = expected(session, [*TOKENS[0], *tokens])[47:-1]  # each token is the first choice after those before it
    assert (rows.max(axis=1) - rows[numpy.arange(40), tokens]).max() <= 2 * tolerance


@pytest.mark.parametrize("tied", [False, True])
def test_fewer_bits_lose_more_and_take_what_was_foretold(tmp_path, tied) -> None:
    from cost_models.demand import demand_of
    from knowledge_base.types import Workload

    losses, stored = [], []
    for bits in (None, 8, 4):
        session, running = opened(tmp_path / str(bits), bits=bits, tie_word_embeddings=tied)
        losses.append(apart(session, running.log_probs(TOKENS[0])))
        stored.append((tmp_path / str(bits) / _onnx_running.DATA).stat().st_size)
        if bits:
            demand = demand_of(session.facts, Workload(prompt_tokens=8, output_tokens=8), "onnxruntime")
            after = weight_onnx.rewrite(demand, bits=bits)
            parts = (after.linear_bytes, after.embedding_bytes, after.head_stored_bytes, after.other_bytes)
            assert stored[-1] == pytest.approx(sum(parts), rel=0.001)
            assert running.memory()["weights_bytes"] == stored[-1]
        running.close()
    assert losses == sorted(losses) and losses[1] > 1e-5
    assert stored == sorted(stored, reverse=True)


def test_a_table_used_twice_is_in_memory_twice_in_float32(tmp_path) -> None:
    session, running = opened(tmp_path, tie_word_embeddings=True)
    table = session.model.lm_head.weight.numel() * 4
    assert running.memory()["weights_bytes"] == (tmp_path / _onnx_running.DATA).stat().st_size + table
    running.close()


def test_the_cache_is_exact(tmp_path) -> None:
    session, running = opened(tmp_path)
    running.generate(TOKENS, 10)
    assert running.memory()["kv_cache_bytes"] == 4 * (48 + 9) * session.facts.kv_values_per_token * 4
    running.close()


def test_weights_that_came_in_16_bits_are_stored_in_float32(tmp_path) -> None:
    session, running = opened(tmp_path, dtype="bfloat16")
    found = running.log_probs(TOKENS[0])
    running.close()
    exact = make_session()
    exact.model.load_state_dict(session.model.state_dict())
    assert numpy.abs(found - expected(exact, TOKENS[0])).max() <= 1e-4


def test_a_batch_gives_what_one_prompt_gives(tmp_path) -> None:
    _, running = opened(tmp_path)
    together = running.generate(TOKENS, 8)
    assert together.tokens == [running.generate([prompt], 8).tokens[0] for prompt in TOKENS]
    running.close()


def test_a_stream_gives_what_generate_gives_and_stops(tmp_path) -> None:
    _, running = opened(tmp_path)
    tokens = running.generate(TOKENS[:1], 12).tokens[0]
    assert list(running.stream(TOKENS[0], 12)) == tokens
    stop = tokens[3]
    assert list(running.stream(TOKENS[0], 12, stop={stop})) == tokens[: tokens.index(stop) + 1]
    assert running.context_tokens == 256
    with pytest.raises(BadInput, match="context of 256"):
        running.stream(TOKENS[0], 250)
    running.close()


def test_end_of_text_does_not_end_generation(tmp_path) -> None:
    session = session_in(tmp_path)
    with torch.no_grad():  # token 0, the end of text, is by far the likeliest after every token
        session.model.get_input_embeddings().weight.zero_()
        session.model.get_input_embeddings().weight[:, 0] = 1.0
        for layer in session.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        session.model.lm_head.weight.zero_()
        session.model.lm_head.weight[0, 0] = 5.0
        session.model.model.norm.weight.fill_(1.0)
    engine.export(session, tmp_path)
    running = engine.open_artefact(tmp_path, {})
    assert running.generate([[5, 6]], 6).tokens == [[0] * 6]
    running.close()


def test_long_texts_are_read_and_scored_in_parts(tmp_path, monkeypatch) -> None:
    _, running = opened(tmp_path)
    whole, tokens = running.log_probs(TOKENS[0]), running.generate(TOKENS, 8).tokens
    monkeypatch.setattr(_onnx_running, "LOGITS_BYTES", 4 * 300 * 7)  # seven rows at a time
    shapes = []
    everything = _onnx_running._Passes.all
    monkeypatch.setattr(
        _onnx_running._Passes, "all", lambda self, ids: shapes.append(ids.shape) or everything(self, ids)
    )
    assert numpy.abs(running.log_probs(TOKENS[0]) - whole).max() < 1e-4
    assert shapes == [(1, 7)] * 6 + [(1, 6)]
    shapes.clear()
    assert running.generate(TOKENS, 8).tokens == tokens
    assert shapes == [(4, 1)] * 8  # the prompt was read without a head
    running.close()


def test_pruned_shapes_run(tmp_path) -> None:
    from knowledge_base.techniques import drop_layers, prune_width

    session = session_in(tmp_path, num_hidden_layers=3)
    session.calibration = torch.tensor(TOKENS)
    prune_width.execute(session, keep=0.5)
    drop_layers.execute(session, count=1, by="loss")
    engine.export(session, tmp_path)
    running = engine.open_artefact(tmp_path, {})
    assert numpy.abs(running.log_probs(TOKENS[0]) - expected(session, TOKENS[0])).max() <= 1e-4
    running.close()


def test_onnx_runtime_genai_reads_the_folder(tmp_path) -> None:
    import onnxruntime_genai

    _, running = opened(tmp_path, bits=4)
    ours = running.generate(TOKENS[:1], 8).tokens[0]
    running.close()
    model = onnxruntime_genai.Model(str(tmp_path))
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=48 + 8, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(numpy.asarray(TOKENS[:1], numpy.int32))
    theirs = []
    while not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours[: len(theirs)] and theirs


def test_building_leaves_nothing_behind(tmp_path) -> None:
    session = session_in(tmp_path)
    out = tmp_path / "artefact"
    before = (list(sys.path), list(logging.getLogger().handlers), logging.getLogger().level)
    sys.modules.pop("onnxruntime_genai.models", None)  # as if it were imported for the first time
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(said):
        engine.export(session, out)
    assert said.getvalue() == ""
    assert before == (list(sys.path), list(logging.getLogger().handlers), logging.getLogger().level)
    assert list(tmp_path.iterdir()) == [out]
    names = {"genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in out.iterdir()} == names
    graph = (out / _onnx_running.FILE).read_bytes()
    assert str(tmp_path).encode() not in graph and b"0.18.0+" not in graph  # no commit of whoever builds


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "positions of type `linear`"),
        ("qwen2", {"rope_parameters": LLAMA3}, "positions of type `llama3` for `qwen2`"),
        ("mistral", {"sliding_window": 32}, "the window of 32 tokens"),
        ("olmo", {}, "computes something else than the model"),
        ("gpt2", {}, "the model builder of ONNX Runtime GenAI failed"),
        ("llama", {"head_dim": 24}, "the graph does not run: .*head_size"),
    ],
)  # fmt: skip
def test_models_the_builder_gets_wrong_are_refused(tmp_path, architecture, changes, words) -> None:
    with pytest.raises(CandidateFailed, match=words) as caught:
        engine.export(session_in(tmp_path, architecture, **changes), tmp_path / "out")
    assert caught.value.kind == "unsupported"


def test_what_has_no_place_in_the_graph_is_refused(tmp_path) -> None:
    from knowledge_base.techniques import weight_dtype, weight_int8

    session = session_in(tmp_path)
    session.storage["gguf_type"] = "q4_k"
    with pytest.raises(CandidateFailed, match="no storage choice `gguf_type`"):
        engine.export(session, tmp_path)
    packed = session_in(tmp_path)
    weight_int8.execute(packed)
    with pytest.raises(CandidateFailed, match="layers are packed"):
        engine.export(packed, tmp_path)
    halved = session_in(tmp_path)
    weight_dtype.execute(halved, dtype="bfloat16")
    with pytest.raises(CandidateFailed, match="the steps made the weights bfloat16"):
        engine.export(halved, tmp_path)
    silent = session_in(tmp_path)
    silent.tokenizer = None
    with pytest.raises(CandidateFailed, match="needs the tokenizer's files"):
        engine.export(silent, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gpt2"}, "architecture `gpt2` has no ONNX graph here"),
        ({"experts": 4}, "mixtures of experts"),
        ({"weight_dtype": "int8"}, "weights are stored as int8"),
        ({"head_size": 24}, "heads of 24 numbers"),
        ({"architecture": "mistral", "sliding_window_tokens": 64}, "beyond its window of 64 tokens"),
    ],
)
def test_facts_that_are_refused_before_anything_is_built(changes, words) -> None:
    assert words in engine.accepts(replace(make_session().facts, **changes))


@pytest.mark.parametrize("part", ["empty", "foreign", "half", "not ours", "no weights", "short weights"])
def test_damaged_files_are_load_errors(tmp_path, part) -> None:
    import onnx

    session = session_in(tmp_path)
    engine.export(session, tmp_path)
    graph, weights = tmp_path / _onnx_running.FILE, tmp_path / _onnx_running.DATA
    if part == "not ours":
        foreign = onnx.load(graph, load_external_data=False)
        del foreign.metadata_props[:]
        onnx.save(foreign, graph)
    elif part == "no weights":
        weights.unlink()
    elif part == "short weights":
        weights.write_bytes(weights.read_bytes()[:-4096])
    else:
        data = graph.read_bytes()
        graph.write_bytes({"empty": b"", "foreign": b"PK\x03\x04" * 50, "half": data[: len(data) // 2]}[part])
    with pytest.raises(CandidateFailed) as caught:
        engine.open_artefact(tmp_path, {})
    assert caught.value.kind == "load_error"
    assert "\n" not in caught.value.message


def test_refuses_tokens_beyond_the_vocabulary_and_the_context(tmp_path) -> None:
    _, running = opened(tmp_path)
    for tokens, words in (([[300]], "token 300"), ([[-1]], "token -1"), ([[1] * 250], "context of 256")):
        with pytest.raises(BadInput, match=words):
            running.generate(tokens, 10)
    running.close()


def test_threads_are_those_asked_for(tmp_path) -> None:
    _, running = opened(tmp_path)
    assert running._session.get_session_options().intra_op_num_threads == 1
    running.close()
    running = engine.open_artefact(tmp_path, {"threads": 2})
    assert running._session.get_session_options().intra_op_num_threads == 2
    running.close()


def test_opening_needs_no_torch(tmp_path) -> None:
    _, running = opened(tmp_path, bits=4)
    running.close()
    code = (
        "import sys; from pathlib import Path; from knowledge_base.engines import onnxruntime as engine;"
        "from knowledge_base.techniques import weight_onnx;"
        "assert engine.find() is None; engine.versions(); asked = 'numpy' in sys.modules;"
        f"running = engine.open_artefact(Path({str(tmp_path)!r}), {{}}); running.generate([[1, 2]], 2);"
        "print(asked, [m for m in ('torch', 'transformers', 'onnx', 'onnxruntime_genai') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False []"


def test_a_missing_package_is_told_with_the_command(monkeypatch) -> None:
    import importlib.util

    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx_ir" else known(name))
    assert engine.find() == 'onnx_ir not installed; pip install "leanplan[onnxruntime]"'


def test_builder_options_are_known_for_every_setting_of_the_technique() -> None:
    assert set(_onnx_writer._PRECISIONS) == {None, *weight_onnx.TECHNIQUE.knobs["bits"].options}
    assert _onnx_writer.GROUP == weight_onnx.GROUP


def test_rows_that_make_an_odd_number_of_blocks_are_refused_before_anything_is_built():
    """9 x 32 inputs: the builder packs the 4-bit zero points of two blocks into a byte, and of nine it cannot."""
    model = replace(TOY_MODEL, hidden_size=288, heads=9)
    for bits, refused in ((4, True), (8, False)):
        why = weight_onnx.legal({"bits": bits}, model, TOY_WORKLOAD, TOY_MACHINE)
        assert (why is not None and "288" in why) == refused
    assert weight_onnx.legal({"bits": 4}, TOY_MODEL, TOY_WORKLOAD, TOY_MACHINE) is None


def test_a_matrix_as_wide_as_the_vocabulary_is_told_before_the_builder_takes_it_for_the_head(tmp_path) -> None:
    session = session_in(tmp_path, vocab_size=512)
    with pytest.raises(CandidateFailed, match="gate_proj for the head: it is as wide as the vocabulary, 512"):
        engine.export(session, tmp_path / "artefact")
