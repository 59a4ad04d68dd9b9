"""What was asked to be priced: a model, an engine, steps, a workload and a machine, each checked before it is priced."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.registry import complete, engines, settings_of, techniques
from knowledge_base.types import Hardware, Model, Plan, Step, Workload
from knowledge_base.units import quote

UNCHANGED = "unchanged"  # how a plan without steps is written
MOST_DEVICES = 4096
MOST_CLIENTS = 1_000_000
LEAST_RATE = 1e-6  # of arriving requests each second: a few in a month
WEIGHTS = "weights"  # the one step of an engine known by its law: how its weights are stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One plan in one place. `weights`: how they are stored, where the engine is known by its law; None: as they come."""

    model: Model
    engine: str
    steps: tuple[Step, ...]
    workload: Workload
    hardware: Hardware
    weights: str | None = None

    @property
    def plan(self) -> Plan:
        """The plan, its steps in the order they are executed."""
        stored = (Step(WEIGHTS, {"stored": self.weights}),) if self.weights else ()
        return Plan(model_digest=self.model.digest, engine=self.engine, steps=(*rules.order(self.steps), *stored))

    @property
    def by_law(self) -> bool:
        """Whether the engine is priced by its law: Leanplan cannot run it, or only where its environment was made."""
        return self.engine in laws()

    def check(self, *, steps_from: str = "--step", lengths_from: str = "--prompt-tokens") -> None:
        """Refuse what cannot be: a context beyond the model's, a step that does not apply here, steps that clash.

        Raises:
            BadInput: says why and names the flag it came from, `steps_from` or `lengths_from`.
        """
        self._check_machine()
        self._check_workload("" if lengths_from == "--prompt-tokens" else lengths_from)
        workload, most = self.workload, self.model.max_context_tokens
        lengths = [workload.prompt_tokens] + [workload.output_tokens] * (self.model.kind != "encoder")
        if sum(lengths) > most:
            what = "a text" if len(lengths) == 1 else "prompt and answer together"
            raise BadInput(
                f"{' + '.join(map(str, lengths))} tokens are more than the model's {most}",
                hint=f"{what} may have {most}: --prompt-tokens, --output-tokens", where=lengths_from,
            )  # fmt: skip
        if self.by_law:
            self._check_law(steps_from)
            return
        if self.weights is not None:
            raise BadInput(
                f"{self.engine} stores weights as the plan's steps say", hint="leanplan ls techniques; --step weight_int8", where="--weights"
            )  # fmt: skip
        engine = engines.get(self.engine)
        if why := engine.accepts(self.model):
            raise BadInput(
                f"{self.engine} cannot run this model: {why}",
                hint="choose another engine: leanplan ls engines",
                where="--engine",
            )
        for step in self.steps:
            self._check_step(step, engine, steps_from)
        known = rules.facts(model=self.model, workload=workload, hardware=self.hardware, engine=self.engine)
        if why := rules.conflict(self.steps, known) or rules.missing(self.steps, known):
            raise BadInput(
                f"these steps do not go together: {why}", hint="leanplan ls techniques", where=steps_from
            )  # fmt: skip

    def _check_workload(self, where: str) -> None:
        """Refuse lengths and loads that nobody has; `where` they come from, if not from flags of their own."""
        workload = self.workload
        positive({name: getattr(workload, name) for name in ("prompt_tokens", "output_tokens", "concurrency")})
        if workload.concurrency > MOST_CLIENTS:
            raise BadInput(
                f"{workload.concurrency} clients at a time are too many", hint=f"at most {MOST_CLIENTS:,}", where=where or "--concurrency"
            )  # fmt: skip
        rate = workload.requests_per_s
        if rate is not None and not (isinstance(rate, int | float) and LEAST_RATE <= rate < math.inf):
            raise BadInput(
                f"must be a rate of at least {LEAST_RATE:g}, got {rate}", hint="for example 2.5", where=where or "--requests-per-s"
            )  # fmt: skip

    def _check_law(self, steps_from: str) -> None:
        """Refuse steps: they are what Leanplan executes, and it cannot run this engine."""
        if self.steps:
            raise BadInput(
                f"{self.engine} is known by its law alone, so `{self.steps[0]}` cannot be told of it",
                hint="say how weights are stored: --weights fp8; requests at a time: --concurrency", where=steps_from,
            )  # fmt: skip

    def _check_machine(self) -> None:
        device = self.hardware.device
        rates = {f"{dtype} rate": rate for dtype, rate in device.flop_per_s.items()}
        told = {"rate between devices": device.link_bytes_per_s, "power": device.busy_w}
        known = {
            "memory bandwidth": device.memory_bytes_per_s, "memory": self.hardware.memory_limit_bytes, **rates,
            **{what: number for what, number in told.items() if number is not None},
        }  # fmt: skip
        for what, number in known.items():
            if not (math.isfinite(number) and number > 0):
                raise BadInput(
                    f"the {what} of {quote(device.name)} is {number:g}: nothing can be predicted with it",
                    hint="measure the machine: leanplan probe; or name another: leanplan ls machines", where="--on",
                )  # fmt: skip

    def _check_step(self, step: Step, engine: Any, steps_from: str) -> None:
        module = techniques.get(step.technique)
        legal = getattr(module, "legal", lambda *_: None)
        why = module.rejects(self.model, self.workload, self.hardware)
        why = why or legal(step.knobs, self.model, self.workload, self.hardware)
        where = f"--step {step.technique}" if steps_from == "--step" else steps_from
        if why:
            raise BadInput(
                f"`{step}` does not apply: {why}", hint="leave it out or choose another setting", where=where
            )
        if missing := module.TECHNIQUE.needs - engine.ENGINE.offers:
            raise BadInput(
                f"`{step.technique}` needs an engine that offers {', '.join(sorted(missing))}; {self.engine} does not",
                hint="leanplan ls engines", where=where,
            )  # fmt: skip


