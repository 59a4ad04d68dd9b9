"""What a machine really gives each engine and weight format, fitted to a few measurements of small models on it.

A time is a sum of parts: bytes over a bandwidth, operations over a rate, a floor that goes with the number of kernels. A factor on the whole sum, as calibration.py learns within a run,
would carry the floor of a small model over to a large one. So what is learned here are the rates themselves. Each has a
prior from data/efficiencies.csv and engine_overheads.csv; its error in log space is the machine's, the engine's and the
format's (or one of them), each normal, so a format nobody measured learns from its engine's others. Measurements of
models of two sizes tell rates and floors apart.

The fit is Gauss-Newton on the very cost terms that predict (Bayesian least squares, Huber's weights against outliers);
what it finds takes the place of the priors in the machine's profile (`Device.reached`), so everything that prices plans
on the machine uses it, and the corrections of calibration.py learn what is left over. A metric keeps its priors where they
predict models left out of the fit better than the laws do. Intervals are widened by the errors of what was left out
(jackknife conformal prediction, as in calibrate.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.calibrate import Group, conformal_quantile
from cost_models.case import SHAPES_LOG_SD, Case, case_of, rates_row
from cost_models.demand import Node, chains
from cost_models.efficiency import read_rows
from cost_models.predict import Figures, Z, predict_term
from cost_models.terms import terms
from knowledge_base.errors import EnvironmentProblem
from knowledge_base.types import Device, Hardware, LawCheck, Measurement, Reached

Key = tuple[str, str, str, bool]  # engine, weight format, type computed with, compiled: as cost_models.demand.Node.key

# What is learned, by the rates it scales, and the shares of its prior variance: the machine's, the engine's, the format's.
KNOBS = {
    "read": (0.3, 0.3, 0.4),
    "flop": (0.3, 0.3, 0.4),
    "overhead": (0.0, 0.6, 0.4),
    "runtime": (0.0, 1.0, 0.0),
}
TELLS = {"tpot_s": ("read", "overhead"), "ttft_s": ("flop", "overhead"), "peak_memory_bytes": ("runtime",)}
NOISE = {"tpot_s": 0.05, "ttft_s": 0.08, "peak_memory_bytes": 0.02}  # what the laws leave open, before it is seen
NOISE_WEIGHT = 4.0  # measurements that expectation is worth
HUBER = 2.5  # standard deviations beyond which a measurement pulls no harder
ENOUGH_MODELS = 3  # that a whole model can be left out to judge the laws
ROUNDS = 12
STEP = 1e-3  # of the numerical derivative, in log space
FARTHEST = 1.0  # a round moves no rate by more than this in log space


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """The fitted rates, for every format the priors know of engines that were measured."""

    reached: tuple[Reached, ...]
    checks: tuple[LawCheck, ...]


def fit_laws(groups: Sequence[Group], hardware: Hardware) -> Laws:
    """Return the machine's laws by measurements of one or more models on it; nothing where there are none."""
    device = replace(hardware.device, reached=())
    bare = replace(hardware, devices=(device,))
    plain = [found for group in groups if (found := _Group.of(group, bare)) is not None]
    if not plain:
        return Laws(reached=(), checks=())
    metrics = [m for m in TELLS if any(len(g.seen[m]) for g in plain)]
    checks, kept = [], []
    for metric in metrics:
        fitted = _Fit(plain, [metric])
        check = fitted.check(metric)
        checks.append(check)
        if check.kept:
            kept.append(metric)
    if not kept:
        return Laws(reached=(), checks=tuple(checks))
    return Laws(reached=_Fit(plain, kept).reached(device), checks=tuple(checks))


