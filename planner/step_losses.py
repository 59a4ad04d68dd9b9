"""What each rewriting step alone costs this model in quality, found in seconds before any plan with it is built.

Published losses of pruning and factorising differ more between models than between methods: a quarter of the feed-forward
channels is nothing to one model and half of what the next one knew. So the steps of plans that may be good are executed in
memory, each on the model as it came and with a part of the calibration text, and judged on windows of that text which no
step sees. What they lose is told from then on instead of published losses; it is no plan's figure, and no answer shows it
as one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base import registry
from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import plain, restore
from knowledge_base.types import Figure, KnownLoss, Model, Plan, Step, Workload
from planner.data import CALIBRATION_TOKENS

if TYPE_CHECKING:
    import torch

    from planner.isolation import Candidate

Progress = Callable[[str, float], None]
ANY_ENGINE = "transformers"
Z = 1.96  # standard deviations to either side that hold 95 %
STAGE = "compress"  # of the techniques that rewrite the model itself, whichever engine runs it
CALIBRATION_WINDOWS, JUDGED_WINDOWS = 16, 8  # at most, of calibration text
BESIDE_OTHERS, FLOOR = 0.3, 0.002  # of the loss, and of its logarithm, that it may be off beside other steps
TOLD, TOLD_FLOOR = 0.5, 0.01  # the same of a setting that was not tried
MOST_NATS = 50.0  # of loss for each token: more says no more
REFUSED = ("unsupported", "build_error", "non_finite")  # after which the next step may do


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoss:
    """What a step alone loses; `loss` is None where it cannot be executed on this model, and `why` says so."""

    step: Step
    loss: Figure | None = None
    why: str = ""


def kept(path: Path) -> StepLoss | None:
    """Return what was found before; None where nothing was, or the file is damaged."""
    try:
        return restore(StepLoss, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_losses(model: Model, workload: Workload, steps: Iterable[Step], found: Sequence[StepLoss]) -> Model:
    """Return the model with what was found of single steps, and what that tells of those techniques' other settings.

    A setting that was not tried loses what its published loss says, on the scale of those that were: between two of them
    in proportion, beyond the harshest in proportion to it.
    """
    from cost_models.demand import chains

    plain_model = model.but(step_losses=())
    memo = chains(plain_model, workload)

    def published(step: Step) -> float:
        demand = memo.node(Plan(model_digest=model.digest, engine=ANY_ENGINE, steps=(step,))).demand
        return math.log(demand.perplexity_ratio)

    known: dict[Step, KnownLoss] = {}
    scales: dict[str, list[tuple[float, float]]] = {}
    for step, loss in ((each.step, each.loss) for each in found if each.loss):
        mid = max(0.0, math.log1p(loss.value))
        own_sd = (math.log1p(loss.high) - math.log1p(loss.low)) / (2 * Z)
        because = f"{step} alone costs this model {loss.value:+.1%} of perplexity, in short"
        spread = math.hypot(own_sd, BESIDE_OTHERS * mid, FLOOR)
        known[step] = KnownLoss(step=step, log_ratio=mid, log_sd=spread, because=because)
        scales.setdefault(step.technique, []).append((published(step), mid))
    for step in dict.fromkeys(steps):
        if step not in known and (scale := scales.get(step.technique)):
            mid = _on_scale(published(step), sorted({(0.0, 0.0), *scale}))
            because = f"{step} is told from other settings of it on this model"
            spread = math.hypot(TOLD * mid, TOLD_FLOOR)
            known[step] = KnownLoss(step=step, log_ratio=mid, log_sd=spread, because=because)
    return model.but(step_losses=tuple(known.values()))


def _on_scale(published: float, scale: Sequence[tuple[float, float]]) -> float:
    """Return the loss of a setting from pairs (published, found) of others, the first of them (0, 0).

    >>> round(_on_scale(0.3, [(0.0, 0.0), (0.2, 0.01), (0.4, 0.03)]), 3), round(_on_scale(0.8, [(0.0, 0.0), (0.4, 0.03)]), 3)
    (0.02, 0.06)
    """
    import numpy

    farthest, most = scale[-1]
    if published > farthest > 0:
        return most * published / farthest
    return float(numpy.interp(published, [x for x, _ in scale], [y for _, y in scale]))


def can_be_tried(step: Step) -> bool:
    """Return whether a step rewrites the model by itself, so that what it loses can be found without building a plan."""
    module = registry.techniques.get(step.technique)
    return module.TECHNIQUE.stage == STAGE and not module.TECHNIQUE.lossless and not hasattr(module, "options")


def memory_bytes(model: Model, step: Step) -> float:
    """Return what trying a step holds in memory at most: the model as it came, and one that is being rewritten."""
    tokens = (CALIBRATION_WINDOWS + JUDGED_WINDOWS) * CALIBRATION_TOKENS
    return 2 * model.weight_bytes + registry.techniques.get(step.technique).TECHNIQUE.holds.bytes_for(model, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate process that holds the model as it came and executes steps on copies of it, one after another."""

    candidate: Candidate
    windows: int  # of text that losses are of
    tokens: int  # in them
    seed: int

    @classmethod
    def of(
        cls, candidate: Candidate, model: Model, *, model_folder: Path, calibration: Path, seed: int, allow_pickle: bool,
        time_limit_s: float, progress: Progress | None = None,
    ) -> Trial:  # fmt: skip
        """Have a candidate load the model and judge it.

        Args:
            calibration: .npy of int32 (windows, tokens), at least two windows.

        Raises:
            CandidateFailed: it cannot, or not in that time.
        """
        from planner.claims import number

        payload = {
            "model_folder": str(model_folder.resolve()), "model": plain(model), "calibration": str(calibration.resolve()),
            "seed": seed, "allow_pickle": allow_pickle,
        }  # fmt: skip
        opened = candidate.call("open_steps", payload, timeout_s=time_limit_s, progress=progress)
        windows, tokens = (int(number(opened, name, 1, 1e9)) for name in ("windows", "tokens"))
        return cls(candidate=candidate, windows=windows, tokens=tokens, seed=seed)

    def loss_of(self, step: Step, *, time_limit_s: float, progress: Progress | None = None) -> StepLoss:
        """Return what a step alone loses.

        Raises:
            CandidateFailed: "timeout", it takes longer; or the candidate ended, for lack of memory for example.
        """
        from planner.claims import numbers
        from planner.statistics import mean_figure

        try:
            reply = self.candidate.call("try_step", {"step": plain(step)}, timeout_s=time_limit_s, progress=progress)
        except CandidateFailed as error:
            if error.kind not in REFUSED:
                raise
            return StepLoss(step=step, why=error.message)
        increases = numbers(reply, "increase_nats", self.windows, -MOST_NATS, MOST_NATS)
        mean = mean_figure(increases, seed=self.seed)
        value, low, high = (math.expm1(x) for x in (mean.value, mean.low, mean.high))
        note = (
            f"paired over {self.windows} windows of calibration text, {self.tokens} tokens, which the step did not see"
        )
        return StepLoss(step=step, loss=replace(mean, value=value, low=low, high=high, samples=(), note=note))


