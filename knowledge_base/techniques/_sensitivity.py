"""How much quality each matrix costs at each option: one is changed at a time, the rest stays as it is.

The sum over matrices predicts the loss of changing them together; it leaves out how their errors interact. Measured once
for a model and calibration text: any number of budgets is allocated from the same figures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn

from knowledge_base.build_memory import LOGIT_BYTES_MAX, TOKENS_AT_ONCE
from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import digest, write_json
from knowledge_base.techniques import _packed
from knowledge_base.techniques._blocks import Moments, _Recorder, calibration_rows, decoder_layers, matrix_of
from knowledge_base.techniques._choices import AS_IT_IS, part_of
from knowledge_base.techniques._experts_module import split_experts
from knowledge_base.types import Session

# Tokens of calibration text. The difference to the unchanged model is paired, so few are enough.
TOKENS_MAX = TOKENS_AT_ONCE
TOKENS_FEW = 512  # fewer only when the cheapest way still takes too long

EVERY, ONE, LAYER = "every option of each matrix", "one option of each matrix", "one option of each layer"
Found = dict[str, dict[str, dict[str, float]]]


class Ways(Protocol):
    """The ways in which matrices can be stored, that an allocation chooses among.

    An option's text is its name in an allocation; `option.removes` says that the matrix is gone, with its part of the layer.
    """

    @property
    def options(self) -> Sequence[Any]:
        """Every option."""

    @property
    def anchor(self) -> Any:
        """The option that is measured where time allows one only."""

    @property
    def slow(self) -> Sequence[Any]:
        """The options that are left out where making them takes half of the time."""

    @property
    def told(self) -> Sequence[Any]:
        """The options that are never measured: told by how much they change the outputs, beside those that are."""

    @property
    def compensated(self) -> bool:
        """Whether errors are made up for, unless that takes half of the time."""

    @property
    def tables(self) -> bool:
        """Whether the tables of the embedding and the output are among the matrices."""

    @property
    def kept(self) -> bool:
        """Whether a matrix may stay as it is."""

    @property
    def identity(self) -> Any:
        """What tells these ways from others, as JSON."""

    def sizes(self, module: nn.Module, option: Any) -> Mapping[str, int] | None:
        """Return what the matrix then takes: {"bytes", "memory"}; None: it cannot be stored so."""

    def weights(self, module: nn.Module, option: Any, inputs: Moments | None) -> torch.Tensor | None:
        """Return what its weights (out, in) then are; None where it cannot be stored so.

        Args:
            inputs: what entered it; with all products where errors are to be made up for.
        """

    def needs_products(self, option: Any) -> bool:
        """Return whether an option is made with all products of what enters, even where no errors are made up for."""


def measure_sensitivities(session: Session, ways: Ways, time_limit_s: float = 60.0) -> Found:
    """Return for each matrix and option what it costs: {name: {"4": {"loss_increase", "bytes", "memory", "params", ...}}}.

    On calibration text, against the unchanged model:

        loss_increase           mean KL divergence, nats for each token: what allocations add up
        next_token_change_nats  change of the mean loss of the next token, which may be below zero; only where measured
        output_error            squared change of the matrix's outputs over their squares

    `bytes` is what storage takes, scales included, `memory` the same once it is loaded. AS_IT_IS stands for leaving the
    matrix so, where that is among the ways. Experts stored as 3-D weights become linear modules; else the model is unchanged after.

    One forward pass for each matrix and option, from its layer on. Where those would take longer than `time_limit_s`,
    fewer tokens are read, down to 512; then one option is measured and the others told by how much they change the
    matrix's outputs beside it, since the divergence grows as their square; then one for all matrices of a layer.
    `ways.told` are always told, and what lies between two that were measured by the power of the change that leads from
    one to the other. Making what is told is not bounded.
    `session.notes` tells what was done. What is done of an interrupted measurement is kept in the workspace.

    Raises:
        CandidateFailed: no calibration text, or the model's layers are not found.
    """
    model = session.model.eval()
    split_experts(model)
    tokens = calibration_tokens(session)
    layers = decoder_layers(model)
    before = [*range(len(layers)), 0, len(layers)]
    groups = list(zip(before, matrices(model, tables=ways.tables)))  # each with how many layers come before it

    with torch.no_grad():
        trial = Trial(model, layers, tokens)
        kept = _Kept(session, [ways.identity, trial.fingerprint])
        if kept.way is None:
            kept.way = _way(trial, groups, ways, time_limit_s)
        way = kept.way
        if list(tokens.shape) != way["tokens"]:
            trial = Trial(model, layers, tokens[: way["tokens"][0], : way["tokens"][1]])
        for number, (index, group) in enumerate(groups):
            if number not in kept.layers:
                kept.add(number, _layer(trial, index, group, ways, way))
            session.progress("sensitivities", (number + 1) / len(groups))
    session.notes["sensitivities.tokens"] = trial.tokens.numel()
    session.notes["sensitivities.measured"] = way["measured"]
    if told := [str(option) for option in ways.told if str(option) not in way["left_out"]]:
        session.notes["sensitivities.told"] = told
    session.notes["sensitivities.rounded"] = "compensated" if way["compensated"] else "to nearest"
    if way["left_out"]:
        session.notes["sensitivities.left_out"] = way["left_out"]
    return kept.all()


def matrices(model: Any, *, tables: bool = True) -> list[dict[str, nn.Module]]:
    """Return the matrices of each layer by name; then the embedding's table, then the output's where it is one of its own."""
    names = {id(module): name for name, module in model.named_modules()}
    modules = _packed.linears(model)
    found = [
        {name: module for name, module in modules.items() if name.startswith(names[id(layer)] + ".")}
        for layer in decoder_layers(model)
    ]
    if tables:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        found.append({names[id(embedding)]: embedding})
        if head is not None and head.weight is not embedding.weight:
            found.append({names[id(head)]: head})
    return found


def _way(
    trial: Trial, groups: Sequence[tuple[int, Mapping[str, nn.Module]]], ways: Ways, time_limit_s: float
) -> dict[str, Any]:
    """Return how to measure in about so many seconds: the shape of the tokens, what is measured, and what is left out."""
    tokens, layers = trial.tokens, len(trial.layers)
    # Half of the time may go into making what is measured.
    slow = list(ways.slow)
    quick = [option for option in ways.options if option not in slow]
    compensated = ways.compensated and _making_s(trial, groups, ways, quick) < time_limit_s / 2
    if slow and _making_s(trial, groups, ways, slow) < time_limit_s / 2:
        slow = []
    left_out = [str(option) for option in slow]
    weights = [1 - index / layers for index, _ in groups]  # a pass begins at the layer that was changed
    each = sum(len(group) * weight for (_, group), weight in zip(groups, weights))
    watching = sum(weights[:layers])
    measured = sum(option not in slow and option not in ways.told for option in ways.options)
    passes = {EVERY: measured * each + watching, ONE: each + watching, LAYER: 2 * watching}
    share = {how: time_limit_s / (count * trial.forward_s) for how, count in passes.items()}
    few = min(TOKENS_FEW, tokens.numel())
    how = next((h for h in (EVERY, ONE) if share[h] * tokens.numel() >= few), LAYER)
    read = _fewer(tokens, share[how]) if share[how] < 1 else tokens
    return {"tokens": list(read.shape), "measured": how, "compensated": compensated, "left_out": left_out}


def _making_s(
    trial: Trial, groups: Sequence[tuple[int, Mapping[str, nn.Module]]], ways: Ways, options: Sequence[Any]
) -> float:
    """Return seconds that making all matrices at all of some options takes, by one matrix at one of them."""
    _, first = groups[0]
    name, module = next(iter(first.items()))
    inputs = trial.watch(0, first, full=True)
    began = time.monotonic()
    ways.weights(module, ways.anchor if ways.anchor in options else options[0], inputs.get(name))
    weights = sum(matrix_of(module).numel() for _, group in groups for module in group.values())
    return (time.monotonic() - began) * len(options) * weights / matrix_of(module).numel()


def _layer(trial: Trial, index: int, group: Mapping[str, nn.Module], ways: Ways, way: Mapping[str, Any]) -> Found:
    """Return what each option of each matrix of one layer, or of a table, costs and takes.

    Args:
        index: layers that come before.
        way: as `_way` tells it.
    """
    how = way["measured"]
    options = [option for option in ways.options if str(option) not in way["left_out"]]
    full = way["compensated"] or any(map(ways.needs_products, options))
    inputs = trial.watch(index, group, full=full)
    found: Found = {}
    for name, module in group.items():
        each = {str(o): ways.sizes(module, o) for o in options}
        if ways.kept:
            each[AS_IT_IS] = dict.fromkeys(("bytes", "memory"), _packed.dense_bytes(module))
        params = matrix_of(module).numel()
        found[name] = {o: {"loss_increase": 0.0, **taken, "params": params} for o, taken in each.items() if taken}
        if ways.kept:
            found[name][AS_IT_IS] |= {"next_token_change_nats": 0.0, "output_error": 0.0}
    anchor = ways.anchor if ways.anchor in options else options[-1]
    plain = inputs if way["compensated"] else {name: replace(seen, products=None) for name, seen in inputs.items()}
    for option in options:
        if option.removes:  # parts are removed as one
            parts: dict[str, dict[str, nn.Module]] = {}
            for name, module in group.items():
                parts.setdefault(part_of(name), {})[name] = module
            units = list(parts.values())
        elif (how == EVERY and option not in ways.told) or (how == ONE and option == anchor):
            units = [{name: module} for name, module in group.items()]
        elif how == LAYER and option == anchor:
            units = [dict(group)]
        else:
            continue
        for unit in units:
            _measure(trial, index, unit, option, ways, inputs if ways.needs_products(option) else plain, found)
    _tell_others(group, options, ways, plain, found)
    return found


def _measure(
    trial: Trial, index: int, unit: Mapping[str, nn.Module], option: Any, ways: Ways, inputs: Mapping[str, Moments],
    found: Found,
) -> None:  # fmt: skip
    """Change some matrices of a layer together, write down what it costs, and change them back."""
    changed = {
        name: ways.weights(module, option, inputs.get(name))
        for name, module in unit.items()
        if str(option) in found[name]
    }
    if not changed:
        return
    kept = {name: matrix_of(unit[name]).clone() for name in changed}
    try:
        for name, new in changed.items():
            assert new is not None
            matrix_of(unit[name]).copy_(new)
        increase, next_token = trial.compare(index)
        # Of matrices changed together, each answers for its share of what their outputs changed; removed ones alike.
        moved = {name: _moved(kept[name], matrix_of(unit[name]), inputs.get(name)) for name in changed}
    finally:
        for name, weight in kept.items():
            matrix_of(unit[name]).copy_(weight)
    total = sum(moved.values())
    for name in changed:
        share = moved[name] / total if total else 1 / len(changed)
        found[name][str(option)] |= {
            "loss_increase": increase * share, "next_token_change_nats": next_token * share, "output_error": moved[name]
        }  # fmt: skip


def _tell_others(
    group: Mapping[str, nn.Module], options: Sequence[Any], ways: Ways, inputs: Mapping[str, Moments], found: Found
) -> None:
    """Tell the options that were not measured by how much they change the outputs, beside those that were."""
    for name, module in group.items():
        untold = [o for o in options if "output_error" not in found[name].get(str(o), {}) and not o.removes]
        if not untold:
            continue
        matrix = matrix_of(module)
        moved = {
            str(option): _moved(matrix, new, inputs.get(name))
            for option in untold
            if (new := ways.weights(module, option, inputs.get(name))) is not None
        }
        measured = [found[name].get(str(o), {}) for o in options if str(o) not in moved and not o.removes]
        known = [(choice["output_error"], choice["loss_increase"]) for choice in measured if "output_error" in choice]
        for option, change in moved.items():
            if known:
                found[name][option] |= {"output_error": change, "loss_increase": told_increase(change, known)}
            else:  # nothing of this matrix could be measured: told by nothing, never changed
                del found[name][option]


def told_increase(change: float, known: Sequence[tuple[float, float]]) -> float:
    """Return the increase of the loss that a change of the outputs brings, told from pairs (change, increase) of others.

    Between two of them by the power law through both; beyond them in proportion to the nearest.

    >>> f"{told_increase(0.02, [(0.01, 0.1), (0.04, 1.6)]):.3g} {told_increase(0.005, [(0.01, 0.1)]):.3g}"
    '0.4 0.05'
    """
    below = max((pair for pair in known if pair[0] <= change), default=None)
    above = min((pair for pair in known if pair[0] >= change), default=None)
    if below and above and below[0] < above[0] and min(*below, *above) > 0:
        return below[1] * (change / below[0]) ** (math.log(above[1] / below[1]) / math.log(above[0] / below[0]))
    nearest = below or above
    assert nearest is not None, "told from nothing"
    return nearest[1] * change / nearest[0] if nearest[0] else 0.0


def _moved(before: torch.Tensor, after: torch.Tensor, inputs: Moments | None) -> float:
    """Return the squared change of a matrix's outputs over their squares, on the vectors that enter it."""
    before, after = before.float(), after.float()
    if inputs is None:
        return ((after - before).square().sum() / before.square().sum().clamp_min(1e-30)).item()
    sample = inputs.sample.T
    return (((after - before) @ sample).square().sum() / (before @ sample).square().sum().clamp_min(1e-30)).item()


