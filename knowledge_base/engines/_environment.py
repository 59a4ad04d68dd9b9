"""Where engines live whose libraries clash with ours, and whether one is there whole. planner/environments.py makes them.

LEANPLAN_ENVIRONMENTS/NAME, or XDG_DATA_HOME/leanplan/environments/NAME, usually under ~/.local/share: several GB that all
projects of a person share. An environment counts once it has its MARK, which is written last.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from knowledge_base.types import Engine

VARIABLE = "LEANPLAN_ENVIRONMENTS"
MARK = "leanplan-environment.json"


def root() -> Path:
    """Return the folder of all environments."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(os.environ.get(VARIABLE) or Path(data, "leanplan", "environments")).expanduser().absolute()


def folder(name: str) -> Path:
    """Return the folder of an engine's environment, which need not be there."""
    return root() / name


def interpreter(name: str) -> Path:
    """Return the Python of an engine's environment."""
    return folder(name) / "bin" / "python"


def mark(place: Path) -> dict[str, Any]:
    """Return what an environment's mark tells: name, requirements, versions by distribution. Empty if it has none."""
    try:
        told = json.loads((place / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("versions"), dict) else {}


def inside(name: str) -> bool:
    """Return whether this process runs in that environment."""
    return mark(Path(sys.prefix)).get("name") == name


def problem(name: str, engine: Engine) -> str | None:
    """Return why an engine with an environment of its own cannot be used, with the command that mends it; or None."""
    assert engine.environment is not None
    if inside(name):
        missing = [module for module in engine.modules if importlib.util.find_spec(module) is None]
        return f"{', '.join(missing)} not installed in its environment; {install(name)}" if missing else None
    told = mark(folder(name))
    if not told:
        what = "half made" if folder(name).is_dir() else "not installed"
        return f"{what}: it lives in an environment of its own; {install(name)}"
    if told.get("requirements") != list(engine.environment.requirements):
        return (
            f"its environment holds other versions than {', '.join(engine.environment.requirements)}; {install(name)}"
        )
    return None


def install(name: str) -> str:
    """Return the command that makes an environment."""
    return f"leanplan doctor --install {name}"


def versions(name: str, distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of some distributions in an environment; empty where it is not there."""
    there = mark(Path(sys.prefix) if inside(name) else folder(name)).get("versions", {})
    return {one: there[one] for one in distributions if one in there}
