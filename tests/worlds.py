"""Worlds with something missing, broken or forbidden, for tests that provoke real faults in a run of the real command."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("knowledge_base", "cost_models", "search", "planner")
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def command(*argv: str, libraries: Path | None = None) -> list[str]:
    """Return the command line of `leanplan argv...`; with `libraries`, only what lies there is installed."""
    return [sys.executable, *(["-S"] if libraries else []), "-m", "planner", *argv]


def environment(*, house: Path = ROOT, libraries: Path | None = None, **more: str) -> dict[str, str]:
    """Return the environment for `command`: the packages of `house`, and `libraries` for `-S`."""
    path = os.pathsep.join(map(str, filter(None, (house, libraries))))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "160", **more}


def leanplan(
    *argv: str, cwd: Path, house: Path = ROOT, libraries: Path | None = None, timeout_s: float = 280, **more: object
) -> subprocess.CompletedProcess[str]:
    """Run one command as a person would and return what it said."""
    return subprocess.run(
        command(*argv, libraries=libraries), cwd=cwd, env=environment(house=house, libraries=libraries),
        capture_output=True, text=True, timeout=timeout_s, **more,
    )  # type: ignore[call-overload]  # fmt: skip


def libraries(folder: Path, *, without: Collection[str] = ()) -> Path:
    """Make a site-packages folder that holds what this environment holds, as links, but for some distributions."""
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.partition("-")[0] not in without and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def copied(folder: Path, package: str) -> Path:
    """Put a copy of a package in the place of the link to it, so that the test may break it; return the copy."""
    link = folder / package
    original = link.readlink()
    link.unlink()
    return shutil.copytree(original, link)


def house_with(folder: Path, **techniques: str) -> Path:
    """Copy the four packages and add techniques, one file each."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in techniques.items():
        (folder / "knowledge_base" / "techniques" / f"{name}.py").write_text(code, encoding="utf-8")
    return folder


def bound_by_permissions() -> Callable[[], None] | None:
    """Return what a child must do before it runs so that permissions bind it: root gives up overriding them."""
    if os.geteuid() != 0:
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def give_up() -> None:
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")

    return give_up
