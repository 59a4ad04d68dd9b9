"""What is in model.gguf: names, layouts, types, sizes, tokenizer; and what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import gguf
import pytest
from gguf_sessions import make_session

from cost_models.demand import demand_of
from knowledge_base.engines import llama_cpp
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import weight_gguf
from knowledge_base.types import Demand, Model, Workload


def predicted(model: Model, type: str) -> Demand:
    demand = demand_of(model, Workload(prompt_tokens=16, output_tokens=16), "llama_cpp")
    return weight_gguf.rewrite(demand, type=type)


def read(folder: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(folder / llama_cpp.FILE)


def types_of(folder: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name.lower() for t in read(folder).tensors}


TYPES = weight_gguf.TECHNIQUE.knobs["type"].options


@pytest.mark.parametrize(
    ("architecture", "type"),
    [*(("llama", t) for t in TYPES), *((a, "q4_k") for a in llama_cpp.ARCHITECTURES if a != "llama"), ("gpt2", "q8_0")],
)
def test_stored_bytes_are_what_rewrite_predicts(tmp_path: Path, architecture: str, type: str) -> None:
    session = make_session(architecture)
    demand = predicted(session.facts, type)
    weight_gguf.execute(session, type=type)
    llama_cpp.export(session, tmp_path)

    tensors = read(tmp_path).tensors
    layers = sum(int(t.n_bytes) for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2)
    assert layers == pytest.approx(demand.linear_bytes, rel=1e-6)
    total = demand.linear_bytes + demand.embedding_bytes + demand.head_stored_bytes + demand.other_bytes
    assert sum(int(t.n_bytes) for t in tensors) == pytest.approx(total, rel=0.05)


def test_every_matrix_has_the_type_and_tables_six_bits(tmp_path: Path) -> None:
    session = make_session(type="q4_k", tie_word_embeddings=False)
    llama_cpp.export(session, tmp_path)
    types = types_of(tmp_path)
    assert types.pop("token_embd.weight") == types.pop("output.weight") == "q6_k"
    matrices = {n for n in types if n.startswith("blk.") and "norm" not in n}
    assert {types[n] for n in matrices} == {"q4_k"} and len(matrices) == 14
    assert {types[n] for n in types.keys() - matrices} == {"f32"}
    assert "gguf.wider_types" not in session.notes


def test_a_row_that_does_not_divide_takes_a_wider_type_and_says_so(tmp_path: Path) -> None:
    session = make_session(type="q4_k", intermediate_size=416)
    llama_cpp.export(session, tmp_path)
    types = types_of(tmp_path)
    assert types["blk.0.ffn_down.weight"] == "q5_0" and types["blk.0.ffn_up.weight"] == "q4_k"
    assert session.notes["gguf.wider_types"] == {f"blk.{i}.ffn_down.weight": "q5_0" for i in range(2)}


@pytest.mark.parametrize(("dtype", "kept"), [("float32", "f32"), ("bfloat16", "bf16"), ("float16", "f16")])
def test_without_a_type_the_models_own_dtype_is_kept_exactly(tmp_path: Path, dtype: str, kept: str) -> None:
    session = make_session("qwen2", dtype=dtype)
    llama_cpp.export(session, tmp_path)
    tensors = {t.name: t for t in read(tmp_path).tensors}
    assert types_of(tmp_path)["blk.1.ffn_up.weight"] == kept
    stored = gguf.dequantize(tensors["blk.1.ffn_up.weight"].data, tensors["blk.1.ffn_up.weight"].tensor_type)
    weight = session.model.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    assert (stored == weight).all()


@pytest.mark.parametrize("type", ["q8_0", "q4_k", None])
def test_equal_sessions_give_equal_bytes(tmp_path: Path, type: str | None) -> None:
    digests = set()
    for name in ("a", "b"):
        llama_cpp.export(make_session(type=type), tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name / llama_cpp.FILE).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_quantised_values_are_near_and_not_equal(tmp_path: Path) -> None:
    for type, most in (("q8_0", 0.01), ("q6_k", 0.03), ("q4_k", 0.11), ("q3_k", 0.22)):
        session = make_session(type=type)
        llama_cpp.export(session, tmp_path / type)
        tensor = next(t for t in read(tmp_path / type).tensors if t.name == "blk.0.ffn_gate.weight")
        weight = session.model.model.layers[0].mlp.gate_proj.weight.detach().numpy()
        error = gguf.dequantize(tensor.data, tensor.tensor_type) - weight
        assert 0 < (error**2).mean() ** 0.5 / (weight**2).mean() ** 0.5 < most


def test_byte_level_tokenizer_goes_in_whole(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    llama_cpp.export(make_session(tokenizer=tokenizer, vocab_size=320), tmp_path)
    fields = read(tmp_path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 320 and tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == "[PAD319]"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.token_type"].contents()[0] == gguf.TokenType.CONTROL
    assert (tmp_path / "tokenizer.json").is_file()


def test_llama_cpp_tokenizes_as_the_tokenizer_does(tmp_path: Path) -> None:
    import ctypes

    from knowledge_base.engines import _llama_abi

    tokenizer = byte_level_tokenizer()
    llama_cpp.export(make_session(tokenizer=tokenizer, vocab_size=320), tmp_path)
    running = llama_cpp.open_artefact(tmp_path, {})
    library = _llama_abi.library()
    text = "the cat can't sit on 1234 mats, naïve 猫\n\n  end"
    raw = text.encode()
    ids = (ctypes.c_int32 * 200)()
    vocab = library.llama_model_get_vocab(running._model)
    count = library.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, False)
    running.close()
    assert list(ids)[:count] == tokenizer(text).input_ids


def byte_level_tokenizer() -> object:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat sat on the mat and the hat, that is that; can't it sit?"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>")


def test_a_tokenizer_llama_cpp_has_no_form_of_stays_outside(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    session = make_session(tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner))
    llama_cpp.export(session, tmp_path)
    assert "not in model.gguf" in session.notes["gguf.tokenizer"]
    running = llama_cpp.open_artefact(tmp_path, {"threads": 1})
    assert running.log_probs([1, 2, 3]).shape == (3, 300)
    running.close()


def test_context_is_cut_to_the_sliding_window(tmp_path: Path) -> None:
    session = make_session("mistral", sliding_window=64)
    llama_cpp.export(session, tmp_path)
    assert read(tmp_path).fields["llama.context_length"].contents() == 64 == session.notes["gguf.context_tokens"]


@pytest.mark.parametrize(
    ("architecture", "changes", "words"),
    [
        ("opt", {"hidden_size": 64, "ffn_dim": 64, "num_attention_heads": 2}, "architecture `opt`"),
        ("llama", {"hidden_act": "gelu"}, "activation `gelu`"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type `dynamic`"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rotary frequencies"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention scaling"),
    ],
)
def test_refuses_what_llama_cpp_would_compute_otherwise(
    tmp_path: Path, architecture: str, changes: dict[str, object], words: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture == "opt":
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("opt", vocab_size=300, num_hidden_layers=1, **changes)
        )
        session = make_session()
        session.model = model
    else:
        session = make_session(architecture, **changes)
    with pytest.raises(CandidateFailed, match=words) as caught:
        llama_cpp.export(session, tmp_path)
    assert caught.value.kind == "unsupported"


def test_refuses_modules_without_a_place(tmp_path: Path) -> None:
    from torch import nn

    class Thin(nn.Module):
        kind = "low_rank"

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(256, 8, bias=False), nn.Linear(8, 512, bias=False)

    session = make_session()
    session.model.model.layers[1].mlp.up_proj = Thin()
    with pytest.raises(CandidateFailed, match=r"model\.layers\.1\.mlp\.up_proj"):
        llama_cpp.export(session, tmp_path)


def test_refuses_values_float16_cannot_hold_and_other_storage(tmp_path: Path) -> None:
    session = make_session(type="f16")
    session.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(CandidateFailed, match=r"blk\.0\.ffn_up\.weight") as caught:
        llama_cpp.export(session, tmp_path)
    assert caught.value.kind == "non_finite"
    session.storage["onnx"] = True
    with pytest.raises(CandidateFailed, match="no storage choice `onnx`"):
        llama_cpp.export(session, tmp_path)


def test_knowledge_and_writer_name_the_same_types_and_architectures() -> None:
    from knowledge_base.engines import _gguf_types, _gguf_writer, _llama_abi

    assert tuple(_gguf_writer.ARCHITECTURES) == llama_cpp.ARCHITECTURES
    library = _llama_abi.library()
    for type, number in _gguf_types.NUMBERS.items():
        assert library.ggml_type_name(number).decode().lower() == type
        assert 8 * library.ggml_type_size(number) / library.ggml_blck_size(number) == weight_gguf.BITS[type]
        assert library.ggml_blck_size(number) == weight_gguf.BLOCK.get(type, 1)


def test_rewrite_says_bits_and_loses_more_with_fewer() -> None:
    model = dataclasses.replace(make_session().facts, params_total=7_000_000_000)
    demands = {type: predicted(model, type) for type in TYPES}
    assert demands["q4_k"].because[-1].startswith("weights in q4_k: 4.5 bits")
    assert demands["q6_k"].linear_bytes == model.linear_params * 6.5625 / 8
    ratios = [demands[t].perplexity_ratio for t in ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k")]
    assert ratios == sorted(ratios) and ratios[0] == 1.0
    assert all(d.kv_bytes_per_token == 2 * model.kv_values_per_token for d in demands.values())


def test_legal_speaks_of_rows_that_do_not_divide() -> None:
    model = make_session().facts
    workload = Workload(prompt_tokens=1, output_tokens=1)
    narrow = dataclasses.replace(model, hidden_size=64, ffn_size=160)
    assert weight_gguf.legal({"type": "q4_k"}, model, workload, None) is None
    assert "q4_k would be q5_0" in weight_gguf.legal({"type": "q4_k"}, narrow, workload, None)
    assert weight_gguf.legal({"type": "q8_0"}, narrow, workload, None) is None
    half = dataclasses.replace(model, weight_dtype="float16")
    assert "float16 already" in weight_gguf.legal({"type": "f16"}, half, workload, None)
    assert "q8_0 would be f16" in weight_gguf.legal(
        {"type": "q8_0"}, dataclasses.replace(model, hidden_size=100, ffn_size=100), workload, None
    )
