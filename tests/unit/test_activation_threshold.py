"""Small inputs taken for zero: one vector and many give the same, and shares are spent where they cost least."""

import pytest
import torch
from tiny_sessions import logits, session_of, tiny_folder

from knowledge_base.engines import _torch_artefact
from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import activation_threshold, weight_int8
from knowledge_base.techniques._threshold_module import ThresholdedLinear


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_one_vector_gives_what_many_give(dtype, bias, threads):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 64, generator=generator).to(dtype)
    made = ThresholdedLinear.from_weight(weight, torch.ones(24, dtype=dtype) if bias else None, threshold=0.7)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    wanted = torch.nn.functional.linear(torch.where(x.abs() > 0.7, x, 0), weight, made.bias)
    alone = torch.cat([made(row[None]) for row in x])
    assert alone.shape == wanted.shape
    assert torch.allclose(made(x), wanted)
    assert torch.allclose(alone.float(), wanted.float(), atol=0.15 if dtype != torch.float32 else 1e-4)


def test_a_vector_all_below_the_threshold_gives_the_bias(threads):
    made = ThresholdedLinear.from_weight(torch.ones(6, 4), torch.arange(6.0), threshold=2.0)
    assert torch.equal(made(torch.ones(1, 1, 4)), torch.arange(6.0)[None, None])


def test_a_share_of_none_lets_zeros_pass():
    assert activation_threshold._threshold(torch.zeros(3, 3), 0.0) < 0
    assert activation_threshold._threshold(torch.arange(101.0)[None], 0.4) == pytest.approx(40.0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_about_the_share_is_skipped_and_the_artefact_is_the_same(architecture, tmp_path):
    session = session_of(tiny_folder(architecture))
    sizes = {f"{i}.{n}": m.weight.numel() for i, layer in enumerate(_layers(session)) for n, m in layer.named_modules()
             if getattr(m, "weight", None) is not None and m.weight.dim() == 2}  # fmt: skip
    activation_threshold.execute(session, sparsity=0.4)
    skipped = session.notes["activation_threshold.skipped"]
    share = sum(sizes[name] * part for name, part in skipped.items()) / sum(sizes.values())
    assert 0.4 <= share < 0.43
    assert len(set(skipped.values())) > 1
    wanted = logits(session.model)
    _torch_artefact.save(session.model, None, tmp_path)
    assert torch.equal(logits(_torch_artefact.load(tmp_path, torch.device("cpu"))), wanted)


def _layers(session):
    from knowledge_base.techniques._blocks import decoder_layers

    return decoder_layers(session.model)


def test_packed_matrices_are_refused():
    session = session_of(tiny_folder())
    weight_int8.execute(session)
    with pytest.raises(CandidateFailed, match="no plain matrices"):
        activation_threshold.execute(session, sparsity=0.4)
