"""How a screen looks: the question on the left, what is predicted beside it, or below where the terminal is narrow."""

from __future__ import annotations

import glob
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowledge_base import units
from knowledge_base.metrics import METRICS
from knowledge_base.types import Value
from planner.cli._talk import clean
from planner.forecast import Outlook
from planner.reports.terminal import ascii_only, in_ascii
from planner.wizard.screens._screen import Grid, Screen, View, told

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    Line = list[Segment]

BESIDE = 104  # columns from which the panel stands beside the question
NARROW = 60  # columns below which a grid is a list
PANEL = 50  # columns of the panel beside
HIGH = 30  # rows from which paragraphs are set apart
PREDICTED = {  # metric -> what the panel calls it, and the end of its unit that this says already
    "artefact_bytes": ("size", ""), "ttft_s": ("TTFT", ""), "tpot_s": ("TPOT", ""),
    "throughput_tokens_per_s": ("tokens/s", " tokens/s"), "energy_j_per_token": ("energy/token", "/token"),
    "cost_usd_per_token": ("cost/1M tokens", "/1M tokens"), "quality_loss_ratio": ("loss", ""),
}  # fmt: skip


class Face:
    """Draws screens on stderr. On a terminal that cannot move its cursor, one screen follows the other."""

    def __init__(self, *, colour: str = "auto", console: Console | None = None) -> None:
        self.ascii = ascii_only(sys.stderr)
        self.console = console or _console(colour)
        self.redraw: Callable[[], None] = _nothing  # draws the last screen once more, for a terminal of another size

    def draw(self, screen: Screen, view: View, *, step: int, steps: int, note: str = "", turned: int = 0) -> None:
        """Show one screen.

        Args:
            note: what the last typed line brought about.
            turned: how often the person has asked for more: the pages that do not fit, then the long explanation.
        """
        self.redraw = lambda: self.draw(screen, view, step=step, steps=steps, note=note, turned=turned)
        dots = "●" * step + "○" * (steps - step)
        head = self._lines(
            [self._text(f"leanplan  {dots}  {step} of {steps}", "dim"), self._text(screen.title, "bold")]
        )
        foot = [self._text(note, "yellow"), *self._gap()] if note else []
        foot = [*self._gap(), *foot, self._text(screen.ask, "cyan")]
        lowest = self._lines([*foot, self._keys("page 9 of 9")])
        scrolls = self.console.is_dumb_terminal or not self.console.is_terminal
        room = sys.maxsize if scrolls else max(4, self.console.height - len(head) - len(lowest) - 1)
        pages = self._pages(screen, view, room)
        page = turned % len(pages)
        if not scrolls:
            self.console.control(_clear())
        more = f"page {page + 2} of {len(pages)}" if page + 1 < len(pages) and len(pages) > 2 else "more"
        self._print([*head, *pages[page], *self._lines([*foot, self._keys(more)])])

    def _pages(self, screen: Screen, view: View, room: int) -> list[list[Line]]:
        """Return what there is to see, in pages of at most `room` lines; the last explain the screen at length."""
        why = [self._text(screen.why, "dim"), self._text("")]
        more = self._lines([self._text(""), self._text(screen.more)])
        whole = self._blocks(screen, view, why)
        if sum(map(len, whole)) > room:  # the figures matter more than why one is asked, which `?` says
            whole = self._blocks(screen, view, [])
        explained = [*self._blocks(screen, view, why)[:-1], more]
        if sum(map(len, explained)) > room:
            explained = [self._lines(why[:1]), more]
        return [*_paged(whole, room), *_paged(explained, room)]

    def _blocks(self, screen: Screen, view: View, why: Sequence[Text]) -> list[list[Line]]:
        """Return the parts of a screen as lines: question, remarks, what is predicted; the latter beside where it can be."""
        grid = self._grid(screen.grid(view))
        remarks = [self._text(r, "yellow" if r.startswith("✗") else "dim") for r in screen.remarks(view)]
        remarks = [*self._gap(), *remarks] if remarks else []
        if self.console.width < BESIDE:
            return [
                self._lines([*why, grid]), self._lines(remarks), self._lines([self._text(""), self._summary(view)])
            ]  # fmt: skip
        from rich.console import Group
        from rich.table import Table

        beside = Table.grid(padding=(0, 2), expand=True)
        beside.add_column(ratio=1)
        beside.add_column(width=PANEL)
        beside.add_row(Group(*why, grid, *remarks), self._panel(view))
        return [self._lines([beside]), []]

    def _keys(self, more: str) -> Text:
        gap = "   " if self.console.width >= NARROW else ", "
        return self._text(
            gap.join(("Enter accepts", "b back", f"? {more}", "Ctrl-C stops and keeps your answers")), "dim"
        )

    def _lines(self, parts: Sequence[RenderableType]) -> list[Line]:
        """Return what is to be printed as lines of the terminal's width."""
        return [line for part in parts for line in self.console.render_lines(part, pad=False)]

    def _print(self, lines: Sequence[Line]) -> None:
        from rich.segment import Segment, Segments

        self.console.print(Segments([segment for line in lines for segment in (*line, Segment.line())]), end="")

    def say(self, text: str, style: str = "") -> None:
        """Print one paragraph below the screen."""
        self.console.print(self._text(text, style))

    # ------------------------------------------------------------ the question

    def _gap(self) -> list[Text]:
        """Return an empty line, where the terminal is high enough for some."""
        return [self._text("")] if self.console.height >= HIGH else []

    def _grid(self, grid: Grid) -> Any:
        from rich.console import Group
        from rich.table import Table

        if self.console.width < NARROW:
            lines = [" ".join(filter(None, row if grid.headings else row[:2])) for row in grid.rows]
            return Group(
                *(
                    self._text(f"▸ {line}" if i in grid.chosen else line, "bold" * (i in grid.chosen))
                    for i, line in enumerate(lines)
                )
            )
        numeric = bool(grid.headings)
        table = Table.grid(padding=(0, 1 if numeric else 2))
        for i in range(max(map(len, grid.rows))):
            right = numeric and 0 < i < 4
            table.add_column(justify="right" if right else "left", no_wrap=i == 0, overflow="fold")
        if grid.headings:
            table.add_row(*(self._text(h, "dim") for h in ("  " + grid.headings[0], *grid.headings[1:])))
        for i, row in enumerate(grid.rows):
            if not any(row) and not self._gap():
                continue
            chosen = i in grid.chosen
            mark = "▸ " if chosen else "  "
            styles = [
                "bold" if chosen else "",
                "bold" if chosen else "",
                "bold" if chosen and numeric else "dim",
                "dim",
                "",
            ]
            cells = [self._text(cell, style) for cell, style in zip(row, styles)]
            if row[-1] in LIGHTS:
                cells[-1] = self._text(row[-1], LIGHTS[row[-1]])
            cells[0] = self._text(mark + row[0] if row[0] else "", styles[0] or "cyan" * (not numeric))
            table.add_row(*cells)
        return table

    # ------------------------------------------------------------ what is predicted

    def _panel(self, view: View) -> Any:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table

        parts: list[Any] = []
        if view.outlook is None:
            parts.append(self._text(_waiting(view), "dim"))
        else:
            table = Table.grid(padding=(0, 1))
            for justify in ("left", "right", "left"):
                table.add_column(justify=justify)  # type: ignore[arg-type]
            best = view.outlook.best
            table.add_row("", self._text("unchanged", "dim"), self._text("best plan" if best else "", "dim"))
            for label, unchanged, planned, style in figures(view.outlook):
                table.add_row(self._text(label), self._text(unchanged, "dim"), self._text(planned, style))
            words = best.words if best else "no plan is predicted to keep every limit"
            parts = [self._text(words, "bold" if best else "bold red"), self._text(""), table]
            parts += [self._text(""), self._text("intervals hold 80 %; nothing was run", "dim")]
        return Panel(Group(*parts), title=self._text("predicted", "dim"), box=box.ASCII if self.ascii else box.ROUNDED)

    def _summary(self, view: View) -> Any:
        """Return the panel as a paragraph."""
        if view.outlook is None:
            return self._text(_waiting(view), "dim")
        best = view.outlook.best
        shown = [f"{label} {planned if best else unchanged}" for label, unchanged, planned, _ in figures(view.outlook)]
        head = (
            f"predicted for {best.words}" if best else "no plan is predicted to keep every limit; the unchanged model"
        )
        return self._text(f"{head}: {' · '.join(shown)}", "" if best else "red")

    def _text(self, value: str, style: str = "") -> Text:
        from rich.text import Text

        value = clean(value)  # names come from strangers: nothing in them may steer the terminal
        return Text(in_ascii(value) if self.ascii else value, style=style)


