"""The forecast of a run, made before it starts from the predicted figures of the plans it is likely to measure.

What earlier runs on this machine took corrects each amount and sets the width of its interval; before the first run that
is a wide prior. Intervals are meant to hold 90 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from knowledge_base import units
from knowledge_base.build_memory import PROCESS_BYTES, loads_weights
from knowledge_base.metrics import METRICS, find_metric
from knowledge_base.registry import techniques
from planner.run_forecast import STAGES, Amount, RunForecast
from planner.step_losses import can_be_tried

if TYPE_CHECKING:
    import numpy as np

    from knowledge_base.types import Model, Plan, Workload
    from planner.spec import Spec
    from planner.store import Record, Store
    from search.problem import Priced
    from search.space import Space

BUILD_SHARE = 0.1  # of the time limit, that building one candidate may be predicted to take
CHOOSING_SHARE = 0.15  # of it, that measuring what a step can choose from may take, or LEAST_CHOOSING_S
LEAST_CHOOSING_S = 10.0
TRYING_SHARE = 0.1  # of it, that trying what single steps lose may take; nothing where that is below LEAST_TRYING_S
LEAST_TRYING_S = 10.0
FINALIST_SHARE = 0.3  # of the time limit, kept for re-measuring the finalists
FEWEST_FINALISTS, MOST_FINALISTS = 3, 8
OVERRUN_S = 30.0  # by which a run may pass its time limit: a candidate is stopped, the answer is written

# Priors, of the two cores the demo ran on.
PROCESS_S = 5.0  # that a candidate's processes take to start, load and end
PROBE_S = 20.0
PREPARE_S, SEARCH_S, ROUND_S = 3.0, 4.0, 1.0
READ_BYTES_PER_S = 1e9  # the weights are read once to see that all are finite
PLANNER_BYTES = 200 * 2**20
FRAMEWORK_BYTES = 300 * 2**20  # of torch and transformers, shared by the candidates forked from one server
RUNTIME_BYTES = 48 * 2**20  # a process's own beside weights and cache
RUN_FILES_BYTES, PLAN_FILES_BYTES = 2**20, 100 * 2**10  # study, logs, token files; records of each plan

ANSWERS_BYTES = 256 * 2**20  # of the unchanged model, kept while a build trains towards them

Z = 1.645  # standard deviations to either side that hold 90 %
PRIOR_WEIGHT = 2.0  # earlier runs a prior counts for
LEAST_LOG_SD = 0.05
RECENT = 30  # earlier facts that are learned from


# ---------------------------------------------------------------- what was learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What runs on this machine took, as ratios to their priors, and which plans need not be measured again."""

    ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # by stage, amount, or "measure ENGINE"
    known: frozenset[Plan] = frozenset()

    def of(self, name: str) -> tuple[float, ...]:
        """Return the latest ratios of a name."""
        return self.ratios.get(name, ())[-RECENT:]


def experience(
    store: Store, fingerprint: str, spec: Spec, model_digest: str, records: Sequence[Record] | None = None
) -> Experience:
    """Return what the store tells of runs of this effort on a machine.

    Args:
        records: those of the machine, where they were read already.
    """
    from planner.measuring import PROTOCOLS

    protocol = PROTOCOLS[spec.search.effort]
    ratios: dict[str, list[float]] = {}
    known = set()
    for record in sorted(records or store.records(fingerprint), key=lambda r: r.measurement.taken_at):
        seen, taken = record.measurement.protocol, record.measurement
        if any(seen.get(name) != getattr(protocol, name) for name in ("requests", "least_s", "most_s")):
            continue
        if record.model.digest == model_digest and record.workload == spec.workload:
            known.add(taken.plan)
        figures = {name: f.value for name, f in taken.as_alone.figures.items()}
        if taken.failure is None and {"build_s", "latency_s", "ttft_s"} <= set(figures) and "wall_s" in seen:
            prior = _measuring_s(spec.search.effort, record.workload, figures["latency_s"], figures["ttft_s"])
            fact = float(seen["wall_s"]) - figures["build_s"] - float(seen.get("lock_wait_s", 0.0))
            if driven := seen.get("load"):
                fact -= float(driven.get("wall_s", 0.0))
            ratios.setdefault(f"measure {taken.plan.engine}", []).append(fact / float(prior))
        if built := seen.get("build_peak_bytes"):
            ratios.setdefault("build memory", []).append(built / _building_bytes(record.model, taken.plan))
    for past in store.forecasts(fingerprint):
        for name, ratio in _learned_from(past).items():
            ratios.setdefault(name, []).append(ratio)
    return Experience(
        ratios={n: tuple(r for r in found if r > 0) for n, found in ratios.items()}, known=frozenset(known)
    )


