"""What the field knows that Leanplan cannot execute yet: methods for the resource that binds, by their published figures."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_base.field import field
from knowledge_base.field.entries import Method
from knowledge_base.field.magnitude import Magnitude
from knowledge_base.rules import facts
from knowledge_base.types import Hardware, Model, Workload
from planner.advising.helping import WORTH

TOLD = 6
SHARING = "serving"  # topic of what shares a machine between requests
OFF_DEVICE = ("hardware_offloading", "collaborative_inference")  # topics that are fast only against not fitting at all
ELSEWHERE = ("tpu", "mobile", "custom-accelerator", "neuromorphic")  # machines Leanplan does not plan for
SINCE = {
    "bf16": 8.0,
    "sparse-tensor-cores": 8.0,
    "int8": 6.1,
    "fp8": 8.9,
    "fp4": 10.0,
}  # compute capability of NVIDIA's
NOT_CAUSAL = (
    "encoder",
    "encoder-decoder",
    "vision-transformer",
    "diffusion",
    "multimodal",
)  # models Leanplan reads are not


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownMethod:
    """A method nobody ran here. `published`: what its figures say of the resource, None where nothing was published."""

    id: str
    name: str
    summary: str
    strength: str  # "direct" | "indirect"; empty where the claim is not Table 2's
    published: Magnitude | None
    spends: tuple[str, ...]  # resources
    requires: tuple[str, ...]
    unmet: tuple[str, ...]  # what this machine or model lacks for it
    risks: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherAttention:
    """What a prompt's arithmetic would be with another attention, over that of the model as it is; it must be trained anew."""

    id: str
    name: str
    prefill_flop_ratio: float
    source: str


def other_attention(model: Model, tokens: int) -> tuple[OtherAttention, ...]:
    """Return the rows of the survey's Table 1 that would save arithmetic on prompts of that length, the most first."""
    from cost_models.attention import EXACT, prefill_flop_ratio

    if not model.attention_layers:
        return ()
    found = [
        OtherAttention(
            id=row.id, name=row.name, prefill_flop_ratio=prefill_flop_ratio(model, row.id, tokens), source=row.source
        )
        for row in field().attention.values()
        if row.id != EXACT
    ]
    return tuple(
        sorted((o for o in found if o.prefill_flop_ratio <= 1 - WORTH), key=lambda o: (o.prefill_flop_ratio, o.id))
    )


def known_methods(resource: str, model: Model, workload: Workload, hardware: Hardware) -> tuple[KnownMethod, ...]:
    """Return methods of inference and serving that save a resource and that no technique of ours executes.

    Those the machine and model allow come first, then those that train nothing, then the larger published saving.
    """
    knowledge = field()
    found = []
    for method in knowledge.select(saves=resource):
        if (method.lifecycle != "inference" and method.stage != "serve") or knowledge.status(method.id) == "executable":
            continue
        if (method.topic == SHARING and workload.concurrency == 1) or (
            method.topic in OFF_DEVICE and resource != "memory"
        ):
            continue
        published = knowledge.magnitudes_of(method.id).get(resource)
        if published is not None and published.factor >= 1:
            continue  # what was published does not bear the claim out at the median
        found.append(
            KnownMethod(
                id=method.id, name=method.name, summary=method.summary,
                strength=knowledge.effects(method.id).get(resource, ""), published=published, spends=tuple(method.spends),
                requires=_requires(method), unmet=_unmet(method, model, hardware), risks=method.risks,
                source=next(iter(method.sources), ""),
            )
        )  # fmt: skip
    trains = {m.id: m.requires.training.startswith(("fine-tuning", "pre-training")) for m in knowledge.methods.values()}
    return tuple(sorted(found, key=lambda known: (bool(known.unmet), trains[known.id], *_rank(known)))[:TOLD])


def _rank(known: KnownMethod) -> tuple[float | bool | str, ...]:
    saving = known.published.factor if known.published else 1.0
    return (saving, known.strength != "direct", known.id)


def _requires(method: Method) -> tuple[str, ...]:
    needs = method.requires
    words = (("data", needs.data), ("training", needs.training))
    # "none: a small model to score the words" needs no data, but that.
    said = [need.removeprefix("none: ") if need.startswith("none") else f"{what}: {need}" for what, need in words]
    said = [need for need in said if need != "none"]
    lists = (("hardware", needs.hardware), ("architecture", needs.architecture), ("engine", needs.engine))
    return (*said, *(f"{what}: {', '.join(names)}" for what, names in lists if names))


def _unmet(method: Method, model: Model, hardware: Hardware) -> tuple[str, ...]:
    """Return what is known to be lacking; what is not known of a machine or model is not held against a method."""
    device = hardware.device
    there = {"gpu": device.kind == "gpu", "cpu": True, "multi-device": len(hardware.devices) > 1}
    there |= dict.fromkeys(ELSEWHERE, False)
    if (capability := facts(hardware=hardware).get("hardware.compute_capability")) is not None:
        there |= {need: capability >= least for need, least in SINCE.items()}
    kinds = {"moe": model.experts > 0, **dict.fromkeys(NOT_CAUSAL, False)}
    lacking = [f"{need}: {hardware.name} has none" for need in method.requires.hardware if not there.get(need, True)]
    return (
        *lacking,
        *(f"{kind}: {model.name} is not" for kind in method.requires.architecture if not kinds.get(kind, True)),
    )
