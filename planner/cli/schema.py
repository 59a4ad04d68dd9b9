"""`leanplan schema [--out FILE]`."""

from __future__ import annotations

import argparse

HELP = "print the JSON Schema of a spec, for completion and checks in editors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="write it there instead of stdout")


def run(options: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from knowledge_base.serde import write_atomic
    from planner import spec
    from planner.cli._talk import emit, say

    text = json.dumps(spec.schema(), indent=1, ensure_ascii=False)
    if options.out:
        write_atomic(Path(options.out), text + "\n")
        say(f"wrote {options.out}", quiet=options.quiet)
    else:
        emit(options, spec.schema(), text)
    return 0