def _learned_from(past: RunForecast) -> dict[str, float]:
    """Return the ratios of fact to prior that one run teaches; building is compared for each candidate."""
    counted = past.amounts["candidates"]
    found = {}
    for name in ("prepare", "search", "finals", "build"):
        stage = past.stages_s[name]
        found[name] = stage.fact / stage.prior if stage.fact and stage.prior else 0.0
    built = (counted.fact or 0.0) - bool(past.stages_s["unchanged"].fact)
    found["build"] *= (counted.prior - 1) / built if built > 0 else 0.0
    if counted.held:  # what more or fewer plans leave on disk tells nothing of each
        for name in ("peak_memory_bytes", "peak_device_bytes", "disk_bytes"):
            amount = past.amounts[name]
            found[name] = amount.fact / amount.prior if amount.fact and amount.prior else 0.0
    return {name: ratio for name, ratio in found.items() if ratio > 0}


def around(prior: float, log_sd: float, ratios: Sequence[float] = (), because: str = "") -> Amount:
    """Return an amount whose logarithm is about a prior's, moved and narrowed (or widened) by earlier ratios to it.

    >>> around(10, 0.5).mid, round(around(10, 0.5, [2.0] * 18).mid, 1)
    (10, 18.7)
    """
    logs = [math.log(r) for r in ratios]
    weight = PRIOR_WEIGHT + len(logs)
    shift = sum(logs) / weight
    variance = (PRIOR_WEIGHT * log_sd**2 + sum((x - shift) ** 2 for x in logs)) / weight
    spread = math.exp(Z * max(LEAST_LOG_SD, math.sqrt(variance)))
    mid = prior * math.exp(shift) if logs else prior
    told = f"{because}; " if because else ""
    source = f"{len(logs)} earlier on this machine" if logs else "a prior: nothing like it ran here yet"
    return Amount(low=mid / spread, mid=mid, high=mid * spread, prior=prior, because=told + source)


# ---------------------------------------------------------------- the forecast


def foresee(
    spec: Spec,
    priced: Priced,
    learned: Experience,
    *,
    probed: bool = True,
    download_bytes: float = 0.0,
    fresh: bool = False,
) -> RunForecast:
    """Return what a measured run of a spec will take.

    Args:
        priced: a sample of the legal plans, under the spec's budgets and objectives.
        probed: this machine's rates are known; else they are measured first.
        fresh: what the store holds is measured again.
    """
    problem, search = priced.problem, spec.search
    known = frozenset() if fresh else learned.known
    first = problem.space.unchanged()
    unchanged = problem.price([first])
    likely = _likely(spec, priced)
    stages = {
        "prepare": around(
            PREPARE_S + (0.0 if probed else PROBE_S) + problem.model.weight_bytes / READ_BYTES_PER_S, 0.7,
            learned.of("prepare"), "reading the model and the texts" + ("" if probed else ", probing the machine"),
        ),
        "unchanged": _sum([_building(spec, unchanged, [0], learned), _measuring(spec, unchanged, [0], learned)]),
    }  # fmt: skip
    stages["unchanged"] = replace(stages["unchanged"], because="building and measuring the model as it came")
    if first in known:
        stages["unchanged"] = replace(stages["unchanged"], low=0.0, mid=0.0, because="it was measured before")
    build, measure = _building(spec, priced, likely, learned), _measuring(spec, priced, likely, learned)
    most = max(0, min(search.max_measured, problem.space.count()) - 1)
    trying = trying_s(spec, problem.space) / 2
    room_s = max(0.0, search.time_limit_s - finals_reserve_s(spec) - stages["unchanged"].mid - trying)

    def fitting(each_s: float) -> int:
        return min(most, max(1, int(room_s / each_s)))

    count, fewest, greatest = (fitting(getattr(build, e) + getattr(measure, e)) for e in ("mid", "high", "low"))
    worth = int((priced.violations("best") <= 0).sum())  # when all were measured, nothing is left to choose
    fewest = min(fewest, max(1, worth - 1), most)
    again = sum(priced.plans[i] in known for i in likely) / max(1, len(likely))  # need no measuring
    if known:
        fewest = 0
    new = count * (1 - again)
    ends = {"low": float(fewest), "mid": new, "high": float(greatest)}
    new_baseline = float(first not in known)
    candidates = Amount(
        low=new_baseline + fewest, mid=new_baseline + round(new), high=new_baseline + greatest, prior=1 + new,
        because="the time limit decides" if count < most else f"search.max_measured is {search.max_measured}",
    )  # fmt: skip
    stages["build"] = _times(build, ends, room_s)
    stages["measure"] = _times(measure, ends, room_s)
    rounds = SEARCH_S + ROUND_S * count / 2
    because = "pricing plans and fitting corrections" + (", trying what single steps lose" if trying else "")
    stages["search"] = around(rounds + trying, 0.8, learned.of("search"), because)
    latency_s = float(priced.figures["latency_s"].mid[likely].mean())
    finalists = min(count, finalists_in(search.effort, latency_s, finals_reserve_s(spec)))
    finals_s = _finals_s(search.effort, latency_s, finalists) if finals_reserve_s(spec) else 0.0
    stages["finals"] = around(finals_s, 0.6, learned.of("finals"), "finalists in turns")
    stages = {name: stages[name] for name in STAGES}
    wall = _sum(list(stages.values()))
    ceiling = stages["prepare"].high + search.time_limit_s + OVERRUN_S
    wall = replace(
        wall, high=max(wall.mid, min(ceiling, max(wall.high, 2 * wall.mid + OVERRUN_S))), because="its stages, added up"
    )
    amounts = {
        "candidates": candidates,
        "wall_s": wall,
        "peak_memory_bytes": around(
            _tree_bytes(priced, unchanged, likely, finalists, learned), 0.35, learned.of("peak_memory_bytes"),
            "the planner, its fork servers, and the largest build or the finalists side by side",
        ),
        "peak_device_bytes": _device(priced, unchanged, likely, finalists, learned),
        "disk_bytes": _disk(spec, priced, unchanged, likely, (1 + fewest, 1 + count, 1 + greatest), learned, first in known),
        "download_bytes": _exactly(download_bytes, "the model's files on the hub" if download_bytes else "nothing is fetched"),
    }  # fmt: skip
    return RunForecast(amounts=amounts, stages_s=stages)


