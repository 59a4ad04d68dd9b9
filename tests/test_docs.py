"""What README and docs show is what there is: specs, commands, flags, files. What they print is run by tests/docs/."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from docs_pages import KINDS, NOTES, PAGES, ROOT, blocks, name_of, prose

from planner.cli import build_parser, commands

README = ROOT / "README.md"
FOLDERS = "benchmarks|cost_models|docs|examples|knowledge_base|models|planner|search|tests|tools"
every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
every_text = pytest.mark.parametrize("page", (*PAGES, *NOTES), ids=name_of)


def test_the_spec_shown_is_the_example() -> None:
    (shown,) = (b.text for b in blocks(README) if b.kind == "yaml")
    assert shown == (ROOT / "examples" / "tiny-lm.yaml").read_text(encoding="utf-8")


@every_page
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks(page)), (
        "a block is not closed, or indented"
    )
    for block in blocks(page):
        assert block.kind in KINDS, block.place
        assert block.kind != "console" or block.text.startswith("$ "), (
            f"{block.place}: a console block starts with a command"
        )


@every_text
def test_every_command_in_the_text_exists_with_its_flags(page: Path) -> None:
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for written in re.findall(r"`leanplan ([^`]+)`", prose(page)):
        verb, *rest = shlex.split(written)
        if verb.startswith("-"):
            continue
        assert verb in verbs.choices, f"{name_of(page)}: leanplan {written}"
        flags = {flag for action in verbs.choices[verb]._actions for flag in action.option_strings}
        assert {word for word in rest if re.fullmatch(r"--?[a-z-]+", word)} <= flags, (
            f"{name_of(page)}: leanplan {written}"
        )


@every_page
def test_every_part_of_a_spec_is_one(page: Path) -> None:
    from planner import _yaml
    from planner.spec import spec_of

    for block in blocks(page):
        if block.kind == "yaml" and not (block.file or "").startswith(("wish", "house/", ".github")):
            whole = block.text if "model:" in block.text else f"model: models/tiny-lm\n{block.text}"
            spec_of(_yaml.parse_yaml(whole, block.place), ROOT)


@every_text
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page)):
        if not link.startswith(("reference/", "../reference/")):  # made while the site is built
            assert (page.parent / link).exists(), f"{name_of(page)}: {link}"


@every_page
def test_every_file_named_exists(page: Path) -> None:
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), f"{name_of(page)}: {path}"


def test_every_command_has_help_of_one_line() -> None:
    for name, module in commands.all().items():
        assert module.HELP and "\n" not in module.HELP, name


def test_every_issue_command_is_there() -> None:
    wanted = "init doctor probe plan estimate check build verify explain compare ls show validate schema clean"
    assert set(wanted.split()) <= set(commands.names())


def test_the_readme_counts_what_is_known() -> None:
    from knowledge_base.field import field
    from knowledge_base.rules import load_rules

    text, known = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()), field()
    for what, number in (
        ("techniques of the surveys'", len(known.methods)),
        ("published figures", len(known.evidence)),
        ("rules on combining them", len(load_rules())),
        ("papers.", len(known.papers)),
    ):
        assert f"{number:,} {what}" in text, f"README: there are {number:,} {what}"
