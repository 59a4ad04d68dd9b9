"""README and docs/ taken apart: fenced blocks, and the commands in them with what is shown of their output.

console   lines after `$ ` are commands; the lines below one are printed by it, `…` stands for anything
yaml      a file where the first line is `# its/name.yaml`, else a part of a spec
python    a whole program
text      anything else
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
NOTES = (ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", ROOT / "models/tiny-lm/README.md")
KINDS = ("console", "yaml", "python", "text")
_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.ya?ml)\n")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. `place` is "docs/start.md:17"."""

    place: str
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file a yaml block shows, or None."""
        found = _FILE.match(self.text) if self.kind == "yaml" else None
        return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Command:
    """A command as a person types it, and the lines a page shows below it."""

    text: str
    shown: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{name_of(page)}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2]) for m in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(block: Block) -> list[Command]:
    """Return the commands of a console block."""
    found = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        end = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
        found.append(Command("\n".join(lines[: end + 1]), tuple(line for line in lines[end + 1 :] if line.strip())))
    return found


def all_commands() -> list[Command]:
    return [c for page in PAGES for b in blocks(page) if b.kind == "console" for c in commands(b)]
