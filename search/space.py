"""Which plans are legal: engines x one option of each technique family, less what the knowledge base refuses."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from knowledge_base import rules
from knowledge_base.engines._serving import side_by_side
from knowledge_base.registry import engines, techniques
from knowledge_base.rules import Composition
from knowledge_base.types import Hardware, Model, Plan, Step, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A technique, setting or engine that is not in the space, and why. `kind`: "rule" or "engine"."""

    what: str
    why: str
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every legal plan of one problem, without listing them.

    `options[engine][family]` holds the steps a plan may take of that family; "none of them" is always allowed.
    `rules[engine]` judges compositions, knowing the facts of this problem. A plan has at most `max_steps` steps.
    `reference`: what all are compared with, where memory does not hold the unchanged model: with some of it on disk.
    """

    model_digest: str
    options: dict[str, dict[str, tuple[Step, ...]]]
    rules: Mapping[str, Composition]
    refused: tuple[Refusal, ...] = ()
    max_steps: int | None = None
    reference: Plan | None = None

    def count(self) -> int:
        """Return how many combinations there are before composition rules; an upper bound of the legal plans."""
        return sum(sum(self._by_length(families)) for families in self.options.values())

    def _by_length(self, families: Mapping[str, Sequence[Step]]) -> list[int]:
        """Return how many combinations have no step, one, two, ... as far as a plan may have so many."""
        counts = [1]
        for steps in families.values():
            counts = [fewer + len(steps) * one_less for fewer, one_less in zip([*counts, 0], [0, *counts])]
        return counts if self.max_steps is None else counts[: self.max_steps + 1]

    def steps(self) -> Iterator[Step]:
        """Yield every step some plan may take, engine by engine."""
        for families in self.options.values():
            for steps in families.values():
                yield from steps

    def fits(self, engine: str, steps: Sequence[Step]) -> bool:
        """Return whether no rule forbids these steps together, nor their number, whatever they still need."""
        too_many = self.max_steps is not None and len(steps) > self.max_steps
        return not too_many and not self.rules[engine].conflict(steps)

    def plan(self, engine: str, steps: Sequence[Step]) -> Plan | None:
        """Return the plan with its steps in the order the knowledge base gives, or None if a rule forbids it."""
        judge = self.rules[engine]
        if not self.fits(engine, steps) or judge.missing(steps):
            return None
        return Plan(model_digest=self.model_digest, engine=engine, steps=judge.order(steps))

    def unchanged(self, engine: str | None = None) -> Plan:
        """Return the model as it came, on an engine.

        On the first if None, which is transformers where it can run, and then with some of its weights left on disk where
        memory does not hold them: the same answers, only slower.
        """
        if engine is None and self.reference is not None:
            return self.reference
        return Plan(model_digest=self.model_digest, engine=engine or next(iter(self.options)))

    def each(self) -> Iterator[Plan]:
        """Yield every legal plan once, in a fixed order."""
        for engine, families in self.options.items():
            yield from self._extend(engine, list(families.values()), ())

    def _extend(self, engine: str, families: list[tuple[Step, ...]], steps: tuple[Step, ...]) -> Iterator[Plan]:
        if not families:
            if (plan := self.plan(engine, steps)) is not None:
                yield plan
            return
        for step in (None, *families[0]):
            longer = steps if step is None else (*steps, step)
            # A pair that conflicts stays in conflict whatever is added, so the branch is cut here.
            if step is None or self.fits(engine, longer):
                yield from self._extend(engine, families[1:], longer)


def build_space(
    model: Model,
    workload: Workload,
    hardware: Hardware,
    *,
    engine_names: Sequence[str],
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    calibration: bool = True,
    executable: bool = True,
    max_steps: int | None = None,
) -> Space:
    """Return the space of legal plans for one model, workload and machine.

    Args:
        engine_names: engines that may be used (found on this machine, or wanted for prediction).
        only: if given, the techniques to consider; `without`: techniques to leave out.
        calibration: whether calibration text was given.
        executable: leave out what cannot be run here for lack of a package.
        max_steps: techniques that one plan may use at most; None for any number.
    """
    refused: list[Refusal] = []
    fitting: dict[str, ModuleType] = {}
    for name in engine_names:
        if why := engines.get(name).accepts(model):
            refused.append(Refusal(what=name, why=why, kind="engine"))
        else:
            fitting[name] = engines.get(name)

    facts = rules.facts(model=model, workload=workload, hardware=hardware, calibration=calibration)
    engine_facts = {
        name: {"engine": name, "engine.slots": "many" if side_by_side(module, model) else "one"}
        for name, module in fitting.items()
    }
    judges = {name: rules.composition().knowing({**facts, **own}) for name, own in engine_facts.items()}
    uncalibrated = []
    options: dict[str, dict[str, tuple[Step, ...]]] = {name: {} for name in fitting}
    for name, module in techniques.all().items():
        technique = module.TECHNIQUE
        if only is not None and name not in only:
            continue
        if name in without:
            refused.append(Refusal(what=name, why="left out by the spec", kind="rule"))
        elif why := module.rejects(model, workload, hardware):
            refused.append(Refusal(what=name, why=why, kind="rule"))
        elif technique.needs_calibration and not calibration:
            uncalibrated.append(name)
        elif executable and (missing := [m for m in technique.modules if importlib.util.find_spec(m) is None]):
            extra = f"leanplan[{technique.extra}]" if technique.extra else " ".join(missing)
            refused.append(
                Refusal(what=name, why=f"{missing[0]} is not installed; pip install '{extra}'", kind="engine")
            )
        else:
            served = [e for e, engine in fitting.items() if technique.needs <= engine.ENGINE.offers]
            if not served:
                needs = ", ".join(sorted(technique.needs))
                refused.append(Refusal(what=name, why=f"no engine in use offers {needs}", kind="engine"))
            steps, illegal = _settings(name, module, model, workload, hardware)
            refused += illegal
            for engine in served:
                barred = {step: why for step in steps if (why := _barred(step, judges[engine]))}
                refused += [Refusal(what=f"{step} on {engine}", why=why, kind="rule") for step, why in barred.items()]
                allowed = tuple(step for step in steps if step not in barred)
                options[engine][technique.family] = options[engine].get(technique.family, ()) + allowed
    if uncalibrated:
        why = f"{len(uncalibrated)} techniques need calibration text and are left out: add calibration.data"
        refused.append(Refusal(what=", ".join(uncalibrated), why=why, kind="rule"))
    return Space(
        model_digest=model.digest,
        options={engine: {f: s for f, s in families.items() if s} for engine, families in options.items()},
        rules=judges,
        refused=tuple(refused),
        max_steps=max_steps,
    )


def _barred(step: Step, judge: Composition) -> str | None:
    """Return the rule that forbids a step whatever is beside it."""
    return next((found.sentence for found in judge.violations((step,)) if not found.rule.b), None)


def _settings(
    name: str, module: ModuleType, model: Model, workload: Workload, hardware: Hardware
) -> tuple[tuple[Step, ...], list[Refusal]]:
    """Return a technique's legal knob settings as steps, and one refusal for each reason a setting was illegal."""
    knobs = module.TECHNIQUE.knobs
    legal = getattr(module, "legal", lambda *_: None)
    steps: list[Step] = []
    reasons: dict[str, Step] = {}
    for values in itertools.product(*(choice.options for choice in knobs.values())):
        setting = dict(zip(knobs, values))
        if why := legal(setting, model, workload, hardware):
            reasons.setdefault(why, Step(name, setting))
        else:
            steps.append(Step(name, setting))
    refused = [Refusal(what=str(step), why=why, kind="rule") for why, step in reasons.items()]
    if len(refused) > 2:  # the same in other numbers: one example says it
        refused = [
            Refusal(
                what=f"{len(refused)} settings of {name}",
                why=f"for example {refused[0].what}: {refused[0].why}",
                kind="rule",
            )
        ]
    return tuple(steps), refused
