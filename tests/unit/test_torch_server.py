"""Answers that a torch model writes together: each is what it would be alone, whatever its neighbours' lengths."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from served import Numbers, told

from knowledge_base.engines import transformers as engine
from knowledge_base.engines._serving import LENGTH, STOP, OneByOneOnly
from knowledge_base.engines._torch_running import TorchRunning
from knowledge_base.errors import CandidateFailed
from knowledge_base.types import Session
from planner.serving import Settings
from planner.serving.one_by_one import OneByOne
from planner.serving.operations import _opened

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "qwen2 mixed": lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=128, max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=128),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
PROMPTS = [list(range(3, 3 + count)) for count in (5, 40, 1, 21, 33)]
ANSWERS = [24, 3, 17, 30, 1]


def export(config: Any, folder: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(8.0)  # so that its first choices are no near-ties
    engine.export(Session(model=model, tokenizer=None, facts=None, calibration=None, seed=0, workspace=folder), folder)  # type: ignore[arg-type]


def alone(folder: Path) -> Iterator[list[int]]:
    running = engine.open_artefact(folder, {"threads": 1})
    for prompt, new_tokens in zip(PROMPTS, ANSWERS):
        yield running.generate([prompt], new_tokens).tokens[0]
    running.close()


@pytest.mark.parametrize("name", CONFIGS)
def test_each_answer_is_as_if_it_were_alone(name: str, tmp_path: Path) -> None:
    export(CONFIGS[name](), tmp_path)
    expected = list(alone(tmp_path))
    server = engine.open_server(tmp_path, {"threads": 1, "batch": 3}, 128, Numbers())
    with ThreadPoolExecutor(len(PROMPTS)) as pool:  # more than slots: they leave and others join
        for _ in range(2):
            found = pool.map(lambda asked: told(server, *asked, ignore_eos=True), zip(PROMPTS, ANSWERS))
            assert list(found) == [(tokens, len(tokens), LENGTH) for tokens in expected]
    server.close()


def test_an_end_of_text_token_ends_one_answer_and_no_other(tmp_path: Path) -> None:
    export(CONFIGS["llama"](), tmp_path)
    expected = list(alone(tmp_path))
    end = expected[0][5]
    server = engine.open_server(tmp_path, {"threads": 1, "batch": 3}, 128, Numbers(end))
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(told, server, PROMPTS[0], 24)
        long = pool.submit(told, server, PROMPTS[3], 30, ignore_eos=True)
        assert short.result()[::2] == (expected[0][: expected[0].index(end)], STOP)
        assert long.result()[0] == expected[3]
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "config", "why"),
    [
        ({"kv_bits": 8}, CONFIGS["llama"], "`kv_bits` is for sequences that begin and end together"),
        ({"lookup_tokens": 4}, CONFIGS["llama"], "`lookup_tokens` is for sequences"),
        ({}, lambda: transformers.MambaConfig(vocab_size=128, hidden_size=32, state_size=8, num_hidden_layers=2), "keeps more of a text"),
        ({}, lambda: transformers.MistralConfig(**SIZES, sliding_window=16), "only the last 16 tokens"),
        ({}, lambda: transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC), "`dynamic` turns all sequences"),
        ({}, lambda: transformers.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "takes no positions"),
    ],
    ids=["cache in bits", "drafts", "state", "window", "rotations", "no positions"],
)  # fmt: skip
def test_what_cannot_be_padded_is_answered_one_by_one(runtime: Any, config: Any, why: str, tmp_path: Path) -> None:
    export(config(), tmp_path)
    with pytest.raises(OneByOneOnly, match=why):
        engine.open_server(tmp_path, runtime, 128, Numbers())
    server, told_why = _opened(engine, tmp_path, runtime, Numbers(), Settings(context_tokens=128))  # type: ignore[arg-type]
    assert isinstance(server, OneByOne) and why in told_why
    assert told(server, PROMPTS[0], 4, ignore_eos=True)[1:] == (4, LENGTH)
    server.close()


def test_a_prompt_that_fails_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(CONFIGS["llama"](), tmp_path)
    expected = list(alone(tmp_path))
    server = engine.open_server(tmp_path, {"threads": 1, "batch": 3}, 128, Numbers())
    whole = TorchRunning.last_logits

    def short_of_memory(self: TorchRunning, tokens: Any, cache: Any, **inputs: Any) -> Any:
        if len(tokens[0]) == len(PROMPTS[1]):
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return whole(self, tokens, cache, **inputs)

    monkeypatch.setattr(TorchRunning, "last_logits", short_of_memory)
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(told, server, PROMPTS[3], 30, ignore_eos=True)
        with pytest.raises(CandidateFailed, match="OutOfMemoryError: tried to allocate 2 GiB"):
            told(server, PROMPTS[1], 8)
        assert long.result()[0] == expected[3]
    assert server.fault is None and told(server, PROMPTS[0], 24, ignore_eos=True)[0] == expected[0]
    server.close()
