"""GPTQ against rounding to nearest, and its sweep against the paper's algorithm written out column by column."""

from __future__ import annotations

import pytest
import torch

from knowledge_base.techniques import weight_gptq
from knowledge_base.techniques._packed import dequantise_groups, group_qparams, levels, quantise_groups, refit


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs in a few strong directions, as activations of a trained model are."""
    torch.manual_seed(seed)
    return torch.randn(rows, width // 8) @ torch.randn(width // 8, width) + 0.3 * torch.randn(rows, width)


def dequantised(found: tuple, bits: int = 4) -> torch.Tensor:
    return dequantise_groups(*found, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "width"), [(32, 128), (64, 256), (128, 384)])
def test_outputs_change_less_than_when_rounded_to_nearest(bits, group_size, width):
    x = correlated(1024, width)
    weight = torch.randn(96, width)
    hessian = x.T @ x / len(x)
    found = weight_gptq.round_with_compensation(weight, hessian, group_size, bits)
    errors = [
        (x @ (weight - dequantised(f, bits)).T).square().sum().item() / len(x)
        for f in (found, quantise_groups(weight, group_size, bits))
    ]
    assert errors[0] < 0.7 * errors[1]
    assert weight_gptq.output_error(weight, found, hessian, bits) == pytest.approx(errors[0], rel=1e-2)
    assert found[0].max() <= 2**bits - 1


def test_blocks_and_order_do_not_change_the_sweep():
    """Columns written out one by one, by falling importance, every later column updated at once."""
    x = correlated(512, 256)
    weight, hessian = torch.randn(16, 256), x.T @ x / len(x)
    found = weight_gptq.round_with_compensation(weight, hessian, 32)

    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = weight_gptq.inverse_factor(hessian[order][:, order])
    scales, zeros = refit(weight, *group_qparams(weight, 32), 4, hessian.diagonal())
    work, rounded = weight[:, order].clone(), torch.empty_like(weight)
    for column, place in enumerate(order.tolist()):
        scale, zero = scales[:, place // 32], zeros[:, place // 32]
        level = ((work[:, column] - zero) / scale).round().clamp(-8, 7)
        rounded[:, place] = level * scale + zero
        error = (work[:, column] - rounded[:, place]) / factor[column, column]
        work[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    same = (dequantised(found) - rounded).abs() < 1e-4
    assert same.float().mean() > 0.99  # ties in rounding may fall either way


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight = torch.randn(32, 128)
    found = weight_gptq.round_with_compensation(weight, torch.eye(128), 32)
    fitted = refit(weight, *group_qparams(weight, 32), 4)
    nearest = (levels(weight, *fitted, 4), *fitted)
    assert torch.equal(dequantised(found), dequantised(nearest))


@pytest.mark.parametrize("rank", [1, 10, 100])
def test_a_singular_hessian_is_damped(rank):
    torch.manual_seed(rank)
    x = torch.randn(200, rank) @ torch.randn(rank, 128)
    found = weight_gptq.round_with_compensation(torch.randn(16, 128), x.T @ x / 200, 32)
    assert found is not None
    assert torch.isfinite(dequantised(found)).all()


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    x = correlated(512, 128)
    x[:, 32:64] = 0  # one group
    weight = torch.randn(16, 128)
    found = weight_gptq.round_with_compensation(weight, x.T @ x / 512, 32)
    fitted = refit(weight, *group_qparams(weight, 32), 4)
    nearest = (levels(weight, *fitted, 4), *fitted)
    assert torch.allclose(dequantised(found)[:, 32:64], dequantised(nearest)[:, 32:64], atol=2e-2)


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.full((64, 64), float("nan")), -torch.eye(64)])
def test_a_useless_hessian_gives_none(hessian):
    assert weight_gptq.round_with_compensation(torch.randn(8, 64), hessian, 32) is None


def test_more_damping_is_tried_until_the_hessian_can_be_inverted():
    """A Hessian with a small negative eigenvalue, as rounding leaves: 1 % damping fails, 10 % does."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]
    values = torch.full((64,), 1.0, dtype=torch.float64)
    values[0] = -0.05
    hessian = ((basis * values) @ basis.T).float()
    assert weight_gptq.inverse_factor(hessian) is not None
    _, failed = torch.linalg.cholesky_ex(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64))
    assert failed
