"""Prometheus metrics of one server, in a registry of its own. The engine's figures are read when /metrics is."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.api import EngineDied, Stats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_GAUGES = {
    "running": "Sequences that the engine runs",
    "waiting": "Sequences that wait in the engine",
    "blocks_total": "KV cache blocks",
    "blocks_free": "KV cache blocks that are free",
    "tokens_per_s": "Tokens generated in a second, lately",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens computed",
    "generated_tokens": "Tokens generated",
    "preemptions": "Sequences that gave their blocks back and were computed again",
}


class _EngineCollector:
    def __init__(
        self, stats: Callable[[], Stats], pending: Callable[[], int], refused: Callable[[], int]
    ) -> None:
        self._stats, self._pending, self._refused = stats, pending, refused

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("tmq_pending", "Sequences admitted and not yet released", self._pending())
        yield CounterMetricFamily(
            "tmq_refused", "Requests refused because the queue was full", self._refused()
        )
        try:
            stats = self._stats()
        except EngineDied:
            yield GaugeMetricFamily("tmq_engine_up", "1 while the engine lives", 0)
            return
        yield GaugeMetricFamily("tmq_engine_up", "1 while the engine lives", 1)
        for name, help_text in _GAUGES.items():
            yield GaugeMetricFamily(f"tmq_{name}", help_text, getattr(stats, name))
        for name, help_text in _COUNTERS.items():
            yield CounterMetricFamily(f"tmq_{name}", help_text, getattr(stats, f"{name}_total"))


class Metrics:
    """Counters and histograms that the server feeds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.answers = Counter(
            "tmq_http_answers", "Answers by route and status", ["route", "status"], registry=self.registry
        )
        self.answer_s = Histogram(
            "tmq_http_seconds",
            "Time to the end of an answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "tmq_first_token_seconds", "Time to the first token", buckets=_SECONDS, registry=self.registry
        )
        self.token_gap_s = Histogram(
            "tmq_token_gap_seconds", "Time between two tokens", buckets=_SECONDS, registry=self.registry
        )
        self.finished = Counter(
            "tmq_sequences_finished",
            "Sequences by the reason of their end",
            ["reason"],
            registry=self.registry,
        )

    def watch(
        self, stats: Callable[[], Stats], pending: Callable[[], int], refused: Callable[[], int]
    ) -> None:
        """Report the engine's and the queue's figures with each scrape."""
        self.registry.register(_EngineCollector(stats, pending, refused))

    def observe(self, route: str, status: int, seconds: float) -> None:
        self.answers.labels(route, str(status)).inc()
        self.answer_s.labels(route).observe(seconds)

    def text(self) -> bytes:
        text: bytes = generate_latest(self.registry)
        return text
