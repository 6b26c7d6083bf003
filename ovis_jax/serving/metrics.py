"""What a server counts, as Prometheus reads it."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ovis_jax.serving.answer import Job
from ovis_jax.serving.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, engine: Engine):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ovis_requests", "Requests to /v1, by HTTP status.", ["status"], registry=registry
        )
        self._prompt = Counter(
            "ovis_prompt_tokens", "Positions of answered prompts.", registry=registry
        )
        self._completion = Counter("ovis_completion_tokens", "Tokens written.", registry=registry)
        self._first = Histogram(
            "ovis_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "ovis_request_seconds",
            "From a request's arrival to its last token.",
            buckets=SECONDS,
            registry=registry,
        )
        gauges = {
            "ovis_queue_requests": (
                "Requests whose prompt is not read yet.",
                lambda: engine.waiting,
            ),
            "ovis_running_answers": ("Answers being written.", lambda: engine.running),
            "ovis_slots": ("Answers that can be written at once.", lambda: engine.num_slots),
        }
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)

    def done(self, job: Job, arrived: float, now: float) -> None:
        """Count a job that is over, however it ended; times are of `time.monotonic`."""
        self._completion.inc(job.completion_tokens)
        if job.first_token is not None:
            self._prompt.inc(len(job.tokens))
            self._first.observe(job.first_token - arrived)
        if not job.unfinished:
            self._whole.observe(now - arrived)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