def find_engine(name: str, where: str = "--engine") -> None:
    """Refuse an engine that Leanplan can neither run nor price by a law.

    Raises:
        BadInput: lists both kinds, and the nearest names.
    """
    known = laws()
    if name in engines.names() or name in known:
        return
    near = difflib.get_close_matches(name, dict.fromkeys((*engines.names(), *known)), n=2)
    guess = f". Did you mean {' or '.join(f'`{n}`' for n in near)}?" if near else ""
    raise BadInput(
        f"unknown engine {quote(name)}{guess}",
        hint=f"run here: {', '.join(e for e in engines.names() if e not in known)}; known by their laws: {', '.join(known)}",
        where=where,
    )


def laws() -> tuple[str, ...]:
    """Return the engines priced by their laws: those without a file, and those that live in environments of their own."""
    from cost_models.served import families

    return tuple(f for f in families() if f not in engines.names() or engines.get(f).ENGINE.environment is not None)


def with_devices(hardware: Hardware, count: int | None) -> Hardware:
    """Return a machine with that many of its device; without a count a described one as it is, a probed one with one.

    Raises:
        BadInput: a probed machine that has fewer, or one beside other devices, or `4x rtx-4090` with another count.
    """
    if count is None and not hardware.measured:
        return hardware
    count = 1 if count is None else count
    positive({"devices": count})
    device = hardware.device
    there = sum(d == device for d in hardware.devices)
    beside = [d for d in hardware.devices if d.kind != device.kind]  # a processor beside accelerators
    unequal = there + len(beside) < len(hardware.devices)
    if count > there if hardware.measured or unequal else there not in (1, count):
        raise BadInput(
            f"{quote(hardware.name)} has {there} of {quote(device.name)}, not {count}",
            hint="leave --devices out, or name another machine", where="--devices",
        )  # fmt: skip
    if count > MOST_DEVICES:
        raise BadInput(f"{count} devices are too many", hint=f"at most {MOST_DEVICES}", where="--devices")
    if count == there and not unequal:
        return hardware
    grown = count / there
    price = hardware.price_usd_per_h
    return replace(
        hardware, name=hardware.name if count <= there else f"{count}x {hardware.name}",
        devices=(*beside, *(device,) * count),
        host_memory_bytes=round(hardware.host_memory_bytes * max(grown, 1)),
        price_usd_per_h=price and price * max(grown, 1),
    )  # fmt: skip


def read_other(text: str, asked: Asked) -> Asked:
    """Return what is asked with another plan: `weight_int8 + kv_cache_quantised:bits=8`, `vllm: fp8`.

    Raises:
        BadInput: as `read_step`, or the engine is unknown.
    """
    where = f"--compare {text}"
    named = re.fullmatch(r"\s*([^\s:+]+):\s+(.*)", text)
    engine, words = (named[1], named[2]) if named else (asked.engine, text)
    find_engine(engine, where)
    other = replace(asked, engine=engine, steps=(), weights=None)
    if words.strip() == UNCHANGED:
        return other
    if other.by_law:
        return replace(other, weights=words.strip())
    return replace(other, steps=tuple(read_step(part.strip(), "--compare") for part in words.split("+")))


def read_step(text: str, flag: str = "--step") -> Step:
    """Return a step as written on the command line: `weight_int4:group_size=64`.

    Raises:
        BadInput: an unknown technique, knob or setting; says which there are.
    """
    name, _, written = text.partition(":")
    try:
        knobs = techniques.get(name.strip()).TECHNIQUE.knobs
    except BadInput as error:
        raise BadInput(error.message, hint=error.hint, where=f"{flag} {text}") from error
    chosen: dict[str, Any] = {}
    for setting in filter(None, written.split(",")):
        knob, equals, value = (part.strip() for part in setting.partition("="))
        if knob not in knobs or not equals:
            known = ", ".join(f"{k}={'|'.join(map(str, c.options))}" for k, c in knobs.items()) or "none"
            raise BadInput(f"`{name}` has no setting `{setting}`", hint=f"its knobs: {known}", where=f"{flag} {text}")
        options = {str(option): option for option in settings_of(name.strip(), knob)}
        if value not in options:
            raise BadInput(
                f"`{knob}` of `{name}` cannot be `{value}`", hint=f"one of: {', '.join(options)}",
                where=f"{flag} {text}",
            )  # fmt: skip
        chosen[knob] = options[value]
    return complete(Step(name.strip(), chosen))


def positive(counts: Mapping[str, int]) -> None:
    """Refuse what is no count, or below 1, by the name of its flag.

    Raises:
        BadInput: names the first.
    """
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            said = "at least 1" if type(count) is int else "a whole number"
            raise BadInput(f"must be {said}, got {count}", hint="give a count", where=f"--{name.replace('_', '-')}")
