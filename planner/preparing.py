"""What must be known before any search: the machine, the model, the engines, the legal plans, the texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base import units
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines
from knowledge_base.types import Hardware, Model, Plan
from planner.foreseeing import scoring_bytes
from planner.results import Rejection

if TYPE_CHECKING:
    from planner.reading import ReadResult
    from planner.spec import ModelRef, Spec
    from search.space import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A spec with all it refers to found and read. `folder` is the model's local folder, None for prediction only."""

    spec: Spec
    model: Model
    folder: Path | None
    hardware: Hardware
    space: Space
    refused: tuple[Rejection, ...]
    notes: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        """Whether plans can be measured: the target is this machine."""
        return self.spec.hardware == "local"


def prepare(
    spec: Spec,
    *,
    store: Path,
    predict: bool = False,
    offline: bool = False,
    trust_remote_code: str | None = None,
    allow_pickle: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Prepared:
    """Read the model and machine of a spec and build the space of legal plans.

    Raises:
        BadInput: model, data or workload cannot be used; EnvironmentProblem: no engine can run here.
    """
    from planner.load.candidates import driven, require
    from planner.machine import find

    only_predict = predict or spec.hardware != "local"
    if spec.workload.trace and not spec.workload.trace.digest:
        from planner.spec import missing_trace

        raise missing_trace(spec.workload.trace)
    if not only_predict and driven(spec.workload, spec.budgets):
        require(spec)
    other = None if spec.hardware == "local" else find(spec.hardware, store)
    if not only_predict:
        _require_measurable(spec)
    read = read_models(
        spec,
        offline=offline,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        weights="optional" if only_predict else "required",
    )
    model = read.model
    check_lengths(spec, model)
    # This machine last: the first time, probing it takes a while, and a mistake in the spec is told before.
    hardware = with_prices(other or find("local", store, tell=tell), spec)
    space, refused = legal_plans(spec, model, hardware, predict=only_predict)
    return Prepared(
        spec=spec,
        model=model,
        folder=read.folder,
        hardware=hardware,
        space=space,
        refused=refused,
        notes=tuple(read.notes),
    )


def check_lengths(spec: Spec, model: Model) -> None:
    """Refuse a workload that is longer than the model's context."""
    longest = spec.workload.longest_tokens
    if longest > model.max_context_tokens:
        output = spec.workload.output_tokens_p95 or spec.workload.output_tokens
        told = f"{spec.workload.turns} turns" if spec.workload.turns > 1 else f"prompt {longest - output}"
        raise BadInput(
            f"{told} + output {output} tokens > context {model.max_context_tokens} of {model.name}",
            hint="shorten workload.prompt_tokens or workload.output_tokens",
            where="workload",
        )


def legal_plans(spec: Spec, model: Model, hardware: Hardware, *, predict: bool) -> tuple[Space, tuple[Rejection, ...]]:
    """Return the legal plans of a spec, and what was left out with the reason.

    Raises:
        EnvironmentProblem: no engine can serve the model here.
    """
    from search.fitting import with_fitted
    from search.space import build_space

    names, refused = _engines(spec, hardware, predict=predict)
    space = build_space(
        model,
        spec.workload,
        hardware,
        engine_names=names,
        only=spec.techniques.only or None,
        without=spec.techniques.without or (),
        calibration=spec.calibration is not None,
        executable=not predict,
        max_steps=spec.search.max_steps,
    )
    if not space.options:
        raise EnvironmentProblem(
            "no engine can serve this model here: "
            + "; ".join(f"{r.what}: {r.why}" for r in space.refused if r.kind == "engine"),
            hint="leanplan doctor shows what is missing",
        )
    if spec.hardware == "local":
        refused += _without_gpu(hardware)
        hardware = replace(hardware, memory_limit_bytes=memory_limit_bytes(spec, hardware))
    space = with_fitted(space, model, spec.workload, hardware, spec.budgets)
    if spec.hardware == "local" and not predict and _needed_bytes(space, model, spec, hardware) > _room_bytes(hardware):
        space = replace(space, reference=in_part(spec, space, model, hardware))
    return space, (*refused, *(Rejection(what=r.what, why=r.why, kind=r.kind) for r in space.refused))


def memory_limit_bytes(spec: Spec, hardware: Hardware) -> int:
    """Return the memory a candidate may use: the machine's, or the spec's limit where that is lower."""
    return min(spec.limits.memory_bytes or hardware.memory_limit_bytes, hardware.memory_limit_bytes)


def in_part(spec: Spec, space: Space, model: Model, hardware: Hardware) -> Plan | None:
    """Return the unchanged model with as much of it in memory as there surely is room for, and for comparing its answers.

    None where no engine in use brings weights in from elsewhere, or even that is too much.
    """
    from search.placing import as_it_fits

    beside = 0 if hardware.device.kind == "gpu" else scoring_bytes(spec, model)
    return as_it_fits(space, model, spec.workload, hardware, _room_bytes(hardware) - beside)


def _needed_bytes(space: Space, model: Model, spec: Spec, hardware: Hardware) -> float:
    import cost_models

    whole = space.unchanged(next(iter(space.options)))
    return float(cost_models.estimate_many([whole], model, spec.workload, hardware)["peak_memory_bytes"].mid[0])


def _room_bytes(hardware: Hardware) -> int:
    device = hardware.device
    return device.memory_bytes if device.kind == "gpu" else hardware.memory_limit_bytes


def told_in_part(prepared: Prepared) -> str:
    """Return that the unchanged model does not run in memory, and how it is measured instead, as a sentence."""
    step = prepared.space.unchanged().steps[0]
    hardware = replace(prepared.hardware, memory_limit_bytes=memory_limit_bytes(prepared.spec, prepared.hardware))
    needed = _needed_bytes(prepared.space, prepared.model, prepared.spec, hardware)
    return (
        f"the unchanged model needs {units.format(needed, 'bytes')} of memory, {units.format(_room_bytes(hardware), 'bytes')} "
        f"is allowed: it runs as {step}, with the same answers, and every plan is compared with that"
    )


def _require_measurable(spec: Spec) -> None:
    """Refuse a budget of level error on energy where this machine can only model it (asked for by `source: any`)."""
    from planner.probes import energy_counters

    for budget in spec.budgets:
        measured_only = budget.level == "error" and budget.source != "any"
        if METRICS[budget.metric].resource == "energy" and measured_only and not energy_counters.find()["kinds"]:
            raise EnvironmentProblem(
                f"{budget.label}: energy can only be modelled here (no energy counter)",
                hint="allow it with source: any, or set level: warn",
                where=f"line {budget.line}" if budget.line else "budgets",
            )


def _without_gpu(hardware: Hardware) -> tuple[Rejection, ...]:
    """Return why no plan runs on a GPU of this machine; nothing where one does."""
    if any(device.kind == "gpu" for device in hardware.devices):
        return ()
    from planner.probes.accelerators import names

    there = names()
    why = f"torch cannot use {', '.join(there)}; leanplan doctor --all says why" if there else "no CUDA device"
    return (Rejection(what="GPU plans", why=why, kind="engine"),)


def with_prices(hardware: Hardware, spec: Spec) -> Hardware:
    """Return the machine with the spec's own prices and intensities in place of the defaults."""
    given = spec.prices
    paid: dict[str, Any] = {
        name: value
        for name in ("electricity_usd_per_kwh", "grid_gco2e_per_kwh", "pue")
        if (value := getattr(given, name)) is not None
    }
    if given.bought is not None:
        paid |= {"price_usd_per_h": (given.usd_per_h or 0.0) + given.bought.usd_per_h, "owned": True}
    elif given.usd_per_h is not None:
        paid |= {"price_usd_per_h": given.usd_per_h, "owned": False}
    return replace(hardware, **paid)


def read_models(
    spec: Spec, *, offline: bool, trust_remote_code: str | None, allow_pickle: bool, weights: str
) -> ReadResult:
    """Return the facts of a spec's model, with its draft; see `planner.reading.read_model`."""
    from planner.reading import read_model

    draft = spec.draft
    return read_model(
        source_of(spec, spec.model), revision=spec.model.revision, offline=offline, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, weights=weights, draft=source_of(spec, draft) if draft else None,
        draft_revision=draft.revision if draft else None,
    )  # fmt: skip


def source_of(spec: Spec, ref: ModelRef) -> str:
    """Return a model's folder where there is one beside the spec or here, else the hub id as written."""
    places = (Path(spec.folder) / ref.source, Path(ref.source))
    return next((str(folder) for folder in places if folder.is_dir()), ref.source)


def _engines(spec: Spec, hardware: Hardware, *, predict: bool) -> tuple[tuple[str, ...], tuple[Rejection, ...]]:
    """Return the engines to use, and those left out with the reason.

    Raises:
        EnvironmentProblem: none of those the spec names can run here.
    """
    wanted = spec.engines or engines.names()
    ready, refused = [], []
    for name in wanted:
        module = engines.get(name)
        why = None if predict else module.find()
        if hardware.device.kind not in module.ENGINE.devices:
            why = f"it computes on {' or '.join(sorted(module.ENGINE.devices))} only, the model would run on {hardware.device.name}"
        if why:
            refused.append(Rejection(what=name, why=why, kind="engine"))
        else:
            ready.append(name)
    if not ready:
        raise EnvironmentProblem(
            "no engine can run here: " + "; ".join(f"{r.what}: {r.why}" for r in refused),
            hint="leanplan doctor shows what is missing",
        )
    # The unchanged model is measured on transformers where that is possible: it reads any model as it came.
    ready.sort(key=lambda name: name != "transformers")
    return tuple(ready), tuple(refused)
