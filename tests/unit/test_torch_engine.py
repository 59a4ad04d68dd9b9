"""The torch engine on several architectures, its quantised cache, drafts and artefacts, and the model loader."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from knowledge_base.engines import _torch_artefact, _torch_cache
from knowledge_base.engines import transformers as engine
from knowledge_base.engines._torch_drafting import PromptLookup
from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.registry import techniques
from knowledge_base.techniques import _kinds, _packed
from knowledge_base.techniques._loading import load_session
from knowledge_base.techniques._low_rank_module import LowRankLinear
from knowledge_base.types import Session

LLAMA = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    ),
    "mistral window": lambda: transformers.MistralConfig(**LLAMA, sliding_window=16),
    "qwen2 mixed": lambda: transformers.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2, bos_token_id=0, eos_token_id=0
    ),
}
ATTENTION = [name for name in CONFIGS if name != "mamba"]
PROMPT_TOKENS, NEW_TOKENS = 30, 24  # beyond the window of 16


def make(name: str):
    """Return a small random model, sharpened so that its first choices are no near-ties."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(2.0 if name == "mamba" else 8.0)
    model.generation_config.eos_token_id = None  # or generate() stops there
    return model


def session_of(model, folder: Path) -> Session:
    return Session(model=model, tokenizer=None, facts=None, calibration=None, seed=0, workspace=folder)


def facts(dtype: str = "float32"):
    return SimpleNamespace(name="tiny", weight_dtype=dtype)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each architecture's model and artefact, made once when first asked for."""
    cache = {}

    def get(name: str):
        if name not in cache:
            folder = tmp_path_factory.mktemp("artefact")
            model = make(name)
            engine.export(session_of(model, folder), folder)
            cache[name] = (model, folder)
        return cache[name]

    return get


@pytest.fixture(scope="module")
def prompts():
    return numpy.random.default_rng(0).integers(1, 128, size=(3, PROMPT_TOKENS)).tolist()


def generate_plainly(model, prompts, new_tokens):
    ids = torch.tensor(prompts)
    settings = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, ids.shape[1] :].tolist()


# ---------------------------------------------------------------- generating


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_transformers_generate(made, prompts, name):
    model, folder = made(name)
    running = engine.open_artefact(folder, {})
    assert running.generate(prompts, NEW_TOKENS).tokens == generate_plainly(model, prompts, NEW_TOKENS)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor(prompts[:1])).logits[0], dim=-1).numpy()
    assert numpy.abs(running.log_probs(prompts[0]) - expected).max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_is_exact(made, prompts, name):
    model, folder = made(name)
    running = engine.open_artefact(folder, {})
    assert running.memory()["kv_cache_bytes"] == 0
    running.generate(prompts[:1], NEW_TOKENS)
    in_file = sum(t.nbytes for t in load_file(folder / "model.safetensors").values())
    not_in_file = sum(b.nbytes for n, b in model.named_buffers() if n not in model.state_dict())
    assert running.memory()["weights_bytes"] == in_file + not_in_file
    cells = PROMPT_TOKENS + NEW_TOKENS - 1
    kv_bytes = {
        "llama": 2 * 2 * 16 * 4 * cells,  # layers x (keys, values) x channels x float32 x tokens
        "gpt2": 2 * 2 * 32 * 4 * cells,
        "mixtral": 2 * 2 * 16 * 4 * cells,
        "mistral window": 2 * 2 * 16 * 4 * 16,
        "qwen2 mixed": 2 * 16 * 4 * (cells + 16),
        "mamba": 2 * 64 * (4 + 8) * 4,  # layers x inner channels x (convolution, state): does not grow
    }
    assert running.memory()["kv_cache_bytes"] == kv_bytes[name]


def test_eos_does_not_stop_generation(tmp_path, prompts):
    model = make("llama")
    first = generate_plainly(model, prompts[:1], 1)[0][0]
    model.config.eos_token_id = first
    engine.export(session_of(model, tmp_path), tmp_path)
    made = engine.open_artefact(tmp_path, {}).generate(prompts[:1], 8)
    assert made.tokens[0][0] == first
    assert len(made.tokens[0]) == 8


