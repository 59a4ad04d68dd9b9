"""`leanplan serve PLAN`: the service that a plan ends in."""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

HELP = (
    "serve a plan.json, a measured plan (its id, or recommended) or an artefact folder as an OpenAI-compatible endpoint; "
    "exit code 0 once it was stopped and every request was answered"
)
FIRST_REQUEST_S = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="PLAN", help="plan.json, the start of a plan id, recommended, or artefact folder"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)")
    parser.add_argument(
        "--drain", default="30 s", metavar="TIME", help="for running requests to end when it is stopped (default 30 s)"
    )
    parser.add_argument(
        "--context-tokens",
        type=int,
        metavar="N",
        help="of prompt and output together (default: the model's, at most 4096)",
    )
    parser.add_argument("--output-tokens", type=int, metavar="N", help="most that one request may ask for")
    parser.add_argument("--waiting", type=int, metavar="N", help="requests that may wait; more get 429 (default 64)")
    parser.add_argument("--name", metavar="TEXT", help="of the model, for clients (default: the folder it came from)")
    parser.add_argument("--check", action="store_true", help="start, answer one request, stop")


class Ready(TypedDict):
    """A service that takes requests."""

    url: str  # base of an OpenAI client: .../v1
    model: str
    engine: str
    plan: str  # id
    words: str  # the plan's steps
    folder: str  # of the artefact
    pid: int  # of the process that holds engine and port
    slots: int  # requests answered at once
    context_tokens: int | None


def output() -> Any:
    return Ready


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base import units
    from knowledge_base.errors import BadInput
    from planner import serving
    from planner.cli._talk import emit, say
    from planner.finding import runs_root
    from planner.progress import Progress
    from planner.serving.choosing import choose
    from planner.serving.ports import require_free
    from planner.serving.stopping import Stopping

    drain_s = units.parse(options.drain, "time", field="--drain")
    given = {name: getattr(options, name) for name in ("context_tokens", "output_tokens", "waiting")}
    settings = serving.Settings(**{name: value for name, value in given.items() if value is not None})
    for name, least in (("context_tokens", 2), ("output_tokens", 1), ("waiting", 0)):
        if given[name] is not None and given[name] < least:
            raise BadInput(f"{given[name]} is too few", hint=f"at least {least}", where=f"--{name.replace('_', '-')}")
    if not 0 <= options.port < 2**16:
        raise BadInput(f"{options.port} is no port", hint="0 to 65535", where="--port")
    require_free(options.host, options.port)
    store = Path(options.store or ".leanplan")
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    chosen = choose(options.plan, runs=runs_root(options), store=store, progress=progress, offline=options.offline)
    log = store / "serving" / f"{chosen.plan.id}.log"
    log.unlink(missing_ok=True)
    with serving.started(
        chosen.folder, host=options.host, port=options.port, name=options.name or chosen.model, settings=settings, log=log,
        progress=lambda what, done: progress.tick(what),
    ) as service, Stopping(service) as stopping:  # fmt: skip
        progress.done()
        if why := service.why_one_by_one:
            say(f"one request is answered after another: {why}", quiet=options.quiet)
        if options.check:
            service.ask(FIRST_REQUEST_S)
            stopping.ask()
        ready = Ready(
            url=f"{service.url}/v1", model=service.model, engine=service.engine, plan=chosen.plan.id, words=chosen.plan.words,
            folder=str(chosen.folder), pid=service.pid, slots=service.slots, context_tokens=service.context_tokens,
        )  # fmt: skip
        emit(options, ready, f"serving {service.model} at {ready['url']} (plan {chosen.plan.id}, {chosen.plan.words})")
        service.wait(stopping)
        return _drained(service, stopping, drain_s, quiet=options.quiet or options.check)


def _drained(service: Any, stopping: Any, limit_s: float, *, quiet: int) -> int:
    """Let what is running end, stop, and return the exit code."""
    from knowledge_base.errors import ExitCode
    from planner.cli._talk import say

    try:
        cut_off = service.drain(limit_s)
    except KeyboardInterrupt:
        say("stopped at once; requests that were running are cut off")
        return stopping.code
    if cut_off:
        say(f"stopped; {cut_off} requests are cut off")
        return stopping.code
    say("stopped; every request was answered", quiet=quiet)
    return ExitCode.DONE
