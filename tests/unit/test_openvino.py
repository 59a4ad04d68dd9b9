"""The OpenVINO engine beyond the laws of tests/conformance/test_engines.py: architectures, storage, memory, faults."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from gguf_sessions import make_session
from served import Numbers
from served import told as served

from knowledge_base.engines import openvino as engine
from knowledge_base.engines._running import Sampling
from knowledge_base.engines._serving import LENGTH, STOP, OneByOneOnly
from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.techniques._kinds import other_sizes
from knowledge_base.techniques.weight_openvino import group_bits, row_bits
from planner.serving import Settings

if why := engine.find():
    pytest.skip(why, allow_module_level=True)

from knowledge_base.engines import _openvino_graph

ROOT = Path(__file__).resolve().parents[2]
TOKENS = numpy.random.default_rng(0).integers(1, 300, size=(4, 48)).tolist()
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def session_of(architecture: str = "llama", *, storage: dict | None = None, **options: object):
    session = make_session(architecture, **options)
    session.storage = {"openvino": storage} if storage else {}
    return session


def opened(folder: Path, session, runtime: dict | None = None):
    """Export a session into `folder` and open it on one thread."""
    engine.export(session, folder)
    return engine.open_artefact(folder, {"threads": 1, **(runtime or {})})


def expected(session, tokens) -> numpy.ndarray:
    with torch.inference_mode():
        return torch.log_softmax(session.model(torch.tensor([tokens])).logits[0].float(), -1).numpy()


def lost(session, running) -> float:
    """Return the mean Kullback-Leibler divergence of what is opened from the session's model, in nats."""
    now, then = expected(session, TOKENS[0]), running.log_probs(TOKENS[0])
    return float((numpy.exp(now) * (now - then)).sum(-1).mean())


def test_architectures_are_those_with_a_graph():
    assert set(engine.ARCHITECTURES) == set(_openvino_graph._WRITERS)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 64, "num_key_value_heads": 8}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": YARN}),  # scales cosine and sine too
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"rms_norm_eps": 1e-5}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu_pytorch_tanh"}),
    ],
    ids=str,
)
def test_float32_scores_and_steps_are_those_of_transformers(tmp_path, architecture, changes):
    session = session_of(architecture, **changes)
    running = opened(tmp_path, session)
    assert numpy.abs(running.log_probs(TOKENS[0]) - expected(session, TOKENS[0])).max() < 1e-4
    made = running.generate(TOKENS, 24).tokens
    for prompt, tokens in zip(TOKENS, made, strict=True):  # token by token through the cache, past any window
        rows = expected(session, [*prompt, *tokens])[len(prompt) - 1 : -1]
        assert (rows.max(1) - rows[numpy.arange(24), tokens]).max() < 1e-4


def test_a_long_text_is_scored_in_pieces_as_at_once(tmp_path, monkeypatch):
    from knowledge_base.engines import _openvino_running

    running = opened(tmp_path, session_of())
    whole = running.log_probs(TOKENS[0])
    monkeypatch.setattr(_openvino_running, "LOGITS_BYTES", 7 * 4 * 300)
    assert numpy.abs(running.log_probs(TOKENS[0]) - whole).max() < 1e-5


@pytest.mark.parametrize(
    ("architecture", "dtype", "size", "slack"),
    [("llama", "float32", 4, 1e-4), ("llama", "bfloat16", 2, 0.2), ("gpt2", "bfloat16", 2, 0.2), ("llama", "float16", 2, 5e-3)],
)  # fmt: skip
def test_weights_are_stored_in_the_model_s_own_dtype(tmp_path, architecture, dtype, size, slack):
    session = session_of(architecture, dtype=dtype)
    running = opened(tmp_path, session)
    params = sum(p.numel() for p in session.model.parameters())
    assert (tmp_path / "openvino_model.bin").stat().st_size == pytest.approx(params * size, rel=0.002)
    session.model.float()
    assert numpy.abs(running.log_probs(TOKENS[0]) - expected(session, TOKENS[0])).max() < slack
    widened = running.precision == "f32" and size == 2  # float16 on most processors
    assert running.memory()["weights_bytes"] == pytest.approx(params * size * (1.9 if widened else 1), rel=0.06)


