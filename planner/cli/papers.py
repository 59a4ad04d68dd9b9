"""`leanplan papers`: the papers of the four surveys, by what they are about, what it saves, seed, year or words."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowledge_base.field import Field
    from knowledge_base.field.entries import Paper

HELP = "papers of the surveys, by technique, topic, resource, seed, year or words of the title"
SURVEYS = ("000", "001", "002", "003")  # as the places of a paper begin; docs/knowledge.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--technique", metavar="ID", help="about this technique")
    parser.add_argument("--topic", metavar="ID", help="about this topic, those below it, or their techniques")
    parser.add_argument(
        "--resource", metavar="R", help="about what saves it: computation, memory, energy, money, network"
    )
    parser.add_argument("--survey", choices=SURVEYS, help="named by this seed survey (--seed is the seed of choices)")
    parser.add_argument("--year", type=_years, metavar="YEAR[-YEAR]", help="published then")
    parser.add_argument("--text", metavar="WORDS", help="all of these words in the title")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def output() -> Any:
    from knowledge_base.field.entries import Paper

    return list[Paper]


def run(options: argparse.Namespace) -> int:
    from knowledge_base.errors import ExitCode
    from knowledge_base.field import field
    from planner.cli._talk import emit

    options.json = options.json or options.format == "json"
    papers = sorted(_chosen(field(), options), key=lambda p: (p.year or 0, p.title.casefold()))
    emit(options, papers, "\n".join(_lines(papers)))
    return ExitCode.DONE


def _years(text: str) -> tuple[int, int]:
    """Return the first and last year of `2023` or `2020-2023`."""
    found = re.fullmatch(r"(\d{4})(?:-(\d{4}))?", text)
    if not found or (found[2] and found[2] < found[1]):
        raise argparse.ArgumentTypeError(f"`{text}` is neither a year nor two with the later one last: 2020-2023")
    return int(found[1]), int(found[2] or found[1])


def _chosen(known: Field, options: argparse.Namespace) -> list[Paper]:
    """Return the papers that answer everything asked.

    Raises:
        BadInput: an unknown technique, topic or resource, with the nearest names.
    """
    found = list(known.papers.values())
    if options.technique:
        found = list(known.papers_of(known.method(options.technique).id))
    if options.topic:
        within = known.papers_of(known.topic(options.topic).id)
        found = [p for p in found if p in within]
    if options.resource:
        saving = _saving(known, options.resource)
        found = [p for p in found if saving.intersection(p.about)]
    if options.survey:
        found = [p for p in found if any(place.startswith(options.survey) for place in p.seeds)]
    if options.year:
        found = [p for p in found if p.year is not None and options.year[0] <= p.year <= options.year[1]]
    if options.text:
        words = options.text.casefold().split()
        found = [p for p in found if all(word in p.title.casefold() for word in words)]
    return found


def _saving(known: Field, resource: str) -> set[str]:
    """Return the methods and topics that act on a resource: as their row of Table 2 says, or any row below them."""
    found = {method.id for method in known.select(saves=resource)}
    for topic in known.topics:
        row = next((t for t in known.upwards(topic) if known.topics[t].effects), topic)
        if resource in known.topics[row].effects:
            found.update(known.upwards(topic))
    return found


def _lines(papers: list[Paper]) -> Iterator[str]:
    from planner.reports._text import literal

    for paper in papers:
        yield literal(f"{paper.year or '    '}  {paper.title}" + (f" ({paper.venue})" if paper.venue else ""))
        about = f"about {', '.join(paper.about)}" if paper.about else f"no technique: {paper.not_yet}"
        seeds = " ".join(dict.fromkeys(place.partition(" ")[0] for place in paper.seeds))
        yield literal("      " + " · ".join(filter(None, (*paper.links[:1], about, f"seeds {seeds}" if seeds else ""))))
    yield f"{len(papers)} paper{'' if len(papers) == 1 else 's'}"