class _Group:
    """Measurements of one model under one workload, with their plans as columns."""

    def __init__(self, good: list[Measurement], nodes: list[Node], case: Case) -> None:
        self.good, self.nodes, self.case = good, nodes, case
        self.forms = [(node.key[0], _form(node.key)) for node in nodes]
        self.seen = {metric: self._seen(metric) for metric in TELLS}

    @classmethod
    def of(cls, group: Group, hardware: Hardware) -> _Group | None:
        measurements, model, workload = group
        memo = chains(model, workload)
        # How many drafted tokens are accepted is the text's doing, not the machine's.
        found = [
            (m.as_alone, node)
            for m in measurements
            if m.failure is None
            and model.kind == "decoder"
            and (node := memo.node(m.plan)).demand.tokens_per_step == 1
            and not node.demand.offloaded_share  # nor a disk's pace
        ]
        if not found:
            return None
        good, nodes = [m for m, _ in found], [node for _, node in found]
        return cls(good, nodes, case_of(nodes, workload, hardware))

    def _seen(self, metric: str) -> list[int]:
        return [
            i
            for i, m in enumerate(self.good)
            if (f := m.figures.get(metric)) is not None and f.source == "measured" and f.value > 0
        ]

    def measured(self, metric: str) -> np.ndarray:
        return np.log([self.good[i].figures[metric].value for i in self.seen[metric]])

    def noise_variance(self, metric: str) -> np.ndarray:
        """Return (seen,) variances that the measurements themselves bring: their intervals, and a crowded machine."""
        variances = []
        for i in self.seen[metric]:
            figure, protocol = self.good[i].figures[metric], self.good[i].protocol
            half = (figure.high - figure.low) / 2 / figure.value
            crowd = protocol.get("other_cores", 0.0) / max(1, protocol.get("cores", 1))
            variances.append(half**2 + (crowd**2 if metric != "peak_memory_bytes" else 0.0))
        return np.array(variances)

    def predicted(self, metric: str, shifts: dict[str, np.ndarray]) -> np.ndarray:
        """Return (seen,) log predictions with every rate scaled by exp(shift), shifts of shape (plans,)."""
        case = bent(self.case, shifts)
        figures = Figures()
        for name in (*terms.get(metric).USES, metric):
            figures[name] = predict_term(terms.get(name), case, figures)
        mid = np.broadcast_to(figures[metric].mid, (len(self.good),))
        return np.log(mid[self.seen[metric]])


def bent(case: Case, shifts: dict[str, Any]) -> Case:
    """Return the case with the rates of each knob scaled by exp(shift)."""
    rates = case.rates
    overhead = np.exp(shifts.get("overhead", 0.0))
    return replace(
        case,
        rates=replace(
            rates,
            streamed_bytes_per_s=rates.streamed_bytes_per_s * np.exp(shifts.get("read", 0.0)),
            flop_per_s=rates.flop_per_s * np.exp(shifts.get("flop", 0.0)),
            kernel_s=rates.kernel_s * overhead,
            step_s=rates.step_s * overhead,
            runtime_bytes=rates.runtime_bytes * np.exp(shifts.get("runtime", 0.0)),
        ),
    )


def prior_log_sd(case: Case, knob: str) -> np.ndarray:
    """Return (plans,) prior standard deviation of one knob."""
    rates = case.rates
    sd = {
        "read": rates.weights_log_sd,
        "flop": np.hypot(rates.weights_log_sd, SHAPES_LOG_SD),
        "overhead": rates.overhead_log_sd,
        "runtime": rates.runtime_log_sd,
    }
    return np.asarray(sd[knob], dtype=float)


