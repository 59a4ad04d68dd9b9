"""`leanplan export PLAN --to TARGET -o DIR`: what an operator deploys."""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

HELP = (
    "write what an operator deploys: the artefact and a compose file, a systemd unit, or the command of another server"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "plan", metavar="PLAN", help="plan.json, the start of a plan id, recommended, or artefact folder"
    )
    parser.add_argument("--to", required=True, metavar="TARGET", help="compose, systemd, llama.cpp or vllm")
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="new folder for the files")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="where it will listen (default 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000")
    parser.add_argument("--name", metavar="TEXT", help="of the model, for clients (default: the folder it came from)")
    parser.add_argument(
        "--drain", default="30 s", metavar="TIME", help="for running requests to end when it is stopped (default 30 s)"
    )
    parser.add_argument(
        "--context-tokens", type=int, default=4096, metavar="N", help="of prompt and output together (default 4096)"
    )


class Exported(TypedDict):
    """A folder to deploy."""

    folder: str
    target: str
    plan: str  # id
    files: list[str]  # relative to the folder
    bytes: int  # of all of them
    memory_limit_bytes: int | None  # that is set; null: the plan's peak was not measured, or the target has no limit


def output() -> Any:
    return Exported


def run(options: argparse.Namespace) -> int:
    from pathlib import Path

    from knowledge_base import units
    from knowledge_base.errors import BadInput, ExitCode
    from planner.cli._talk import emit
    from planner.finding import runs_root
    from planner.progress import Progress
    from planner.serving import exports
    from planner.serving.choosing import choose
    from planner.serving.exporting import write

    target = exports.target(options.to)
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput("exists and is not empty", where=str(out), hint="give a new folder with -o")
    if not 0 < options.port < 2**16:
        raise BadInput(f"{options.port} is no port", hint="1 to 65535", where="--port")
    if options.context_tokens < 2:
        raise BadInput(f"{options.context_tokens} is too few", hint="at least 2", where="--context-tokens")
    progress = Progress(quiet=bool(options.quiet), live=False if options.no_progress else None)
    chosen = choose(
        options.plan, runs=runs_root(options), store=Path(options.store or ".leanplan"), progress=progress,
        offline=options.offline,
    )  # fmt: skip
    deployment = exports.Deployment(
        folder=chosen.folder, out=out.absolute(), model=options.name or chosen.model, plan=chosen.plan,
        manifest=chosen.manifest, peak_bytes=chosen.peak_bytes, host=options.host, port=options.port,
        drain_s=units.parse(options.drain, "time", field="--drain"), context_tokens=options.context_tokens,
    )  # fmt: skip
    exports.require_plain(deployment.model, "the model's name")
    exports.require_plain(deployment.host, "--host")
    if why := target.refuses(deployment):
        raise BadInput(
            f"{options.to} cannot serve this plan: {why}",
            hint="choose another target (compose and systemd serve every plan) or another plan", where=options.plan,
        )  # fmt: skip
    written = write(target, deployment)
    limited = deployment.memory_limit_bytes if options.to in ("compose", "systemd") else None
    facts = Exported(
        folder=str(out), target=options.to, plan=chosen.plan.id, files=sorted(written), bytes=sum(written.values()),
        memory_limit_bytes=limited,
    )  # fmt: skip
    shown = "\n".join(f"  {name}" for name in facts["files"])
    emit(options, facts, f"{out}: {units.format(facts['bytes'], 'bytes')} for {options.to}\n{shown}")
    return ExitCode.DONE
