"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("xdit_requests", "Requests by route and status", ["route", "status"],
                                registry=self._registry)
        self.refused = Counter("xdit_refused", "Requests refused, by code", ["code"], registry=self._registry)
        self.results = Counter("xdit_results", "Pictures, videos and other results made", registry=self._registry)
        self.steps = Counter("xdit_steps", "Steps of denoising made", registry=self._registry)
        self.shared = Counter("xdit_shared_calls", "Calls that shared a batch with others", registry=self._registry)
        self.rank_failures = Counter("xdit_rank_failures", "Calls that a rank's failure ended", registry=self._registry)
        self.waiting = Gauge("xdit_queue_waiting", "Calls that wait", registry=self._registry)
        self.running = Gauge("xdit_queue_running", "Calls that run", registry=self._registry)
        self.ready = Gauge("xdit_ready", "Whether the engine takes calls", registry=self._registry)
        self.wait_seconds = Histogram("xdit_wait_seconds", "Seconds in the queue", buckets=_SECONDS,
                                      registry=self._registry)
        self.call_seconds = Histogram("xdit_call_seconds", "Seconds of a call", buckets=_SECONDS,
                                      registry=self._registry)

    def text(self) -> bytes:
        """In the format that Prometheus reads."""
        return generate_latest(self._registry)
