"""Artefacts: built by a candidate process, moved into place whole, and known by digests the planner computed itself."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knowledge_base import registry
from knowledge_base.errors import CandidateFailed
from knowledge_base.serde import digest, file_digest, plain, write_json
from knowledge_base.types import Model, Plan
from planner.drafts import draft_for
from planner.isolation import Limits, Servers
from planner.isolation.worker import OPTIONS, RESUME

MANIFEST = "leanplan.json"
MAX_FILES = 10_000
MAX_MANIFEST_BYTES = 16 << 20
MAX_OPTIONS_BYTES = 64 << 20
CUT_OFF = ("timeout", "killed")  # failures after which a build may go on from what it had done
UNFINISHED_MAX = 3  # builds of which that is kept; the oldest go

Allocate = Callable[
    [int, Callable[[float], Any]], Mapping[str, str]
]  # number of the step, how to measure -> allocation


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildResult:
    """An artefact folder and how it came to be. `bytes` are those of all its files but the manifest."""

    folder: Path
    digest: str
    bytes: int
    seconds: float
    runtime: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    step_s: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    peak_bytes: int = 0  # highest resident memory of the building process
    allocation: Mapping[str, str] | None = None  # what its steps executed, given or chosen on the way


def build(
    servers: Servers,
    plan: Plan,
    model: Model,
    *,
    model_folder: Path,
    out: Path,
    limits: Limits,
    workspace: Path,
    log: Path,
    allocation: Mapping[str, str] | None = None,
    allocate: Allocate | None = None,
    calibration: Path | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    unfinished: Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> BuildResult:
    """Build a plan's artefact in a process of its own and move it to `out`, which then holds all of it or nothing.

    A build that was stopped at its time limit, killed or interrupted leaves what it had done in `unfinished`; asked for
    again, with everything the same, it goes on from there. What a planner that was killed itself left in `workspace`
    serves as well.

    Args:
        workspace: the candidate's folder, on the same file system as `out`; removed afterwards.
        unfinished: folder of builds that were cut off, by key; None: they begin anew.
        allocation: what each part of the model gets, where steps execute one. None: `allocate` is asked when the build
            comes to such a step, with its number, and with a function that measures in about so many seconds what the
            step can choose from, on the model as it is then.
        calibration: token windows, .npy of int32 (windows, tokens).

    Raises:
        CandidateFailed: with the reason; nothing is left at `out`.
    """
    preload = registry.engines.get(plan.engine).ENGINE.preload
    payload = {
        "model_folder": str(model_folder.resolve()),
        "model": plain(model),
        "plan": plain(plan),
        "allocation": plain(allocation),
        "calibration": str(calibration.resolve()) if calibration else None,
        "seed": seed,
        "allow_pickle": allow_pickle,
        "out": str((workspace / "artefact").resolve()),
        "key": (key := _key(plan, model, calibration, seed)),
    }
    left = unfinished / key if unfinished else None
    _tidy(workspace, left)
    try:
        with servers.start(builder_preload(preload), folder=workspace, limits=limits, log=log) as candidate:
            began = time.monotonic()  # what the first candidate waits for the modules to load is not the plan's
            reply = candidate.call("build", payload, timeout_s=limits.time_s, progress=progress)
            while "waits_for" in reply:
                number = reply["waits_for"]
                if number not in range(len(plan.steps)) or allocate is None:
                    raise CandidateFailed(
                        "build_error", "the plan has a step that executes an allocation, and none was given",
                        hint="plan again: the planner measures and allocates",
                    )  # fmt: skip

                def measure(seconds: float, candidate: Any = candidate) -> Any:
                    candidate.call("options", {"time_limit_s": seconds}, timeout_s=limits.time_s, progress=progress)
                    return _measured(workspace / OPTIONS)

                chosen = allocate(number, measure)
                allocation = {**(allocation or {}), **chosen}
                reply = candidate.call(
                    "allocated", {"allocation": plain(chosen)}, timeout_s=limits.time_s, progress=progress
                )
            peak_bytes = candidate.peak_bytes
        made = workspace / "artefact"
        facts = {name: _mapping(reply, name) for name in ("runtime", "notes", "versions", "step_s")}
        manifest = seal(made, plan, allocation=allocation, **{k: facts[k] for k in ("runtime", "notes", "versions")})
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_symlink() or out.parent.is_symlink():
            raise CandidateFailed("build_error", f"refusing to follow a link out of the run folder: {out}")
        if out.is_dir():
            shutil.rmtree(out)
        made.replace(out)
    except (CandidateFailed, KeyboardInterrupt) as error:
        if left is not None and (not isinstance(error, CandidateFailed) or error.kind in CUT_OFF):
            _keep(workspace / RESUME, left)
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return BuildResult(
        folder=out, digest=manifest["digest"], bytes=sum(f["bytes"] for f in manifest["files"].values()),
        seconds=time.monotonic() - began, peak_bytes=peak_bytes, allocation=allocation, **facts,
    )  # fmt: skip


def _key(plan: Plan, model: Model, calibration: Path | None, seed: int) -> str:
    """Return the digest of everything that what a build had done depends on."""
    from planner.predicting import versions

    text = file_digest(calibration) if calibration else None
    drafts = [draft.digest] if (draft := draft_for(plan, model)) else []
    return digest([plain(plan), model.digest, *drafts, text, seed, versions()])[:32]


def _tidy(workspace: Path, left: Path | None) -> None:
    """Leave nothing in the workspace but what a build can go on from: of an earlier one cut off, or of a planner killed."""
    if left is not None and left.is_dir() and not left.is_symlink():
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(parents=True, mode=0o700)
        shutil.move(left, workspace / RESUME)
    for path in workspace.iterdir() if workspace.is_dir() else ():
        if path.name != RESUME:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _keep(folder: Path, left: Path) -> None:
    """Move what a build had done to where it is found again, if it is plain files only; the oldest such folders go."""
    if not folder.is_dir() or folder.is_symlink() or _files(folder)[1] or not _files(folder)[0]:
        return
    left.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(left, ignore_errors=True)
    shutil.move(folder, left)
    os.utime(left)
    for old in sorted(left.parent.iterdir(), key=lambda p: p.lstat().st_mtime)[:-UNFINISHED_MAX]:
        shutil.rmtree(old, ignore_errors=True)


def _measured(path: Path) -> dict[str, Any]:
    """Return what a step can choose from, as the candidate measured it: at least {"parts": {name: {option: {...}}}}.

    "ties", where there are any, lists (name, option)s that are taken all or none.

    Raises:
        CandidateFailed: "invalid_result", it is not there or of another form.
    """
    try:
        if path.is_symlink() or path.stat().st_size > MAX_OPTIONS_BYTES:
            raise ValueError("a link, or too large")
        measured = json.loads(path.read_text(encoding="utf-8"))
        parts: Any = measured["parts"]
        for choice in (choice for choices in parts.values() for choice in choices.values()):
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in choice.values()):
                raise ValueError("a number that is not finite")
        if not all(option in parts[part] for tie in measured.get("ties", ()) for part, option in tie):
            raise ValueError("a tie of what is no option")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        text = f"what the step can choose from was not measured: {type(error).__name__}: {error}"
        raise CandidateFailed("invalid_result", text) from error
    return measured


def builder_preload(preload: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a building process preloads: every build rewrites a torch model, whichever engine runs the result."""
    return preload if "torch" in preload else registry.engines.get("transformers").ENGINE.preload


