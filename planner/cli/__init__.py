"""The command line. One file for each command: HELP, add_arguments(parser), output() -> type of what --json prints,
run(options) -> exit code.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TypedDict

from knowledge_base.errors import EXIT_CODE_MEANING, BadInput, ExitCode, LeanplanError, Terminated
from knowledge_base.registry import Folder
from planner.cli._talk import emit, say, write_crash_report

commands = Folder("planner.cli", "command", ("HELP", "add_arguments", "output", "run"))

# name, argparse settings; every one is also LEANPLAN_<NAME> in the environment (flag > environment > default).
GLOBAL_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--json", dict(action="store_true", help="print data as JSON")),
    ("--output-file", dict(metavar="PATH", help="write data there instead of stdout")),
    ("--color", dict(choices=("auto", "always", "never"), help="colour of tables (default auto; NO_COLOR is obeyed)")),
    ("--no-progress", dict(action="store_true", help="no progress on stderr")),
    ("--no-input", dict(action="store_true", help="never ask; name the missing flag instead")),
    ("--yes", dict(action="store_true", help="answer yes to confirmations")),
    ("--offline", dict(action="store_true", help="any network access is an error")),
    ("--seed", dict(type=int, metavar="N", help="seed of every random choice (default: the spec's, else 0)")),
    ("--run-dir", dict(metavar="PATH", help="folder of run folders (default: runs)")),
    ("--store", dict(metavar="PATH", help="folder of the measurement store (default: .leanplan)")),
    ("--knowledge", dict(metavar="DIR[:DIR]", help="folders of your own knowledge; Python files in them are run")),
    ("--ignore-damaged-knowledge", dict(action="store_true", help="leave a folder of knowledge that has a fault out")),
    (
        "--trust-remote-code",
        dict(metavar="ORG/NAME@SHA", help="read a model that brings its own code; it can be priced, not yet measured"),
    ),
    (
        "--allow-pickle",
        dict(action="store_true", help="accept .bin weights, loaded with weights_only in a candidate process"),
    ),
)
_DEFAULTS: dict[str, Any] = {"color": "auto", "verbose": 0, "quiet": 0}


class _Parser(argparse.ArgumentParser):
    verbs: Mapping[str, argparse.ArgumentParser]  # the commands, by name

    def error(self, message: str) -> NoReturn:
        raise BadInput(message, hint=f"{self.prog} --help", where="command line")


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for, because reading package metadata takes longer than --help."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("leanplan")
        except PackageNotFoundError:
            number = "from source"
        print(f"leanplan {number}")
        raise SystemExit(ExitCode.DONE)


def build_parser() -> _Parser:
    """Return the parser with every command of this folder."""
    shared = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = shared.add_argument_group("global flags")
    for flag, settings in GLOBAL_FLAGS:
        group.add_argument(flag, **settings)
    group.add_argument("-v", "--verbose", action="count", help="more detail; -vv shows tracebacks of bugs")
    group.add_argument("-q", "--quiet", action="count", help="no talk on stderr but errors")
    parser = _Parser(
        prog="leanplan",
        parents=[shared],
        description="Fit a language model to your budgets: search efficiency techniques, measure the promising ones "
        "on this machine, return the Pareto set.",
        epilog="exit codes: " + "; ".join(f"{int(c)} {m.split(';')[0]}" for c, m in EXIT_CODE_MEANING.items()),
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, module in commands.all().items():
        command = verbs.add_parser(name, help=module.HELP, description=module.HELP, parents=[shared])
        module.add_arguments(command)
        command.set_defaults(run_command=module.run)
    parser.verbs = verbs.choices
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code; expected failures print one message, bugs leave a report."""
    signal.signal(signal.SIGTERM, _terminate)
    asked = "--json" in (sys.argv if argv is None else argv) or _switched_on("json")
    options: Any = argparse.Namespace(json=asked)  # until the command line is read, if it can be
    try:
        parser = build_parser()
        options = parser.parse_args(argv)
        _fill_defaults(options)
        if options.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        for name in ("knowledge", "ignore_damaged_knowledge"):  # read where knowledge is, in other processes too
            os.environ[f"LEANPLAN_{name.upper()}"] = str(getattr(options, name) or "")
        if not options.command:
            return _without_command(parser, options)
        code = options.run_command(options)
        sys.stdout.flush()
        return int(code)
    except LeanplanError as error:
        _show_error(options, error)
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader of our output left (`| head`); say nothing more, also at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.DONE
    except KeyboardInterrupt:
        say("interrupted")
        return ExitCode.INTERRUPTED
    except Terminated:
        say("terminated")
        return ExitCode.TERMINATED
    except OSError as error:
        _show_error(options, LeanplanOSError(error))
        return ExitCode.ENVIRONMENT
    except Exception as error:
        if getattr(options, "verbose", 0) > 1:
            raise
        message = f"{type(error).__name__}: {error}"
        hint = f"this is leanplan's fault; send {write_crash_report(error)}"
        say(f"bug: {message}\nhint: {hint}")
        _print_fault(options, Fault(message=message, where=None, hint=hint, exit_code=ExitCode.BUG))
        return ExitCode.BUG


