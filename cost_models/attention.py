"""How the cost of attention grows with the context: the formulas of the survey's Table 1, and what they save a model.

The table's formulas hide constants, so ratios between rows compare growth and not kernels: a kernel of an approximate
variant is rarely as well tuned as the exact one's. Formulas are parsed to a few operations and never run as code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cost_models.demand import demand_of
from cost_models.roofline import causal_pairs
from knowledge_base.errors import BadInput
from knowledge_base.field import field
from knowledge_base.field.entries import AttentionCost
from knowledge_base.types import Model, Workload
from knowledge_base.units import quote

EXACT = "standard_attention"  # the row of the unchanged transformer
SYMBOLS = ("T", "d", "m", "c")
SAMPLED_COLUMNS = 256  # m, where nobody says: the table leaves it open, the sources try 64 to 1024
CHUNK = 128  # c, as in the source's long-context runs (arXiv:2209.10655)

Formula = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True, slots=True)
class Growth:
    """Time and memory, in the table's operations and numbers, or their ratio to the exact row's."""

    time: float
    memory: float


@lru_cache(maxsize=64)
def formula(text: str) -> Formula:
    """Return the function that a formula of sums, products, powers and log (to the base 2) is.

    >>> formula("T^2*d + 3*log(T)")({"T": 8, "d": 2})
    137.0

    Raises:
        BadInput: anything else.
    """
    try:
        return _compiled(ast.parse(text.replace("^", "**"), mode="eval").body)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise BadInput(
            f"cannot read the formula {quote(text)}",
            hint=f"sums, products, whole powers and log of {', '.join(SYMBOLS)}",
        ) from error


def _compiled(node: ast.expr) -> Formula:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return lambda _: float(number)
        case ast.Name(id=name) if name in SYMBOLS:
            return lambda at: float(at[name])
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            a, b = _compiled(left), _compiled(right)
            return lambda at: a(at) + b(at)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _compiled(left), _compiled(right)
            return lambda at: a(at) * b(at)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if 0 < power <= 4:
            a = _compiled(left)
            return lambda at: a(at) ** power
        case ast.Call(func=ast.Name(id="log"), args=[inner], keywords=[]):
            a = _compiled(inner)
            return lambda at: math.log2(a(at))
    raise ValueError(ast.dump(node))


def growth(row: AttentionCost, *, tokens: int, d: int, m: int = SAMPLED_COLUMNS, c: int = CHUNK) -> Growth:
    """Return what a row of the table says at a context of `tokens` and features `d`. m and c stay below the context.

    Raises:
        BadInput: a formula of the row cannot be read or has no value; names the row's file and line.
    """
    at = {"T": tokens, "d": d, "m": min(m, tokens), "c": min(c, tokens)}
    try:
        return Growth(time=formula(row.time)(at), memory=formula(row.memory)(at))
    except BadInput as error:
        raise BadInput(error.message, hint=error.hint, where=row.where) from error
    except (ArithmeticError, ValueError) as error:  # log(0), or beyond what a float holds
        raise BadInput(
            f"the formulas of `{row.id}` have no value at {at}", hint="correct them", where=row.where
        ) from error


def scale(method: str, *, tokens: int, d: int, m: int = SAMPLED_COLUMNS, c: int = CHUNK) -> Growth:
    """Return a method's time and memory over those of exact attention, both as the table has them.

    The exact row holds the table of all scores; kernels such as FlashAttention never store it.

    Raises:
        BadInput: Table 1 has no such row.
    """
    table = field().attention
    if method not in table:
        raise BadInput(f"no formula for {quote(method)}", hint=f"the table has: {', '.join(table)}")
    exact, other = (growth(table[row], tokens=tokens, d=d, m=m, c=c) for row in (EXACT, method))
    return Growth(time=other.time / exact.time, memory=other.memory / exact.memory)


def prefill_flop_ratio(model: Model, method: str, tokens: int) -> float:
    """Return the arithmetic of reading a prompt with another attention over that of the model as it is.

        ratio = (matrices + attention x scale) / (matrices + attention)

    Every head is an attention of its own, so d is the head's size. A ratio above 1 means the context is too short
    for the method. Left out: output matrix (applied to one position), kernels, and that the model must be trained anew.

    Raises:
        BadInput: Table 1 has no such row.
    """
    demand = demand_of(model, Workload(prompt_tokens=tokens, output_tokens=1), "transformers")
    matrices = tokens * demand.linear_flop_per_token
    windowed = float(causal_pairs(tokens, float(model.sliding_window_tokens or math.inf)))
    pairs = model.window_share * windowed + (1 - model.window_share) * float(causal_pairs(tokens, math.inf))
    attention = pairs * demand.attention_flop_per_token_pair
    exact = tokens * (tokens + 1) / 2 * demand.attention_flop_per_token_pair
    wanted = exact * scale(method, tokens=tokens, d=model.head_size).time
    return (matrices + wanted) / (matrices + attention)
