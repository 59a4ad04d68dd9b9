"""Engines' packages, installed on demand: into an environment of the engine's own, or into ours where they do not clash.

An environment is made where it stays (knowledge_base/engines/_environment.py says where), by venv and pip with exact
pins. Its mark is written last, so what was stopped half-way is never taken for whole, and the same command goes on from
there: pip leaves what is installed already. Into our own environment a package is installed only beside what is there:
every version installed is pinned, so numpy, torch and transformers cannot move.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from knowledge_base import units
from knowledge_base.engines import _environment
from knowledge_base.errors import BadInput, EnvironmentProblem
from knowledge_base.registry import engines
from knowledge_base.serde import write_json
from knowledge_base.types import Engine

Tell = Callable[[str], None]

REASONS = 3  # lines of pip's own that an error repeats
_TOLD = re.compile(r"^(Collecting|Downloading|Using cached|Building|Installing collected|Successfully installed)\b")
_BAR = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An environment of an engine's own, as it is: "made", "half made", "other versions" or "not made"."""

    name: str
    folder: Path
    state: str
    bytes: int
    versions: Mapping[str, str]


def places() -> tuple[Place, ...]:
    """Return the environment of every engine that has one of its own, made or not."""
    return tuple(_place(name, m.ENGINE) for name, m in engines.all().items() if m.ENGINE.environment)


def _place(name: str, engine: Engine) -> Place:
    assert engine.environment is not None
    folder = _environment.folder(name)
    told = _environment.mark(folder)
    if told:
        state = "made" if told.get("requirements") == list(engine.environment.requirements) else "other versions"
    else:
        state = "half made" if folder.is_dir() else "not made"
    names = [requirement.partition("==")[0] for requirement in engine.environment.requirements]
    return Place(
        name=name, folder=folder, state=state, bytes=_bytes(folder),
        versions={n: v for n, v in told.get("versions", {}).items() if n in names},
    )  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def interpreter(preload: tuple[str, ...]) -> Path:
    """Return the Python to import an engine's modules with: its own environment's, or ours."""
    for name, module in engines.all().items():
        if module.ENGINE.environment and module.ENGINE.preload == preload:
            return _environment.interpreter(name)
    return Path(sys.executable)


# ---------------------------------------------------------------- installing and removing


def install(name: str, *, tell: Tell) -> str:
    """Install what an engine needs, and return what was done in a sentence.

    Raises:
        BadInput: no such engine; EnvironmentProblem: no disk, no pip, or pip could not, with its own reason.
    """
    engine = _engine(name)
    if engine.environment is not None:
        return _make(name, engine, tell)
    if not (wanted := _missing(engine)):
        return f"{name} is installed already"
    _install_here(wanted, tell)
    return f"{name} is installed: {', '.join(wanted)}"


def remove(name: str) -> str:
    """Remove an engine's environment, and return what went in a sentence.

    Raises:
        BadInput: no engine has such an environment.
    """
    own = [place.name for place in places()]
    if name not in own:
        raise BadInput(
            f"`{name}` has no environment of its own",
            hint=f"these have: {', '.join(own)}" if own else "no engine here has one; pip uninstall removes a package",
            where="--remove",
        )
    folder = _environment.folder(name)
    if not folder.is_dir():
        return f"{name} has no environment here"
    with _alone(name):
        size = units.format(_bytes(folder), "bytes")
        (folder / _environment.MARK).unlink(missing_ok=True)  # first: what is half gone is not whole
        shutil.rmtree(folder)
    return f"removed {name}: {size}"


def _engine(name: str) -> Engine:
    if name not in engines.names():
        raise BadInput(
            f"`{name}` cannot be installed: no such engine", hint=f"these can: {', '.join(engines.names())}", where="--install"
        )  # fmt: skip
    engine: Engine = engines.get(name).ENGINE
    return engine


# ---------------------------------------------------------------- an environment of its own


