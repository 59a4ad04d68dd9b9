"""What must be known before any search: the machine, the model, the engines, the legal plans, the texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.metrics import METRICS
from knowledge_base.registry import engines
from knowledge_base.types import Hardware, Model
from planner.results import Rejection

if TYPE_CHECKING:
    from planner.spec import Spec
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
    from planner.machine import find
    from planner.reading import read_model

    if spec.workload.requests_per_s is not None:
        raise BadInput(
            "arrival rates are not planned for yet: requests are served back to back",
            hint="give workload.concurrency instead of workload.arrival_rate",
            where="workload.arrival_rate",
        )
    only_predict = predict or spec.hardware != "local"
    other = None if spec.hardware == "local" else find(spec.hardware, store)
    if not only_predict:
        _require_measurable(spec)
    read = read_model(
        model_source(spec),
        revision=spec.model.revision,
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
    output = spec.workload.output_tokens
    prompt = spec.workload.prompt_tokens_p95 or spec.workload.prompt_tokens
    if prompt + output > model.max_context_tokens:
        raise BadInput(
            f"prompt {prompt} + output {output} tokens > context {model.max_context_tokens} of {model.name}",
            hint="shorten workload.prompt_tokens or workload.output_tokens",
            where="workload",
        )


def legal_plans(spec: Spec, model: Model, hardware: Hardware, *, predict: bool) -> tuple[Space, tuple[Rejection, ...]]:
    """Return the legal plans of a spec, and what was left out with the reason.

    Raises:
        EnvironmentProblem: no engine can serve the model here.
    """
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
    )
    if not space.options:
        raise EnvironmentProblem(
            "no engine can serve this model here: "
            + "; ".join(f"{r.what}: {r.why}" for r in space.refused if r.kind == "engine"),
            hint="leanplan doctor shows what is missing",
        )
    if spec.hardware == "local":
        refused += _without_gpu(hardware)
    return space, (*refused, *(Rejection(what=r.what, why=r.why, kind=r.kind) for r in space.refused))


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
    return replace(
        hardware,
        price_usd_per_h=hardware.price_usd_per_h if given.usd_per_h is None else given.usd_per_h,
        electricity_usd_per_kwh=hardware.electricity_usd_per_kwh
        if given.electricity_usd_per_kwh is None
        else given.electricity_usd_per_kwh,
        grid_gco2e_per_kwh=hardware.grid_gco2e_per_kwh
        if given.grid_gco2e_per_kwh is None
        else given.grid_gco2e_per_kwh,
        pue=hardware.pue if given.pue is None else given.pue,
    )


def model_source(spec: Spec) -> str:
    """Return the model's folder where there is one beside the spec or here, else the hub id as written."""
    for folder in (Path(spec.folder) / spec.model.source, Path(spec.model.source)):
        if folder.is_dir():
            return str(folder)
    return spec.model.source


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
