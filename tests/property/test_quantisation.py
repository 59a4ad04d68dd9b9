"""Laws of rounding weights, for any weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge_base.techniques import _packed

shapes = st.tuples(st.integers(1, 40), st.integers(1, 6).map(lambda n: 32 * n))
seeds = st.integers(0, 2**31 - 1)
sizes = st.floats(1e-4, 1e3)
shifts = st.floats(-2, 2)


def weights(shape: tuple[int, int], seed: int, size: float, shift: float) -> torch.Tensor:
    return size * (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift)


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, sizes, shifts)
def test_int8_is_within_half_a_step(shape, seed, size, shift):
    weight = weights(shape, seed, size, shift)
    quantised, scales = _packed.quantise_channels(weight, torch.float32)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantised.float() * scales[:, None] - weight).abs() <= step * 0.5001 + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, sizes, shifts)
def test_int4_is_within_about_half_a_step(shape, seed, size, shift):
    weight = weights(shape, seed, size, shift)
    quantised, scales, zeros = _packed.quantise_groups(weight, 32)
    assert quantised.max() <= 15
    found = (quantised.float() - 8) * scales.repeat_interleave(32, 1) + zeros.repeat_interleave(32, 1)
    groups = weight.reshape(shape[0], -1, 32)
    step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15  # a group's range holds zero
    # half a step for the weight, half for the integer zero point, and bfloat16 scales and zeros
    assert ((found - weight).abs() <= step.repeat_interleave(32, 1) * 1.1 + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(shapes, seeds, st.integers(1, 8))
def test_packing_is_undone_by_unpacking(shape, seed, bits):
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(_packed.unpack_bits(_packed.pack_bits(values, bits), bits), values)


@settings(max_examples=40, deadline=None)
@given(shapes, seeds)
def test_the_kernels_layout_reads_back_exactly(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)
    scales = torch.rand(shape[0], shape[1] // 32, generator=generator) + 0.01
    module = _packed.Int4Linear.from_quantised(values, scales, -scales, None, torch.float32)
    module.prepare()
    assert torch.equal(_packed.unpack_bits(module.state_dict()["packed"], 4), values)


@settings(max_examples=40, deadline=None)
@given(shapes, seeds, st.sampled_from(["int8", "int8_dynamic"]))
def test_rounding_to_8_bits_again_changes_little(shape, seed, kind):
    made = _packed.module_class(kind).from_weight
    once = made(weights(shape, seed, 1.0, 0.0), None).dequantised()
    twice = made(once, None).dequantised()
    assert (twice - once).abs().max() <= 0.01 * once.abs().max() + 1e-12


@settings(max_examples=40, deadline=None)
@given(shapes, seeds)
def test_a_token_in_a_batch_gets_what_it_gets_alone(shape, seed):
    """Scales of activations are for each token, so what else is in the batch changes nothing."""
    module = _packed.Int8DynamicLinear.from_weight(weights(shape, seed, 1.0, 0.0), None)
    x = weights((5, shape[1]), seed + 1, 1.0, 0.0)
    assert torch.allclose(module(x)[2:3], module(x[2:3]), rtol=1e-5, atol=1e-5)