@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("name", ATTENTION)
def test_prompt_lookup_changes_steps_but_no_token(made, prompts, name, tokens):
    _, folder = made(name)
    plain, lookup = engine.open_artefact(folder, {}), engine.open_artefact(folder, {"lookup_tokens": tokens})
    saved = 0
    for prompt in (*prompts, prompts[0][:10] * 3, [5, 6, 7] * 10):
        expected, found = plain.generate([prompt], 40), lookup.generate([prompt], 40)
        assert found.tokens == expected.tokens
        assert math.ceil(39 / (tokens + 1)) <= found.steps <= expected.steps == 39
        assert lookup.memory()["kv_cache_bytes"] <= plain.memory()["kv_cache_bytes"] * (1 + tokens / 10)
        saved += expected.steps - found.steps
    if name == "llama":
        assert saved > 0  # some draft was right, or this test compares nothing


def test_prompt_lookup_takes_a_repetition_in_few_steps(made):
    """A model that continues a cycle accepts whole drafts: the bound ceil((n - 1) / (draft + 1)) is reached."""
    _, folder = made("llama")
    plain = engine.open_artefact(folder, {})
    tokens = plain.generate([[5, 6, 7] * 10], 96).tokens[0]
    cycle = next((n for n in range(1, 30) if tokens[-2 * n :][:n] == tokens[-n:]), None)
    assert cycle, "the tiny model no longer falls into a cycle: choose another seed"
    prompt = ([5, 6, 7] * 10 + tokens)[-100:]
    found = engine.open_artefact(folder, {"lookup_tokens": 4}).generate([prompt], 21)
    assert found.tokens == plain.generate([prompt], 21).tokens
    assert found.steps == 4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ATTENTION)
def test_quantised_cache_scores_what_it_decodes(made, prompts, name, bits):
    """One pass over prompt and output chooses the tokens that step-by-step decoding chose, drafts or not."""
    _, folder = made(name)
    running = engine.open_artefact(folder, {"kv_bits": bits})
    prompt, tokens = prompts[0], running.generate(prompts[:1], NEW_TOKENS).tokens[0]
    scored = running.log_probs([*prompt, *tokens]).argmax(axis=1)
    assert scored[len(prompt) - 1 : -1].tolist() == tokens
    with_drafts = engine.open_artefact(folder, {"kv_bits": bits, "lookup_tokens": 4})
    assert with_drafts.generate(prompts[:1], NEW_TOKENS).tokens == [tokens]
    assert with_drafts.memory() == running.memory()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("layers", "kv_heads", "head_size"), [(2, 2, 8), (1, 1, 32), (1, 2, 64), (1, 1, 80)])
def test_quantised_cache_has_the_bytes_the_technique_predicts(bits, layers, kv_heads, head_size):
    cache = _torch_cache.Cache(layers=[_torch_cache.QuantisedLayer(bits) for _ in range(layers)])
    for tokens in (5, 1, 1):
        for layer in range(layers):
            cache.update(*torch.randn(2, 1, kv_heads, tokens, head_size), layer)
    model = SimpleNamespace(head_size=head_size, kv_values_per_token=2 * layers * kv_heads * head_size)
    predicted = techniques.get("kv_cache_quantised").bytes_per_token(model, bits)
    assert _torch_cache.cache_bytes(cache) == 7 * predicted


