"""Prometheus metrics, with vLLM's names and buckets after the prefix `keras_gemma_`.

No label has text of a user: routes are those of the application, and the model is its served name.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from keras_gemma.serving.request_log import RequestRecord

PREFIX = "keras_gemma_"

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
CHOICES_BUCKETS = (1, 2, 5, 10, 20)


class EngineCollector(Collector):
    """Metrics of the engine, read when they are scraped."""

    def __init__(self, engine: Any, model: str) -> None:
        self.engine = engine
        self.model = model

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        gauges = {
            "num_requests_running": ("Requests in slots", stats.num_running),
            "num_requests_waiting": ("Requests in the queue", stats.num_waiting),
            "queue_tokens": ("Prompt tokens in the queue", stats.num_waiting_tokens),
            "slots_used": ("Slots that decode a sequence", stats.slots_used),
            "slots_total": ("Slots of the engine", stats.slots_total),
            "kv_cache_usage_perc": (
                "Used slots, as a fraction of all",
                stats.slots_used / max(1, stats.slots_total),
            ),
            "prefix_cache_bytes": ("Memory of the prefix cache", stats.prefix_cache_bytes),
            "engine_healthy": ("1 if the engine is healthy", float(self.engine.is_healthy)),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens looked up", stats.prefix_cache_queries),
            "prefix_cache_hits": ("Prompt tokens found", stats.prefix_cache_hits),
            "prompt_tokens": ("Prefilled tokens", stats.prompt_tokens),
            "generation_tokens": ("Generated tokens", stats.generation_tokens),
            "decode_steps": ("Decode steps of all slots", stats.num_steps),
            "turn_seconds": ("Time of prefills and decode steps", stats.step_seconds),
            "engine_restarts": ("Rebuilds of the state after an exception", stats.num_restarts),
            "requests_cancelled": ("Requests that were canceled", stats.num_cancelled),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
            gauge.add_metric([self.model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self.model], value)
            yield counter


class ServerMetrics:
    """Metrics of one application, in a registry of its own.

    Args:
        engine: The engine.
        model: Served name of the model.
    """

    def __init__(self, engine: Any, model: str) -> None:
        self.model = model
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model))
        self.http_requests = self._counter("http_requests", "HTTP requests", "route", "status")
        self.rejected = self._counter("requests_rejected", "Refused requests", "reason")
        self.client_gone = self._counter("client_disconnects", "Clients that left early")
        self.success = self._counter(
            "request_success", "Sequences that ended normally", "finished_reason"
        )
        histogram = self._histogram
        self.first_token = histogram("time_to_first_token_seconds", FIRST_TOKEN_BUCKETS)
        self.inter_token = histogram("inter_token_latency_seconds", TOKEN_BUCKETS)
        self.per_token = histogram("request_time_per_output_token_seconds", TOKEN_BUCKETS)
        self.latency = histogram("e2e_request_latency_seconds", REQUEST_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", REQUEST_BUCKETS)
        self.prefill = histogram("request_prefill_time_seconds", REQUEST_BUCKETS)
        self.decode = histogram("request_decode_time_seconds", REQUEST_BUCKETS)
        self.inference = histogram("request_inference_time_seconds", REQUEST_BUCKETS)
        self.prompt_length = histogram("request_prompt_tokens", COUNT_BUCKETS)
        self.generation_length = histogram("request_generation_tokens", COUNT_BUCKETS)
        self.choices = histogram("request_params_n", CHOICES_BUCKETS)
        self.max_tokens = histogram("request_params_max_tokens", COUNT_BUCKETS)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ["model_name", *labels], registry=self.registry)

    def _histogram(self, name: str, buckets: Iterable[float]) -> Any:
        text = name.replace("_", " ").capitalize()
        histogram = Histogram(
            PREFIX + name, text, ["model_name"], buckets=tuple(buckets), registry=self.registry
        )
        return histogram.labels(self.model)

    def observe(self, record: RequestRecord) -> None:
        """Counts a request at its end."""
        route = record.route or "unknown"
        self.http_requests.labels(self.model, route, str(record.status)).inc()
        if record.status in (401, 413, 429, 503) and record.error is not None:
            self.rejected.labels(self.model, record.error).inc()
        if record.is_client_gone:
            self.client_gone.labels(self.model).inc()
        for reason in record.finish_reasons:
            self.success.labels(self.model, reason).inc()

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self.registry)
