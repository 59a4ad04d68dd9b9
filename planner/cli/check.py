"""`leanplan check [SPEC]`: judge every budget, for CI."""

from __future__ import annotations

import argparse

HELP = "judge each budget of a spec for the locked plan: met, not met or inconclusive; for CI"
FORMATS = ("full", "concise", "json", "junit", "markdown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "spec", nargs="?", default="leanplan.yaml", help="spec file, or - for stdin (default leanplan.yaml)"
    )
    parser.add_argument("--predict", action="store_true", help="judge predictions; nothing is run")
    parser.add_argument("--baseline", metavar="FILE", help="lock file (default: check.against of the spec, beside it)")
    parser.add_argument("--update-lock", action="store_true", help="write today's figures of the plan to the lock file")
    parser.add_argument("--exit-zero", action="store_true", help="exit 0 also when a budget is not met or inconclusive")
    parser.add_argument("--format", choices=FORMATS, help="what to print (default full)")


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base.errors import ExitCode
    from planner import spec as specs
    from planner.checking import check, lock_of, lock_path
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.lock import write_lock
    from planner.loop import Settings
    from planner.progress import Progress

    spec = specs.load(options.spec)
    settings = Settings(
        run_root=runs_root(options), store_root=Path(options.store or ".leanplan"), predict=options.predict, offline=options.offline,
        trust_remote_code=options.trust_remote_code, allow_pickle=options.allow_pickle,
    )  # fmt: skip
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    lock = Path(options.baseline) if options.baseline else None
    result = check(spec, settings=settings, progress=progress, lock=lock)
    if options.update_lock and result.measured:
        measured = next(r for r in result.answer.results if r.plan == result.plan)
        write_lock(lock or lock_path(spec), lock_of(result.answer, measured))
        progress.line(f"wrote {lock or lock_path(spec)}")
    if options.format == "json":
        options.json = True
    emit(options, summary(result), RENDER[options.format or "full"](result))
    code = result.exit_code
    return ExitCode.DONE if options.exit_zero and code in (ExitCode.BUDGET_NOT_MET, ExitCode.INCONCLUSIVE) else code


def summary(result) -> dict:  # type: ignore[no-untyped-def, type-arg]
    """Return a check as JSON data."""
    return {
        "schema": 1, "headline": result.headline, "exit_code": int(result.exit_code), "plan": result.plan, "plan_id": result.plan.id,
        "measured": result.measured, "verdicts": result.verdicts, "regressions": result.regressions, "notes": result.notes,
    }  # fmt: skip


def full(result) -> str:  # type: ignore[no-untyped-def]
    from planner.reports._table import MARKS

    lines = [result.headline, "", f"plan {result.plan.id}: {result.plan.words}"]
    for verdict in result.verdicts:
        warn = "  (warn)" if verdict.budget.level == "warn" else ""
        lines.append(f"  {MARKS[verdict.outcome]} {verdict.sentence}{warn}")
    shown = [r for r in result.regressions if r.outcome != "not compared"]
    if shown:
        lines.append("against the lock:")
        lines += [f"  {r.outcome:7} {r.sentence}" for r in shown]
    return "\n".join([*lines, *(f"note: {n}" for n in result.notes)])


def concise(result) -> str:  # type: ignore[no-untyped-def]
    return "\n".join([result.headline, *(f"{v.outcome}: {v.sentence}" for v in result.verdicts if v.outcome != "met")])


def markdown(result) -> str:  # type: ignore[no-untyped-def]
    from planner.reports._table import MARKS
    from planner.reports.markdown import escape

    lines = [
        f"### {'✅' if result.exit_code == 0 else '❌' if result.exit_code == 1 else '❔'} leanplan: {escape(result.headline)}",
        "",
    ]
    lines += ["| budget | limit | figure | |", "|---|--:|---|---|"]
    order = {"not met": 0, "inconclusive": 1, "not judged": 2, "met": 3}
    for verdict in sorted(result.verdicts, key=lambda v: order[v.outcome]):
        lines.append(
            f"| {verdict.budget.label} | {escape(verdict.budget.text)} | {escape(verdict.sentence)} | {MARKS[verdict.outcome]} |"
        )
    worse = [r for r in result.regressions if r.outcome in ("worse", "better")]
    if worse:
        lines += [
            "",
            "| against the lock | |",
            "|---|---|",
            *(f"| {r.outcome} | {escape(r.sentence)} |" for r in worse),
        ]
    lines += [
        "",
        f"<sub>plan {result.plan.id}: {escape(result.plan.words)}; figures {'measured' if result.measured else 'predicted'}</sub>",
    ]
    return "\n".join([*lines, *(f"- {escape(n)}" for n in result.notes)])[:60_000]


def junit(result) -> str:  # type: ignore[no-untyped-def]
    from planner.reports.junit import suite

    return suite(result.name, result.verdicts)


RENDER = {"full": full, "concise": concise, "json": full, "junit": junit, "markdown": markdown}
