"""`leanplan graph`: all that is known as one graph, or the neighbourhood of a resource, technique, paper …"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, TypedDict

HELP = "the knowledge as a graph: a neighbourhood in words or as a picture, or all of it for other tools"
FORMATS = ("text", "svg", "graphml", "json")


class Graph(TypedDict):
    """What networkx reads with `node_link_graph(data, edges="edges")`."""

    directed: bool
    multigraph: bool
    graph: Mapping[str, str]
    nodes: list[Mapping[str, Any]]  # `id`, `kind`, `label` and what is known of it
    edges: list[Mapping[str, Any]]  # `source`, `target`, `key` and, of a rule, its condition, effect and source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--about", metavar="NODE", help="only this and what it is joined to: resource:memory, gptq, stage:quantise …"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text (default), an SVG picture, GraphML or JSON"
    )


def output() -> Any:
    return Graph


def run(options: argparse.Namespace) -> int:
    from knowledge_base import graph, pictures
    from knowledge_base.errors import BadInput, ExitCode
    from planner.cli._talk import emit

    form = "json" if options.json else options.format
    options.json = form == "json"
    if form == "svg" and not options.about:
        raise BadInput(
            "a picture of everything is nothing a person can read", hint="name a node: --about resource:memory",
            where="--format svg",
        )  # fmt: skip
    if form == "svg":
        emit(options, None, pictures.picture(options.about))
    elif form == "text":
        emit(options, None, graph.about(options.about) if options.about else graph.summary())
    else:
        shown = graph.neighbourhood(options.about) if options.about else graph.knowledge_graph()
        emit(options, graph.as_json(shown), graph.as_graphml(shown) if form == "graphml" else "")
    return ExitCode.DONE
