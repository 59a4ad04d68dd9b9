"""Live progress: a table that lives on a terminal, one plain line for each event in a pipe. Always on stderr."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.cli._talk import clean

if TYPE_CHECKING:
    from knowledge_base.types import Estimate, Plan
    from planner.results import PlanResult
    from planner.spec import Spec

NARROWEST = 72  # columns below which the table has no room, and a status line does
SPARK_COLUMNS, SPARK_ROWS = 32, 4
FIGURE_COLUMNS = 19  # of one metric in the table
TABLE_LINES = 5  # of the table that are no plan: the space above, headings, rule, "and more"; and the cursor's


class Progress:
    """Tells a person what goes on. Events are printed as lines; `tick` redraws one status line on a terminal.

    Args:
        quiet: no lines at all; `live`: None decides by the terminal.
    """

    def __init__(self, *, quiet: bool = False, live: bool | None = None) -> None:
        self.quiet = quiet
        self.live = (_terminal() if live is None else live) and not quiet
        self.start = time.monotonic()
        self._drawn = 0
        self._last_tick = 0.0

    def line(self, text: str) -> None:
        """Print one line that stays."""
        if self.quiet:
            return
        self._erase()
        self._put(f"{self._clock()} {clean(text)}\n")

    def tick(self, text: str) -> None:
        """Redraw the status line, at most ten times a second; nothing in a pipe."""
        if not self.live or time.monotonic() - self._last_tick < 0.1:
            return
        self._last_tick = time.monotonic()
        self._erase()
        width = max(20, _columns()) - 1
        shown = f"{self._clock()} {clean(text)}"[:width]
        self._put(shown)
        self._drawn = len(shown)

    def stage(self, text: str) -> None:
        """A new part of the run begins; its own lines tell of it."""

    def trying(self, plan: Plan, why: str, estimate: Estimate | None) -> None:
        """A plan is about to be measured."""
        self.line(f"{plan.id} {plan.words}  ({why})")

    def measured(self, results: Sequence[PlanResult], figures: str) -> None:
        """The last of the results has just been measured; `figures` says it in a line."""
        self.line(f"           {figures}")

    def expect(self, seconds: float, plans: int) -> None:
        """The rest is expected to take this long, with this many plans more."""

    def done(self) -> None:
        """Erase what is not to stay."""
        self._erase()

    def _clock(self) -> str:
        return f"[{_minutes(time.monotonic() - self.start):>5}]"

    def _erase(self) -> None:
        if self._drawn:
            self._put("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _put(self, text: str) -> None:
        encoding: Any = getattr(sys.stderr, "encoding", None) or "utf-8"
        try:
            sys.stderr.write(text.encode(encoding, errors="replace").decode(encoding))
            sys.stderr.flush()
        except (BrokenPipeError, ValueError):
            self.quiet = True  # nobody reads; the work goes on


class LiveProgress(Progress):
    """Draws the run as it goes: stages, the table of measured plans, the plan in hand, the front, the time left.

    Lines that stay are printed above. Nothing is drawn before the first stage, and `done` takes the drawing away.
    """

    def __init__(self, spec: Spec, *, console: Any = None) -> None:
        from planner.reports.terminal import ascii_only

        super().__init__(live=True)
        self.spec = spec
        self.plain = ascii_only(sys.stderr)
        self.console = console or _console()
        self.results: Sequence[PlanResult] = ()
        self.stages: list[str] = []
        self.hand: tuple[Plan, str, Estimate | None] | None = None
        self.doing = ""
        self.expected: tuple[float, int] | None = None  # when the run is expected to end, and plans left
        self.limited_from = self.start  # the time limit is not for what comes before the first stage
        self._display: Any = None

    def line(self, text: str) -> None:
        """Print one line that stays, above what is drawn; broken between words where the terminal is narrow."""
        self._erase()
        self.console.print(self._text(f"{self._clock()} {text}"))

    def tick(self, text: str) -> None:
        """Take note of what the plan in hand is at."""
        if self._display is None:
            super().tick(text)
        self.doing = text.partition(": ")[2] or text

    def stage(self, text: str) -> None:
        """Begin drawing, or go on with the next stage."""
        from rich.live import Live

        self._erase()
        if not self.stages:
            self.limited_from = time.monotonic()
        self.stages.append(text)
        self.doing = ""
        if self._display is None:
            self._display = Live(
                console=self.console, get_renderable=self.drawing, refresh_per_second=4, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._display.start()

    def trying(self, plan: Plan, why: str, estimate: Estimate | None) -> None:
        self.hand, self.doing = (plan, why, estimate), ""
        if self._display is None:
            super().trying(plan, why, estimate)

    def measured(self, results: Sequence[PlanResult], figures: str) -> None:
        self.results, self.hand, self.doing = results, None, ""
        if self._display is None:
            super().measured(results, figures)

    def expect(self, seconds: float, plans: int) -> None:
        self.expected = time.monotonic() + seconds, plans

    def done(self) -> None:
        """Take the drawing away; the lines above it stay."""
        super().done()
        if self._display is not None:
            self._display.stop()
            self._display = None

    # ------------------------------------------------------------ what is drawn

    def drawing(self) -> Any:
        """Return the whole picture as it is now."""
        from rich.console import Group

        below: list[Any] = []
        if self.hand is not None:
            below += [self._text(""), *self._in_hand(*self.hand)]
        elif self.doing:
            below += [self._text(""), self._text(f"▸ {self.doing}", "cyan", lines=1)]
        if len(points := self._points()) > 1:
            below += [self._text(""), self._front(points)]
        failures = [r for r in self.results if r.measurement and r.measurement.failure]
        if failures and (failure := failures[-1].measurement) and failure.failure:
            said = f"last failure: {failure.failure.kind}: {failure.failure.message}  ({failures[-1].plan.words})"
            below += [self._text(""), self._text(said, "red", lines=1)]
        above = [self._text(""), self._stages(), self._time()]
        if self.results:
            taken = sum(len(self.console.render_lines(part)) for part in (*above, *below))
            above += [self._text(""), self._table(room=max(3, self.console.height - taken - TABLE_LINES))]
        return Group(*above, *below)

    def _stages(self) -> Any:
        return self._text(
            "  ".join(f"{'▸' if s is self.stages[-1] else '✓'} {s}" for s in self.stages), "bold", lines=1
        )

    def _time(self) -> Any:
        search = self.spec.search
        spent = time.monotonic() - self.limited_from
        width = 24
        full = min(width, int(width * spent / search.time_limit_s))
        left = max(0.0, search.time_limit_s - spent)
        likely, most = "", search.max_measured
        if self.expected is not None:
            likely = f"about {_minutes(max(0.0, self.expected[0] - time.monotonic()))} left, "
            most = min(most, len(self.results) + self.expected[1])
        return self._text(
            f"{'━' * full}{'╸' if full < width else ''}{' ' * (width - full - 1)}  {_minutes(spent)}, {likely}at most "
            f"{_minutes(left)} left; {len(self.results)} of at most {most} plans measured",
            "cyan", lines=1,
        )  # fmt: skip

    def _table(self, room: int) -> Any:
        """Return the measured plans, the best first; no more than there is room for."""
        from rich import box
        from rich.table import Table

        from planner.reports import _table as cells

        names = self._metrics()
        table = Table(box=box.ASCII if self.plain else box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        widest = max(20, self.console.width - FIGURE_COLUMNS * len(names) - 2)
        table.add_column(self._text("measured", "dim"), no_wrap=True, max_width=widest, overflow="ellipsis")
        for name in names:
            table.add_column(self._text(cells.heading(name), "dim"), justify="right", no_wrap=True)
        good = [r for r in self.results if not (r.measurement and r.measurement.failure)]
        ranked = sorted(good, key=lambda r: (not r.on_front, not r.feasible, self._rank(r)))
        for result in ranked[:room]:
            style = "bold" if result.on_front and result.feasible else "" if result.on_front else "dim"
            shown = [cells.cell(result, name, measured=True) for name in names]
            mark = cells.KINDS[cells.kind(result)].mark
            table.add_row(self._text(f"{mark} {result.plan.words}", style), *(self._judged(c, style) for c in shown))
        if len(ranked) > room:
            table.add_row(self._text(f"... and {len(ranked) - room} more", "dim"))
        return table

    def _judged(self, cell: str, style: str) -> Any:
        """Return a cell with the mark of its budget in its colour."""
        text = self._text(cell, style)
        if colour := {"✓": "green", "✗": "red", "?": "yellow"}.get(cell[-1]):
            text.stylize(colour, len(text) - 1)
        return text

    def _rank(self, result: PlanResult) -> float:
        """Return what sorts plans by the first objective, the best first."""
        from knowledge_base.metrics import find_metric
        from planner.answering import value_of

        label = self.spec.objectives[0]
        value = value_of(result, label)
        return math.inf if value is None else value if find_metric(label)[0].better == "lower" else -value

    def _metrics(self) -> list[str]:
        """Return the metrics with a column, as many as leave the plan room: what to be best at, then what must hold."""
        from knowledge_base.metrics import find_metric

        first, *others = (find_metric(o)[0].name for o in self.spec.objectives)
        wanted = [first, *(b.metric for b in self.spec.budgets), *others]
        return list(dict.fromkeys(wanted))[: max(1, (self.console.width - 40) // FIGURE_COLUMNS)]

    def _in_hand(self, plan: Plan, why: str, estimate: Estimate | None) -> list[Any]:
        from knowledge_base.metrics import METRICS
        from planner.reports._table import value_text

        lines = [self._text(f"▸ {plan.words}{': ' if self.doing else ''}{self.doing}  ({why})", "cyan", lines=1)]
        values = estimate.values if estimate else {}
        told = ", ".join(f"{METRICS[n].label} {value_text(values[n], n)}" for n in self._metrics() if n in values)
        return [*lines, self._text(f"  predicted: {told}", "dim")] if told else lines

    def _points(self) -> list[tuple[float, float]]:
        """Return the measured plans as points of the first two objectives."""
        from planner.answering import failed, value_of

        if len(self.spec.objectives) < 2:
            return []
        pairs = [tuple(value_of(r, o) for o in self.spec.objectives[:2]) for r in self.results if not failed(r)]
        return [(x, y) for x, y in pairs if x is not None and y is not None]

    def _front(self, points: list[tuple[float, float]]) -> Any:
        from knowledge_base.metrics import find_metric

        labels = self.spec.objectives[:2]
        signs = [1 if find_metric(label)[0].better == "lower" else -1 for label in labels]
        rows = scatter(points, columns=SPARK_COLUMNS, rows=SPARK_ROWS, signs=signs, plain=self.plain)
        across, up = (f"{'more' if sign > 0 else 'less'} {label}" for sign, label in zip(signs, labels))
        rows = [f"│{row}" for row in rows]
        for i, label in enumerate((f"up: {up}", f"right: {across}", "best: lower left")):
            rows[i] += f"  {label}"
        return self._text("\n".join([*rows, "└" + "─" * SPARK_COLUMNS]), "dim", lines=1)

    def _text(self, value: str, style: str = "", lines: int = 0) -> Any:
        """Return foreign text as it is; cut to the terminal's width where it has `lines` 1."""
        from rich.text import Text

        from planner.reports.terminal import in_ascii

        value = clean(value)
        text = Text(in_ascii(value) if self.plain else value, style=style)
        if lines:
            text.no_wrap, text.overflow = True, "ellipsis" if not self.plain else "crop"
        return text