class _Fit:
    """One joint fit of the knobs that some metrics tell of. Effects are in prior standard deviations: each is N(0, 1)."""

    def __init__(self, groups: Sequence[_Group], metrics: Sequence[str]) -> None:
        self.groups, self.metrics = groups, metrics
        self.knobs = [k for k in KNOBS if any(k in TELLS[m] for m in metrics)]
        self.numbers: dict[str, int] = {}
        designs = [{k: self._design(g, k) for k in self.knobs} for g in groups]
        width = len(self.numbers)
        self.designs = [
            {k: np.pad(d, ((0, 0), (0, width - d.shape[1]))) for k, d in design.items()} for design in designs
        ]
        rows = [(g, m) for g in range(len(groups)) for m in metrics if groups[g].seen[m]]
        self.row_metric = np.concatenate([[m] * len(groups[g].seen[m]) for g, m in rows])
        self.row_model = np.concatenate(
            [[groups[g].good[0].plan.model_digest] * len(groups[g].seen[m]) for g, m in rows]
        )
        self.target = np.concatenate([groups[g].measured(m) for g, m in rows])
        self.own = np.concatenate([groups[g].noise_variance(m) for g, m in rows])
        self.rows = rows
        self.noise = dict(NOISE)
        self.z = np.zeros(width)
        self.before = self.target - self._predicted(self.z)
        self._solve()

    def _design(self, group: _Group, knob: str) -> np.ndarray:
        """Return (plans, effects so far): what each effect, one prior standard deviation of it, adds to the knob."""
        sd = prior_log_sd(group.case, knob)
        entries = []
        for i, (engine, form) in enumerate(group.forms):
            for share, name in zip(KNOBS[knob], ("", f":{engine}", f":{form}"), strict=True):
                if share:
                    number = self.numbers.setdefault(f"{knob}{name}", len(self.numbers))
                    entries.append((i, number, math.sqrt(share) * sd[i]))
        matrix = np.zeros((len(group.forms), len(self.numbers)))
        for i, number, weight in entries:
            matrix[i, number] = weight
        return matrix

    def _shifts(self, g: int, z: np.ndarray) -> dict[str, np.ndarray]:
        return {knob: design @ z for knob, design in self.designs[g].items()}

    def _predicted(self, z: np.ndarray) -> np.ndarray:
        return np.concatenate([self.groups[g].predicted(m, self._shifts(g, z)) for g, m in self.rows])

    def _jacobian(self, z: np.ndarray, now: np.ndarray) -> np.ndarray:
        """Return (rows, effects): how log predictions answer to each effect."""
        whole = np.zeros((len(now), len(z)))
        for knob in self.knobs:
            ahead = np.concatenate([
                self.groups[g].predicted(m, {**(s := self._shifts(g, z)), knob: s[knob] + STEP}) for g, m in self.rows
            ])  # fmt: skip
            weights = np.concatenate([self.designs[g][knob][self.groups[g].seen[m]] for g, m in self.rows])
            whole += ((ahead - now) / STEP)[:, None] * weights
        return whole

    def _solve(self) -> None:
        for _ in range(ROUNDS):
            now = self._predicted(self.z)
            residual = self.target - now
            self.jacobian = self._jacobian(self.z, now)
            self.weights = self._weights(residual)
            step = _ridge(self.jacobian, self.weights, residual + self.jacobian @ self.z) - self.z
            moved = max((np.abs(d @ step).max() for design in self.designs for d in design.values()), default=0.0)
            self.z = self.z + step * min(1.0, FARTHEST / max(moved, 1e-12))
            self._see_noise(self.target - self._predicted(self.z))
            if moved < 1e-4:
                break
        self.residual = self.target - self._predicted(self.z)

    def _variance(self) -> np.ndarray:
        return self.own + np.array([self.noise[m] ** 2 for m in self.row_metric])

    def _weights(self, residual: np.ndarray) -> np.ndarray:
        variance = self._variance()
        return np.minimum(1.0, HUBER * np.sqrt(variance) / np.maximum(np.abs(residual), 1e-12)) / variance

    def _see_noise(self, residual: np.ndarray) -> None:
        """Let the residuals tell how much the laws leave open, as far as there are more of them than effects."""
        for metric in self.metrics:
            rows = self.row_metric == metric
            excess = np.minimum(np.square(residual[rows]), (HUBER * NOISE[metric] * 2) ** 2) - self.own[rows]
            known = NOISE_WEIGHT * NOISE[metric] ** 2
            self.noise[metric] = math.sqrt(max((known + excess.sum()) / (NOISE_WEIGHT + rows.sum()), known / 20))

    # ------------------------------------------------------------ what the fit is worth

    def left_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows,) errors of each row's prediction without its model, and their standard deviations.

        Without the row alone where there are fewer than three models: rates and floors cannot be told apart by one.
        By linear algebra at the solution: nothing is fitted again.
        """
        goal = self.residual + self.jacobian @ self.z
        errors, sds = np.zeros(len(goal)), np.zeros(len(goal))
        models = list(dict.fromkeys(self.row_model))
        blocks = [np.array([i]) for i in range(len(goal))]
        if len(models) >= ENOUGH_MODELS:
            blocks = [np.flatnonzero(self.row_model == model) for model in models]
        for block in blocks:
            weights = self.weights.copy()
            weights[block] = 0.0
            z = _ridge(self.jacobian, weights, goal)
            covariance = _covariance(self.jacobian, weights)
            rows = self.jacobian[block]
            errors[block] = goal[block] - rows @ z
            sds[block] = np.sqrt(np.einsum("ij,jk,ik->i", rows, covariance, rows) + self._variance()[block])
        return errors, sds

    def check(self, metric: str) -> LawCheck:
        """Return whether the laws predict what they were not fitted to better than the priors do, or well enough."""
        errors, _ = self.left_out()
        before, after = (float(np.median(np.abs(np.expm1(-e)))) for e in (self.before, errors))
        return LawCheck(
            metric=metric,
            n=len(errors),
            before_ratio=before,
            after_ratio=after,
            kept=after <= max(before, NOISE[metric]),
        )

    def reached(self, device: Device) -> tuple[Reached, ...]:
        """Return the rates of every format the priors know of the engines measured."""
        errors, sds = self.left_out()
        widening = {
            m: conformal_quantile([abs(e) / s for e, s in zip(errors[rows], sds[rows], strict=True)]) / Z
            for m in self.metrics
            for rows in [self.row_metric == m]
        }
        covariance = _covariance(self.jacobian, self.weights)
        found = []
        for engine in dict.fromkeys(engine for g in self.groups for engine, _ in g.forms):
            for key, n in self._keys(engine).items():
                row = _prior(key, device)
                if row is None:
                    continue
                shift, sd = {}, {}
                for knob in self.knobs:
                    told = next(m for m in self.metrics if knob in TELLS[m])
                    design, unknown = self._row(row.log_sds[knob], knob, engine, _form(key))
                    variance = float(design @ covariance @ design) + self.noise[told] ** 2
                    # What left-out errors say of the fit says nothing of a format that nobody measured.
                    variance = widening[told] ** 2 * variance + max(1.0, widening[told]) ** 2 * unknown
                    shift[knob], sd[knob] = float(design @ self.z), math.sqrt(variance)
                found.append(row.reached(shift, sd, n=n, metrics=tuple(self.metrics)))
        return tuple(found)

    def _keys(self, engine: str) -> dict[Key, int]:
        """Return the formats to tell of an engine, those of the table and those measured, with how often each was."""
        measured = [n.key for g in self.groups for n in g.nodes if n.key[0] == engine]
        table = [
            (engine, r["weight_format"], r["rate_dtype"] or r["weight_format"], r["compiled"] == "1")
            for r in read_rows("efficiencies.csv")
            if r["engine"] == engine and r["weight_format"] != "*"
        ]
        keys: dict[tuple[str, bool], Key] = {}
        for key in (*measured, *table):  # a format may be computed with in several types; one row serves them all
            keys.setdefault((key[1], key[3]), key)
        counts = [_form(key) for key in measured]
        return {key: counts.count(_form(key)) for key in keys.values()}

    def _row(self, sd: float, knob: str, engine: str, form: str) -> tuple[np.ndarray, float]:
        """Return one format's row of the design, and the variance of effects that no measurement took part in."""
        row, unknown = np.zeros(len(self.z)), 0.0
        for share, name in zip(KNOBS[knob], ("", f":{engine}", f":{form}"), strict=True):
            number = self.numbers.get(f"{knob}{name}")
            if number is None:
                unknown += share * sd**2
            else:
                row[number] = math.sqrt(share) * sd
        return row, unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prior:
    """What the tables say of one format on one device."""

    key: Key
    weights_bytes_per_s: float
    flop_per_s: float
    kernel_s: float
    step_s: float
    runtime_bytes: float
    log_sds: dict[str, float]

    def reached(self, shift: dict[str, float], sd: dict[str, float], *, n: int, metrics: tuple[str, ...]) -> Reached:
        """Return the rates scaled by exp(shift); a knob that was not fitted keeps its prior."""
        factor = {knob: math.exp(shift.get(knob, 0.0)) for knob in KNOBS}
        # Where prompts were not timed, what the table does not know of thin shapes is told apart, as in case.py.
        sds = {**self.log_sds, "flop": SHAPES_LOG_SD, **sd}
        engine, weight_format, _, compiled = self.key
        return Reached(
            engine=engine, weight_format=weight_format, compiled=compiled,
            weights_bytes_per_s=self.weights_bytes_per_s * factor["read"], read_log_sd=sds["read"],
            flop_per_s=self.flop_per_s * factor["flop"], flop_log_sd=sds["flop"],
            kernel_s=self.kernel_s * factor["overhead"], step_s=self.step_s * factor["overhead"],
            overhead_log_sd=sds["overhead"], runtime_bytes=self.runtime_bytes * factor["runtime"],
            runtime_log_sd=sds["runtime"], n=n, metrics=metrics,
        )  # fmt: skip


