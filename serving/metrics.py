"""What `/metrics` reports, in the format of Prometheus."""

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
)

from .generation import Answer


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server."""

    def __init__(self):
        registry = self.registry = CollectorRegistry()
        for collector in (GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR):
            registry.register(collector)
        self.requests = Counter(
            "minigpt3d_requests", "Chat completions by status; 499: the client left", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "minigpt3d_request_seconds", "Time of a chat completion", buckets=SECONDS, registry=registry
        )
        self.in_progress = Gauge("minigpt3d_requests_in_progress", "Chat completions in progress", registry=registry)
        self.waiting = Gauge("minigpt3d_requests_waiting", "Questions that wait for the model", registry=registry)
        self.reading = Histogram(
            "minigpt3d_reading_seconds", "Time of reading a cloud", buckets=SECONDS, registry=registry
        )
        self.batch_size = Histogram(
            "minigpt3d_batch_size", "Questions of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.prompt_tokens = Counter("minigpt3d_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("minigpt3d_completion_tokens", "Tokens of answers", registry=registry)

    def count_batch(self, answers: list[Answer]):
        """Record a batch that is over."""
        self.batch_size.observe(len(answers))
        self.prompt_tokens.inc(sum(len(answer.input_ids) for answer in answers))
        self.completion_tokens.inc(sum(answer.num_tokens for answer in answers))
