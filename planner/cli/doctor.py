"""`leanplan doctor`: what Leanplan may use here, for each trouble the command that mends it, and installing engines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

HELP = "check engines, packages, GPU, energy counters, disk, limits, noise; one fix for each trouble"

State = Literal["ok", "warn", "fail"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="also import every engine and ask the GPU (seconds)")
    parser.add_argument(
        "--install", metavar="ENGINE", help="install an engine's packages: beside ours, or in an environment of its own"
    )
    parser.add_argument("--remove", metavar="ENGINE", help="remove an engine's own environment")


class Checked(TypedDict):
    """One thing that was looked at."""

    check: str
    state: State
    found: str
    fix: str  # the command that mends it; empty where nothing is to be mended


def output() -> Any:
    return list[Checked]


def run(options: argparse.Namespace) -> int:
    from knowledge_base.errors import ExitCode
    from planner.cli._talk import emit, say
    from planner.cli.ls import table

    if changed := options.install or options.remove:
        _change(options)
    rows = [row for check in CHECKS for row in check(options)]
    if changed:
        rows = [row for row in rows if row["check"] in (f"engine {changed}", f"environment {changed}")]
    emit(options, rows, table(rows))
    failed = sum(row["state"] == "fail" for row in rows)
    if failed:
        say(f"{failed} check{'s' if failed > 1 else ''} failed", quiet=options.quiet)
    return ExitCode.ENVIRONMENT if failed else ExitCode.DONE


def _change(options: argparse.Namespace) -> None:
    """Install or remove what was asked for, and tell.

    Raises:
        BadInput: no such engine, or --offline; EnvironmentProblem: it cannot be installed here.
    """
    from knowledge_base.errors import BadInput
    from planner import environments
    from planner.cli._talk import say

    if options.install and options.remove:
        raise BadInput("--install and --remove together", hint="give one of them", where="command line")
    if options.remove:
        say(environments.remove(options.remove), quiet=options.quiet)
        return
    if options.offline:
        raise BadInput("--offline forbids what --install needs", hint="leave one of them out", where="--offline")
    say(
        environments.install(options.install, tell=lambda text: say(text, quiet=options.quiet or options.no_progress)),
        quiet=options.quiet,
    )


def _row(check: str, state: State, found: str, fix: str = "") -> Checked:
    return Checked(check=check, state=state, found=found, fix=fix)


def _python(options: Any) -> Iterator[Checked]:
    import platform
    import sys

    good = sys.version_info >= (3, 11)
    yield _row(
        "python", "ok" if good else "fail", platform.python_version(), "" if good else "install Python 3.11 or newer"
    )


def _packages(options: Any) -> Iterator[Checked]:
    """Compare installed versions with what the distribution asks for; the floors hold back known vulnerabilities."""
    from importlib.metadata import PackageNotFoundError, requires, version

    try:
        wanted = requires("leanplan") or []
    except PackageNotFoundError:
        yield _row("leanplan", "warn", "runs from source, not installed", "pip install -e .")
        return
    from packaging.requirements import Requirement

    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            number = version(requirement.name)
        except PackageNotFoundError:
            yield _row(requirement.name, "fail", "not installed", f"pip install '{requirement}'")
            continue
        good = requirement.specifier.contains(number, prereleases=True)
        found = number if good else f"{number}, needs {requirement.specifier}"
        yield _row(requirement.name, "ok" if good else "fail", found, "" if good else f"pip install '{requirement}'")


def _engines(options: Any) -> Iterator[Checked]:
    from knowledge_base.registry import engines
    from planner.probes import accelerators

    ready = 0
    rows = []
    for name, module in engines.all().items():
        if module.ENGINE.devices == {"gpu"} and not accelerators.names():
            rows.append(_row(f"engine {name}", "ok", "left out: it computes on CUDA devices only, and there is none"))
            continue
        problem = module.find()
        if problem is None and options.all:
            problem = _import_problem(module.ENGINE.preload)
        ready += problem is None
        what, _, command = (problem or "").partition("; ")
        found = what or ", ".join(f"{k} {v}" for k, v in module.versions().items())
        fix = command or ("pip install the engine again" if problem else "")
        rows.append(_row(f"engine {name}", "warn" if problem else "ok", found, fix))
    if not ready:
        for row in rows:
            row["state"], row["fix"] = "fail", row["fix"] or "pip install leanplan again"
    yield from rows


def _environments(options: Any) -> Iterator[Checked]:
    """Tell of engines that live in environments of their own."""
    from knowledge_base import units
    from planner import environments

    for place in environments.places():
        size = f", {units.format(place.bytes, 'bytes')}" if place.bytes else ""
        versions = "".join(f", {name} {version}" for name, version in place.versions.items())
        made = place.state in ("made", "not made")  # an engine's own row tells what it lacks
        yield _row(
            f"environment {place.name}", "ok" if made else "warn", f"{place.state}{size}{versions}: {place.folder}",
            "" if made else f"leanplan doctor --install {place.name}, or --remove {place.name}",
        )  # fmt: skip


def _import_problem(modules: tuple[str, ...]) -> str | None:
    """Return why an engine's modules cannot be imported where it lives, tried in a process of its own; None if they can."""
    import os
    import subprocess

    from planner import environments

    code = "".join(f"import {name}\n" for name in modules)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [str(environments.interpreter(modules)), "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
    )
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else f"present but broken: {lines[-1] if lines else done.returncode}"


