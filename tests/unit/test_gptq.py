"""GPTQ against rounding to nearest, and its sweep against the paper's algorithm written out column by column."""

from __future__ import annotations

import pytest
import torch

from knowledge_base.techniques import weight_gptq
from knowledge_base.techniques._packed import group_qparams, quantise_groups


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs in a few strong directions, as activations of a trained model are."""
    torch.manual_seed(seed)
    return torch.randn(rows, width // 8) @ torch.randn(width // 8, width) + 0.3 * torch.randn(rows, width)


def dequantised(found: tuple) -> torch.Tensor:
    quantised, scales, zeros = found
    size = quantised.shape[1] // scales.shape[1]
    return (quantised.float() - 8) * scales.repeat_interleave(size, 1) + zeros.repeat_interleave(size, 1)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("width", [128, 256, 384])
def test_outputs_change_less_than_when_rounded_to_nearest(group_size, width):
    x = correlated(1024, width)
    weight = torch.randn(96, width)
    hessian = x.T @ x / len(x)
    found = weight_gptq.round_with_compensation(weight, hessian, group_size)
    errors = [
        (x @ (weight - dequantised(f)).T).square().sum().item() / len(x)
        for f in (found, quantise_groups(weight, group_size))
    ]
    assert errors[0] < 0.7 * errors[1]
    assert weight_gptq.output_error(weight, found, hessian) == pytest.approx(errors[0], rel=1e-2)
    assert found[0].max() <= 15


def test_blocks_do_not_change_the_sweep(monkeypatch):
    """The lazily updated blocks give what updating every later column at once gives."""
    x = correlated(512, 256)
    weight, hessian = torch.randn(16, 256), x.T @ x / len(x)
    found = weight_gptq.round_with_compensation(weight, hessian, 32)

    factor = weight_gptq._inverse_factor(hessian)
    work, rounded = weight.clone(), torch.empty_like(weight)
    for column in range(256):
        if column % 32 == 0:
            scale, zero = (t[:, 0] for t in group_qparams(work[:, column : column + 32], 32))
        level = ((work[:, column] - zero) / scale).round().add(8).clamp(0, 15)
        rounded[:, column] = (level - 8) * scale + zero
        error = (work[:, column] - rounded[:, column]) / factor[column, column]
        work[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    same = (dequantised(found) - rounded).abs() < 1e-4
    assert same.float().mean() > 0.99  # ties in rounding may fall either way


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight = torch.randn(32, 128)
    found = weight_gptq.round_with_compensation(weight, torch.eye(128), 32)
    nearest = quantise_groups(weight, 32)
    assert torch.allclose(dequantised(found), dequantised(nearest), atol=1e-2)


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
    nearest = quantise_groups(weight, 32)
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
    assert weight_gptq._inverse_factor(hessian) is not None
    _, failed = torch.linalg.cholesky_ex(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64))
    assert failed