LIGHTS = {"✓": "green", "?": "yellow", "✗": "red"}


def figures(outlook: Outlook) -> list[tuple[str, str, str, str]]:
    """Return (label, the unchanged model's figure, the best plan's with its interval, style) for the panel."""
    best = outlook.best
    was, planned = outlook.unchanged.values, outlook.estimate(best).values if best else {}

    def fits(values: Mapping[str, Value], show: Callable[[Value, str], str]) -> str:
        peak = values.get("peak_memory_bytes")
        return "" if peak is None else f"{'✓' if peak.mid <= outlook.memory_bytes else '✗'} {show(peak, 'bytes')}"

    rows = [("fits", fits(was, _mid), fits(planned, interval), "")]
    for name, (label, said) in PREDICTED.items():
        dimension = METRICS[name].dimension
        before = _mid(was[name], dimension).removesuffix(said) if name in was else "–"
        after = interval(planned[name], dimension).replace(said or "\0", "") if name in planned else ""
        rows.append((label, before, after, ""))
    return rows


def interval(value: Value, dimension: str) -> str:
    """Return a prediction with its interval, both in one unit.

    >>> interval(Value(mid=0.0012, low=0.00066, high=0.0021, source="analytic"), "time")
    '1.2 ms [0.66 – 2.1]'
    """
    mid = _mid(value, dimension)
    fitting = [u for u in units.DIMENSIONS[dimension].shown if mid.endswith(u.removeprefix("USD"))]
    unit = max(fitting, key=len, default="")
    size = float(units.DIMENSIONS[dimension].units[unit])
    low, high = (f"{float(f'{end / size:.2g}'):,g}" for end in (value.low, value.high))
    return mid if low == high else f"{mid} [{low} – {high}]"


