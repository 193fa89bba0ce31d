"""The gateway's own metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
_DECISION_SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.1)


class Measures:
    """Counters, gauges and histograms; labels are names of engines and words of this library, never of clients."""

    def __init__(self, engines: Sequence[str]) -> None:
        """Makes all metrics at zero."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        prefix, of_engine = "qos_gateway", ["engine"]

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{prefix}_{name}", text, of_engine, registry=self.registry)

        def histogram(
            name: str, text: str, buckets: Sequence[float] = _SECONDS, labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(f"{prefix}_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = Counter(
            f"{prefix}_requests",
            "Requests that ended, by engine and how.",
            ["engine", "status"],
            registry=self.registry,
        )
        self.tokens = Counter(f"{prefix}_tokens", "Tokens that passed.", of_engine, registry=self.registry)
        self.qos = Counter(f"{prefix}_qos", "Sum of predicted scores of requests within their limits.",
                           registry=self.registry)  # fmt: skip
        self.retries = Counter(f"{prefix}_retries", "Requests sent to another engine.", registry=self.registry)
        self.ttft_s = histogram("ttft_seconds", "Time to the first token.", labels=of_engine)
        self.token_s = histogram("time_per_token_seconds", "Time per further token.", labels=of_engine)
        self.decision_s = histogram("decision_seconds", "Time of a decision.", _DECISION_SECONDS)
        self.in_flight = gauge("in_flight", "Requests sent to the engine that have not ended.")
        self.running = gauge("engine_running", "Requests that run, as the engine says.")
        self.waiting = gauge("engine_waiting", "Requests that wait, as the engine says.")
        self.kv_share = gauge("engine_kv_share", "Share of KV memory in use, as the engine says.")
        self.up = gauge("engine_up", "1 if requests may be sent to the engine.")
        for name in engines:
            self.in_flight.labels(name).set(0)
            self.up.labels(name).set(1)

    def page(self) -> bytes:
        """Returns all of them as text."""
        return generate_latest(self.registry)
