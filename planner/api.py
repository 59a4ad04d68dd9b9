"""The Python way in: the same specs, the same plans, the same ids as the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base.types import Budget, Estimate, Step
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
        fields: any other key of a spec file: `objectives`, `workload`, `hardware`, `quality`, `calibration`, ...

    Raises:
        BadInput: the spec, model or data cannot be used; NoFeasiblePlan is not raised: the set says so.

    Example:
        >>> answer = plan("models/tiny-lm", budgets={"peak_memory": "2 GiB"}, predict=True)  # doctest: +SKIP
    """
    from planner.loop import Settings, run
    from planner.progress import Progress

    settings = Settings(run_root=Path(run_dir), store_root=Path(store), predict=predict, fresh=fresh, offline=offline)
    return run(_spec_of(model, spec, budgets, fields), settings, Progress(quiet=not progress))


def estimate(
    model: str | Path,
    steps: Sequence[Step] = (),
    *,
    engine: str = "transformers",
    hardware: str = "local",
    store: str | Path = ".leanplan",
    **workload: int,
) -> Estimate:
    """Return predicted figures of one plan, without running anything.

    Args:
        steps: techniques with their knobs, those not given at their default; put in the order the knowledge base gives.
        hardware: "local" or a name of `leanplan ls machines`.
        workload: prompt_tokens, output_tokens, concurrency.

    Raises:
        BadInput: an unknown technique, knob, setting or machine, or a model that cannot be read.
    """
    import cost_models
    from knowledge_base import rules
    from knowledge_base.registry import complete
    from knowledge_base.types import Plan, Workload
    from planner.machine import find
    from planner.reading import read_model

    facts = read_model(str(model), weights="optional").model
    chosen = Plan(model_digest=facts.digest, engine=engine, steps=tuple(rules.order([complete(s) for s in steps])))
    lengths = {"prompt_tokens": 128, "output_tokens": 64, **workload}
    return cost_models.estimate(chosen, facts, Workload(**lengths), find(hardware, Path(store)))


def check(spec: str | Path, **settings: Any) -> Any:
    """Judge the budgets of a spec for its locked plan; see `leanplan check`. Returns a planner.checking.CheckResult."""
    from planner.checking import check as run_check

    return run_check(spec, **settings)


def _spec_of(model: str | Path | None, spec: str | Path | None, budgets: Any, fields: Mapping[str, Any]) -> Spec:
    from knowledge_base.errors import BadInput
    from planner import spec as specs

    if (model is None) == (spec is None):
        raise BadInput(
            "give either a model or a spec file",
            hint='plan("models/tiny-lm", budgets={...}) or plan(spec="leanplan.yaml")',
        )
    if spec is not None:
        if budgets or fields:
            raise BadInput(
                "a spec file and spec fields were both given", hint="put them in the file, or pass all as arguments"
            )
        return specs.load(spec)
    as_values = [b for b in budgets if isinstance(b, Budget)] if not isinstance(budgets, Mapping) else []
    data = {"version": 1, "goal": "serve", "model": str(model), **fields}
    if isinstance(budgets, Mapping) and budgets:
        data["budgets"] = dict(budgets)
    elif as_values and "objectives" not in data:
        data["objectives"] = ["tpot_p50", "peak_memory", "quality_loss"]
    read = specs.from_mapping(data, folder=Path.cwd())
    return replace(read, budgets=tuple(as_values)) if as_values else read
