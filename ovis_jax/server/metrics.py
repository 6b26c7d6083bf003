"""The server's metrics for Prometheus."""

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ovis_jax.engine.request import Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
"""Upper bounds of the histogram buckets, in seconds."""


class ServerMetrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        gauge = partial(Gauge, labelnames=["engine"], registry=registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=registry)
        self._responses = counter(
            "ovis_requests", "Requests to /v1 and /tokenize, by HTTP status.", ["status"]
        )
        self._prompt_tokens = counter("ovis_prompt_tokens", "Prompt tokens of answered requests.")
        self._cached_tokens = counter(
            "ovis_cached_prompt_tokens",
            "Prompt tokens found in the KV cache of earlier requests.",
        )
        self._crops = counter("ovis_crops", "Crops of images of answered requests.")
        self._cached_crops = counter("ovis_cached_crops", "Crops that were not encoded again.")
        self._generated_tokens = counter("ovis_generation_tokens", "Generated tokens.")
        self._first_token = seconds(
            "ovis_time_to_first_token_seconds", "Time from a request's arrival to its first token."
        )
        self._latency = seconds(
            "ovis_e2e_request_latency_seconds", "Time from a request's arrival to its last token."
        )
        self._waiting = gauge(
            "ovis_num_requests_waiting", "Requests whose prompt has not been read."
        )
        self._running = gauge("ovis_num_seqs_running", "Sequences that are being generated.")
        self._max_num_seqs = gauge("ovis_max_num_seqs", "Maximum of ovis_num_seqs_running.")
        self._visual_bytes = gauge(
            "ovis_visual_cache_bytes", "Size of the visual embeddings that are kept."
        )
        self._cache_length = gauge(
            "ovis_kv_cache_positions", "Current length of each sequence's row of the KV cache."
        )
        self._accepting = gauge(
            "ovis_engine_accepting", "1 while the engine accepts requests, otherwise 0."
        )

    def add_engine(
        self,
        name: str,
        max_num_seqs: int,
        num_running: Callable[[], int],
        num_waiting: Callable[[], int],
        num_visual_bytes: Callable[[], int],
        cache_length: Callable[[], int],
        is_accepting: Callable[[], bool],
    ) -> None:
        """Add an engine, whose metrics are read by functions.

        Args:
          name: Value of the label `engine`.
          max_num_seqs: Maximum number of concurrent sequences.
          num_running: Returns the number of sequences that are being generated.
          num_waiting: Returns the number of requests whose prompt has not been read.
          num_visual_bytes: Returns the size of the visual embeddings that are kept.
          cache_length: Returns the current length of the KV cache, in positions.
          is_accepting: Returns whether the engine accepts requests.
        """
        self._max_num_seqs.labels(name).set(max_num_seqs)
        self._running.labels(name).set_function(num_running)
        self._waiting.labels(name).set_function(num_waiting)
        self._visual_bytes.labels(name).set_function(num_visual_bytes)
        self._cache_length.labels(name).set_function(cache_length)
        self._accepting.labels(name).set_function(is_accepting)

    def count_response(self, status: int) -> None:
        """Count a response with this HTTP status."""
        self._responses.labels(str(status)).inc()

    def record_request(self, request: Request, arrival_time: float, end_time: float) -> None:
        """Record a request that has ended for any reason; times are from `time.monotonic()`."""
        self._generated_tokens.inc(request.completion_tokens)
        if request.first_token_time is not None:
            self._prompt_tokens.inc(len(request.tokens))
            self._cached_tokens.inc(request.cached_tokens)
            self._crops.inc(len(request.pixels))
            self._cached_crops.inc(request.cached_crops)
            self._first_token.observe(request.first_token_time - arrival_time)
        if not request.num_unfinished:
            self._latency.observe(end_time - arrival_time)

    def render(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