def _prior(key: Key, device: Device) -> _Prior | None:
    """Return the tables' rates of a format; None where the device has no rate of the type it is computed with."""
    try:
        read, peak, flop, kernel, step, *rest = rates_row(key, device, {})
    except EnvironmentProblem:
        return None
    _, _, _, runtime, runtime_sd, weights_sd, shapes_sd, overhead_sd = rest
    return _Prior(
        key=key, weights_bytes_per_s=read * device.memory_bytes_per_s, flop_per_s=flop * peak, kernel_s=kernel,
        step_s=step, runtime_bytes=runtime,
        log_sds={
            "read": weights_sd, "flop": math.hypot(weights_sd, shapes_sd), "overhead": overhead_sd,
            "runtime": runtime_sd,
        },
    )  # fmt: skip


def _form(key: Key) -> str:
    engine, weight_format, _, compiled = key
    return f"{engine}/{weight_format}{'/compiled' if compiled else ''}"


def _ridge(jacobian: np.ndarray, weights: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return the effects that explain goal best, each held to N(0, 1)."""
    normal = jacobian.T @ (weights[:, None] * jacobian) + np.eye(jacobian.shape[1])
    return np.linalg.solve(normal, jacobian.T @ (weights * goal))


def _covariance(jacobian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return what remains unknown of the effects, (effects, effects)."""
    return np.linalg.inv(jacobian.T @ (weights[:, None] * jacobian) + np.eye(jacobian.shape[1]))
