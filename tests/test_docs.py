"""What the README shows is what there is: the spec file, the commands, the files it names."""

from __future__ import annotations

import re
from pathlib import Path

from planner.cli import commands

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_spec_shown_is_the_example() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown.strip() == (ROOT / "examples" / "tiny-lm.yaml").read_text(encoding="utf-8").strip()


def test_every_command_shown_exists() -> None:
    shown = set(re.findall(r"^leanplan ([a-z]+)", README, re.MULTILINE)) | set(
        re.findall(r"`leanplan ([a-z]+)", README)
    )
    assert shown <= set(commands.names())
    assert {"plan", "check", "build", "validate", "explain"} <= shown


def test_every_linked_file_exists() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_command_has_help_of_one_line() -> None:
    for name, module in commands.all().items():
        assert module.HELP and "\n" not in module.HELP, name


def test_every_issue_command_is_there() -> None:
    wanted = [
        "init",
        "doctor",
        "probe",
        "plan",
        "estimate",
        "check",
        "build",
        "verify",
        "explain",
        "compare",
        "ls",
        "show",
        "validate",
        "schema",
        "clean",
    ]
    assert set(wanted) <= set(commands.names())
