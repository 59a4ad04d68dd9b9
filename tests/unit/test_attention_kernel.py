"""The kernel of a torch model's attention: chosen on the device that has it, refused with a reason on any other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests_support import TOY_MACHINE, TOY_MODEL, TOY_WORKLOAD
from tiny_sessions import load, tiny_folder

from cost_models.demand import demand_of
from knowledge_base.engines import _torch_attention
from knowledge_base.engines import transformers as engine
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import attention_kernel

TOKENS = torch.arange(1, 60)[None]
HOPPER = replace(
    TOY_MACHINE, devices=(replace(TOY_MACHINE.device, name="H100", kind="gpu", features=frozenset({"cuda", "sm_90"})),)
)
HALF = replace(TOY_MODEL, weight_dtype="bfloat16")


def test_a_kernel_that_is_there_computes_the_same() -> None:
    model = load(tiny_folder("llama"))
    with torch.no_grad():
        before = model(TOKENS).logits
        _torch_attention.use(model, "eager")
        assert model.config._attn_implementation == "eager"
        after = model(TOKENS).logits
    assert not torch.equal(before, after)  # another order of the same sums
    assert (before - after).abs().max() < 1e-3


def test_a_kernel_nobody_knows_is_refused() -> None:
    with pytest.raises(CandidateFailed, match="no_such_kernel cannot be used") as caught:
        _torch_attention.use(load(tiny_folder("llama")), "no_such_kernel")
    assert caught.value.kind == "unsupported"


def test_an_architecture_that_takes_no_other_attention_is_refused() -> None:
    with pytest.raises(CandidateFailed, match="sdpa cannot be used: MambaForCausalLM"):
        _torch_attention.use(load(tiny_folder("mamba")), "sdpa")


def test_an_architecture_that_transformers_only_warns_of_is_refused(monkeypatch) -> None:
    model = load(tiny_folder("llama"))
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(CandidateFailed, match="transformers keeps `llama` from"):
        _torch_attention.use(model, "eager")


def test_flash_attention_is_not_used_on_the_cpu() -> None:
    with pytest.raises(CandidateFailed, match="runs on CUDA GPUs, not on the cpu"):
        _torch_attention.use(load(tiny_folder("llama")), "flash_attention_3")


def test_nothing_is_fetched_where_the_package_is_missing(monkeypatch) -> None:
    monkeypatch.setattr(_torch_attention, "PACKAGES", {"flash_attention_3": "no_such_package"})
    gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)  # refused before it is asked anything
    with pytest.raises(CandidateFailed, match="needs no_such_package") as caught:
        _torch_attention.use(gpu, "flash_attention_3")
    assert caught.value.kind == "engine_missing"
    monkeypatch.setattr(_torch_attention, "PACKAGES", {"flash_attention_3": "torch"})
    with pytest.raises(CandidateFailed, match="computes in 16 bits, the model in float32"):
        _torch_attention.use(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32), "flash_attention_3")


def test_the_engine_passes_the_choice_on(tmp_path) -> None:
    from knowledge_base.engines import _torch_artefact

    _torch_artefact.save(load(tiny_folder("llama")), None, tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(CandidateFailed, match="runs on CUDA GPUs"):
            engine.open_artefact(tmp_path, {"attention": "flash_attention_3"})
    with pytest.raises(CandidateFailed, match="`attention` is 'eager'"):
        engine.open_artefact(tmp_path, {"attention": "eager"})
    for other in ({"compile": True}, {"prompt_keep": 0.5}):
        with pytest.raises(CandidateFailed, match=r"does not go with.*, which brings another"):
            engine.open_artefact(tmp_path, {"attention": "flash_attention_3", **other})


def test_it_is_for_16_bits_on_hopper() -> None:
    assert attention_kernel.rejects(HALF, TOY_WORKLOAD, HOPPER) is None
    assert "this is toy cpu" in attention_kernel.rejects(HALF, TOY_WORKLOAD, TOY_MACHINE)
    assert "come in float32" in attention_kernel.rejects(TOY_MODEL, TOY_WORKLOAD, HOPPER)
    assert "has no attention" in attention_kernel.rejects(replace(HALF, attention_layers=0), TOY_WORKLOAD, HOPPER)
    demand = demand_of(HALF, TOY_WORKLOAD, "transformers")
    after = attention_kernel.rewrite(demand)
    assert after.attention_flop_per_token_pair == pytest.approx(demand.attention_flop_per_token_pair / 1.5)
    assert after.linear_flop_per_token == demand.linear_flop_per_token


@pytest.mark.gpu
def test_flash_attention_computes_what_pytorch_does() -> None:
    pytest.importorskip("flash_attn_interface", reason="FlashAttention-3 is not installed")
    model = load(tiny_folder("llama"), torch.bfloat16).to("cuda")
    with torch.no_grad():
        before = model(TOKENS.cuda()).logits.float()
        _torch_attention.use(model, "flash_attention_3")
        assert (model(TOKENS.cuda()).logits.float() - before).abs().max() < 0.1
