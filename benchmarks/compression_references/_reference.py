"""What a reference library is to the benchmark: where it comes from, and the environment it is run in.

A file of this folder without an underscore is one library: `REFERENCE`, and for `_driver.py`, which runs it there,

    prepare(method)                        imports what will be needed, so that importing is not timed
    load(folder, method, setting)          the model, float32
    build(model, tokens, method, setting)  does it; timed
    plain(built)                           {name: weights} in the names of transformers, float32, or a model of other shapes
    save(built, folder)                    the library's own artefact, or its tensors where it has none; comes last
    stored_bytes(built, folder, matrices)  bytes of these matrices in the artefact; optional
    runnable(built)                        a model to score in place, where activations are rounded as well; optional
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Reference:
    """A library at one version. `frees` are pins of the project it cannot run with; it brings its own."""

    name: str
    version: str
    source: str
    package: str = ""  # nothing to install where empty: the project has it already
    frees: tuple[str, ...] = ()

    def python(self, folder: Path) -> Path:
        """Return the interpreter of its environment in a folder."""
        return folder / self.name / "bin/python" if self.package else Path(sys.executable)

    def installed(self, folder: Path) -> bool:
        """Return whether its environment is there and has this version."""
        if not self.package:
            return True
        here = self.python(folder).parent.parent / "lib"
        wanted = f"{self.package.replace('-', '_').lower()}-{self.version}.dist-info"
        return any(path.name.lower() == wanted for path in here.glob("python*/site-packages/*.dist-info"))

    def install(self, folder: Path) -> None:
        """Make its environment. It looks through to the project's own for what both can share: torch, transformers.

        Raises:
            subprocess.CalledProcessError: pip could not.
        """
        home = folder / self.name
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(home)], check=True)
        (site,) = home.glob("lib/python*/site-packages")
        (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        kept = home / "constraints.txt"
        kept.write_text("\n".join(pin for pin in pins if pin.partition("==")[0] not in self.frees), encoding="utf-8")
        subprocess.run(
            [str(self.python(folder)), "-m", "pip", "install", "--quiet", "--constraint", str(kept), f"{self.package}=={self.version}"],
            check=True,
        )  # fmt: skip
