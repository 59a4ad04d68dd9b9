"""How much quality each matrix costs at fewer bits: one is rounded at a time, the rest stays as it is.

The sum over matrices predicts the loss of rounding them together; it leaves out how their errors interact.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from knowledge_base.errors import CandidateFailed
from knowledge_base.techniques import _packed
from knowledge_base.techniques._blocks import calibration_rows, decoder_layers, matrix_of
from knowledge_base.types import Session

# Tokens of calibration text. The difference to the unchanged model is paired, so few are enough.
TOKENS_MAX = 1024
TOKENS_FEW = 512  # fewer only when rounding whole layers together still takes too long
LOGIT_BYTES_MAX = 256 << 20  # reference log-probabilities kept


def measure_sensitivities(
    session: Session, bits: tuple[int, ...] = (4, 8), group_size: int = 64, time_limit_s: float = 60.0
) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each matrix and number of bits what it costs: {name: {"4": {"loss_increase", "bytes", "params"}}}.

    `loss_increase` is the mean KL divergence, in nats for each token, from the unchanged model on calibration text;
    `bytes` what storage takes, scales included. "16" stands for leaving the matrix as it is.

    One forward pass for each matrix and precision, from its layer on. Where those would take longer than
    `time_limit_s`, fewer tokens are read, down to 512; where that is still too long, the matrices of a layer are
    rounded together and share the increase by their parameters, on fewer tokens yet if need be. `session.notes`
    tells what was done. The model is unchanged after.

    Raises:
        CandidateFailed: no calibration text, or the model's layers are not found.
    """
    model = session.model.eval()
    tokens = _tokens(session)
    layers = decoder_layers(model)
    names = {id(layer): name for name, layer in model.named_modules()}
    modules = _packed.linears(model)
    by_layer = [{name: m for name, m in modules.items() if name.startswith(names[id(layer)] + ".")} for layer in layers]

    with torch.no_grad():
        trial = _Trial(model, layers, tokens)
        weights = [1 - i / len(layers) for i in range(len(layers))]  # a pass begins at the layer that was changed
        passes = {
            "a matrix at a time": len(bits) * sum(len(group) * w for group, w in zip(by_layer, weights)),
            "a layer at a time": len(bits) * sum(weights),
        }
        share = {how: time_limit_s / (count * trial.forward_s) for how, count in passes.items()}
        together = share["a matrix at a time"] * tokens.numel() < min(TOKENS_FEW, tokens.numel())
        how = "a layer at a time" if together else "a matrix at a time"
        if share[how] < 1:
            tokens = _fewer(tokens, share[how])
            trial = _Trial(model, layers, tokens)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for index, group in enumerate(by_layer):
            for name, module in group.items():
                params = matrix_of(module).numel()
                found[name] = {"16": {"loss_increase": 0.0, "bytes": _packed.dense_bytes(module), "params": params}}
            for part in [group] if together else [{name: module} for name, module in group.items()]:
                for number in bits:
                    _measure(trial, index, part, number, group_size, found)
            session.progress("sensitivities", (index + 1) / len(layers))
    session.notes["sensitivities.tokens"] = tokens.numel()
    session.notes["sensitivities.rounded"] = how
    return found


def _measure(
    trial: _Trial, index: int, modules: Mapping[str, nn.Module], bits: int, group_size: int, found: dict[str, Any]
) -> None:
    sizes = {name: _packed.packed_bytes(matrix_of(m).shape, bits, group_size) for name, m in modules.items()}
    rounded = [name for name, size in sizes.items() if size is not None]
    if not rounded:
        return
    kept = {name: matrix_of(modules[name]).clone() for name in rounded}
    try:
        for name, weight in kept.items():
            matrix_of(modules[name]).copy_(_rounded(weight, bits, group_size))
        increase = trial.divergence(index)
    finally:
        for name, weight in kept.items():
            matrix_of(modules[name]).copy_(weight)
    total = sum(weight.numel() for weight in kept.values())
    for name, weight in kept.items():
        share = weight.numel() / total
        found[name][str(bits)] = {
            "loss_increase": increase * share, "bytes": sizes[name], "params": weight.numel()
        }  # fmt: skip


def _rounded(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    if bits == 8:
        quantised, scales = _packed.quantise_channels(weight, torch.bfloat16)
        return quantised.float() * scales.float()[:, None]
    size = _packed.usable_group_size(weight.shape[1], group_size)
    assert size is not None
    quantised, scales, zeros = _packed.quantise_groups(weight, size)
    return (quantised.float() - 8) * scales.repeat_interleave(size, 1) + zeros.repeat_interleave(size, 1)


def _tokens(session: Session) -> torch.Tensor:
    vocabulary = session.model.config.get_text_config().vocab_size
    rows = calibration_rows(session, bytes_per_token=4.0 * vocabulary)
    limit = min(TOKENS_MAX, LOGIT_BYTES_MAX // (4 * vocabulary))
    return _fewer(rows, limit / rows.numel())


def _fewer(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Return that share of tokens (rows, tokens): whole rows, then a shorter row, never below 32 tokens."""
    wanted = max(32, int(tokens.numel() * min(share, 1.0)))
    rows = max(1, wanted // tokens.shape[1])
    return tokens[:rows, : max(2, wanted // rows)]


class _Trial:
    """The unchanged model's answers, and a way to compare a changed one that skips the layers before the change."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, tokens: torch.Tensor) -> None:
        self.model, self.layers, self.tokens = model, layers, tokens
        self.outputs: list[Any] = [None] * len(layers)
        handles = [layer.register_forward_hook(self._keep(i)) for i, layer in enumerate(layers)]
        try:
            began = time.monotonic()
            self.reference = self._log_probs()
            self.forward_s = time.monotonic() - began
        finally:
            for handle in handles:
                handle.remove()
        if not torch.isfinite(self.reference).all():
            raise CandidateFailed("non_finite", "the unchanged model gives numbers that are not finite")

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.outputs[index] = output

        return hook

    def _log_probs(self) -> torch.Tensor:
        return self.model(self.tokens, use_cache=False).logits.float().log_softmax(-1)

    def divergence(self, first: int) -> float:
        """Return the mean KL(unchanged || now) in nats for each token; layers before `first` are known unchanged."""
        for layer, output in zip(self.layers[:first], self.outputs):
            layer.forward = lambda *args, _output=output, **kwargs: _copy(_output)
        try:
            changed = self._log_probs()
        finally:
            for layer in self.layers[:first]:
                del layer.forward
        kl = (self.reference.exp() * (self.reference - changed)).sum(-1).mean().item()
        if kl != kl:
            raise CandidateFailed("non_finite", f"rounding a matrix of layer {first} gives numbers that are not finite")
        return max(kl, 0.0)


def _copy(output: Any) -> Any:
    """Return a layer's output anew, since some models add to it in place."""
    if isinstance(output, tuple):
        return (output[0].clone(), *output[1:])
    return output.clone()