def test_tied_tables_are_stored_once(tmp_path):
    sizes = []
    for tied in (True, False):
        folder = tmp_path / str(tied)
        running = opened(folder, session_of(tie_word_embeddings=tied, vocab_size=4096))
        sizes.append((running.memory()["weights_bytes"], (folder / "openvino_model.bin").stat().st_size))
    assert [b - a for a, b in zip(*sizes, strict=True)] == [4 * 4096 * 256] * 2


def rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Return weights (rows, row) as nearest multiples of each group's scale, its range in 2^bits - 1 steps."""
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero).mul(scale).flatten(1)


def is_table(name: str) -> bool:
    return any(word in name for word in ("embed_tokens", "lm_head", "wte"))


@pytest.mark.parametrize(
    ("architecture", "changes", "bits", "group_size"),
    [("llama", {}, 8, 128), ("llama", {}, 4, 32), ("gpt2", {}, 4, 128), ("llama", {"intermediate_size": 96}, 4, 128)],
    ids=["8", "4/32", "gpt2 4/128", "groups of 128 in rows of 96"],
)
def test_fewer_bits_are_those_of_rounding_to_nearest(tmp_path, architecture, changes, bits, group_size):
    session = session_of(architecture, storage={"bits": bits, "group_size": group_size}, **changes)
    running = opened(tmp_path, session)
    before, claimed = lost(session, running), 0.0
    for name, parameter in session.model.named_parameters():
        if parameter.dim() == 1 or "wpe" in name:
            claimed += 4 * parameter.numel()
            continue
        turned = "c_" in name  # GPT-2 stores its matrices the other way round
        matrix = parameter.T if turned else parameter
        row = matrix.shape[1]
        group = row if bits == 8 or is_table(name) else group_size if row % group_size == 0 else 32
        claimed += matrix.numel() * (row_bits(row) if group == row else group_bits(group)) / 8
        value = rounded(matrix, 8 if group == row else bits, group)
        parameter.copy_(value.T if turned else value)
    assert (tmp_path / "openvino_model.bin").stat().st_size == pytest.approx(claimed, rel=0.01)
    assert running.memory()["weights_bytes"] == pytest.approx(claimed, rel=0.01)
    after = lost(session, running)  # activations are rounded to 8 bits where the processor multiplies integers
    assert after < 0.01
    assert after < before / 10 or bits == 8


def test_layers_may_differ_in_size(tmp_path):
    session = session_of()
    layer = session.model.model.layers[0]
    for module, rows in ((layer.mlp.gate_proj, 160), (layer.mlp.up_proj, 160)):
        module.weight = torch.nn.Parameter(module.weight[:rows].clone(), requires_grad=False)
        other_sizes(module)
    layer.mlp.down_proj.weight = torch.nn.Parameter(layer.mlp.down_proj.weight[:, :160].clone(), requires_grad=False)
    other_sizes(layer.mlp.down_proj)
    attention = layer.self_attn  # two of the four key heads, four of the eight query heads
    for module, rows in ((attention.q_proj, 128), (attention.k_proj, 64), (attention.v_proj, 64)):
        module.weight = torch.nn.Parameter(module.weight[:rows].clone(), requires_grad=False)
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :128].clone(), requires_grad=False)
    running = opened(tmp_path, session)
    assert numpy.abs(running.log_probs(TOKENS[0]) - expected(session, TOKENS[0])).max() < 1e-4
    running.generate([TOKENS[0]], 2)
    assert running.memory()["kv_cache_bytes"] == 4 * 2 * 32 * (2 + 4) * 49


def test_a_factorised_matrix_is_two_products(tmp_path):
    from knowledge_base.techniques._low_rank_module import LowRankLinear

    session = session_of()
    factors = LowRankLinear(256, 512, False, torch.float32, rank=16)
    session.model.model.layers[1].mlp.up_proj = factors.requires_grad_(False)
    running = opened(tmp_path, session)
    assert numpy.abs(running.log_probs(TOKENS[0]) - expected(session, TOKENS[0])).max() < 1e-4
    assert (tmp_path / "openvino_model.bin").stat().st_size == pytest.approx(
        4 * sum(p.numel() for p in session.model.parameters()), rel=0.002
    )