def _without_command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Start the wizard where a person can answer it; elsewhere say what there is."""
    if not options.no_input:
        from planner import wizard

        if wizard.can_ask():
            return wizard.run(options)
    parser.print_help(sys.stderr)
    raise BadInput(
        "no COMMAND given, and questions are asked only at a terminal and without --no-input",
        hint="leanplan init writes a spec to edit, leanplan plan runs it", where="command line",
    )  # fmt: skip


class LeanplanOSError(LeanplanError):
    """A full disk, a missing permission or a missing file that no command foresaw, told in our words."""

    exit_code = ExitCode.ENVIRONMENT

    def __init__(self, error: OSError) -> None:
        import errno

        hint = {
            errno.ENOSPC: "free space, then run the same command: finished measurements are kept",
            errno.EACCES: "choose a folder you may write with --run-dir and --store",
            errno.EROFS: "choose a folder you may write with --run-dir and --store",
        }.get(error.errno or 0, "check the path and its permissions; leanplan doctor shows what leanplan may use")
        text = error.strerror or str(error)
        if error.errno == errno.ENOSPC and error.filename:
            text += f": {_free(str(error.filename))} free"
        super().__init__(text, hint=hint, where=str(error.filename) if error.filename else None)


def _free(path: str) -> str:
    """Return what is free on the file system of a path whose last parts may not exist."""
    import shutil
    from pathlib import Path

    from knowledge_base import units

    folder = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    return units.format(shutil.disk_usage(folder).free, "bytes")


class Fault(TypedDict):
    """Why a command failed. With --json it is printed in place of the command's data, as `{"error": ...}`."""

    message: str
    where: str | None  # "file:line:column", or the flag or field that is at fault
    hint: str  # what to do next
    exit_code: ExitCode  # leanplan help exit-codes


def _show_error(options: Any, error: LeanplanError) -> None:
    from planner.reports._text import literal

    place = f"{literal(error.where)}: " if error.where else ""
    excerpt = f"\n{error.excerpt}" if getattr(error, "excerpt", None) else ""
    say(f"{place}error: {literal(error.message)}{excerpt}\nhint: {literal(error.hint)}")
    _print_fault(options, Fault(message=error.message, where=error.where, hint=error.hint, exit_code=error.exit_code))


def _print_fault(options: Any, fault: Fault) -> None:
    if getattr(options, "json", False):
        emit(options, {"error": fault}, "")


def _fill_defaults(options: argparse.Namespace) -> None:
    for flag, settings in GLOBAL_FLAGS:
        name = flag[2:].replace("-", "_")
        if hasattr(options, name):
            continue
        text = os.environ.get(f"LEANPLAN_{name.upper()}")
        if settings.get("action") == "store_true":
            value: Any = _switched_on(name)
        elif text and settings.get("type") is int:
            try:
                value = int(text)
            except ValueError as error:
                raise BadInput(
                    f"`{text}` is not a whole number", hint=f"unset it or give {flag}", where=f"LEANPLAN_{name.upper()}"
                ) from error
        else:
            value = text or _DEFAULTS.get(name)
        setattr(options, name, value)
    for name in ("verbose", "quiet"):
        if not hasattr(options, name):
            setattr(options, name, 0)


def _switched_on(name: str) -> bool:
    return os.environ.get(f"LEANPLAN_{name.upper()}") not in (None, "", "0", "false")


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise Terminated
