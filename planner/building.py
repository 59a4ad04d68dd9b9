"""Artefacts: built by a candidate process, moved into place whole, and known by digests the planner computed itself."""

from __future__ import annotations

import json
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
from planner.isolation import Limits, Servers

MANIFEST = "leanplan.json"
MAX_FILES = 10_000
MAX_MANIFEST_BYTES = 16 << 20


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
    allocation: Mapping[str, int] | None = None,
    calibration: Path | None = None,
    seed: int = 0,
    allow_pickle: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> BuildResult:
    """Build a plan's artefact in a process of its own and move it to `out`, which then holds all of it or nothing.

    Args:
        workspace: the candidate's folder, on the same file system as `out`; removed afterwards.
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
    }
    try:
        with servers.start(builder_preload(preload), folder=workspace, limits=limits, log=log) as candidate:
            began = time.monotonic()  # what the first candidate waits for the modules to load is not the plan's
            reply = candidate.call("build", payload, timeout_s=limits.time_s, progress=progress)
        made = workspace / "artefact"
        facts = {name: _mapping(reply, name) for name in ("runtime", "notes", "versions", "step_s")}
        manifest = seal(made, plan, allocation=allocation, **{k: facts[k] for k in ("runtime", "notes", "versions")})
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_symlink() or out.parent.is_symlink():
            raise CandidateFailed("build_error", f"refusing to follow a link out of the run folder: {out}")
        if out.is_dir():
            shutil.rmtree(out)
        made.replace(out)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return BuildResult(
        folder=out, digest=manifest["digest"], bytes=sum(f["bytes"] for f in manifest["files"].values()),
        seconds=time.monotonic() - began, peak_bytes=int(reply.get("peak_bytes") or 0), **facts,
    )  # fmt: skip


def builder_preload(preload: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a building process preloads: every build rewrites a torch model, whichever engine runs the result."""
    return preload if "torch" in preload else registry.engines.get("transformers").ENGINE.preload


def seal(
    folder: Path,
    plan: Plan,
    *,
    allocation: Mapping[str, int] | None,
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
