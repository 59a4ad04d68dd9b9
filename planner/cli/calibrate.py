"""`leanplan calibrate`: a minute of measurements after which predictions for this machine are its own."""

from __future__ import annotations

import argparse
from typing import Any

LONGEST_WAIT_S = 300.0  # for a measurement of another run
HELP = "measure in a minute what each engine reaches here, so that every later prediction for this machine uses it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--time-limit",
        default="60 s",
        metavar="TIME",
        help='wall time of it all, e.g. "30 s" (default 60 s); one plan is measured however little it is',
    )
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME",
        help="calibrate this engine; may be repeated (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="FOLDER", help="measure this model too, besides the small ones made for the purpose"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")
    parser.add_argument("--forget", action="store_true", help="remove this machine's calibration; nothing is measured")


def output() -> Any:
    from planner.calibrating.telling import Calibrated, Forgotten

    return Calibrated | Forgotten


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from planner.progress import Progress

    store = Path(options.store or ".leanplan")
    progress = Progress(quiet=bool(options.quiet or options.no_progress))
    return _forget(options, store) if options.forget else _calibrate(options, store, progress)


def _calibrate(options: argparse.Namespace, store: Any, progress: Any) -> int:
    import time

    from knowledge_base.errors import EnvironmentProblem, ExitCode
    from planner.calibrating import keeping, taking, telling
    from planner.cli._talk import emit
    from planner.locks import measurement_lock
    from planner.machine import profile

    limit_s = _time_limit(options.time_limit)
    keeping.own_store(store).require_writable()  # told now, not after a minute
    model = _model(options)
    with measurement_lock(waiting=progress.line, timeout_s=LONGEST_WAIT_S):
        pass  # a run that is timing something is waited for; from here on each measurement takes its turn
    began = time.monotonic()
    machine = profile(store, tell=progress.line)
    taken = taking.take(
        machine.hardware, store, stop_at=began + limit_s, progress=progress, engine_names=options.engine, model=model,
        fresh=options.fresh,
    )  # fmt: skip
    progress.done()
    if not taken.records and taken.interrupted is None:
        raise EnvironmentProblem(
            f"nothing was measured: {'; '.join(taken.left_out[:3]) or 'no engine offers anything to measure'}",
            hint="give it more time: --time-limit 120s; leanplan doctor shows what is broken", where="calibrate",
        )  # fmt: skip
    facts = telling.calibrated(
        machine, taken, keeping.laws_of(machine.hardware, store), wall_s=time.monotonic() - began
    )  # fmt: skip
    emit(options, facts, telling.as_text(facts))
    if taken.interrupted is not None:
        raise taken.interrupted
    return ExitCode.DONE


def _forget(options: argparse.Namespace, store: Any) -> int:
    from knowledge_base.errors import ExitCode
    from planner.calibrating import keeping
    from planner.calibrating.telling import Forgotten
    from planner.cli._talk import emit
    from planner.machine import this_fingerprint

    gone = keeping.forget(store, this_fingerprint())
    lines = [*map(str, gone), f"removed {len(gone)} files; measurements of runs stay"]
    emit(options, Forgotten(removed=[str(path) for path in gone]), "\n".join(lines))
    return ExitCode.DONE


def _time_limit(text: str) -> float:
    from knowledge_base import units
    from knowledge_base.errors import BadInput
    from planner.calibrating.taking import LEAST_S

    limit_s = units.parse(text, "time", field="--time-limit")
    if limit_s < LEAST_S:
        raise BadInput(
            f"{units.format(limit_s, 'time')} are too few: loading the engines alone takes longer",
            hint=f"give at least {LEAST_S:.0f} s, better 60 s", where="--time-limit",
        )  # fmt: skip
    return limit_s


def _model(options: argparse.Namespace) -> Any:
    from planner.reading import check_complete, check_finite, read_model

    if options.model is None:
        return None
    read = read_model(options.model, offline=options.offline, allow_pickle=options.allow_pickle, weights="required")
    assert read.folder is not None
    check_complete(read.folder)
    check_finite(read.folder)
    return read
