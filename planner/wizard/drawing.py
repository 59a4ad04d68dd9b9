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
from planner.wizard.screens import Grid, Screen, View

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

BESIDE = 104  # columns from which the panel stands beside the question
NARROW = 60  # columns below which a grid is a list
PANEL = 48  # columns of the panel beside
HIGH = 30  # rows from which paragraphs are set apart
PREDICTED = {  # metric -> what the panel calls it, and the end of its unit that this says already
    "artefact_bytes": ("size", ""), "ttft_s": ("TTFT", ""), "tpot_s": ("TPOT", ""),
    "throughput_tokens_per_s": ("tokens/s", " tokens/s"), "energy_j_per_token": ("energy/token", "/token"),
    "cost_usd_per_token": ("cost/1M tokens", "/1M tokens"), "quality_loss_ratio": ("loss", ""),
}  # fmt: skip
KEYS = "Enter accepts   b back   ? more   Ctrl-C stops and keeps your answers"


class Face:
    """Draws screens on stderr. On a terminal that cannot move its cursor, one screen follows the other."""

    def __init__(self, *, colour: str = "auto", console: Console | None = None) -> None:
        self.ascii = ascii_only(sys.stderr)
        self.console = console or _console(colour)

    def draw(self, screen: Screen, view: View, *, step: int, steps: int, note: str = "", more: bool = False) -> None:
        """Show one screen. `note`: what the last typed line brought about; `more`: the long explanation as well."""
        from rich.console import Group
        from rich.table import Table

        columns = self.console.width
        question = self._question(screen, view, step, steps, note, more)
        if columns >= BESIDE:
            beside = Table.grid(padding=(0, 2), expand=True)
            beside.add_column(ratio=1)
            beside.add_column(width=PANEL)
            beside.add_row(question, self._panel(view))
            whole: RenderableType = beside
        elif columns >= NARROW:
            whole = question if more else Group(question, self._text(""), self._summary(view))
        else:  # what is asked comes last, where the eye is
            whole = Group(self._summary(view), self._text(""), question)
        if not self.console.is_dumb_terminal and self.console.is_terminal:
            self.console.control(_clear())
        self.console.print(whole)
        self.console.print(*self._gap(), self._text(screen.ask, "cyan"), sep="\n")
        self.console.print(self._text(KEYS, "dim"))

    def say(self, text: str, style: str = "") -> None:
        """Print one paragraph below the screen."""
        self.console.print(self._text(text, style))

    # ------------------------------------------------------------ the question

    def _question(self, screen: Screen, view: View, step: int, steps: int, note: str, more: bool) -> Any:
        from rich.console import Group

        dots = "●" * step + "○" * (steps - step)
        parts: list[Any] = [
            self._text(f"leanplan  {dots}  {step} of {steps}", "dim"), self._text(screen.title, "bold"),
            self._text(screen.why, "dim"), self._text(""), self._grid(screen.grid(view)),
        ]  # fmt: skip
        if remarks := screen.remarks(view):
            parts += [*self._gap(), *(self._text(r, "yellow" if r.startswith("✗") else "dim") for r in remarks)]
        if note:
            parts += [*self._gap(), self._text(note, "yellow")]
        if more:
            parts += [self._text(""), self._text(screen.more)]
        return Group(*parts)

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


def _waiting(view: View) -> str:
    if view.problem is None:
        return "predicting ... (? looks again)"
    return f"nothing can be predicted: {view.problem.message}\n{view.problem.hint}"


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
    if screen.name in ("model", "machine", "quality"):
        folder, _, start = text.rpartition("/")
        above = Path(folder or ("/" if text.startswith("/") else "."))
        there = sorted(above.glob(f"{glob.escape(start)}*")) if above.is_dir() else []
        known += [str(path) + "/" * path.is_dir() for path in there]
    return [word for word in dict.fromkeys(known) if word.startswith(text)]
