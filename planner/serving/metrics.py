"""What the service counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Any

# Upper ends in seconds: fine enough for a millisecond a token, wide enough for a queue of minutes.
FIRST_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
BETWEEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters, gauges and histograms of one service. Outcomes are: stop, length, cancelled, failed, refused."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        kept: dict[str, Any] = {"registry": self._registry, "namespace": "leanplan"}
        self.requests = Counter("requests", "requests by how they ended", ["outcome"], **kept)
        self.prompt_tokens = Counter("prompt_tokens", "tokens of accepted prompts", **kept)
        self.output_tokens = Counter("output_tokens", "tokens generated", **kept)
        self.running = Gauge("requests_running", "requests that are being answered", **kept)
        self.waiting = Gauge("requests_waiting", "requests that wait for their turn", **kept)
        self.first_s = Histogram("ttft_seconds", "from a request to its first token", buckets=FIRST_S, **kept)
        self.between_s = Histogram("itl_seconds", "from one token to the next", buckets=BETWEEN_S, **kept)
        self.whole_s = Histogram("e2e_seconds", "from a request to its last token", buckets=WHOLE_S, **kept)

    def text(self) -> tuple[bytes, str]:
        """Return all of them in Prometheus' text form, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
