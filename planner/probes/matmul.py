"""Matrix products, measured with torch on the processor: rate by dtype, for prefill and decode shapes."""

from __future__ import annotations

import time
from typing import Any

from planner.probes._child import measure_apart

PROBE = "matrix product rates of the processor by dtype"
DTYPES = ("float32", "bfloat16", "float16", "int8")
SHAPES = ((512, 2048, 2048), (8, 2048, 2048), (1, 8192, 8192))  # tokens x outputs x inputs; the last exceeds caches
SECONDS_EACH = 0.4


def find() -> dict[str, Any]:
    """Return {"flop_per_s": {dtype: {"512x2048x2048": ...}}, "threads", "torch"}, or {"problem": why}.

    A dtype this build of torch cannot multiply is absent.
    """
    return measure_apart("matmul")


def measure() -> dict[str, Any]:
    """Multiply activations with a weight matrix; the best of several passes counts, since noise only slows."""
    import torch

    from planner.probes.linux_cpu import usable_cores

    torch.set_num_threads(usable_cores())
    rates: dict[str, dict[str, float]] = {}
    for dtype in DTYPES:
        for tokens, outputs, inputs in SHAPES:
            rate = product_rate(dtype, tokens, outputs, inputs, device="cpu")
            if rate is not None:
                rates.setdefault(dtype, {})[f"{tokens}x{outputs}x{inputs}"] = rate
    return {"flop_per_s": rates, "threads": torch.get_num_threads(), "torch": torch.__version__}


def product_rate(dtype: str, tokens: int, outputs: int, inputs: int, *, device: str) -> float | None:
    """Return one product's best operations for each second, multiply and add counted as two; None if torch has none."""
    import torch

    try:
        if dtype == "int8":
            left = torch.randint(-127, 127, (tokens, inputs), dtype=torch.int8, device=device)
            right = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8, device=device).t()
            multiply = lambda: torch._int_mm(left, right)  # noqa: E731
        else:
            left = torch.randn(tokens, inputs, device=device).to(getattr(torch, dtype))
            right = torch.randn(outputs, inputs, device=device).to(getattr(torch, dtype))
            multiply = lambda: torch.nn.functional.linear(left, right)  # noqa: E731

        def timed() -> float:
            start = time.perf_counter()
            multiply()
            if device != "cpu":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        with torch.inference_mode():
            stop = time.monotonic() + SECONDS_EACH
            timed()  # the first call also chooses kernels and packs weights
            best = timed()
            while time.monotonic() < stop:
                best = min(best, timed())
    except RuntimeError:
        return None  # no kernel for this dtype and shape
    return 2.0 * tokens * outputs * inputs / best