def finals_reserve_s(spec: Spec) -> float:
    """Return the seconds of the time limit kept for measuring the finalists in turns; plans under load are not."""
    from planner.load.candidates import driven

    return 0.0 if driven(spec.workload, spec.budgets) else FINALIST_SHARE * spec.search.time_limit_s


def finalists_in(effort: str, latency_s: float, room_s: float) -> int:
    """Return how many finalists can be timed beside the unchanged model in every round of turns, in so many seconds.

    Args:
        latency_s: the mean of a request to one of them.
    """
    from planner.measuring import PROTOCOLS

    protocol = PROTOCOLS[effort]
    rounds_s = protocol.blocks * (latency_s + max(latency_s, protocol.block_s))
    plans = min(protocol.blocks_s / rounds_s, room_s / (rounds_s + PROCESS_S / 2))
    return max(FEWEST_FINALISTS, min(MOST_FINALISTS, int(plans) - 1))


def _likely(spec: Spec, priced: Priced) -> np.ndarray:
    """Return the indices of the plans in mind: the predicted front within the limits, of all plans where none is."""
    import numpy as np

    from search.pareto import front

    fine = (priced.violations() <= 0) & (priced.figures["build_s"].mid <= BUILD_SHARE * spec.search.time_limit_s)
    left = np.flatnonzero(fine)
    if not len(left):
        left = np.arange(len(priced.plans))
    return left[front(priced.costs()[left])]


def _building(spec: Spec, priced: Priced, chosen: Any, learned: Experience) -> Amount:
    """Return the seconds one of these plans takes to build, and to measure what its steps can choose from."""
    import numpy as np

    low, mid, high = (float(np.mean(getattr(priced.figures["build_s"], end)[chosen])) for end in ("low", "mid", "high"))
    plans = [priced.plans[i] for i in chosen]
    choosing = choosing_s(spec) * sum(map(_chooses, plans)) / len(plans)  # at most: plans that begin alike share it
    mid, high = mid + choosing / 2, high + choosing
    log_sd = max(0.3, math.log(max(high, 1e-9) / max(low, 1e-9)) / (2 * Z))
    because = "predicted for the plans on the front" + (", with measuring what they choose from" if choosing else "")
    return around(mid, log_sd, learned.of("build"), because)


def _chooses(plan: Plan) -> bool:
    return any(hasattr(techniques.get(step.technique), "options") for step in plan.steps)


