"""What the server counts, in Prometheus' text format."""

from worldvla_client.optional import import_extra

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)


class ServerMetrics:
    """Counters of one server; several servers of a process do not share them.

    Outcomes of a request: `ok`, `refused` (bad input), `unauthorized`, `busy`, `timeout`, `failed` (the server's
    fault), `gone` (the client left before its answer).
    """

    def __init__(self) -> None:
        prometheus = import_extra("prometheus_client")
        self._prometheus = prometheus
        self._registry = prometheus.CollectorRegistry()
        options = {"registry": self._registry, "namespace": "worldvla"}
        self.requests = prometheus.Counter(
            "requests", "Requests by way and outcome", ["transport", "outcome"], **options
        )
        self.seconds = prometheus.Histogram(
            "request_seconds", "Seconds from a whole request to its answer", ["transport"], buckets=_SECONDS, **options
        )
        self.batch = prometheus.Histogram(
            "batch_size", "Requests that the model answered together", buckets=(1, 2, 4, 8, 16, 32), **options
        )
        self.clients = prometheus.Gauge("websocket_clients", "Connected websocket clients", **options)
        self.pending = prometheus.Gauge("pending_requests", "Requests that wait for the model", **options)
        self.confidence = prometheus.Histogram(
            "action_confidence",
            "Confidence of the first action of each chunk",
            buckets=[step / 10 for step in range(1, 11)],
            **options,
        )

    def render(self) -> tuple[bytes, str]:
        """The body and the content type of `/metrics`."""
        return self._prometheus.generate_latest(self._registry), self._prometheus.CONTENT_TYPE_LATEST
