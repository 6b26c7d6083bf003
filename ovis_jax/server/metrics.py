"""The server's metrics for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ovis_jax.engine.request import Request

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
"""Upper bounds of the histograms' buckets."""


class ServerMetrics:
    """Metrics of one server, in a registry of their own.

    Args:
      max_num_seqs: Maximum number of sequences that are generated at the same time.
      num_running: Returns the number of sequences that are being generated.
      num_waiting: Returns the number of requests whose prompt has not been read.
    """

    def __init__(
        self, max_num_seqs: int, num_running: Callable[[], int], num_waiting: Callable[[], int]
    ):
        self._registry = registry = CollectorRegistry()
        self._responses = Counter(
            "ovis_requests", "Requests to /v1, by HTTP status.", ["status"], registry=registry
        )
        self._prompt_tokens = Counter(
            "ovis_prompt_tokens", "Prompt tokens of answered requests.", registry=registry
        )
        self._generated_tokens = Counter(
            "ovis_generation_tokens", "Generated tokens.", registry=registry
        )
        self._first_token = Histogram(
            "ovis_time_to_first_token_seconds",
            "Time from a request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._latency = Histogram(
            "ovis_e2e_request_latency_seconds",
            "Time from a request's arrival to its last token.",
            buckets=SECONDS,
            registry=registry,
        )
        gauges: dict[str, tuple[str, Callable[[], int]]] = {
            "ovis_num_requests_waiting": ("Requests whose prompt has not been read.", num_waiting),
            "ovis_num_seqs_running": ("Sequences that are being generated.", num_running),
            "ovis_max_num_seqs": ("Maximum of ovis_num_seqs_running.", lambda: max_num_seqs),
        }
        for name, (documentation, function) in gauges.items():
            Gauge(name, documentation, registry=registry).set_function(function)

    def count_response(self, status: int) -> None:
        """Count a response by its HTTP status."""
        self._responses.labels(str(status)).inc()

    def record_request(self, request: Request, arrival_time: float, end_time: float) -> None:
        """Record a request that is over, however it ended; times are by `time.monotonic()`."""
        self._generated_tokens.inc(request.completion_tokens)
        if request.first_token_time is not None:
            self._prompt_tokens.inc(len(request.tokens))
            self._first_token.observe(request.first_token_time - arrival_time)
        if not request.num_unfinished:
            self._latency.observe(end_time - arrival_time)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
