"""Drawing the next token from a model's logits."""

from __future__ import annotations

import numpy

from knowledge_base.engines._running import Sampling


class Sampler:
    """Draws tokens one after another; with a seed, the same ones again.

    The logits are divided by the temperature, and of the tokens, the likeliest first, those are kept that together reach
    `top_p` (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751).
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature, self._top_p = sampling.temperature, sampling.top_p
        self._random = numpy.random.default_rng(sampling.seed)

    def draw(self, logits: numpy.ndarray) -> int:
        """Return a token by its logits (vocabulary,)."""
        if self._temperature == 0:
            return int(logits.argmax())
        exact = logits.astype(numpy.float64)
        weights = numpy.exp((exact - exact.max()) / self._temperature)
        order = numpy.argsort(-weights, kind="stable")
        total = numpy.cumsum(weights[order])
        kept = int(numpy.searchsorted(total, self._top_p * total[-1])) + 1  # the one that reaches it included
        kept = min(kept, len(order))
        at = int(numpy.searchsorted(total[:kept], self._random.random() * total[kept - 1], side="right"))
        return int(order[min(at, kept - 1)])
