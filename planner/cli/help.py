"""`leanplan help TOPIC`."""

from __future__ import annotations

import argparse
from typing import Any, TypedDict

from knowledge_base.errors import BadInput

HELP = "explain a topic: exit-codes, units, spec, machine, environment, security"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", nargs="?", help="one of the topics above, or a command")


class Topic(TypedDict):
    """A topic of help; without one, all commands."""

    topic: str | None
    text: str


def output() -> Any:
    return Topic


def run(options: argparse.Namespace) -> int:
    from planner.cli import build_parser, commands
    from planner.cli._talk import emit
    from planner.cli._topics import TOPICS

    if options.topic is None:
        text = build_parser().format_help()
    elif options.topic in TOPICS:
        text = TOPICS[options.topic]()
    elif options.topic in commands.names():
        text = build_parser().verbs[options.topic].format_help()
    else:
        raise BadInput(
            f"no help topic `{options.topic}`",
            hint=f"topics: {', '.join(TOPICS)}; commands: {', '.join(commands.names())}",
        )
    emit(options, Topic(topic=options.topic, text=text), text)
    return 0
