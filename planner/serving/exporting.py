"""Writing a folder to deploy: whole, or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from planner.serving.exports import Deployment

FILE_MODE, SCRIPT_MODE, FOLDER_MODE = 0o644, 0o755, 0o755  # whoever serves is another user than who built


def write(target: Any, deployment: Deployment) -> dict[str, int]:
    """Write a target's files and copies; return their sizes in bytes by name, relative to the folder."""
    out = deployment.out
    out.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".leanplan-export-") as work:
        made = Path(work) / "made"
        for name, place in target.copies(deployment).items():
            path = _place(made, place)
            shutil.copyfile(deployment.folder / name, path, follow_symlinks=False)
            path.chmod(FILE_MODE)
        for name, text in target.files(deployment).items():
            path = _place(made, name)
            path.write_text(text, encoding="utf-8")
            path.chmod(SCRIPT_MODE if text.startswith("#!") else FILE_MODE)
        for path in (made, *made.rglob("*")):
            if path.is_dir():
                path.chmod(FOLDER_MODE)
            else:
                written[path.relative_to(made).as_posix()] = path.stat().st_size
        if out.is_dir():
            out.rmdir()
        made.rename(out)
    return written


def _place(folder: Path, name: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
