"""The pages of what a user types and gets back: commands, spec, exit codes, environment variables."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from tools.reference.markdown import code, codes, inline, page, table


def commands() -> str:
    from planner.cli import build_parser
    from planner.reports.check import formats

    parser = build_parser()
    shared = next(group for group in parser._action_groups if group.title == "global flags")
    parts = [
        "Every command takes `-h` and the global flags; each global flag is also an "
        "[environment variable](environment.md). What the exit codes mean: [exit codes](exit-codes.md).\n",
        "## Global flags\n",
        _arguments(shared._group_actions),
    ]
    for name, command in parser.verbs.items():
        own = [a for g in command._action_groups if g.title != "global flags" for a in g._group_actions]
        own = [a for a in own if not isinstance(a, argparse._HelpAction)]
        parts += [f"## leanplan {name}\n", inline(str(command.description)) + ".\n"]
        parts += [_arguments(own)] if own else []
        parts += [f"With `--json` it prints [this](files.md#{name}).\n"]
    rows = [(code(name.replace("_", "-")), inline(module.CHECK)) for name, module in formats.all().items()]
    parts += ["## Formats of leanplan check\n", table(("format", "what it is"), rows)]
    return page("Commands", "`planner.cli.build_parser`", *parts)


def _arguments(actions: Iterable[argparse.Action]) -> str:
    rows = []
    for action in actions:
        value = action.metavar or (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
        )
        if action.option_strings:
            takes = "" if action.nargs == 0 else f" {value}"
            name = codes(f"{flag}{takes}" for flag in action.option_strings)
        else:
            name = code(f"[{value}]" if action.nargs == "?" else value)
        rows.append((name.replace("|", "\\|"), inline((action.help or "") % vars(action))))
    return table(("argument", "meaning"), rows)


def spec() -> str:
    from knowledge_base.metrics import METRICS
    from planner import spec as specs

    keys = [(code(name), inline(about), inline(words), inline(absent)) for name, about, words, absent in specs.rows()]
    limits = [
        (code(m.label), "max" if m.better == "lower" else "min", code(specs.example_limit(m)), inline(m.summary))
        for m in METRICS.values()
    ]
    return page(
        "Spec", "`planner.spec`",
        "What the words mean: [budgets, units, verdicts](../concepts/budgets.md). The JSON Schema is printed by "
        "`leanplan schema`.\n",
        "## Keys\n", table(("key", "meaning", "may be", "when left out"), keys),
        "## Budgets\n",
        "A budget's key is a metric, with `_p50` (the default), `_p95`, `_p99` or `_mean` behind it where the metric is sampled.\n",
        table(("metric", "limit", "for example", "meaning"), limits),
        "## The commented spec\n", "`leanplan init` writes this:\n",
        f"```yaml\n{specs.template('models/tiny-lm')}```\n",
    )  # fmt: skip


def exit_codes() -> str:
    from knowledge_base.errors import EXIT_CODE_MEANING, FAILURE_KINDS

    return page(
        "Exit codes and failures", "`knowledge_base.errors`",
        table(("code", "name", "meaning"), [(code(int(c)), code(c.name), inline(m)) for c, m in EXIT_CODE_MEANING.items()]),
        "`leanplan check --exit-zero` turns 1 and 5 into 0, never 2, 3 or 4.\n",
        "## Failures of a candidate\n",
        "A candidate that fails is a result with one of these kinds and a message, and never ends a run:\n",
        codes(FAILURE_KINDS) + ".\n",
    )  # fmt: skip


def environment() -> str:
    from planner.cli import GLOBAL_FLAGS
    from planner.isolation.environment import FIXED, PASSED_ON

    rows = [
        (code(f"LEANPLAN_{flag[2:].replace('-', '_').upper()}"), code(flag), inline(str(settings.get("help", ""))))
        for flag, settings in GLOBAL_FLAGS
    ]
    return page(
        "Environment variables", "`planner/cli/__init__.py` and `planner/isolation/environment.py`",
        "A flag wins over its variable. For flags without a value, `0`, `false` and nothing at all mean no. `NO_COLOR` with "
        "any value means no colour, unless `--color always`.\n",
        table(("variable", "flag", "meaning"), rows),
        "## What a candidate sees\n",
        f"Of the planner's environment a candidate gets {codes(PASSED_ON)} and nothing else; besides, these are set, and HOME "
        "and TMPDIR are a folder of its own:\n",
        table(("variable", "value"), [(code(k), code(v)) for k, v in FIXED.items()]),
    )  # fmt: skip