def progress_of(spec: Spec, *, quiet: bool, live: bool | None) -> Progress:
    """Return what suits stderr: a live table where there is room for one, else lines."""
    if live is None and not quiet and _terminal() and _columns() >= NARROWEST:
        return LiveProgress(spec)
    return Progress(quiet=quiet, live=live)


def scatter(
    points: Sequence[tuple[float, float]],
    *,
    columns: int,
    rows: int,
    signs: Sequence[int] = (1, 1),
    plain: bool = False,
) -> list[str]:
    """Return points as rows of braille, two by four dots a character (`plain`: one asterisk); axes are logarithmic.

    Args:
        signs: -1 for an axis that is to be drawn the other way round.

    >>> scatter([(1, 1), (10, 10)], columns=2, rows=1)
    ['⡀⠈']
    """
    dots = [[0] * columns for _ in range(rows)]
    for x, y in zip(*(_scaled([p[axis] for p in points], signs[axis]) for axis in (0, 1))):
        across, down = round(x * (2 * columns - 1)), round((1 - y) * (4 * rows - 1))
        dots[down // 4][across // 2] |= _BRAILLE[down % 4][across % 2]
    return ["".join(("*" if plain else chr(0x2800 + d)) if d else " " for d in row) for row in dots]


_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a character's dots, row by row


def _scaled(values: Sequence[float], sign: int) -> list[float]:
    """Return values as shares of their range: of their logarithms where all are positive."""
    logs = [sign * (math.log(v) if min(values) > 0 else v) for v in values]
    low, high = min(logs), max(logs)
    return [(v - low) / (high - low) if high > low else 0.0 for v in logs]


def _terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def _minutes(seconds: float) -> str:
    return f"{int(seconds // 60):d}:{int(seconds % 60):02d}"


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, legacy_windows=False)


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((80, 24)).columns
