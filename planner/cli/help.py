"""`leanplan help TOPIC`."""

from __future__ import annotations

import argparse

from knowledge_base.errors import BadInput

HELP = "explain a topic: exit-codes, units, spec, environment, security"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("topic", nargs="?", help="one of the topics above, or a command")


def run(options: argparse.Namespace) -> int:
    from planner.cli import build_parser, commands
    from planner.cli._talk import emit
    from planner.cli._topics import TOPICS

    if options.topic is None:
        build_parser().print_help()
    elif options.topic in TOPICS:
        text = TOPICS[options.topic]()
        emit(options, {"topic": options.topic, "text": text}, text)
    elif options.topic in commands.names():
        build_parser().parse_args([options.topic, "--help"])
    else:
        raise BadInput(
            f"no help topic `{options.topic}`",
            hint=f"topics: {', '.join(TOPICS)}; commands: {', '.join(commands.names())}",
        )
    return 0
