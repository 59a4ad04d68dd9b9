"""`leanplan schema [--of NAME] [--out FILE]`."""

from __future__ import annotations

import argparse
from typing import Annotated, Any

from planner import schemas

HELP = "print the JSON Schema of a spec, for editors, or of what leanplan writes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--of", choices=schemas.names(), default="spec",
        help="a spec (default), another file that leanplan writes, an error, or what a command prints with --json",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write it there instead of stdout")


def output() -> Any:
    return Annotated[dict[str, Any], schemas.Given(lambda: {"$ref": schemas.DIALECT})]


def run(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from knowledge_base.serde import write_atomic
    from planner.cli._talk import emit, say

    schema = schemas.schema(options.of)
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    if options.out:
        write_atomic(Path(options.out), text + "\n")
        say(f"wrote {options.out}", quiet=options.quiet)
    else:
        emit(options, schema, text)
    return 0