class _Kept:
    """How sensitivities are measured and what is known of each layer, kept in the session's workspace until all is."""

    def __init__(self, session: Session, asked: Any) -> None:
        self.way: dict[str, Any] | None = None
        self.layers: dict[int, Found] = {}
        self._path = session.workspace / f"sensitivities-{digest(asked)[:16]}.json"
        if self._path.exists():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self.way, self.layers = kept["way"], {int(i): found for i, found in kept["layers"].items()}

    def add(self, index: int, found: Found) -> None:
        self.layers[index] = found
        write_json(self._path, {"way": self.way, "layers": self.layers})

    def all(self) -> Found:
        self._path.unlink(missing_ok=True)
        return {name: choices for _, layer in sorted(self.layers.items()) for name, choices in layer.items()}


def calibration_tokens(session: Session) -> torch.Tensor:
    vocabulary = session.model.config.get_text_config().vocab_size
    rows = calibration_rows(session, bytes_per_token=4.0 * vocabulary)
    limit = min(TOKENS_MAX, LOGIT_BYTES_MAX // (4 * vocabulary))
    return _fewer(rows, limit / rows.numel())


def _fewer(tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Return that share of tokens (rows, tokens): whole rows, then a shorter row, never below 32 tokens."""
    wanted = max(32, int(tokens.numel() * min(share, 1.0)))
    rows = max(1, wanted // tokens.shape[1])
    return tokens[:rows, : max(2, wanted // rows)]


class Trial:
    """The unchanged model's answers, and a way to compare a changed one that skips the layers before the change."""

    def __init__(self, model: nn.Module, layers: nn.ModuleList, tokens: torch.Tensor) -> None:
        self.model, self.layers, self.tokens = model, layers, tokens
        self.outputs: list[Any] = [None] * len(layers)
        handles = [layer.register_forward_hook(self._keep(i)) for i, layer in enumerate(layers)]
        try:
            began = time.monotonic()
            self.reference = self._log_probs()
            self.reference_loss = self._loss(self.reference)
            self.forward_s = time.monotonic() - began
        finally:
            for handle in handles:
                handle.remove()
        if not torch.isfinite(self.reference).all():
            raise CandidateFailed("non_finite", "the unchanged model gives numbers that are not finite")

    @property
    def fingerprint(self) -> list[Any]:
        """What tells this model and text from others."""
        return [list(self.tokens.shape), f"{self.reference_loss:.6f}"]

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self.outputs[index] = output

        return hook

    def _log_probs(self) -> torch.Tensor:
        return self.model(self.tokens, use_cache=False).logits.float().log_softmax(-1)

    def _loss(self, log_probs: torch.Tensor) -> float:
        """Return the mean loss of the next token, in nats."""
        following = self.tokens[:, 1:, None].to(log_probs.device)
        return -log_probs[:, :-1].gather(-1, following).mean(dtype=torch.float64).item()

    def watch(self, index: int, modules: Mapping[str, nn.Module], *, full: bool) -> dict[str, Moments]:
        """Return what enters each matrix of a layer, by name; those the text never came through are left out, and tables."""
        inside = {id(module) for layer in self.layers[index : index + 1] for module in layer.modules()}
        if not inside.intersection(map(id, modules.values())):
            return {}
        recorder = _Recorder(self.layers[index], full=full)
        recorder.start()
        try:
            self.divergence(index)
        finally:
            recorder.stop()
        seen = {id(matrix.module): matrix.inputs for matrix in recorder.found}
        return {name: seen[id(module)] for name, module in modules.items() if id(module) in seen}

    def divergence(self, first: int) -> float:
        """Return the mean KL(unchanged || now) in nats for each token; layers before `first` are known unchanged."""
        return self.compare(first)[0]

    def compare(self, first: int) -> tuple[float, float]:
        """Return that divergence, and by how much the mean loss of the next token changed."""
        for layer, output in zip(self.layers[:first], self.outputs):
            layer.forward = lambda *args, _output=output, **kwargs: _copy(_output)
        try:
            changed = self._log_probs()
        finally:
            for layer in self.layers[:first]:
                del layer.forward
        kl = (self.reference.exp() * (self.reference - changed)).sum(-1).mean().item()
        if kl != kl:
            raise CandidateFailed(
                "non_finite", f"rounding a matrix gives numbers that are not finite, from layer {first} on"
            )
        return max(kl, 0.0), self._loss(changed) - self.reference_loss


def _copy(output: Any) -> Any:
    """Return a layer's output anew, since some models add to it in place."""
    if isinstance(output, tuple):
        return (output[0].clone(), *output[1:])
    return output.clone()
