"""Every command and every program that README and docs print is run, in the order of the page, with the shipped model.

What is run is what is printed. Only how many plans a spec measures, in what time, and how strictly it compares with its lock
is relaxed, in the copies that are worked on, and what takes minutes by default is given less time (SHORTER); what cannot be
run here is in NOT_RUN, with the reason.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, Block, Command, all_commands, blocks, commands, name_of

COPIED = ("examples", "models/tiny-lm", "knowledge_base/data/texts")
RELAXED = {
    r"max_measured: \d+": "max_measured: 2",
    r"time_limit: \d+ min": "time_limit: 3 min",
    r"regression: [^,}]+": "regression: 1000 %",
}
SHORTER = {r"leanplan calibrate$": "--time-limit 10s", r"leanplan load .*(?<!s\")$": "--duration 10s"}
NOT_RUN = {
    r"make ": "installs packages over the network; .ci/run is made of these",
    r"git clone ": "needs the network",
    r"\. \.venv/bin/activate": "changes the shell it is typed in",
    r"leanplan serve (?!.*--check)": "serves until it is stopped; docs/how-to/serve.md has --check",
    r"leanplan doctor --install": "needs the package registry",
}
# A busy machine is not a failed budget: 5 is "cannot be told".
ALSO_FINE = {"leanplan check": 5, "leanplan replan": 5, "leanplan load": 5}
MEASURES_NOTHING = (
    "docs/concepts/engines.md",
    "docs/concepts/report.md",
    "docs/how-to/research.md",
    "docs/how-to/small-gpu.md",
    "docs/knowledge.md",
)  # the other pages take minutes


def _parameters() -> list[object]:
    found = []
    for page in PAGES:
        if any(b.kind in ("console", "python") for b in blocks(page)):
            marks = () if name_of(page) in MEASURES_NOTHING else pytest.mark.slow
            found.append(pytest.param(page, id=name_of(page), marks=marks))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, machine: Path) -> Path:
    """What is known of this machine, and all that was measured on the pages before: no plan is measured twice."""
    folder = tmp_path_factory.mktemp("known")
    return shutil.copytree(machine, folder / ".leanplan")


@pytest.fixture
def place(tmp_path: Path, store: Path) -> Path:
    """A folder as a fresh checkout is, with what the pages name; only the store is that of all pages."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / ".leanplan").symlink_to(store)
    for spec in tmp_path.rglob("*.yaml"):
        spec.write_text(_relaxed(spec.read_text(encoding="utf-8")), encoding="utf-8")
    return tmp_path


def _relaxed(spec: str) -> str:
    for what, instead in RELAXED.items():
        spec = re.sub(what, instead, spec)
    return spec


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", _parameters())
def test_what_a_page_prints_runs(page: Path, place: Path) -> None:
    for block in blocks(page):
        if block.file:
            (place / block.file).parent.mkdir(parents=True, exist_ok=True)
            (place / block.file).write_text(_relaxed(block.text), encoding="utf-8")
        elif block.kind == "python":
            _python(block, place)
        elif block.kind == "console":
            _run_all(commands(block), block, place)


def _python(block: Block, place: Path) -> None:
    done = _shell([sys.executable, "-"], place, block.text)
    assert done.returncode == 0, f"{block.place}: {done.stderr}"


def _run_all(found: list[Command], block: Block, place: Path) -> None:
    for command, after in itertools.zip_longest(found, found[1:]):
        if after and after.text == "echo $?":
            _run(command, block, place, fine={int(after.shown[0])})
        elif command.text != "echo $?" and not any(re.match(pattern, command.text) for pattern in NOT_RUN):
            also = {code for start, code in ALSO_FINE.items() if command.text.startswith(start)}
            _run(command, block, place, fine={0, *also})


def _run(command: Command, block: Block, place: Path, *, fine: set[int]) -> None:
    """Run a command; its exit code is a fine one, and it prints the lines that are shown, in that order."""
    text = re.sub(r"\s+# .*", "", command.text)
    less = (added for what, added in SHORTER.items() if re.match(what, text))
    done = _shell(["bash", "-c", " ".join([text, *less])], place)
    assert done.returncode in fine, (
        f"{block.place}: {command.text}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    rest = done.stdout + done.stderr
    for line in command.shown:
        found = re.search(".*".join(map(re.escape, line.rstrip().split("…"))), rest)
        assert found, f"{block.place}: {command.text}: does not print `{line}`, but\n{rest}"
        rest = rest[found.end() :]


def _shell(argv: list[str], place: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(place), "LANG": "C.UTF-8", "COLUMNS": "120",
        "LEANPLAN_NO_PROGRESS": "1", "LEANPLAN_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run(argv, cwd=place, env=environment, input=text, capture_output=True, text=True, timeout=1200)


def test_what_is_not_run_is_printed_somewhere() -> None:
    for pattern, reason in NOT_RUN.items():
        assert reason
        assert any(re.match(pattern, c.text) for c in all_commands()), f"no page prints {pattern}"
