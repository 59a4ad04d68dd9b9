"""The Python way in: the same specs, the same plans, the same ids as the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.errors import BadInput
from knowledge_base.types import Budget, Estimate, Step, Workload
from planner.results import ParetoSet

if TYPE_CHECKING:
    from planner.spec import Spec


def plan(
    model: str | Path | None = None,
    *,
    spec: str | Path | None = None,
    budgets: Mapping[str, Any] | Sequence[Budget] = (),
    predict: bool = False,
    run_dir: str | Path = "runs",
    store: str | Path = ".leanplan",
    fresh: bool = False,
    offline: bool = False,
    progress: bool = False,
    **fields: Any,
) -> ParetoSet:
    """Fit a model to budgets and return the Pareto set of measured plans.

    Args:
        model: folder or hub id; or give a whole spec file as `spec`.
        budgets: as in a spec file (`{"ttft_p95": "50 ms", "quality_loss": {"max": "2 %"}}`), or Budget values.
        predict: price plans only; nothing is run.
        fresh: measure again what the store already holds.
        progress: tell on stderr what goes on.
        fields: any other key of a spec file: `draft`, `objectives`, `workload`, `hardware`, `quality`, `calibration`, ...

    Raises:
        BadInput: the spec, model or data cannot be used; NoFeasiblePlan is not raised: the set says so.

    Example:
        >>> answer = plan("models/tiny-lm", budgets={"peak_memory": "2 GiB"}, predict=True)  # doctest: +SKIP
    """
    from planner.loop import Settings, run
    from planner.progress import Progress

    settings = Settings(run_root=Path(run_dir), store_root=Path(store), predict=predict, fresh=fresh, offline=offline)
    return run(_spec_of(model, spec, budgets, fields), settings, Progress(quiet=not progress))


def replan(
    run: str | Path | None = None,
    *,
    budgets: Mapping[str, Any] | Sequence[Budget] = (),
    objectives: Sequence[str] = (),
    spec: str | Path | None = None,
    run_dir: str | Path = "runs",
    store: str | Path = ".leanplan",
) -> ParetoSet:
    """Judge what a run measured under changed budgets or objectives, at once: nothing is run.

    Args:
        run: folder or name of a finished run; None: the newest.
        budgets: as in a spec file, or Budget values; each takes the place of the spec's on the same figure.
        objectives: in place of the spec's.
        spec: a spec file with the same workload, in place of the run's own.

    Raises:
        BadInput: no such run, it measured nothing, or a budget or the spec cannot be used.
    """
    from planner import spec as specs
    from planner.finding import find_run
    from planner.replanning import replan as judge_anew
    from planner.replanning import spec_of_run, with_budgets

    answer = find_run(str(run) if run else None, Path(run_dir))
    base = specs.load(spec) if spec else spec_of_run(answer)
    asked: dict[str, Any] = {"model": answer.model.source, "objectives": list(objectives or base.objectives)}
    if isinstance(budgets, Mapping) and budgets:
        asked["budgets"] = dict(budgets)
    read = specs.from_mapping(asked)
    values = read.budgets if isinstance(budgets, Mapping) else tuple(budgets)
    changed = replace(with_budgets(base, values), objectives=read.objectives)
    return judge_anew(answer, changed, run_root=Path(run_dir), store=Path(store))


def estimate(
    model: str | Path,
    steps: Sequence[str | Step] = (),
    *,
    engine: str = "transformers",
    weights: str | None = None,
    hardware: str | Path = "local",
    devices: int | None = None,
    draft: str | Path | None = None,
    store: str | Path = ".leanplan",
    **workload: Any,
) -> Estimate:
    """Return predicted figures of one plan, without running anything.

    Args:
        steps: techniques with their knobs, those not given at their default, as values or as on the command line
            ("weight_int4:group_size=64"); put in the order the knowledge base gives.
        engine: one of `leanplan ls engines`, or one known by its law ("vllm", "sglang", ...), which takes no steps.
        weights: how an engine known by its law stores them: "bf16", "fp8", "int8", "int4" or "fp4".
        hardware: "local", a name of `leanplan ls machines`, or a file that describes a machine.
        devices: how many of its device; None: as many as the name says.
        draft: folder or hub id of a smaller model that drafts; None: the folder NAME-draft beside the model's, if there is one.
        workload: prompt_tokens, output_tokens, concurrency or requests_per_s.

    Raises:
        BadInput: an unknown technique, knob, setting, engine or machine, or a model that cannot be read.
    """
    from knowledge_base.registry import complete
    from planner.estimating.asking import Asked, find_engine, read_step, with_devices
    from planner.estimating.pricing import price
    from planner.machine import find
    from planner.reading import read_model

    find_engine(_text(engine, "engine"))
    if isinstance(steps, str) or not all(isinstance(step, str | Step) for step in steps):
        raise BadInput(
            f"not a list of steps: {steps!r}", hint='["weight_int4:group_size=64"], or Step values', where="steps"
        )
    asked = Asked(
        model=read_model(_text(model, "model"), weights="optional", draft=str(draft) if draft else None).model,
        engine=engine,
        steps=tuple(read_step(step, "steps:") if isinstance(step, str) else complete(step) for step in steps),
        weights=weights,
        workload=_workload({"prompt_tokens": 128, "output_tokens": 64, **workload}),
        hardware=with_devices(find(_text(hardware, "hardware"), Path(store)), devices),
    )
    asked.check()
    return price(asked).estimate


def check(spec: str | Path, **settings: Any) -> Any:
    """Judge the budgets of a spec for its locked plan; see `leanplan check`. Returns a planner.checking.CheckResult."""
    from planner.checking import check as run_check

    return run_check(spec, **settings)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str | Path):
        raise BadInput(f"{value!r} is not text", hint=f"the signature tells what `{name}` may be", where=name)
    return str(value)


def _workload(values: Mapping[str, Any]) -> Workload:
    known = [field.name for field in fields(Workload)]
    if unknown := sorted(values.keys() - set(known)):
        raise BadInput(f"a workload has no `{unknown[0]}`", hint=f"it has {', '.join(known)}", where="workload")
    return Workload(**values)


def _spec_of(model: str | Path | None, spec: str | Path | None, budgets: Any, given: Mapping[str, Any]) -> Spec:
    from planner import spec as specs

    if (model is None) == (spec is None):
        raise BadInput(
            "give either a model or a spec file",
            hint='plan("models/tiny-lm", budgets={...}) or plan(spec="leanplan.yaml")',
        )
    if spec is not None:
        if budgets or given:
            raise BadInput(
                "a spec file and spec fields were both given", hint="put them in the file, or pass all as arguments"
            )
        return specs.load(spec)
    as_values = [] if isinstance(budgets, Mapping) else list(budgets)
    if not all(isinstance(budget, Budget) for budget in as_values):
        raise BadInput(
            f"not budgets: {budgets!r}", hint='{"ttft_p95": "50 ms"}, or a list of Budget values', where="budgets"
        )
    data = {"version": 1, "goal": "serve", "model": _text(model, "model"), **given}
    if isinstance(budgets, Mapping) and budgets:
        data["budgets"] = dict(budgets)
    elif as_values and "objectives" not in data:
        data["objectives"] = ["tpot_p50", "peak_memory", "quality_loss"]
    read = specs.from_mapping(data, folder=Path.cwd())
    return replace(read, budgets=tuple(as_values)) if as_values else read
