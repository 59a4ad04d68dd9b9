"""The built site: made without a network, every link leads somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import importlib
import re
import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href"}


class Page(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif LOADED.get(tag, "") in given:
            self.loads.append(given[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Page]]:
    """Every page of the site, built strictly while no socket can connect."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the build asks the network: {arguments}")

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    found = folder.rglob("*.html")
    yield {
        path.relative_to(folder): Page(path.read_text(encoding="utf-8")) for path in found if path.name != "404.html"
    }


def test_every_link_inside_leads_to_a_page_and_a_place_on_it(site: dict[Path, Page]) -> None:
    files = {path.as_posix() for path in site}
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or not (parts.path or parts.fragment):
                continue
            target = _joined(path, unquote(parts.path)) if parts.path else path
            assert target.as_posix() in files, f"{path}: {link}"
            assert not parts.fragment or unquote(parts.fragment) in site[target].places, f"{path}: {link}"


def _joined(page: Path, link: str) -> Path:
    parts: list[str] = []
    for part in (page.parent / link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return Path(*parts)


def test_every_link_outside_is_well_formed(site: dict[Path, Page]) -> None:
    seen = 0
    for path, page in site.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme:
                continue
            seen += 1
            assert parts.scheme in ("https", "http"), f"{path}: {link}"
            assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc), f"{path}: {link}"
            assert not re.search(r"[\s<>\"`|\\]|[.,;:]$", link), f"{path}: {link}"
            assert link.count("(") == link.count(")"), f"{path}: {link}"
    assert seen > 50


def test_the_marks_explained_are_the_marks_shown() -> None:
    from planner.reports._table import KINDS
    from planner.reports.html import PARTS
    from planner.reports.terminal import in_ascii

    text = (ROOT / "docs/concepts/report.md").read_text(encoding="utf-8")
    rows = [f"| {k.mark} | `{in_ascii(k.mark)}` | {k.words} |" for k in KINDS.values()]
    assert "\n".join(rows) in text
    titles = re.findall(r"^\d+\. \*\*(.+?)\*\*", text, re.MULTILINE)
    assert titles == [importlib.import_module(f"planner.reports.html.{name}").TITLE for name in PARTS]


def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert page.loads, f"{path}: no style sheet: was this built?"
        for load in page.loads:
            assert not urlsplit(load).scheme and not load.startswith("//"), f"{path}: {load}"


def test_the_reference_is_complete(site: dict[Path, Page]) -> None:
    from cost_models.terms import terms
    from knowledge_base.registry import engines, techniques
    from knowledge_base.rules import load_rules
    from planner import __all__ as names
    from planner import schemas
    from planner.cli import commands

    def places(page: str) -> set[str]:
        return site[Path("reference") / f"{page}.html"].places

    assert {f"leanplan-{name}" for name in commands.names()} <= places("commands")
    assert set(techniques.names()) <= places("techniques")
    assert set(engines.names()) <= places("engines")
    assert set(terms.names()) <= places("cost-terms")
    assert {rule.id for rule in load_rules()} <= places("composition")
    assert set(schemas.names()) <= places("files")
    assert {name.lower() for name in names} <= places("python")


def test_the_tables_of_the_reference_hold_every_entry() -> None:
    from knowledge_base.errors import EXIT_CODE_MEANING, FAILURE_KINDS
    from knowledge_base.metrics import METRICS
    from planner import spec
    from planner.cli import GLOBAL_FLAGS
    from tools.reference import command_line, measuring

    wanted = {
        command_line.exit_codes(): [*(str(int(c)) for c in EXIT_CODE_MEANING), *FAILURE_KINDS],
        measuring.metrics(): [text for m in METRICS.values() for text in (m.name, m.label)],
        command_line.spec(): [key for key, *_ in spec.rows()],
        command_line.environment(): [f"LEANPLAN_{flag[2:].replace('-', '_').upper()}" for flag, _ in GLOBAL_FLAGS],
    }
    for page, entries in wanted.items():
        assert not [e for e in entries if f"`{e}`" not in page]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a | b", "a \\| b"),
        ("<script>", "&lt;script&gt;"),
        ("*bold* [x](y)", "\\*bold\\* \\[x\\](y)"),
        ("`a*b`, arXiv:2210.17323.", "`a*b`, [arXiv:2210.17323](https://arxiv.org/abs/2210.17323)."),
        ("see https://example.org/a_b.", "see [example.org/a\\_b](https://example.org/a_b)."),
        ("https://example.org/a/b/c", "[example.org/…/c](https://example.org/a/b/c)"),
    ],
)
def test_text_of_the_code_is_shown_literally(text: str, shown: str) -> None:
    from tools.reference.markdown import inline

    assert inline(text) == shown
