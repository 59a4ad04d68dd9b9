"""The errors a user can cause or meet. One class for each exit code; anything else is a bug of ours.

LeanplanError
├── BadInput            2   usage, spec, model or data
├── NoFeasiblePlan      1   nothing can meet the budgets
├── EnvironmentProblem  4   engine, device, disk, network, permission, lock
└── CandidateFailed     -   one candidate failed; recorded as a result, never ends a run
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Exit codes of every command. The docstring of each member is what `leanplan help exit-codes` prints."""

    DONE = 0
    BUDGET_NOT_MET = 1
    BAD_INPUT = 2
    BUG = 3
    ENVIRONMENT = 4
    INCONCLUSIVE = 5
    INTERRUPTED = 130
    TERMINATED = 143


EXIT_CODE_MEANING = {
    ExitCode.DONE: "done; every budget of level error is met",
    ExitCode.BUDGET_NOT_MET: "a budget is not met, or no plan can meet the budgets",
    ExitCode.BAD_INPUT: "bad input: usage, spec, model or data",
    ExitCode.BUG: "a bug in leanplan; the traceback and the report path are printed",
    ExitCode.ENVIRONMENT: "environment: engine, device, disk, network, permission or lock",
    ExitCode.INCONCLUSIVE: "inconclusive: could not be judged (noise, another machine, too few samples)",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C; the same command resumes",
    ExitCode.TERMINATED: "stopped by SIGTERM; the same command resumes",
}


class Terminated(BaseException):
    """SIGTERM or SIGHUP arrived: end politely, exit 143. Not an Exception, as KeyboardInterrupt is not."""


class LeanplanError(Exception):
    """An expected failure: printed as one message without a traceback.

    Args:
        message: what is wrong, with what was found and what was expected.
        hint: what to do next; every raise gives one.
        where: "file:line:column" or the flag or field that is at fault.
        excerpt: the line of the file with carets under the fault, where there is one.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, message: str, *, hint: str, where: str | None = None, excerpt: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.excerpt = excerpt

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        shown = f"\n{self.excerpt}" if self.excerpt else ""
        return f"{place}{self.message}{shown}\nhint: {self.hint}"


class BadInput(LeanplanError):
    """Usage, spec, model or data cannot be used as given."""

    exit_code = ExitCode.BAD_INPUT


class NoFeasiblePlan(LeanplanError):
    """No plan meets the budgets; the message names the nearest and what it is short by."""

    exit_code = ExitCode.BUDGET_NOT_MET


class EnvironmentProblem(LeanplanError):
    """The machine, not the input, stands in the way."""

    exit_code = ExitCode.ENVIRONMENT


# The closed list of reasons a candidate can fail for (promise P3).
FAILURE_KINDS = (
    "oom_host", "oom_device", "timeout", "crashed", "killed", "build_error", "load_error", "non_finite",
    "quality_collapse", "output_too_short", "engine_missing", "unsupported", "disk_full", "invalid_result",
)  # fmt: skip


class CandidateFailed(LeanplanError):
    """One candidate could not be built or measured. `kind` is one of FAILURE_KINDS."""

    exit_code = ExitCode.ENVIRONMENT

    def __init__(self, kind: str, message: str, *, hint: str = "see the candidate's log") -> None:
        if kind not in FAILURE_KINDS:
            raise ValueError(f"unknown failure kind `{kind}`; expected one of {FAILURE_KINDS}")
        super().__init__(message, hint=hint)
        self.kind = kind
