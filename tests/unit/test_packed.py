"""Packed linear modules against the slow, obvious version: float weights put back together and multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _kinds, _packed

SHAPES = [(768, 256), (256, 768), (48, 64), (50, 96), (1, 32), (33, 160)]  # (out, in)


SPECS: dict[str, dict] = {
    "int8": {}, "int8_dynamic": {}, "fp8": {}, "int8_table": {},
    "int4": {"group_size": 32}, "int3": {"group_size": 32}, "int2": {"group_size": 32}, "int4_table": {"group_size": 32},
    "codebook": {"group_size": 32, "levels": "nf4", "double_quant": True},
}  # fmt: skip
PACKED = tuple(SPECS)
BITS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def make(
    kind: str, outputs: int, inputs: int, bias: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, nn.Module]:
    torch.manual_seed(outputs * inputs)
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return linear, _kinds.module_class(kind).from_weight(linear.weight, linear.bias, **SPECS[kind])


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_forward_is_the_product_with_the_dequantised_weights(kind, shape, rows):
    _, module = make(kind, *shape)
    x = torch.randn(2, rows, shape[1])
    expected = x @ module.dequantised().T + module.bias
    found = module(x)
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    # bfloat16 has 8 bits of mantissa; 8-bit activations with a scale for each row are of the same coarseness
    assert relative_error(found, expected) < (0.02 if kind == "int8_dynamic" else 0.006)


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("int8", 0.006),
        ("int8_dynamic", 0.006),
        ("fp8", 0.03),
        ("int4", 0.09),
        ("codebook", 0.09),
        ("int3", 0.19),
        ("int2", 0.45),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_is_close_to_the_weights(kind, limit, dtype):
    linear, module = make(kind, 256, 768, dtype=dtype)
    assert relative_error(module.dequantised(), linear.weight) < limit
    assert module.weight.dtype == dtype


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "after forward"])
@pytest.mark.parametrize("shape", [(50, 96), (128, 256)], ids=str)
def test_state_dict_survives_use_and_reload(kind, used, shape):
    _, module = make(kind, *shape)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(3, shape[1])
    if used:
        module(x)
    state = module.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    again = type(module).from_spec(shape[1], shape[0], True, torch.float32, **module.spec())
    assert all(t.is_meta for t in again.state_dict().values())
    again.load_state_dict(state, assign=True)
    assert torch.equal(again(x), module(x))
    module.load_state_dict(before)  # also into a module that holds the kernel's layout
    assert torch.equal(again(x), module(x))


def test_int4_holds_its_weights_once():
    _, module = make("int4", 256, 768)
    claimed = _packed.packed_bytes((256, 768), 4, 32)

    def held() -> int:
        return sum(b.numel() * b.element_size() for b in module.buffers())

    assert held() == claimed
    module(torch.randn(1, 768))
    assert held() == claimed
    module.to(torch.device("cpu"))
    assert module.kernel is not None  # a move to where it is costs nothing


def test_int4_returns_to_the_stored_layout_before_it_moves():
    _, module = make("int4", 50, 96)
    expected = module.packed.clone()
    module(torch.randn(1, 96))
    module.to("meta")
    assert module.packed.shape == expected.shape
    assert module.kernel is None


@pytest.mark.parametrize("kind", PACKED)
def test_stored_bytes_are_what_is_claimed(kind):
    _, module = make(kind, 256, 768, bias=False)
    stored = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    weights, groups = 256 * 768, 256 * 768 // 32
    expected = {
        "int8_dynamic": weights + 4 * 256, "fp8": weights + 4 * 256, "int8_table": weights + 2 * 256,
        "int4_table": weights // 2 + 4 * groups, "codebook": weights // 2 + groups + 8 * groups // 256,
    }  # fmt: skip
    assert stored == (expected.get(kind) or _packed.packed_bytes((256, 768), BITS[kind], 32))


@pytest.mark.parametrize("kind", PACKED)
def test_zero_and_constant_weights_are_held(kind):
    for value in (0.0, 0.37, -2.0):
        module = _kinds.module_class(kind).from_weight(torch.full((16, 64), value), None, **SPECS[kind])
        assert torch.allclose(module.dequantised(), torch.full((16, 64), value), rtol=0.01)
        assert torch.isfinite(module(torch.zeros(1, 64))).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_are_packed_and_unpacked_whole(bits):
    values = torch.randint(0, 2**bits, (7, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = _packed.pack_bits(values, bits)
    assert packed.shape == (7, 96 * bits // 8)
    assert torch.equal(_packed.unpack_bits(packed, bits), values)


def test_thirty_two_3_bit_values_take_twelve_bytes():
    """By hand: 7 at the weights 0 and 31 is three bits in each of two bytes."""
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, 0] = values[0, 31] = 7
    # low two bits: byte k holds weights k, k + 8, k + 16, k + 24; high bit: weights k, k + 4, ...
    assert _packed.pack_bits(values, 3).tolist() == [[0b11, 0, 0, 0, 0, 0, 0, 0b11 << 6, 1, 0, 0, 1 << 7]]


def test_long_products_are_taken_in_blocks(monkeypatch):
    _, module = make("int3", 50, 96)
    whole = module(x := torch.randn(3, 96))
    monkeypatch.setattr(_packed, "_BLOCK_WEIGHTS", 7 * 96)
    assert torch.equal(module(x), whole)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fitting_again_lowers_the_squared_error_in_every_group(bits):
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(bits))
    importance = torch.rand(128, generator=torch.Generator().manual_seed(9))
    before = _packed.group_qparams(weight, 32, bits)

    def errors(scales, zeros):
        found = _packed.dequantise_groups(_packed.levels(weight, scales, zeros, bits), scales, zeros, bits)
        return ((found - weight) ** 2 * importance).unflatten(1, (-1, 32)).sum(2)

    after = _packed.refit(weight, *before, bits, importance)
    assert (errors(*after) <= errors(*before)).all()
    assert errors(*after).sum() < (0.8 if bits < 4 else 0.97) * errors(*before).sum()


def test_a_group_on_one_level_keeps_a_scale():
    scales, zeros = _packed.refit(torch.full((2, 32), 0.5), torch.ones(2, 1), torch.zeros(2, 1), 2)
    assert torch.isfinite(zeros).all()
    assert (scales > 0).all()


def test_group_size_falls_back_to_one_that_divides():
    assert _packed.usable_group_size(768, 128) == 128
    assert _packed.usable_group_size(192, 128) == 64
    assert _packed.usable_group_size(96, 128) == 32
    assert _packed.usable_group_size(128, 32) == 32
    assert _packed.usable_group_size(100, 128) is None


@pytest.mark.parametrize("params", [{"group_size": 16}, {"group_size": 64}, {}, {"group_size": 32, "more": 1}])
def test_a_damaged_spec_is_refused(params):
    with pytest.raises(CandidateFailed, match="cannot be held as int4") as caught:
        _packed.Int4Linear.from_spec(96, 50, False, torch.float32, **params)
    assert caught.value.kind == "load_error"


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(CandidateFailed, match=r"unknown kind of module `int5`; known: .*int2, int3, int4, "):
        _packed.module_class("int5")
    assert _packed.module_class("low_rank").kind == "low_rank"


def test_conv1d_is_packed_by_its_transpose():
    torch.manual_seed(0)
    conv = Conv1D(48, 64)
    holder = nn.Module()
    holder.c = conv
    x = torch.randn(4, 64)
    expected = conv(x)
    assert _packed.pack(holder, "c", "int8")
    assert holder.c.out_features == 48
    assert relative_error(holder.c(x), expected) < 0.02