def open_steps(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """In the candidate: load the model and judge it as it came.

    Payload: model_folder, model, calibration (.npy, int32 (windows, tokens)), seed, allow_pickle.
    """
    import numpy
    import torch

    from knowledge_base.engines import _torch_artefact
    from knowledge_base.techniques import _loading

    progress("loading the model", 0.0)
    rows = torch.from_numpy(numpy.load(payload["calibration"], allow_pickle=False).astype("int64"))
    judged = rows[-min(JUDGED_WINDOWS, len(rows) // 2) :]
    session = _loading.load_session(
        Path(payload["model_folder"]), restore(Model, payload["model"]),
        calibration=rows[: len(rows) - len(judged)][:CALIBRATION_WINDOWS], seed=payload["seed"], workspace=Path.cwd(),
        allow_pickle=bool(payload["allow_pickle"]),
    )  # fmt: skip
    _torch_artefact.lay_out(session.model)
    state["steps"] = (session, judged, _losses(session.model, judged))
    return {"windows": len(judged), "tokens": judged.numel()}


def try_step(state: dict[str, Any], payload: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """In the candidate: execute a step on a copy of the model; return by how much each window's loss grew, in nats.

    Payload: step.
    """
    import copy

    session, judged, before = state["steps"]
    step = restore(Step, payload["step"])
    progress(f"trying {step}", 0.0)
    copied = replace(session, model=copy.deepcopy(session.model), runtime={}, storage={}, notes={}, progress=progress)
    registry.techniques.get(step.technique).execute(copied, **step.knobs)
    increase = (_losses(copied.model, judged) - before).clamp(-MOST_NATS, MOST_NATS)
    if not increase.isfinite().all():
        raise CandidateFailed("non_finite", f"{step} gives losses that are not finite")
    return {"increase_nats": increase.tolist()}


def _losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the next token of each row, in nats, float64 (rows,)."""
    import torch
    from torch.nn.functional import cross_entropy

    losses = []
    with torch.inference_mode():
        for row in rows.to(model.device):
            logits = model(row[None], use_cache=False).logits[0, :-1].float()
            losses.append(cross_entropy(logits, row[1:].to(logits.device)).double().cpu())
    return torch.stack(losses)