def _mid(value: Value, dimension: str) -> str:
    return units.format(value.mid, dimension, digits=2)


def _paged(blocks: Sequence[list[Line]], room: int) -> list[list[Line]]:
    """Return blocks of lines in pages: each block whole where a page can hold it."""
    pages: list[list[Line]] = [[]]
    for block in blocks:
        if pages[-1] and len(pages[-1]) + len(block) > room:
            pages.append([])
            block = block[1:] if block and not "".join(segment.text for segment in block[0]).strip() else block
        while block:
            fitting = room - len(pages[-1])
            pages[-1] += block[:fitting]
            block = block[fitting:]
            if block:
                pages.append([])
    return pages


def _nothing() -> None:
    """Draw nothing: there is no screen yet."""


def _waiting(view: View) -> str:
    if view.problem is None:
        return "predicting ... (? looks again)"
    return f"nothing can be predicted: {told(view.problem)}"


def _console(colour: str) -> Console:
    from rich.console import Console

    return Console(
        stderr=True, highlight=False, legacy_windows=False,
        no_color=True if colour == "never" else None, force_terminal=True if colour == "always" else None,
    )  # fmt: skip


def _clear() -> Any:
    from rich.control import Control
    from rich.segment import ControlType

    return Control(ControlType.HOME, ControlType.CLEAR)


def completions(screen: Screen, models: Sequence[str], text: str) -> list[str]:
    """Return what the Tab key offers for a started word: the screen's words, models, and paths."""
    known = [*screen.words, *(models if screen.name == "model" else ())]
    if screen.name in ("model", "machine", "workload", "quality"):
        folder, _, start = text.rpartition("/")
        above = Path(folder or ("/" if text.startswith("/") else "."))
        there = sorted(above.glob(f"{glob.escape(start)}*")) if above.is_dir() else []
        known += [str(path) + "/" * path.is_dir() for path in there if str(path).isprintable()]
    return [word for word in dict.fromkeys(known) if word.startswith(text)]
