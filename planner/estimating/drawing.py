"""One picture, drawn twice: as lines of braille (or ASCII) for a terminal, and as an SVG of our own.

A picture holds shares of its width and height, so whoever makes one decides the axes. The SVG is 900 units wide, follows
the text colour around it, and holds foreign text escaped.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Ticks = Sequence[tuple[float, str]]  # share of the axis, text

COLUMNS, ROWS = 60, 12  # cells of the plot in a terminal
WIDTH, HEIGHT = 900, 380  # of one picture in an SVG
LEFT, TOP, BOTTOM = 110, 34, 50  # around its plot
LEGEND = 330  # width of what stands beside it
LONGEST = 110  # characters of a text
LINE = 18  # height of a line of text
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_DASHES = {"line": "", "reached": "7 4", "limit": "2 4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A line through points, each (share of the width, share of the height). `band`: heights of an interval around it."""

    points: Sequence[tuple[float, float]]
    text: str
    line: str = "line"  # a key of _DASHES
    band: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A named point; points at the same place share a letter."""

    at: tuple[float, float]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A plot with its axes."""

    title: str  # what is along the height
    across: str  # what is along the width
    across_ticks: Ticks
    up_ticks: Ticks
    curves: Sequence[Curve]
    points: Sequence[Point] = ()

    @property
    def named(self) -> list[tuple[str, tuple[float, float], list[str]]]:
        """(letter, place, texts) of the points: those too near to be told apart share a letter."""
        places: dict[tuple[float, float], tuple[tuple[float, float], list[str]]] = {}
        for point in self.points:
            cell = (round(point.at[0], 2), round(point.at[1], 2))
            places.setdefault(cell, (point.at, []))[1].append(point.text)
        return [(letter, at, texts) for letter, (at, texts) in zip(LETTERS, places.values())]


def bar(start: float, end: float, columns: int, *, ascii_only: bool) -> str:
    """Return a bar from one share of a width to another, at least one character long.

    >>> bar(0.25, 0.75, 8, ascii_only=True)
    '  ####  '
    """
    first = min(round(start * columns), columns - 1)
    last = max(round(end * columns), first + 1)
    return (" " * first + ("#" if ascii_only else "█") * (last - first)).ljust(columns)


# ---------------------------------------------------------------- terminal

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell: row, column


def lines(picture: Picture, *, ascii_only: bool) -> list[str]:
    """Return the picture as lines of text: title, plot with its axes, then what its marks mean."""
    cells = [[" "] * COLUMNS for _ in range(ROWS)]
    across, up = (1, 1) if ascii_only else (2, 4)
    for curve in picture.curves:
        for column, row in _path(curve, COLUMNS * across, ROWS * up):
            x, y = column // across, row // up
            if ascii_only:
                cells[y][x] = "." if curve.line == "line" else "-"
            else:
                known = ord(cells[y][x]) - 0x2800 if cells[y][x] != " " else 0
                cells[y][x] = chr(0x2800 + (known | _DOTS[row % up][column % across]))
    for letter, place, _ in picture.named:
        cells[_cell(1 - place[1], ROWS)][_cell(place[0], COLUMNS)] = letter
    rows = {_cell(1 - at, ROWS): text for at, text in picture.up_ticks if 0 <= at <= 1}
    width = max((len(text) for text in rows.values()), default=0)
    edge, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    body = [f"{rows.get(i, ''):>{width}} {edge}{''.join(row)}".rstrip() for i, row in enumerate(cells)]
    title = f"{picture.title} over {picture.across}"
    meaning = [f"{letter}  {', '.join(texts)}" for letter, _, texts in picture.named]
    return [title, *body, f"{'':{width}} {corner}{floor * COLUMNS}", f"{'':{width}}  {_below(picture)}", *meaning]


def _path(curve: Curve, columns: int, rows: int) -> list[tuple[int, int]]:
    """Return the dots of a curve; dashed ones have gaps."""
    found = []
    for (x0, y0), (x1, y1) in zip(curve.points, curve.points[1:] or curve.points):
        steps = max(1, round(abs(x1 - x0) * columns), round(abs(y1 - y0) * rows))
        for i in range(steps + 1):
            x, y = x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps
            if 0 <= x <= 1 and 0 <= y <= 1 and (curve.line == "line" or i % 4 < 2):
                found.append((_cell(x, columns), _cell(1 - y, rows)))
    return found


def _cell(share: float, cells: int) -> int:
    return min(max(int(share * cells), 0), cells - 1)