def choosing_s(spec: Spec) -> float:
    """Return the seconds that measuring what a step can choose from may take."""
    return max(LEAST_CHOOSING_S, CHOOSING_SHARE * spec.search.time_limit_s)


def trying_s(spec: Spec, space: Space) -> float:
    """Return the seconds that trying what single steps lose may take; 0 where it is not asked for or there is no text."""
    from search.limits import binding

    asked = {find_metric(name)[0].resource for name in spec.objectives}
    asked |= {METRICS[budget.metric].resource for budget in binding(spec.budgets)}
    told = spec.calibration is not None and spec.calibration.data is not None
    if not told or "quality" not in asked or not any(map(can_be_tried, space.steps())):
        return 0.0
    share_s = TRYING_SHARE * spec.search.time_limit_s
    return share_s if share_s >= LEAST_TRYING_S else 0.0


def _measuring(spec: Spec, priced: Priced, chosen: Any, learned: Experience) -> Amount:
    """Return the seconds one of these plans takes to start, be sent requests and be scored, and then driven."""
    import numpy as np

    from planner.load.candidates import load_of

    # Requests of one batch after the other come before any load; what waiting adds to those under load is not met there.
    problem, plans = priced.problem, [priced.plans[i] for i in chosen]
    workload = replace(problem.workload, requests_per_s=None, turns=1, trace=None)
    figures = replace(problem, workload=workload).price(plans).figures
    latency_s, ttft_s = figures["latency_s"].mid, figures["ttft_s"].mid
    each_s = _measuring_s(spec.search.effort, workload, latency_s, ttft_s)
    engines = {plan.engine for plan in plans}
    ratios = [r for engine in sorted(engines) for r in learned.of(f"measure {engine}")]
    alone = around(float(np.mean(each_s)), 0.5, ratios, "starting, requests and scoring")
    if (load := load_of(spec)) is None:
        return alone
    served_per_s = figures["throughput_tokens_per_s"].mid / workload.output_tokens
    driven = around(PROCESS_S + float(np.mean(load.lasts_s(latency_s, served_per_s))), 0.3)
    return replace(_sum([alone, driven]), because=f"{alone.because}; then served and put under the load")


def _measuring_s(effort: str, workload: Workload, latency_s: Any, ttft_s: Any) -> Any:
    import numpy as np

    from planner.data import WINDOWS
    from planner.measuring import PROTOCOLS

    protocol, (windows, tokens) = PROTOCOLS[effort], WINDOWS[effort]
    requests_s = np.clip(protocol.requests * latency_s, protocol.least_s, protocol.most_s)
    return PROCESS_S + requests_s + ttft_s * windows * tokens / workload.prompt_tokens


def _finals_s(effort: str, latency_s: float, finalists: int) -> float:
    from planner.measuring import PROTOCOLS

    protocol, plans = PROTOCOLS[effort], 1 + finalists
    blocks_s = protocol.blocks * plans * (latency_s + max(latency_s, protocol.block_s))
    return plans * PROCESS_S / 2 + min(blocks_s, protocol.blocks_s)


def building_bytes(priced: Priced) -> np.ndarray:
    """Return (plans,): memory that building each is expected to take, the framework's included."""
    import numpy as np

    return np.array([_building_bytes(priced.problem.model, plan) for plan in priced.plans])


def _building_bytes(model: Any, plan: Plan) -> float:
    """Return the memory of a building process: the framework, the model, and what the step that holds most needs beside it."""
    from planner.data import CALIBRATION_TOKENS, CALIBRATION_WINDOWS

    tokens = CALIBRATION_WINDOWS * min(CALIBRATION_TOKENS, model.max_context_tokens)
    beside = [techniques.get(step.technique).TECHNIQUE.holds.bytes_for(model, tokens) for step in plan.steps]
    loaded = model.weight_bytes if loads_weights(plan) else 0
    return FRAMEWORK_BYTES + loaded + max(beside, default=PROCESS_BYTES)


def _tree_bytes(priced: Priced, unchanged: Priced, likely: np.ndarray, finalists: int, learned: Experience) -> float:
    servers = len({priced.plans[i].engine for i in likely} | {unchanged.plans[0].engine})
    plans = [unchanged.plans[0], *(priced.plans[i] for i in likely)]
    usual = statistics.median(learned.of("build memory") or (1.0,))
    build = usual * max(_building_bytes(priced.problem.model, plan) for plan in plans) - FRAMEWORK_BYTES
    on_device = priced.problem.hardware.device.kind == "gpu"
    serving = 0.0 if on_device else _finalists_bytes(priced, unchanged, likely, finalists)
    serve = (1 + finalists) * RUNTIME_BYTES + serving
    return PLANNER_BYTES + FRAMEWORK_BYTES + servers * RUNTIME_BYTES + max(build, serve)