def _make(name: str, engine: Engine, tell: Tell) -> str:
    environment, folder = engine.environment, _environment.folder(name)
    assert environment is not None
    with _alone(name):
        before = _place(name, engine)
        if before.state == "made":
            return f"{name} is installed already: {folder}"
        if before.state == "other versions":
            shutil.rmtree(folder)
        need = max(0, environment.disk_bytes - before.bytes if before.state == "half made" else environment.disk_bytes)
        free = shutil.disk_usage(folder.parent).free
        tell(
            f"{name}: {', '.join(environment.requirements)} into {folder}; about {units.format(need, 'bytes')} of disk"
        )
        if free < need:
            raise EnvironmentProblem(
                f"{name} takes about {units.format(need, 'bytes')}, {units.format(free, 'bytes')} is free",
                hint=f"free some disk, or point {_environment.VARIABLE} at a larger one", where=str(folder.parent),
            )  # fmt: skip
        python = _environment.interpreter(name)
        if not _works(python):
            tell("making the environment")
            _run([sys.executable, "-m", "venv", "--clear", str(folder)], name, tell)
        _pip(python, environment.requirements, name, tell)
        versions = _versions(folder)
        _check(name, engine, versions)
        told = {"name": name, "requirements": list(environment.requirements), "versions": versions}
        write_json(folder / _environment.MARK, told | {"made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    return f"{name} is installed: {folder}, {units.format(_bytes(folder), 'bytes')}"


def _works(python: Path) -> bool:
    """Return whether an interpreter starts and has pip."""
    if not python.exists():
        return False
    done = subprocess.run(
        [str(python), "-m", "pip", "--version"], capture_output=True, stdin=subprocess.DEVNULL, env=_world()
    )
    return done.returncode == 0


def _versions(folder: Path) -> dict[str, str]:
    """Return the versions of what is installed in an environment, by distribution."""
    sites = [str(path) for path in folder.glob("lib/python*/site-packages")]
    return {d.metadata["Name"]: d.version for d in metadata.distributions(path=sites)}


def _check(name: str, engine: Engine, versions: Mapping[str, str]) -> None:
    """Refuse an environment that does not hold what was asked for, or a pre-release that came along."""
    from packaging.version import Version

    early = [f"{n} {v}" for n, v in versions.items() if Version(v).is_prerelease]
    if early:
        raise EnvironmentProblem(
            f"pip chose pre-releases for {name}: {', '.join(early)}",
            hint=f"leanplan doctor --remove {name}, then look into pip's configuration", where="--install",
        )  # fmt: skip


# ---------------------------------------------------------------- our own environment


def _missing(engine: Engine) -> list[str]:
    """Return what an engine of ours lacks, as requirements of the project's; its modules' names where it has none."""
    from importlib.util import find_spec

    from packaging.requirements import Requirement

    lacking = [module for module in engine.modules if find_spec(module) is None]
    if not lacking:
        return []
    try:
        known = [Requirement(text) for text in metadata.requires("leanplan") or []]
    except metadata.PackageNotFoundError:
        known = []
    chosen = [
        f"{r.name}{r.specifier}"
        for r in known
        if r.marker is not None and engine.extra and r.marker.evaluate({"extra": engine.extra}) and not r.marker.evaluate({"extra": ""})
    ]  # fmt: skip
    return chosen or lacking


def _install_here(wanted: Iterable[str], tell: Tell) -> None:
    """Install packages beside what is here, every version of which is pinned."""
    python = Path(sys.executable)
    if not _works(python):
        raise EnvironmentProblem(
            "this environment has no pip", hint=f"install with your own tool: {' '.join(wanted)}", where=sys.prefix
        )
    tell(f"{', '.join(wanted)} into {sys.prefix}; nothing that is installed there changes")
    with tempfile.NamedTemporaryFile("w", prefix="leanplan-pins-", suffix=".txt") as pins:
        ours = (d for d in metadata.distributions() if d.metadata["Name"] and not d.read_text("direct_url.json"))
        pins.write("\n".join(sorted({f"{d.metadata['Name']}=={d.version}" for d in ours})) + "\n")
        pins.flush()
        _pip(python, wanted, " ".join(wanted), tell, "--constraint", pins.name)


# ---------------------------------------------------------------- pip


def _pip(python: Path, wanted: Iterable[str], what: str, tell: Tell, *more: str) -> None:
    _run(
        [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off", "--prefer-binary", *more, *wanted],
        what,
        tell,
    )


def _world() -> dict[str, str]:
    """Return our environment variables without those that would change what pip installs, or where."""
    left_out = ("PIP_PRE", "PIP_TARGET", "PIP_USER", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV", "PYTHONPATH", "PYTHONHOME")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _run(command: list[str], what: str, tell: Tell) -> None:
    """Run a command of making an environment, tell what it does line by line, and stop it when we are stopped.

    Raises:
        EnvironmentProblem: it failed, with its own last words.
    """
    lines: list[str] = []
    began = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=_world(), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                line = _BAR.sub("", line).strip()
                lines.append(line)
                if _TOLD.match(line):
                    tell(f"{time.monotonic() - began:5.0f} s  {line[:160]}")
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode:
        raise EnvironmentProblem(
            f"{what} could not be installed: {_reason(lines) or f'ended with {process.returncode}'}",
            hint="mend that and give the same command again: it goes on from what is there", where="--install",
        )  # fmt: skip


def _reason(lines: list[str]) -> str:
    """Return pip's own reason: its lines of errors, the first few; else its last line."""
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or [x for x in lines if x][
        -1:
    ]
    return "; ".join(dict.fromkeys(said[:REASONS]))


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Hold the lock of one environment: two commands at once would spoil it.

    Raises:
        EnvironmentProblem: another process holds it.
    """
    folder = _environment.root()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentProblem(
                f"another process installs or removes {name}", hint="wait for it to end", where=str(folder)
            ) from error
        yield
    finally:
        os.close(handle)
