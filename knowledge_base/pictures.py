"""Pictures of the graph that a person can read: one node in the middle, what leads to it left, what it leads to right.

An SVG of our own, 900 units wide, at most MOST boxes of what is shipped. Everything is drawn in `currentColor`, so it follows the text
colour of the page around it, light or dark. What a box has no room for is in its tooltip.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import TYPE_CHECKING

from knowledge_base import graph as graphs
from knowledge_base import rules
from knowledge_base.field import field as knowledge
from knowledge_base.field.entries import RESOURCES

if TYPE_CHECKING:
    import networkx

MOST = 44  # boxes beside the one in the middle
WIDTH, SIDE, MIDDLE, EDGE = 900, 330, 140, 1  # of the picture, a box at the side, the one in the middle, the rim
ROW, BOX, TITLE, GAP = 26, 22, 24, 10  # heights: a box with its space, a box, a group's title, space between groups
LETTER = 7.2  # widest usual letter at 13 units
WIDE = 13.0  # a letter of scripts that are wider
_LINES = {"direct": "", "indirect": "6 4", "against": "1.5 4"}  # how a line is dashed


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One neighbour. `line`: a key of _LINES; `mark`: executable, drawn with a dot."""

    text: str
    tip: str
    line: str = "direct"
    mark: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbours of one sort, and how many there are beyond those drawn."""

    title: str
    boxes: Sequence[Box]
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """What is drawn: a title in the middle, groups left and right."""

    title: str
    tip: str
    left: Sequence[Group] = field(default_factory=tuple)
    right: Sequence[Group] = field(default_factory=tuple)
    legend: str = ""


def picture(text: str) -> str:
    """Return the SVG of a resource, technique or method: `resource:memory`, `gptq`; any other node with its neighbours.

    Raises:
        BadInput: there is no such node.
    """
    graph = graphs.knowledge_graph()
    node = graphs.find(text, graph)
    kind, _, name = node.partition(":")
    if kind == "resource" and name in RESOURCES:
        return draw(_of_resource(graph, node))
    return draw(_of_node(graph, node))


# ---------------------------------------------------------------- what is drawn


def _of_resource(graph: networkx.MultiDiGraph, node: str) -> Picture:
    """Left the methods that save a resource, by topic, those we execute and those with evidence first; right their price."""
    known = knowledge()
    resource = node.partition(":")[2]
    savers = [m for m in known.methods.values() if resource in m.saves]
    best = sorted(
        savers, key=lambda m: (not known.implementing(m.id), -graph.nodes[f"method:{m.id}"]["evidence"], m.id)
    )
    topics = Counter(m.topic for m in savers)
    shown: dict[str, list[Box]] = {}
    for method in best[: MOST - 18]:
        strength = known.effects(method.id).get(resource, "direct")
        tip = f"{method.name}: {method.summary} saves {resource} [{method.saves[resource]}]"
        box = Box(text=method.name, tip=tip, line=strength, mark=bool(known.implementing(method.id)))
        shown.setdefault(method.topic, []).append(box)
    prices = Counter(price for m in savers for price in m.spends)
    also = Counter(other for m in savers for other in m.saves if other != resource)
    metrics = [n for n in graphs.neighbours(graph, node).get("measured by", []) if n.startswith("metric:")]
    return Picture(
        title=resource,
        tip=f"{len(savers)} methods save {resource}",
        left=[
            Group(title=known.topics[topic].name, boxes=boxes, more=topics[topic] - len(boxes))
            for topic, boxes in sorted(shown.items(), key=lambda item: known.topics[item[0]].name)
        ],
        right=[
            Group(title="what it costs", boxes=_counted(prices, len(savers), "against")),
            Group(title="what it saves as well", boxes=_counted(also, len(savers), "direct")),
            Group(title="measured by", boxes=_nodes(graph, metrics[:4], "indirect"), more=len(metrics[4:])),
        ],
        legend=f"{sum(map(len, shown.values()))} of {len(savers)} methods: those Leanplan executes (●), then those with most "
        "published figures; - - indirect by the survey's Table 2, ··· a price",
    )


def _counted(counts: Counter[str], of: int, line: str) -> list[Box]:
    return [
        Box(text=f"{name}: {count} of {of}", tip=f"{count} of the {of} methods: {name}", line=line)
        for name, count in counts.most_common(4)
    ]


def _of_node(graph: networkx.MultiDiGraph, node: str) -> Picture:
    """Left what a node is, needs and follows, right what it does; rules under what they mean for a plan that holds it."""
    around = graphs.neighbours(graph, node)
    left = [_group(graph, said, around[said]) for said in _LEFT if said in around]
    right = [_group(graph, said, around[said]) for said in around if said not in _LEFT]
    for (title, side, line), boxes in _told(node).items():
        group = Group(title=title, boxes=[replace(box, line=line) for box in boxes[:4]], more=len(boxes[4:]))
        (left if side == "left" else right).append(group)
    facts = graph.nodes[node]
    return Picture(
        title=facts["label"], tip=f"{node} {facts.get('summary', '')}".strip(), left=left, right=right,
        legend="● Leanplan executes it; - - worth knowing; ··· a price, or what cannot go together",
    )  # fmt: skip


_LEFT = (
    "under",
    "at",
    "one of",
    "implements",
    "executed by",
    "needs",
    "runs on",
    "needed by",
    "holds",
    "papers",
    "about",
)
_TITLES = {"under": "part of", "at": "stage", "one of": "an alternative in", "told as": "in Leanplan"}
_MEANS = {  # (relation, whether the node is its `a`) -> title, side, line
    ("before", True): ("comes before", "right", "direct"),
    ("before", False): ("comes after", "left", "direct"),
    ("requires", True): ("requires", "left", "direct"),
    ("requires", False): ("required by", "right", "direct"),
    ("synergy", True): ("gains with", "right", "direct"),
    ("weakens", True): ("gains less with", "right", "indirect"),
    ("conflicts", True): ("cannot go with", "right", "against"),
    ("redundant", True): ("makes useless, or is made so", "right", "against"),
    ("note", True): ("worth knowing", "right", "indirect"),
}


def _told(node: str) -> dict[tuple[str, str, str], list[Box]]:
    """Return the rules about a node by what they mean for it, those that name it before those about all of its kind."""
    found: dict[tuple[str, str, str], list[tuple[bool, Box]]] = {}
    name = node.partition(":")[2]
    engine = rules.composition()
    for rule in graphs.rules_of(node):
        first, second = graphs.ends(rule, engine)
        is_a = node == first or (node != second and name in engine.meaning(rule.a))
        other = rule.b if is_a else rule.a
        said = ": ".join(filter(None, (" where ".join(filter(None, (other, rule.when))), rule.effect)))
        box = Box(text=said, tip=f"{rule.sentence} [{rule.source}]")
        meaning = _MEANS.get((rule.relation, is_a)) or _MEANS[rule.relation, True]
        found.setdefault(meaning, []).append((node not in (first, second), box))
    return {meaning: [box for _, box in sorted(boxes, key=itemgetter(0))] for meaning, boxes in found.items()}


def _group(graph: networkx.MultiDiGraph, word: str, nodes: Sequence[str]) -> Group:
    shown = sorted(nodes, key=lambda n: (graph.nodes[n].get("status") != "executable", n))[:5]
    line = "against" if word in ("spends", "spent by") else "direct"
    return Group(title=_TITLES.get(word, word), boxes=_nodes(graph, shown, line), more=len(nodes) - len(shown))


def _nodes(graph: networkx.MultiDiGraph, nodes: Iterable[str], line: str) -> list[Box]:
    return [
        Box(
            text=graph.nodes[n]["label"], tip=f"{n} {graph.nodes[n].get('summary', '')}".strip(), line=line,
            mark=graph.nodes[n].get("status") == "executable",
        )
        for n in nodes
    ]  # fmt: skip


# ---------------------------------------------------------------- how it is drawn


def draw(what: Picture) -> str:
    """Return the SVG. Text is cut to its box and escaped; no two boxes overlap."""
    height = max(_height(what.left), _height(what.right), 120) + 2 * TITLE
    middle = height / 2
    shapes = [
        *_column(what.left, EDGE, height, middle, at_left=True),
        *_column(what.right, WIDTH - EDGE - SIDE, height, middle, at_left=False),
        _box((WIDTH - MIDDLE) / 2, middle - 20, MIDDLE, 40, what.title, what.tip, bold=True),
        f'<text x="{WIDTH / 2:g}" y="{height - 8:g}" text-anchor="middle" opacity="0.7" font-size="12">{_escape(what.legend)}</text>',
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" role="img" '
            f'aria-label="{_escape(what.title)}" fill="currentColor" font-family="system-ui, sans-serif" font-size="13">',
            f"<title>{_escape(what.title)}</title>",
            *shapes,
            "</svg>",
        ]
    )


def _height(groups: Sequence[Group]) -> float:
    return sum(TITLE + len(g.boxes) * ROW + GAP for g in groups if g.boxes)


def _column(groups: Sequence[Group], x: float, height: float, middle: float, *, at_left: bool) -> list[str]:
    """Return the groups of one side, centred, each box joined to the middle."""
    shapes = []
    y = (height - _height(groups)) / 2
    for group in (g for g in groups if g.boxes):
        more = f" (and {group.more} more)" if group.more else ""
        shapes.append(_text(x, y, SIDE, TITLE, group.title + more, bold=True))
        y += TITLE
        for box in group.boxes:
            near, far = (x + SIDE, (WIDTH - MIDDLE) / 2) if at_left else (x, (WIDTH + MIDDLE) / 2)
            bend = (near + far) / 2
            dash = f' stroke-dasharray="{_LINES[box.line]}"' if _LINES[box.line] else ""
            shapes.append(
                f'<path d="M{near:g} {y + BOX / 2:g}C{bend:g} {y + BOX / 2:g} {bend:g} {middle:g} {far:g} {middle:g}" '
                f'fill="none" stroke="currentColor" stroke-opacity="0.45"{dash}/>'
            )
            shapes.append(_box(x, y, SIDE, BOX, ("● " if box.mark else "") + box.text, box.tip))
            y += ROW
        y += GAP
    return shapes


def _box(x: float, y: float, width: float, height: float, text: str, tip: str, *, bold: bool = False) -> str:
    return (
        f'<g><title>{_escape(tip)}</title><rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
        f'fill-opacity="0.06" stroke="currentColor" stroke-opacity="0.35"/>'
        f"{_text(x + 8, y, width - 16, height, text, bold=bold, centred=bold)}</g>"
    )


def _text(
    x: float, y: float, width: float, height: float, text: str, *, bold: bool = False, centred: bool = False
) -> str:
    """Return text that stays in its rectangle: cut by an estimate of its width, and clipped where that was too low."""
    style = (' font-weight="600"' if bold else "") + (' text-anchor="middle"' if centred else "")
    return (
        f'<svg x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}">'
        f'<text x="{"50%" if centred else 0}" y="{height / 2 + 4.5:g}"{style}>{_escape(_cut(text, width))}</text></svg>'
    )


def _cut(text: str, width: float) -> str:
    """Return as much of a text as fits, with an ellipsis where it does not."""
    room = width
    for place, letter in enumerate(text):
        room -= LETTER if ord(letter) < 0x1100 else WIDE
        if room < 0:
            return text[: max(place - 1, 0)].rstrip() + "…"
    return text


def _escape(text: str) -> str:
    """Return text for SVG: markup escaped, and nothing that XML cannot hold."""
    return html.escape("".join(c if c.isprintable() else "?" for c in text))
