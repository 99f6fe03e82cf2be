"""What a service counts, in Prometheus' words. A registry of its own: two services in one process do not meet."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from harness.serving.queue import Queue
from harness.serving.record import Recording

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one service; `text` is what `GET /metrics` answers."""

    def __init__(self, queue: Queue):
        self.registry = CollectorRegistry()
        self.num_answering = 0
        """Requests that have come and were not answered yet; of the event loop's thread."""
        for name, told, read in (
            ("requests", "Requests that wait for the device", lambda: queue.num_requests),
            ("rows", "Completions that wait for the device", lambda: queue.num_rows),
            ("tokens", "Tokens, of contexts and to be written, that wait for the device", lambda: queue.num_tokens),
        ):
            Gauge(f"harness_queued_{name}", told, registry=self.registry).set_function(read)
        self.running_rows = Gauge("harness_running_rows", "Completions being written", registry=self.registry)
        self.batch_rows = Histogram(
            "harness_batch_rows", "Completions in a step of the device", buckets=_ROWS, registry=self.registry
        )
        self.queued_s = Histogram(
            "harness_queued_seconds",
            "From admission to the first row's begin",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.row_s = Histogram(
            "harness_computing_seconds", "From a row's begin to its end", buckets=_SECONDS, registry=self.registry
        )
        self.step_s = Histogram("harness_step_seconds", "A step of a batch", buckets=_SECONDS, registry=self.registry)
        self.prompt_tokens = Counter("harness_prompt_tokens", "Tokens of contexts begun", registry=self.registry)
        self.new_tokens = Counter("harness_new_tokens", "Tokens written", registry=self.registry)
        self.splits = Counter("harness_splits", "Batches halved because memory ran out", registry=self.registry)
        self.refusals = Counter("harness_refusals", "Requests refused", ["reason"], registry=self.registry)
        self.answers = Counter("harness_answers", "Requests answered", ["path", "status"], registry=self.registry)

    def watch(self, recording: Recording) -> None:
        """Count what is recorded, too."""
        for name, told, read in (
            ("recorded", "Requests whose rows are on the disk", lambda: recording.num_written),
            ("unrecorded", "Requests whose rows are still to be written", lambda: recording.num_waiting),
        ):
            Gauge(f"harness_{name}_requests", told, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