@pytest.mark.parametrize(("bits", "size"), [(None, 4 * 32), (8, 32 + 8), (4, 16 + 8)])
def test_the_cache_is_counted_by_its_states(tmp_path, bits, size):
    session = session_of()
    running = opened(tmp_path, session, {"kv_bits": bits} if bits else {})
    running.generate(TOKENS[:2], 5)
    states = [state.state.shape for state in running._request.query_state()]
    assert states == [[2, 4, 48 + 4, 32]] * 4
    assert running.memory()["kv_cache_bytes"] == sum(b * heads * cells * size for b, heads, cells, _ in states)


def test_fewer_bits_in_the_cache_lose_more(tmp_path):
    session = session_of()
    engine.export(session, tmp_path)
    losses = [
        lost(session, engine.open_artefact(tmp_path, runtime)) for runtime in ({}, {"kv_bits": 8}, {"kv_bits": 4})
    ]
    assert losses[0] < 1e-6 < losses[1] < losses[2] / 10 < 0.1


def test_streams_what_it_generates_and_stops(tmp_path):
    running = opened(tmp_path, session_of())
    whole = running.generate([TOKENS[0]], 12).tokens[0]
    assert list(running.stream(TOKENS[0], 12)) == whole
    assert list(running.stream(TOKENS[0], 12, stop=[whole[3]])) == whole[: whole.index(whole[3]) + 1]
    drawn = [list(running.stream(TOKENS[0], 12, sampling=Sampling(temperature=1.5, seed=s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(BadInput, match="exceed"):
        running.stream(TOKENS[0], 250)
    assert running.context_tokens == 256


def test_opening_needs_no_torch_and_tells_nobody(tmp_path):
    """Neither torch nor telemetry is loaded, and importing starts no thread: the fork server forks after it."""
    engine.export(session_of(), tmp_path)
    code = f"""
import os, sys
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from knowledge_base.engines import _openvino_running, openvino
from pathlib import Path
threads = len(os.listdir("/proc/self/task"))
made = openvino.open_artefact(Path({str(tmp_path)!r}), {{"threads": 1}}).generate([[5, 6, 7]], 4)
print(threads, len(made.tokens[0]), "torch" in sys.modules, sys.modules["openvino_telemetry"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "4", "False", "None"]


def test_openvino_genai_reads_the_artefact(tmp_path):
    if importlib.util.find_spec("openvino_genai") is None:
        pytest.skip("openvino_genai not installed")
    session = session_of()
    ours = opened(tmp_path, session).generate([TOKENS[0]], 12).tokens[0]
    code = f"""
import json, numpy
from knowledge_base.engines._openvino_library import openvino
library = openvino()
import openvino_genai
prompt = numpy.array([{TOKENS[0]}])
config = openvino_genai.GenerationConfig(max_new_tokens=12, ignore_eos=True, eos_token_id=0, do_sample=False)
inputs = openvino_genai.TokenizedInputs(library.Tensor(prompt), library.Tensor(numpy.ones_like(prompt)))
exact = {{"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}}
pipeline = openvino_genai.LLMPipeline({str(tmp_path)!r}, openvino_genai.Tokenizer({str(ROOT / "none")!r}), "CPU", **exact)
print(json.dumps(pipeline.generate(inputs, config).tokens[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert json.loads(done.stdout.splitlines()[-1]) == ours


# ---------------------------------------------------------------- its server


def server_of(folder: Path, *end: int, context_tokens: int = 256, **runtime: object):
    pytest.importorskip("openvino_genai")
    return engine.open_server(folder, {"threads": 1, "batch": 2, **runtime}, context_tokens, Numbers(*end))


def pruned(session):
    """Take key heads from one layer and neurons from another, so that no two layers are alike."""
    first, second = session.model.model.layers[:2]
    for module, rows in ((first.self_attn.q_proj, 128), (first.self_attn.k_proj, 64), (first.self_attn.v_proj, 64)):
        module.weight = torch.nn.Parameter(module.weight[:rows].clone(), requires_grad=False)
    first.self_attn.o_proj.weight = torch.nn.Parameter(
        first.self_attn.o_proj.weight[:, :128].clone(), requires_grad=False
    )
    for module in (second.mlp.gate_proj, second.mlp.up_proj):
        module.weight = torch.nn.Parameter(module.weight[:160].clone(), requires_grad=False)
        other_sizes(module)
    second.mlp.down_proj.weight = torch.nn.Parameter(second.mlp.down_proj.weight[:, :160].clone(), requires_grad=False)
    other_sizes(second.mlp.down_proj)


def factorised(session):
    from knowledge_base.techniques._low_rank_module import LowRankLinear

    factors = LowRankLinear(256, 512, False, torch.float32, rank=16)
    session.model.model.layers[1].mlp.up_proj = factors.requires_grad_(False)


@pytest.mark.parametrize(
    ("architecture", "changes", "storage", "edit"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, None, None),
        ("llama", {"head_dim": 64, "num_key_value_heads": 8}, None, None),
        ("llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}, None, None),
        ("llama", {"rope_parameters": YARN}, None, None),
        ("llama", {}, None, pruned),
        ("llama", {}, None, factorised),
        ("llama", {}, {"bits": 8, "group_size": 128}, None),
        ("llama", {}, {"bits": 4, "group_size": 32}, None),
        ("mistral", {"sliding_window": None}, None, None),
        ("mistral", {"sliding_window": 100}, None, None),  # further than this service reaches
        ("qwen2", {}, None, None),
        ("qwen3", {}, None, None),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None, None),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)
def test_paged_attention_generates_what_the_graph_does(tmp_path, architecture, changes, storage, edit):
    """OpenVINO GenAI rewrites the graph's attention; what it has no word for it leaves out and says nothing."""
    session = session_of(architecture, storage=storage, **changes)
    if edit:
        edit(session)
    running = opened(tmp_path, session)
    server = server_of(tmp_path, context_tokens=72)
    for prompt in TOKENS[:2]:
        assert served(server, prompt, ignore_eos=True) == (running.generate([prompt], 24).tokens[0], 24, LENGTH)
    server.close()


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_layers_with_a_window_are_served_one_by_one(tmp_path, architecture):
    windowed = {"use_sliding_window": True, "max_window_layers": 1} if architecture == "qwen2" else {}
    engine.export(session_of(architecture, sliding_window=16, **windowed), tmp_path)
    with pytest.raises(OneByOneOnly, match="only the last 16 tokens"):
        server_of(tmp_path)


def test_without_openvino_genai_requests_are_served_one_by_one(tmp_path, monkeypatch):
    from planner.serving.one_by_one import OneByOne
    from planner.serving.operations import _opened

    session = session_of()
    whole = opened(tmp_path, session).generate([TOKENS[0]], 8).tokens[0]
    monkeypatch.setattr(engine, "SERVES", "openvino_genai_that_is_not_there")
    settings = Settings(context_tokens=128)
    server, why = _opened(engine, tmp_path, {"threads": 1, "batch": 2}, Numbers(), settings)
    assert isinstance(server, OneByOne) and server.slots == 1
    assert why == 'openvino_genai_that_is_not_there not installed; pip install "leanplan[openvino]"'
    assert served(server, TOKENS[0], 8) == (whole, 8, LENGTH)
    server.close()
    for asked in ({"prefix_cache": True}, {"prefill_chunk": 16}):
        with pytest.raises(CandidateFailed, match=f"one after another .* leaves `{next(iter(asked))}` out") as failed:
            _opened(engine, tmp_path, asked, Numbers(), settings)
        assert failed.value.kind == "unsupported"


def test_an_answer_ends_at_an_end_of_text_token(tmp_path):
    whole = opened(tmp_path, session_of()).generate([TOKENS[0]], 12).tokens[0]
    end = whole[5]
    server = server_of(tmp_path, end, 299)
    first = whole.index(end)
    assert served(server, TOKENS[0], 12) == (whole[:first], first + 1, STOP)
    assert served(server, TOKENS[0], 12, ignore_eos=True) == (whole, 12, LENGTH)
    server.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_cache_loses_as_much_in_pages(tmp_path, bits):
    """The mean surprise at what plain float32 says next, of answers with the cache in pages and in a row."""
    session = session_of()
    running = opened(tmp_path, session, {"kv_bits": bits})
    server = server_of(tmp_path, kv_bits=bits)
    lost = []
    for make in (lambda p: running.generate([p], 24).tokens[0], lambda p: served(server, p, ignore_eos=True)[0]):
        short = []
        for prompt in TOKENS:
            tokens = make(prompt)
            rows = expected(session, [*prompt, *tokens])[len(prompt) - 1 : -1]
            short += list(rows.max(1) - rows[numpy.arange(24), tokens])
        lost.append(numpy.mean(short))
    server.close()
    assert lost[1] <= 2 * lost[0] + 1e-3


def test_the_cache_has_room_for_all_slots_and_no_more(tmp_path):
    engine.export(session_of(), tmp_path)
    server = server_of(tmp_path, context_tokens=100, batch=3)
    served(server, TOKENS[0], 2)
    assert server._engine._pipeline.get_metrics().kv_cache_size_in_bytes == 3 * 128 * 4 * 4 * 32 * 4  # four pages each
    server.close()


def test_a_kept_beginning_is_not_computed_again(tmp_path, monkeypatch):
    pytest.importorskip("openvino_genai")
    from knowledge_base.engines._openvino_server import _Pipeline

    steps, plain = [], _Pipeline.step
    monkeypatch.setattr(_Pipeline, "step", lambda self: steps.append(1) or plain(self))
    engine.export(session_of(), tmp_path)
    taken = []
    for runtime in ({}, {"prefix_cache": True}):
        server = server_of(tmp_path, prefill_chunk=16, **runtime)
        for number in (1, 2):
            steps.clear()
            served(server, [*TOKENS[0], *TOKENS[1], *TOKENS[2], number], 1, ignore_eos=True)
        taken.append(len(steps))
        server.close()
    assert taken == [10, 2]  # 145 tokens in pieces of 16; 128 of them are in four whole pages


def test_serving_needs_no_torch_and_no_tokenizer_files(tmp_path):
    pytest.importorskip("openvino_genai")
    engine.export(session_of(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "max_new_tokens": 1}')
    code = f"""
import sys
from knowledge_base.engines import openvino
from knowledge_base.engines._serving import Wanted
from pathlib import Path
class Texts:
    end = frozenset()
    def reading(self): return str
server = openvino.open_server(Path({str(tmp_path)!r}), {{"threads": 1}}, 64, Texts())
print(server.answer(Wanted(prompt=(5, 6, 7), new_tokens=4), lambda piece: True))
server.close()
print("torch" in sys.modules, sys.modules["openvino_telemetry"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["length", "False", "None"]
    assert done.stderr == ""


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation `gelu`"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "`dynamic`"),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "partial_rotary_factor": 0.5,
                }
            },
            "16 of 32",
        ),
        ("gpt2", {"activation_function": "relu"}, "activation `relu`"),
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}, "architecture `mixtral`"),
    ],
)
def test_refuses_structures_without_a_graph(tmp_path, architecture, changes, words):
    with pytest.raises(CandidateFailed, match=words) as failed:
        engine.export(session_of(architecture, **changes), tmp_path)
    assert failed.value.kind == "unsupported"


def test_refuses_packed_modules_and_other_engines_storage(tmp_path):
    from knowledge_base.techniques._packed import pack_all

    session = session_of()
    session.storage = {"gguf_type": "q8_0"}
    with pytest.raises(CandidateFailed, match="`gguf_type`"):
        engine.export(session, tmp_path)
    session.storage = {}
    pack_all(session, "weight_int8", "int8")
    with pytest.raises(CandidateFailed, match="Int8Linear"):
        engine.export(session, tmp_path)


@pytest.mark.parametrize("name", ["openvino_model.xml", "openvino_model.bin"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_refuses_damaged_files(tmp_path, name, damage):
    engine.export(session_of(), tmp_path)
    file = tmp_path / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"\x00garbage<" * 9}[damage])
    with pytest.raises(CandidateFailed) as failed:
        engine.open_artefact(tmp_path, {})
    assert failed.value.kind == "load_error"
    assert "\n" not in failed.value.message


def test_refuses_a_graph_of_another_maker(tmp_path):
    from knowledge_base.engines._openvino_library import openvino

    library = openvino()
    number = library.opset15.parameter([1], library.Type.f32)
    library.save_model(library.Model([library.opset15.relu(number)], [number]), tmp_path / "openvino_model.xml")
    (tmp_path / "openvino_model.bin").touch()
    with pytest.raises(CandidateFailed, match="cannot be loaded") as failed:
        engine.open_artefact(tmp_path, {})
    assert failed.value.kind == "load_error"
