"""The measured plans as an Optuna study in SQLite, so that optuna-dashboard and Optuna's own plots open a run."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from knowledge_base.metrics import find_metric
from planner.answering import value_of
from planner.results import ParetoSet


def write_study(path: Path, answer: ParetoSet) -> None:
    """Write one trial for each measured plan: steps as parameters, objectives as values, budgets as constraints.

    Written whole beside its place and then renamed: an interrupted write leaves the earlier file.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".study.", suffix=".db")
    os.close(handle)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{temporary}",
            study_name=answer.run_id,
            directions=["minimize" if find_metric(o)[0].better == "lower" else "maximize" for o in answer.objectives],
        )
        study.set_user_attr("objectives", list(answer.objectives))
        options: dict[str, set[str]] = {"engine": set()}
        rows = []
        for result in answer.results:
            params = {"engine": result.plan.engine} | {s.technique: str(s) for s in result.plan.steps}
            rows.append((result, params))
            for name, value in params.items():
                options.setdefault(name, {"none"}).add(value)
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            n: optuna.distributions.CategoricalDistribution(sorted(v)) for n, v in options.items()
        }
        for result, params in rows:
            values = [v for o in answer.objectives if (v := value_of(result, o)) is not None]
            good = len(values) == len(answer.objectives)
            trial = optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if good else optuna.trial.TrialState.FAIL,
                params={name: params.get(name, "none") for name in distributions},
                distributions=distributions,
                values=values if good else None,
                user_attrs={"plan": result.plan.words, "id": result.plan.id, "feasible": result.feasible},
            )
            study.add_trial(trial)
        study._storage.remove_session()
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