def test_mamba_refuses_what_its_state_cannot_do(made):
    _, folder = made("mamba")
    for runtime in ({"kv_bits": 8}, {"lookup_tokens": 4}, {"compile": True}):
        with pytest.raises(CandidateFailed) as caught:
            engine.open_artefact(folder, runtime)
        assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    "runtime",
    [
        {"lookup_tokens": 4, "batch": 2},
        {"lookup_tokens": 4, "compile": True},
        {"kv_bits": 8, "compile": True},
        {"compile": False},
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(made, runtime):
    with pytest.raises(CandidateFailed) as caught:
        engine.open_artefact(made("llama")[1], runtime)
    assert caught.value.kind == "unsupported"


def test_threads_are_set_and_given_back(made):
    before = torch.get_num_threads()
    running = engine.open_artefact(made("llama")[1], {"threads": before + 1})
    assert torch.get_num_threads() == before + 1
    running.close()
    assert torch.get_num_threads() == before


def test_close_frees_every_weight(made, prompts):
    running = engine.open_artefact(made("llama")[1], {"kv_bits": 8})
    running.generate(prompts[:1], 4)
    weights = [weakref.ref(p) for p in running._model.parameters()]
    running.close()
    gc.collect()
    assert not any(weight() is not None for weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral window"])
def test_compiled_tokens_are_the_same_and_shapes_can_change(made, prompts, name):
    model, folder = made(name)
    running = engine.open_artefact(folder, {"compile": True})
    for batch, new_tokens in ((1, NEW_TOKENS), (1, NEW_TOKENS), (2, 8)):
        found = running.generate(prompts[:batch], new_tokens)
        assert found.tokens == generate_plainly(model, prompts[:batch], new_tokens)
    running.close()


# ---------------------------------------------------------------- cache and drafts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "levels"), [(8, 254), (4, 15)])
def test_quantising_is_off_by_at_most_half_a_step(dtype, bits, levels):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 64).mul(torch.logspace(-2, 2, 5)[:, None]).to(dtype)
    stored = _torch_cache.quantise(x, bits)
    found = _torch_cache.dequantise(stored, dtype)
    assert found.dtype == dtype
    groups = x.float().unflatten(-1, (-1, 32))
    width = 2 * groups.abs().amax(-1) if bits == 8 else groups.amax(-1) - groups.amin(-1)
    error = (found.float() - x.float()).unflatten(-1, (-1, 32)).abs().amax(-1)
    rounding = 2 * torch.finfo(dtype).eps * groups.abs().amax(-1)  # of scale, low and result
    half_step = width / levels / 2
    assert (error <= half_step * 1.02 + rounding + 2**-11 * width).all()
    assert sum(t.nbytes for t in stored) == 2 * 3 * 5 * (64 * bits // 8 + 2 * (2 if bits == 8 else 4))


def test_zeros_and_constants_survive_quantising():
    for x in (torch.zeros(1, 1, 2, 32), torch.full((1, 1, 2, 32), 3.0)):
        for bits in (8, 4):
            found = _torch_cache.dequantise(_torch_cache.quantise(x, bits), torch.float32)
            assert torch.allclose(found, x, rtol=5e-3)


def next_by_search(text: list[int], tokens: int, longest: int = 3, shortest: int = 2) -> list[int]:
    """The slow, obvious draft: search the text backwards for the last n tokens, longest n first."""
    for size in range(longest, shortest - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == text[-size:]:
                return (text[start + size :] * tokens)[:tokens]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_drafts_are_those_of_a_plain_search(seed):
    generator = numpy.random.default_rng(seed)
    text = generator.integers(0, 4, size=20).tolist()
    drafter = PromptLookup()
    drafter.begin(text)
    for _ in range(40):
        more = generator.integers(0, 4, size=int(generator.integers(1, 4))).tolist()
        drafter.append(more)
        text += more
        assert drafter.draft(5) == next_by_search(text, 5)
    assert drafter.draft(0) == []


def test_new_text_gives_no_draft():
    for text in ([1, 2, 3, 4], [1]):
        drafter = PromptLookup()
        drafter.begin(text)
        assert drafter.draft(4) == []


# ---------------------------------------------------------------- artefacts


@pytest.mark.parametrize("name", CONFIGS)
def test_dense_artefact_loads_in_plain_transformers(made, prompts, name):
    model, folder = made(name)
    assert not (folder / "structure.json").exists()
    loaded, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values())
    with torch.inference_mode():
        assert torch.equal(loaded(torch.tensor(prompts)).logits, model(torch.tensor(prompts)).logits)


def test_tied_weights_are_stored_and_held_once(made):
    _, folder = made("llama")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    loaded = _torch_artefact.load(folder, torch.device("cpu"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_head_untied_by_a_step_stays_untied(tmp_path, prompts):
    model = make("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0.5, requires_grad=False)
    engine.export(session_of(model, tmp_path), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor(prompts[:1])).logits[0], dim=-1).numpy()
    assert numpy.abs(engine.open_artefact(tmp_path, {}).log_probs(prompts[0]) - expected).max() < 1e-5


def test_replaced_modules_come_back(tmp_path, prompts):
    """Packed and factorised modules, one inside the other, in Linear and in Conv1D."""

    def sizes(name):
        module = model.get_submodule(name)
        return {"in_features": module.in_features, "out_features": module.out_features}

    for name, replaced in (("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")):
        folder = tmp_path / name
        model = make(name)
        assert _packed.pack(model, replaced, "int4", 32)
        down = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.0.mlp.c_proj"}[name]
        weight, bias = _packed.matrix_of(model.get_submodule(down)), model.get_submodule(down).bias
        low_rank = LowRankLinear.factorise(weight, bias, torch.eye(weight.shape[1]), rank=8)
        model.set_submodule(down, low_rank)
        assert _packed.pack(model, f"{down}.reduce", "int8")
        engine.export(session_of(model, folder), folder)
        structure = json.loads((folder / "structure.json").read_text())
        assert structure == {
            replaced: {"kind": "int4", **sizes(replaced), "group_size": 32},
            down: {"kind": "low_rank", **sizes(down), "rank": 8},
            f"{down}.reduce": {"kind": "int8", **sizes(f"{down}.reduce")},
        }
        running = engine.open_artefact(folder, {})
        with torch.inference_mode():
            expected = torch.log_softmax(model(torch.tensor(prompts[:1])).logits[0].float(), dim=-1).numpy()
        assert numpy.array_equal(running.log_probs(prompts[0]), expected)
        dense = sum(t.nbytes for t in make(name).state_dict().values())
        assert running.memory()["weights_bytes"] < dense


def test_shapes_config_does_not_describe_are_refused(tmp_path):
    model = make("llama")
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(
        CandidateFailed, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*found 48x32.*gives 64x32"
    ) as caught:
        engine.export(session_of(model, tmp_path), tmp_path)
    assert caught.value.kind == "unsupported"
    assert not (tmp_path / "model.safetensors").exists()


def test_another_engines_storage_is_refused(tmp_path):
    session = session_of(make("llama"), tmp_path)
    session.storage["gguf_type"] = "q4_k"
    with pytest.raises(CandidateFailed, match="gguf_type"):
        engine.export(session, tmp_path)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_a_load_error(made, tmp_path, fault):
    _, folder = made("llama")
    tensors = load_file(folder / "model.safetensors")
    if fault == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 31)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CandidateFailed, match="up_proj") as caught:
        engine.open_artefact(tmp_path, {})
    assert caught.value.kind == "load_error"


# ---------------------------------------------------------------- loading the model as it came


def load(folder: Path, **settings):
    return load_session(folder, facts(), calibration=None, seed=0, workspace=folder, **settings)


def test_loads_the_model_as_it_is(made, prompts, tmp_path):
    model, folder = made("llama")
    session = load(folder)
    assert session.tokenizer is None
    assert all(torch.equal(a, b) for a, b in zip(session.model.state_dict().values(), model.state_dict().values()))
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(Path(__file__).parents[2] / "models/tiny-lm").tokenizer is not None


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape", "nan", "truncated", "absent", "pickle"])
def test_a_broken_model_is_bad_input(made, tmp_path, fault):
    _, folder = made("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    said = name
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        said = "model.layers.7"
    elif fault == "shape":
        tensors[name] = torch.zeros(64, 31)
    elif fault == "nan":
        tensors[name][3, 4] = math.nan
        said = f"`{name}` has 1 non-finite value"
    else:
        said = "cannot be loaded"
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if fault == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    elif fault != "absent":
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if fault == "truncated":
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:-5])
    with pytest.raises(BadInput, match=said.replace(".", r"\.")):
        load(tmp_path)
    if fault == "pickle":
        assert load(tmp_path, allow_pickle=True).model is not None


def test_code_that_comes_with_a_model_is_refused(made, tmp_path):
    _, folder = made("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(BadInput):
        load(tmp_path)
    with pytest.raises(CandidateFailed):
        engine.open_artefact(tmp_path, {})
    assert not (tmp_path / "ran").exists()


def test_weights_of_another_format_are_unsupported(made, tmp_path):
    with pytest.raises(CandidateFailed, match="float8_e4m3fn"):
        load_session(made("llama")[1], facts("float8_e4m3fn"), calibration=None, seed=0, workspace=tmp_path)


# ---------------------------------------------------------------- what the engine says of itself


def test_accepts_by_architecture_and_dtype():
    known = SimpleNamespace(architecture="llama", weight_dtype="bfloat16")
    assert engine.accepts(known) is None
    for architecture in ("gpt2", "mistral", "qwen2", "mixtral", "mamba", "qwen3_moe"):
        assert engine.accepts(SimpleNamespace(architecture=architecture, weight_dtype="float32")) is None
    assert "`zzz` is unknown" in engine.accepts(SimpleNamespace(architecture="zzz", weight_dtype="float32"))
    assert "float8" in engine.accepts(SimpleNamespace(architecture="llama", weight_dtype="float8_e4m3fn"))


# ---------------------------------------------------------------- techniques


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_weight_dtype_halves_the_file_and_keeps_rotary_frequencies(tmp_path, prompts, name, dtype):
    model = make(name)
    before = sum(p.nbytes for p in model.parameters())
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    session = session_of(model, tmp_path)
    techniques.get("weight_dtype").execute(session, dtype=dtype)
    engine.export(session, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert sum(t.nbytes for t in tensors.values()) == before // 2
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    running = engine.open_artefact(tmp_path, {})
    for n, buffer in running._model.named_buffers():
        assert torch.equal(buffer, buffers[n])
    assert numpy.isfinite(running.log_probs(prompts[0])).all()
    assert len(running.generate(prompts[:2], 4).tokens) == 2


def test_float16_matrices_lie_as_the_cpu_multiplies_them_fast(tmp_path, prompts):
    model = make("gpt2")
    techniques.get("weight_dtype").execute(session_of(model, tmp_path), dtype="float16")
    engine.export(session_of(model, tmp_path), tmp_path)
    running = engine.open_artefact(tmp_path, {})
    for there, came in zip(running._model.transformer.h, model.transformer.h, strict=True):
        matrix = there.mlp.c_fc.weight
        assert torch.equal(matrix, came.mlp.c_fc.weight) and matrix.T.is_contiguous()
        assert there.ln_1.weight.is_contiguous()
    assert numpy.isfinite(running.log_probs(prompts[0])).all()


def test_weight_dtype_refuses_an_overflow(tmp_path):
    model = make("llama")
    model.model.norm.weight.fill_(1e5)
    with pytest.raises(CandidateFailed, match=r"model\.norm\.weight") as caught:
        techniques.get("weight_dtype").execute(session_of(model, tmp_path), dtype="float16")
    assert caught.value.kind == "non_finite"


@pytest.mark.parametrize(
    ("technique", "knobs", "runtime"),
    [
        ("kv_cache_quantised", {"bits": 4}, {"kv_bits": 4}),
        ("prompt_lookup", {"tokens": 8}, {"lookup_tokens": 8}),
        ("torch_compile", {}, {"compile": True}),
        ("batch_size", {"count": 4}, {"batch": 4}),
        ("thread_count", {"count": 1}, {"threads": 1}),
    ],
)
def test_serving_steps_write_runtime_keys_the_engine_knows(made, tmp_path, technique, knobs, runtime):
    model, folder = made("llama")
    session = session_of(model, tmp_path)
    techniques.get(technique).execute(session, **knobs)
    assert session.runtime == runtime
    engine.open_artefact(folder, session.runtime).close()


def test_layers_of_other_sizes_come_back(tmp_path, prompts):
    model = make("llama")
    mlp = model.model.layers[1].mlp
    kept = torch.arange(0, 64, 2)
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight = torch.nn.Parameter(part.weight[kept], requires_grad=False)
        _kinds.other_sizes(part, out_features=32)
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, kept], requires_grad=False)
    _kinds.other_sizes(mlp.down_proj, in_features=32)
    _kinds.other_sizes(mlp, intermediate_size=32)
    with torch.inference_mode():
        expected = model(torch.tensor(prompts[:1])).logits[0].float().log_softmax(-1).numpy()
    engine.export(session_of(model, tmp_path), tmp_path)
    running = engine.open_artefact(tmp_path, {})
    assert numpy.allclose(running.log_probs(prompts[0]), expected, atol=1e-5)
    again = _torch_artefact.load(tmp_path, torch.device("cpu"))
    assert [layer.mlp.intermediate_size for layer in again.model.layers] == [64, 32]


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "resized", "shapes": {"nothing": [3]}, "sizes": {}},
        {"kind": "resized", "shapes": {}, "sizes": {"forward": 3}},
        {"kind": "resized", "shapes": {}, "sizes": {"in_features": "3"}},
        {"kind": "no such kind"},
    ],
)
def test_a_structure_nobody_knows_is_a_load_error(made, tmp_path, entry):
    _, folder = made("llama")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "structure.json").write_text(json.dumps({"model.layers.1.mlp.up_proj": entry}))
    with pytest.raises(CandidateFailed) as caught:
        engine.open_artefact(tmp_path, {})
    assert caught.value.kind == "load_error"
