"""The card of one method as lines for people."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from knowledge_base.field.card import Card, Effect
from knowledge_base.field.entries import EvidenceRow

WIDTH = 110
BROKEN = 1000  # times the perplexity: what is left is noise, and how much of it is no figure
PAPERS = 8  # told; leanplan papers --technique lists them all
STATUSES = {
    "executable": "Leanplan executes it",
    "priced": "Leanplan can price it but not execute it yet",
    "known": "Leanplan knows of it; it neither prices nor executes it yet",
}


def as_text(card: Card, measured: Sequence[str] = ()) -> str:
    """Return all that is known of a method; `measured`: the lines on what it did on this machine."""
    method = card.method
    status = STATUSES[card.status] + (f", as {', '.join(card.techniques)} in plans" if card.techniques else "")
    blocks = [
        [f"{method.name} ({method.id})", " / ".join(card.place), status],
        textwrap.wrap(method.summary, WIDTH),
        _block("saves", [_effect(effect) for effect in card.saves]),
        _block("costs", [_effect(effect) for effect in card.spends]),
        _losses(card),
        _block("knobs", [f"{knob}: {', '.join(map(str, values))}" for knob, values in method.knobs.items()]),
        _block("needs", _needs(card)),
        _block("risks", method.risks),
        _block("with others", [f"{rule.sentence} [{rule.source}]" for rule in card.rules]),
        _evidence(card),
        measured,
        _papers(card),
        _block("sources", method.sources),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _block(title: str, lines: Iterable[str]) -> list[str]:
    told = [f"  {line}" for line in lines]
    return [f"{title}:", *told] if told else []


def _effect(effect: Effect) -> str:
    said = f"{effect.resource}" + (f", {effect.strength}" if effect.strength else "") + f" [{effect.why}]"
    if (published := effect.published) is not None:
        said += (
            f": ×{published.factor:.3g} at the median of {many(published.rows, 'published figure')} "
            f"of {many(published.models, 'model')} [×{published.low:.3g} – ×{published.high:.3g}]"
        )
    return said


def _losses(card: Card) -> list[str]:
    """Return the fitted losses: one line for each setting, the sizes side by side."""
    lines: dict[str, list[str]] = {}
    for entry in card.losses:
        loss = entry.loss
        lines.setdefault(entry.step, []).append(
            f"{entry.params / 1e9:g}B {_ratio(loss.mid)} [{_ratio(loss.low)} – {_ratio(loss.high)}]"
        )
    return _block(
        "expected loss of perplexity by parameters, with its 90 % interval, fitted on evidence",
        [f"{step}: {'; '.join(said)}" for step, said in lines.items()],
    )


def _ratio(log_ratio: float) -> str:
    """Return a change of perplexity in two digits, for no more are known: `+46%`, `×4.6`."""
    if log_ratio > math.log(BROKEN):
        return f"beyond ×{BROKEN}"
    percent = float(f"{100 * math.expm1(log_ratio):.2g}")
    return f"{round(percent, 2):+g}%" if log_ratio < 1 else f"×{float(f'{math.exp(log_ratio):.2g}'):g}"


def many(count: int, noun: str) -> str:
    """Return `1 model`, `2 models`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _needs(card: Card) -> list[str]:
    needs = card.method.requires
    lists = (("hardware", needs.hardware), ("architecture", needs.architecture), ("engine", needs.engine))
    return [
        f"data: {needs.data}",
        f"training: {needs.training}",
        *(f"{what}: {', '.join(n)}" for what, n in lists if n),
    ]


def _evidence(card: Card) -> list[str]:
    if not card.evidence_rows:
        return ["evidence: no published figure in the knowledge base"]
    return _block(
        f"evidence, {len(card.evidence)} of {many(card.evidence_rows, 'published figure')}",
        [_row(r) for r in card.evidence],
    )


def _row(row: EvidenceRow) -> str:
    before = "" if row.baseline is None else f"{row.baseline:g} -> "
    steps = " + ".join(map(str, row.steps))
    return f"{steps}, {row.model}: {row.metric} {before}{row.value:g}{f' on {row.task}' if row.task else ''} [{row.source}]"


def _papers(card: Card) -> list[str]:
    lines = [
        f"{paper.year or '?'}  {paper.title}{f' [{paper.links[0]}]' if paper.links else ''}"
        for paper in card.papers[:PAPERS]
    ]
    more = len(card.papers) - PAPERS
    lines += [f"… {more} more: leanplan papers --technique {card.method.id}"] if more > 0 else []
    return _block("papers of the surveys", lines)
