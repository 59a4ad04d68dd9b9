"""When a rule holds: clauses that are parsed, never evaluated as Python, and answered yes, no or not known.

    a.bits <= 4 and b.count > 1       knobs of the two steps
    workload.concurrency >= 16        a fact of the workload, model, machine …: see FACTS
    model.kv_heads < model.heads      two facts
    hardware.features has nvidia      a set holds a word

A knob that a step leaves open and a fact that the context does not tell make a clause "not known" (None).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from knowledge_base.errors import BadInput
from knowledge_base.types import Hardware, Model, Workload
from knowledge_base.units import quote

Knobs = Mapping[str, Any]
Context = Mapping[str, Any]  # fact -> number, word or frozenset of words
NOTHING_KNOWN: Context = {}

# All that a condition may name beside knobs. `facts` fills in what leanplan knows by itself; a caller may know more.
FACTS: Mapping[str, str] = {
    "engine": "the engine that runs the plan",
    "engine.slots": "one or many: requests its server answers at once",
    "library": "the library that trains: torchao, peft, deepspeed …",
    "format": "the library format that holds quantised weights: bnb, gptq, gguf, aqlm, torchao, …",
    "calibration": "yes or no: text to calibrate on is given",
    "training_data": "small or large: examples to train on",
    "model.architecture": "config.json's model_type",
    "model.family": "models that share a training recipe: llama-3",
    "model.heads": "attention heads",
    "model.kv_heads": "key-value heads",
    "model.experts": "experts of each layer, 0 for a dense model",
    "model.params_total": "parameters",
    "model.activation": "the feed-forward activation: relu, silu, gelu",
    "model.early_exit": "yes or no: trained to exit early (layer dropout and an early-exit loss)",
    "model.quantised": "yes or no: the weights as they came are already quantised",
    "draft.same_tokenizer": "yes or no: the draft model has the tokenizer of the model",
    "draft.size_ratio": "parameters of the draft model, divided by those of the model",
    "workload.prompt_tokens": "tokens of a prompt",
    "workload.output_tokens": "tokens generated",
    "workload.concurrency": "requests at once",
    "workload.fixed_shapes": "yes or no: every batch has the same shape",
    "workload.loaded": "yes or no: requests arrive, follow each other or are replayed",
    "hardware.kind": "cpu or gpu",
    "hardware.devices": "accelerators of the machine",
    "hardware.nodes": "machines",
    "hardware.compute_capability": "NVIDIA's, of the device: 8.9",
    "hardware.features": "features of the device",
}
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq, "<": operator.lt, ">": operator.gt,
    "has": operator.contains,
}  # fmt: skip
_PLAIN_DTYPES = ("float32", "bfloat16", "float16")
_CLAUSE = re.compile(r"([a-z_.]+) (<=|>=|!=|==|<|>|has) ([\w.:-]+)")
_KNOB = re.compile(r"([ab])\.([a-z_]+)")
_HINT = "write for example `b.count > 1`, `workload.concurrency >= 16` or `engine == vllm`, joined by `and`"

_Clause = Callable[[Knobs, Knobs, Context], "bool | None"]


@dataclass(frozen=True, slots=True)
class Condition:
    """Clauses that must all hold. `knobs`: the (side, knob) pairs they ask for."""

    text: str
    clauses: tuple[_Clause, ...]
    knobs: frozenset[tuple[str, str]]

    def holds(self, a: Knobs, b: Knobs, context: Context = NOTHING_KNOWN) -> bool | None:
        """Return whether every clause holds; None where none fails and some cannot be told."""
        answer: bool | None = True
        for clause in self.clauses:
            said = clause(a, b, context)
            if said is False:
                return False
            if said is None:
                answer = None
        return answer

    def possible(self, a: frozenset[str], b: frozenset[str]) -> bool:
        """Return whether steps that have these knobs can meet it at all."""
        return all(knob in (a if side == "a" else b) for side, knob in self.knobs)


@lru_cache(maxsize=1024)
def parse(text: str) -> Condition:
    """Return a condition; an empty text always holds.

    Raises:
        BadInput: a clause cannot be read, orders a word, or names a fact that is not in FACTS.
    """
    parts = [part.strip() for part in text.split(" and ")] if text else []
    knobs = frozenset((found[1], found[2]) for part in parts if (found := _KNOB.match(part)))
    return Condition(text, tuple(_clause(part) for part in parts), knobs)


def _clause(text: str) -> _Clause:
    found = _CLAUSE.fullmatch(text)
    if not found:
        raise BadInput(f"cannot read the condition {quote(text)}", hint=_HINT)
    left, sign, right = found.groups()
    compare, value_of = _COMPARE[sign], _reader(left)
    try:
        wanted: float | str = float(right)
    except ValueError:
        wanted = right
        if right in FACTS:
            return _two_facts(value_of, compare, right)
        if sign not in ("==", "!=", "has"):
            raise BadInput(f"`{right}` has no order in {quote(text)}", hint="compare words with == or !=") from None

    def clause(a: Knobs, b: Knobs, context: Context) -> bool | None:
        value = value_of(a, b, context)
        if value is None:
            return None
        try:
            return compare(value, wanted)
        except TypeError:  # a word where the rule compares numbers
            return None

    return clause


def _two_facts(
    left: Callable[[Knobs, Knobs, Context], Any], compare: Callable[[Any, Any], bool], right: str
) -> _Clause:
    def clause(a: Knobs, b: Knobs, context: Context) -> bool | None:
        first, second = left(a, b, context), context.get(right)
        return None if first is None or second is None else compare(first, second)

    return clause


def _reader(name: str) -> Callable[[Knobs, Knobs, Context], Any]:
    if found := _KNOB.fullmatch(name):
        side, knob = found.groups()
        return (lambda a, b, context: a.get(knob)) if side == "a" else (lambda a, b, context: b.get(knob))
    if name not in FACTS:
        raise BadInput(f"unknown fact `{name}`", hint=f"a knob (a.bits, b.bits) or one of {', '.join(FACTS)}")
    return lambda a, b, context: context.get(name)


def facts(
    *,
    model: Model | None = None,
    workload: Workload | None = None,
    hardware: Hardware | None = None,
    engine: str | None = None,
    calibration: bool | None = None,
) -> Context:
    """Return the facts of FACTS that can be told of these; what is not known is left out, never guessed."""
    known: dict[str, Any] = {"engine": engine}
    if calibration is not None:
        known["calibration"] = "yes" if calibration else "no"
    for side, thing in (("model", model), ("workload", workload)):
        known |= {name: getattr(thing, name.partition(".")[2], None) for name in FACTS if name.startswith(f"{side}.")}
    if workload:
        known["workload.loaded"] = "yes" if workload.loaded else "no"
    if model:
        plain = "no" if model.weight_dtype in _PLAIN_DTYPES else None
        known["model.quantised"] = "yes" if model.quantised_format else plain
    if hardware:
        device = hardware.device
        capability = next((m for f in device.features if (m := re.fullmatch(r"sm_(\d+)(\d)", f))), None)
        known |= {
            "hardware.kind": device.kind,
            "hardware.devices": len([d for d in hardware.devices if d.kind == device.kind]),
            "hardware.compute_capability": float(f"{capability[1]}.{capability[2]}") if capability else None,
            "hardware.features": device.features,
        }
    return {name: value for name, value in known.items() if value is not None}