def seal(
    folder: Path,
    plan: Plan,
    *,
    allocation: Mapping[str, str] | None,
    runtime: Mapping[str, Any],
    notes: Mapping[str, Any],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Write the manifest of a folder of model files and return it.

    Raises:
        CandidateFailed: "invalid_result", the folder is empty or holds something that is not a plain file.
    """
    files, problems = _files(folder)
    if problems or not files:
        raise CandidateFailed("invalid_result", f"artefact: {problems[0] if problems else 'no files were written'}")
    listed = {name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for name, path in files.items()}
    manifest = {
        "schema": 1,
        "plan": plain(plan),
        "plan_id": plan.id,
        "allocation": plain(allocation),
        "engine": plan.engine,
        "runtime": plain(runtime),
        "files": listed,
        "notes": plain(notes),
        "versions": plain(versions),
    }
    manifest["digest"] = artefact_digest(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def artefact_digest(manifest: Mapping[str, Any]) -> str:
    """Return the one digest of an artefact: every file's bytes, and how they are to be served.

    Notes and versions are left out: they tell how it was made, not what it is.
    """
    files = sorted((name, entry["sha256"]) for name, entry in manifest["files"].items())
    return digest([manifest["plan"], manifest["allocation"], manifest["engine"], manifest["runtime"], files])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return an artefact's manifest.

    Raises:
        CandidateFailed: "load_error", it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ValueError("a link, or too large")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        for name in ("plan", "allocation", "engine", "runtime", "files", "digest"):
            manifest[name]
        for entry in manifest["files"].values():
            entry["bytes"], entry["sha256"]
    except FileNotFoundError as error:
        text = f"no {MANIFEST} in {folder}"
        raise CandidateFailed("load_error", text, hint="this is not an artefact folder") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        text = f"{MANIFEST} is damaged: {type(error).__name__}: {error}"
        raise CandidateFailed("load_error", text, hint="build the artefact again: leanplan build plan.json") from error
    return manifest


def verify(folder: Path) -> list[str]:
    """Return what is wrong with an artefact folder, each as a sentence; empty when it is the one that was built."""
    folder = Path(folder)
    if folder.is_symlink() or not folder.is_dir():
        return [f"{folder}: not a folder"]
    try:
        manifest = read_manifest(folder)
    except CandidateFailed as error:
        return [error.message]
    files, problems = _files(folder)
    listed = manifest["files"]
    problems += [f"{name}: missing" for name in sorted(set(listed) - set(files))]
    problems += [f"{name}: not in the manifest" for name in sorted(set(files) - set(listed))]
    for name in sorted(set(files) & set(listed)):
        size = files[name].stat().st_size
        if size != listed[name]["bytes"]:
            problems.append(f"{name}: {size} bytes, the manifest says {listed[name]['bytes']}")
        elif file_digest(files[name]) != listed[name]["sha256"]:
            problems.append(f"{name}: its SHA-256 is not the manifest's")
    if artefact_digest(manifest) != manifest["digest"]:
        problems.append(f"{MANIFEST}: its digest does not match what it lists")
    return problems


def _files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Return the plain files under a folder by relative name, manifest left out, and what else was found there."""
    files: dict[str, Path] = {}
    problems: list[str] = []
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            facts = path.lstat()
            if stat.S_ISLNK(facts.st_mode):
                problems.append(f"{relative}: a link; artefacts hold plain files only")
            elif stat.S_ISDIR(facts.st_mode):
                continue
            elif not stat.S_ISREG(facts.st_mode):
                problems.append(f"{relative}: not a plain file")
            elif facts.st_nlink > 1:
                problems.append(f"{relative}: shares its content with another file (hard link)")
            elif relative != MANIFEST:
                files[relative] = path
        if len(files) > MAX_FILES:
            return files, [f"more than {MAX_FILES} files"]
    return files, problems


def _mapping(reply: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = reply.get(name)
    if not isinstance(value, dict):
        raise CandidateFailed("invalid_result", f"build: `{name}` is missing")
    return value
