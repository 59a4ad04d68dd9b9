"""One HTML file that explains a whole answer: opens from disk, makes no request, complete without JavaScript.

Each of its ten parts is a file here: `TITLE`, `LEAD` (what to look for, in one sentence) and `facts(view)` give what
the template of the same name shows. Python does the arithmetic, templates (autoescaped) the markup, style.css the
looks; script.js adds axis pickers and highlighting. The same answer gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.results import ParetoSet

REPORT = "one HTML file, everything, for people"
SUFFIX = ".html"
HERE = Path(__file__).parent
PARTS = (
    "answer", "scatter", "parallel", "resources", "explain", "timeline", "errors", "sensitivity", "rejected", "provenance",
)  # fmt: skip


def render(answer: ParetoSet) -> str:
    """Return the report as one self-contained HTML page."""
    import importlib

    from planner.reports.html._view import View
    from planner.scrubbing import scrub

    view = View.of(answer)
    parts = []
    for name in PARTS:
        part = importlib.import_module(f"{__name__}.{name}")
        parts.append({"id": name, "title": part.TITLE, "lead": part.LEAD, "it": part.facts(view)})
    page = environment().get_template("page.html").render(
        view=view, answer=answer, parts=parts, data=_block(view.data()),
        style=_own("style.css"), script=_own("script.js"),
    )  # fmt: skip
    return scrub(page) + "\n"


def environment() -> Any:
    """Return where templates come from and how they treat what is put into them: escaped, and nothing left undefined."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_literal,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _literal(value: Any) -> Any:
    """Return foreign text with its control characters spelt out; HTML has no way to show them."""
    from planner.cli._talk import clean

    return clean(value) if type(value) is str else value


def _own(name: str) -> Any:
    from markupsafe import Markup

    return Markup((HERE / name).read_text(encoding="utf-8"))  # ours: no foreign text in it


def _block(data: Any) -> Any:
    """Return data as JSON that cannot end its script element, whatever the strings in it."""
    import json

    from markupsafe import Markup

    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