def _finalists_bytes(priced: Priced, unchanged: Priced, likely: np.ndarray, finalists: int) -> float:
    """Return weights and cache of the unchanged model and the finalists, the largest, open at the same time."""
    import numpy as np

    own = priced.figures["weights_bytes"].mid[likely] + priced.figures["kv_cache_bytes"].mid[likely]
    first = unchanged.figures["weights_bytes"].mid[0] + unchanged.figures["kv_cache_bytes"].mid[0]
    return float(first + np.sort(own)[::-1][:finalists].sum())


def _device(priced: Priced, unchanged: Priced, likely: np.ndarray, finalists: int, learned: Experience) -> Amount:
    if priced.problem.hardware.device.kind != "gpu":
        return _exactly(0.0, "no plan runs on a GPU here")
    prior = 1.2 * _finalists_bytes(priced, unchanged, likely, finalists)
    return around(prior, 0.35, learned.of("peak_device_bytes"), "weights and caches of the finalists, side by side")


def _disk(
    spec: Spec, priced: Priced, unchanged: Priced, likely: np.ndarray, counts: tuple[int, int, int], learned: Experience,
    referenced: bool,
) -> Amount:  # fmt: skip
    """Return the bytes a run folder and the store grow by, while the run lasts."""
    sizes = priced.figures["artefact_bytes"].mid[likely]
    each, first = float(sizes.mean()) + PLAN_FILES_BYTES, float(unchanged.figures["artefact_bytes"].mid[0])
    fixed = first + RUN_FILES_BYTES + (0.0 if referenced else reference_bytes(spec, priced.problem.model))
    low, mid, high = (fixed + (count - 1) * each for count in counts)
    told = around(mid, 0.3, learned.of("disk_bytes"))
    scale = told.mid / mid
    kept = units.format(scale * (first + (counts[1] - 1) * each), "bytes")
    because = f"{kept} of artefacts, which leanplan clean frees; references, records; {told.because}"
    most = max(told.high, scale * high * 1.3) + _training_bytes(priced, likely, first)
    return replace(told, low=told.low * low / mid, high=most, because=because)


def _training_bytes(priced: Priced, likely: np.ndarray, model_bytes: float) -> float:
    """Return what a build that trains may put on disk meanwhile: the model it changed, and the unchanged one's answers."""
    steps = {step.technique for i in likely for step in priced.plans[i].steps}
    trains = any(techniques.get(name).TECHNIQUE.stage in ("recover", "finetune") for name in steps)
    return model_bytes + ANSWERS_BYTES if trains else 0.0


def reference_bytes(spec: Spec, model: Model) -> float:
    """Return the bytes of the unchanged model's log-probabilities on the held-out text."""
    from planner.data import REFERENCE_BYTES, WINDOWS

    windows, tokens = WINDOWS[spec.search.effort]
    return float(min(REFERENCE_BYTES, 2 * windows * tokens * model.vocab_size))


def scoring_bytes(spec: Spec, model: Model) -> float:
    """Return the memory that scoring takes beside an open model.

    One window's log-probabilities four times over in float32 (logits, their logarithms, rounded, compared), and the
    pages of the reference.
    """
    from planner.data import WINDOWS

    return 4 * 4 * WINDOWS[spec.search.effort][1] * model.vocab_size + reference_bytes(spec, model)


# ---------------------------------------------------------------- arithmetic of amounts


def _exactly(value: float, because: str) -> Amount:
    return Amount(low=value, mid=value, high=value, prior=value, because=because)


def _sum(parts: Sequence[Amount]) -> Amount:
    total = {name: sum(getattr(part, name) for part in parts) for name in ("low", "mid", "high", "prior")}
    return Amount(**total, because=parts[0].because)


def _times(each: Amount, counts: Mapping[str, float], most: float) -> Amount:
    """Return what several candidates take together: at most `most`, which is what there is room for."""
    mid = each.mid * counts["mid"]
    high = max(mid, min(most, each.high * counts["high"]))
    return replace(each, low=min(mid, each.low * counts["low"]), mid=mid, high=high, prior=each.prior * counts["mid"])