def _techniques(options: Any) -> Iterator[Checked]:
    """Name the optional modules that are missing, and what is left out without them."""
    from importlib.util import find_spec

    from knowledge_base.registry import techniques

    missing: dict[tuple[str, str], list[str]] = {}
    for name, module in techniques.all().items():
        for need in module.TECHNIQUE.modules:
            if find_spec(need) is None:
                extra = module.TECHNIQUE.extra
                missing.setdefault(
                    (need, f"pip install 'leanplan[{extra}]'" if extra else f"pip install {need}"), []
                ).append(name)
    count = len(techniques.names())
    if not missing:
        yield _row("techniques", "ok", f"{count}, all can run")
    for (need, fix), names in missing.items():
        yield _row("techniques", "warn", f"{need} not installed; left out: {', '.join(names)}", fix)


def _gpu(options: Any) -> Iterator[Checked]:
    from planner.probes import accelerators

    names = accelerators.names()
    if not names:
        yield _row("GPU", "ok", "no CUDA device; plans run on the processor")
        return
    facts = accelerators.find() if options.all else {}
    if facts.get("problem"):
        yield _row(
            "GPU",
            "warn",
            f"{', '.join(names)}: {facts['problem']}",
            "install a torch build for this driver: pytorch.org/get-started",
        )
        return
    yield _row("GPU", "ok", ", ".join(names))
    for gpu in facts.get("gpus", ()):
        used = gpu["memory_bytes"] - gpu["free_bytes"]
        if used > 0.1 * gpu["memory_bytes"]:
            yield _row(
                "GPU", "warn", f"others hold {used / 2**30:.0f} GiB of {gpu['name']}", "nvidia-smi shows which process"
            )


def _energy(options: Any) -> Iterator[Checked]:
    from planner.probes import energy_counters

    facts = energy_counters.find()
    if facts["kinds"]:
        yield _row("energy", "ok", ", ".join(facts["counters"]))
        return
    what, _, command = facts["problems"][0].partition(": sudo ")
    fix = f"sudo {command}" if command else "in the spec, let modelled energy count: source: any"
    yield _row("energy", "warn", f"energy can only be modelled: {what}", fix)


def _memory(options: Any) -> Iterator[Checked]:
    from planner.probes import memory_limits

    facts = memory_limits.find()
    usable = min(facts["limit_bytes"], facts["available_bytes"])
    found = f"{usable / 2**30:.1f} GiB usable, limit {facts['limit_bytes'] / 2**30:.1f} GiB ({facts['limit_source']})"
    good = usable >= 2 * 2**30
    yield _row(
        "memory",
        "ok" if good else "warn",
        found,
        "" if good else "close programs or raise the limit: a candidate needs about 2 GiB",
    )


def _disk(options: Any) -> Iterator[Checked]:
    import shutil

    for name, folder in (
        ("run folder", Path(options.run_dir or "runs")),
        ("store", Path(options.store or ".leanplan")),
    ):
        there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
        flag = "--run-dir" if name == "run folder" else "--store"
        if not _writable(there):
            yield _row(name, "fail", f"{there} cannot be written", f"choose another folder: {flag} PATH")
            continue
        free = shutil.disk_usage(there).free
        state: State = "ok" if free >= 5 * 2**30 else "warn" if free >= 2**30 else "fail"
        fix = (
            ""
            if state == "ok"
            else f"free space, or choose another disk: {flag} PATH; leanplan clean shows what may go"
        )
        yield _row(name, state, f"{folder}, {free / 2**30:.1f} GiB free", fix)


def _writable(folder: Path) -> bool:
    import tempfile

    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _noise(options: Any) -> Iterator[Checked]:
    from planner.probes import noise

    facts = noise.find()
    for warning in facts["warnings"]:
        what, _, fix = warning.partition(": ")
        yield _row("noise", "warn", what, fix)
    if not facts["warnings"]:
        yield _row("noise", "ok", f"load {facts['load_1m']:.1f}, other programs use {facts['busy_ratio']:.0%}")


CHECKS = (_python, _packages, _engines, _environments, _techniques, _gpu, _energy, _memory, _disk, _noise)