def _below(picture: Picture) -> str:
    """Return the ticks of the width on one line, those without room left out."""
    text = ""
    for at, tick in sorted(picture.across_ticks):
        start = max(0, _cell(at, COLUMNS) - len(tick) // 2)
        if 0 <= at <= 1 and (not text or start > len(text)):
            text = text.ljust(start) + tick
    return text


# ---------------------------------------------------------------- SVG


def svg(title: str, pictures: Sequence[Picture], notes: Sequence[str] = ()) -> str:
    """Return pictures one below the other, with notes under them, as one SVG."""
    height = 30 + HEIGHT * len(pictures) + LINE * len(notes) + 12
    shapes = [_text(WIDTH / 2, 20, title, anchor="middle", bold=True)]
    for i, picture in enumerate(pictures):
        shapes += _draw(picture, 30 + HEIGHT * i)
    shapes += [_text(16, height - 12 - LINE * (len(notes) - 1 - i), note, size=12) for i, note in enumerate(notes)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" '
            f'aria-label="{_escape(title)}" fill="currentColor" font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{_escape(title)}</title>",
            *shapes,
            "</svg>",
        ]
    )


def _draw(picture: Picture, top: float) -> list[str]:
    """Return the shapes of one picture: frame and ticks, bands below curves below points, names beside."""
    right = WIDTH - LEGEND
    low, high = top + HEIGHT - BOTTOM, top + TOP

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + point[0] * (right - LEFT), low - point[1] * (low - high)

    shapes = [_text(LEFT, top + 22, picture.title, bold=True)]
    for share, text in picture.across_ticks:
        x, _ = place((share, 0))
        shapes += [_line(x, low, x, high, opacity=0.12), _text(x, low + 18, text, anchor="middle", size=12)]
    for share, text in picture.up_ticks:
        _, y = place((0, share))
        shapes += [_line(LEFT, y, right, y, opacity=0.12), _text(LEFT - 8, y + 4, text, anchor="end", size=12)]
    shapes += [_line(LEFT, low, right, low, opacity=0.6), _line(LEFT, low, LEFT, high, opacity=0.6)]
    shapes.append(_text((LEFT + right) / 2, low + 38, picture.across, anchor="middle", size=12))
    frame = f'<svg x="{LEFT}" y="{high:g}" width="{right - LEFT:g}" height="{low - high:g}" viewBox="{LEFT} {high:g} {right - LEFT:g} {low - high:g}">'
    shapes += [frame, *(shape for curve in picture.curves for shape in _curve(curve, place)), "</svg>"]
    for letter, at, texts in picture.named:
        x, y = place(at)
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_escape(", ".join(texts))}</title></circle>')
        crowded = any(0 < other[1] - at[1] < 0.1 and abs(other[0] - at[0]) < 0.05 for _, other, _ in picture.named)
        shapes.append(_text(x + 7, y + (15 if crowded else -6), letter, bold=True))
    y = high + 8
    for letter, _, texts in picture.named:
        shapes.append(_text(right + 20, y, letter, bold=True))
        for text in texts:
            shapes.append(_text(right + 38, y, text, size=12))
            y += LINE
    for curve in (c for c in picture.curves if c.text):
        shapes.append(_line(right + 20, y - 4, right + 48, y - 4, dash=_DASHES[curve.line]))
        shapes.append(_text(right + 56, y, curve.text, size=12))
        y += LINE
    return shapes


def _curve(curve: Curve, place: Callable[[tuple[float, float]], tuple[float, float]]) -> list[str]:
    shapes = []
    if curve.band:
        edge = [(x, high) for (x, _), (_, high) in zip(curve.points, curve.band)]
        edge += [(x, low) for (x, _), (low, _) in reversed(list(zip(curve.points, curve.band)))]
        shapes.append(f'<polygon points="{_coordinates(map(place, edge))}" fill-opacity="0.12"/>')
    points = _coordinates(map(place, curve.points))
    dash = f' stroke-dasharray="{_DASHES[curve.line]}"' if _DASHES[curve.line] else ""
    shapes.append(f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.6"{dash}/>')
    return shapes


def _coordinates(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(x0: float, y0: float, x1: float, y1: float, *, opacity: float = 1.0, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="currentColor" stroke-opacity="{opacity:g}"{dashed}/>'


def _text(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{weight}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Return text for SVG: cut, markup escaped, and nothing that XML cannot hold."""
    shown = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return html.escape("".join(c if c.isprintable() else "?" for c in shown))
