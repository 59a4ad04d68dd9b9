"""What was asked to be priced: a model, an engine, steps, a workload and a machine, each checked before it is priced."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from knowledge_base import rules
from knowledge_base.errors import BadInput
from knowledge_base.registry import Folder, complete, engines, techniques
from knowledge_base.types import Hardware, Model, Plan, Step, Workload
from knowledge_base.units import quote

UNCHANGED = "unchanged"  # how a plan without steps is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One plan in one place."""

    model: Model
    engine: str
    steps: tuple[Step, ...]
    workload: Workload
    hardware: Hardware

    @property
    def plan(self) -> Plan:
        """The plan, its steps in the order they are executed."""
        return Plan(model_digest=self.model.digest, engine=self.engine, steps=tuple(rules.order(self.steps)))

    def check(self, *, steps_from: str = "--step", lengths_from: str = "--prompt-tokens") -> None:
        """Refuse what cannot be: a context beyond the model's, a step that does not apply here, steps that clash.

        Raises:
            BadInput: says why and names the flag it came from, `steps_from` or `lengths_from`.
        """
        self._check_machine()
        workload, most = self.workload, self.model.max_context_tokens
        if workload.prompt_tokens + workload.output_tokens > most:
            raise BadInput(
                f"{workload.prompt_tokens} + {workload.output_tokens} tokens are more than the model's {most}",
                hint=f"prompt and answer together may have {most}: --prompt-tokens, --output-tokens", where=lengths_from,
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

    def _check_machine(self) -> None:
        device = self.hardware.device
        rates = {f"{dtype} rate": rate for dtype, rate in device.flop_per_s.items()}
        known = {"memory bandwidth": device.memory_bytes_per_s, "memory": self.hardware.memory_limit_bytes, **rates}
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


def read_other(text: str, asked: Asked) -> Asked:
    """Return what is asked with another plan: `weight_int8 + kv_cache_quantised:bits=8`, `llama_cpp: weight_gguf`.

    Raises:
        BadInput: as `read_step`, or the engine is unknown.
    """
    where = f"--compare {text}"
    named = re.fullmatch(r"\s*([^\s:+]+):\s+(.*)", text)
    engine, words = (named[1], named[2]) if named else (asked.engine, text)
    _find(engines, engine, where)
    written = [part.strip() for part in words.split("+")]
    steps = () if written == [UNCHANGED] else tuple(read_step(part, "--compare") for part in written)
    return replace(asked, engine=engine, steps=steps)


def read_step(text: str, flag: str = "--step") -> Step:
    """Return a step as written on the command line: `weight_int4:group_size=64`.

    Raises:
        BadInput: an unknown technique, knob or setting; says which there are.
    """
    name, _, written = text.partition(":")
    knobs = _find(techniques, name.strip(), f"{flag} {text}").TECHNIQUE.knobs
    chosen: dict[str, Any] = {}
    for setting in filter(None, written.split(",")):
        knob, equals, value = (part.strip() for part in setting.partition("="))
        if knob not in knobs or not equals:
            known = ", ".join(f"{k}={'|'.join(map(str, c.options))}" for k, c in knobs.items()) or "none"
            raise BadInput(f"`{name}` has no setting `{setting}`", hint=f"its knobs: {known}", where=f"{flag} {text}")
        options = {str(option): option for option in knobs[knob].options}
        if value not in options:
            raise BadInput(
                f"`{knob}` of `{name}` cannot be `{value}`", hint=f"one of: {', '.join(options)}",
                where=f"{flag} {text}",
            )  # fmt: skip
        chosen[knob] = options[value]
    return complete(Step(name.strip(), chosen))


def _find(folder: Folder, name: str, where: str) -> Any:
    try:
        return folder.get(name)
    except BadInput as error:
        raise BadInput(error.message, hint=error.hint, where=where) from error


def positive(counts: Mapping[str, int]) -> None:
    """Refuse counts below 1, by the name of their flag.

    Raises:
        BadInput: names the first.
    """
    for name, count in counts.items():
        if count < 1:
            raise BadInput(f"must be at least 1, got {count}", hint="give a count", where=f"--{name.replace('_', '-')}")
