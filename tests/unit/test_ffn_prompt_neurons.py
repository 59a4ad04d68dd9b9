"""Neurons chosen by the prompt: the model is whole again for each prompt, views hold nothing twice, scoring is of what decodes."""

import numpy
import pytest
import torch
from tiny_sessions import load, session_of, tiny_folder

from knowledge_base.engines import transformers
from knowledge_base.engines._torch_ffn import PromptNeurons
from knowledge_base.engines._torch_running import TorchRunning
from knowledge_base.errors import BadInput, CandidateFailed
from knowledge_base.techniques import weight_int8
from knowledge_base.techniques._blocks import decoder_layers, ffn_of

TOKENS = numpy.random.default_rng(0).integers(1, 500, size=48).tolist()


def running(model, keep):
    return TorchRunning(model, threads=None, kv_bits=None, decoding=None, ffn_keep=keep, compiled=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_the_most_used_neurons_are_computed_and_the_model_stays_what_it_was(architecture):
    model = load(tiny_folder(architecture))
    ffn, tokens = ffn_of(decoder_layers(model)[0]), torch.tensor([TOKENS])
    with torch.no_grad():
        wanted = model(tokens, use_cache=False).logits
        active = []
        handle = ffn.down.register_forward_pre_hook(lambda _, args: active.append(args[0][0]))
        model(tokens, use_cache=False)
        neurons = PromptNeurons(model, 0.5)
        with neurons.reading():
            assert torch.allclose(model(tokens, use_cache=False).logits, wanted, atol=1e-4)
        model(tokens, use_cache=False)
        # by hand, on the whole model's activations
        share = active[0].square() / active[0].square().sum(1, keepdim=True)
        best = share.sum(0).argsort(descending=True)[: ffn.size // 2]
        assert active[-1].shape[-1] == ffn.size // 2
        narrowed, whole = active[-1][0].sort().values, active[0][0, best].sort().values
        assert torch.allclose(narrowed, whole, atol=1e-5)
        handle.remove()
        for _ in range(3):  # each prompt sees the whole model
            with neurons.reading():
                again = model(tokens.flip(1), use_cache=False).logits
        with neurons.reading():
            assert torch.allclose(model(tokens, use_cache=False).logits, wanted, atol=1e-4)
        assert again.shape == wanted.shape


def test_memory_is_that_of_the_model():
    plain, chosen = running(load(tiny_folder()), None), running(load(tiny_folder()), 0.5)
    chosen.generate([TOKENS], 4)
    assert chosen.memory()["weights_bytes"] == plain.memory()["weights_bytes"]


def test_the_second_half_is_scored_as_it_is_decoded():
    model = load(tiny_folder())
    scored = running(model, 0.5).log_probs(TOKENS)
    half = len(TOKENS) // 2
    again = running(load(tiny_folder()), 0.5)
    first = again.generate([TOKENS[:half]], 2).tokens[0]
    with torch.inference_mode():
        cache = again._empty_cache(1, 64)
        again._prefill([TOKENS[:half]], cache)
        row = again._forward(again._tensor([[TOKENS[half]]]), cache)[0, -1].log_softmax(-1).numpy()
    assert numpy.allclose(scored[half], row, atol=1e-4)
    assert len(first) == 2
    whole = running(load(tiny_folder()), None).log_probs(TOKENS)
    assert all(numpy.abs(scored[i] - whole[i]).max() > 1e-4 for i in (0, half - 1, half, len(TOKENS) - 1))


def test_one_token_has_no_prompt_to_choose_by():
    whole = running(load(tiny_folder()), None).log_probs(TOKENS[:1])
    assert numpy.allclose(running(load(tiny_folder()), 0.5).log_probs(TOKENS[:1]), whole, atol=1e-5)


def test_what_cannot_be_narrowed_is_refused(tmp_path):
    session = session_of(tiny_folder())
    weight_int8.execute(session)
    for model in (session.model, load(tiny_folder("mixtral"))):
        with pytest.raises(CandidateFailed) as error:
            running(model, 0.5)
        assert error.value.kind == "unsupported"
    with pytest.raises(BadInput, match="one runs at a time"):
        running(load(tiny_folder()), 0.5).generate([TOKENS, TOKENS], 2)
    for other in ({"batch": 2}, {"compile": True}, {"ffn_keep": 1.5}):
        with pytest.raises(CandidateFailed, match=r"neurons|between"):
            transformers.open_artefact(tmp_path, {"ffn_keep": 0.5, **other})
