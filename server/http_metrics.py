"""GET /metrics, and the metrics of the HTTP side: requests by route, method and status, their times and sizes."""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector, Summary
from prometheus_client.exposition import generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
UNCOUNTED_PATHS = frozenset(("/metrics", "/metrics/", "/health", "/load", "/ping", "/version", "/ui/live"))
UNKNOWN_ROUTE = "none"  # whatever address a client makes up, it makes no new series


class HttpMetrics:
    """Counts answered requests in `registry`, beside what this process uses of memory, time and files."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        labels = ("handler", "method", "status")
        self._requests = Counter("http_requests", "Requests by route and status class.", labels, registry=registry)
        self._seconds = Histogram(
            "http_request_duration_seconds", "From a request's head to the end of its answer.", labels[:2],
            buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300), registry=registry,
        )  # fmt: skip
        handler = labels[:1]
        self._request_bytes = Summary(
            "http_request_size_bytes", "Of a request's body, as its header tells.", handler, registry=registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes", "Of an answer's body, a stream's too.", handler, registry=registry
        )

    def count(self, request: web.Request, status: int, seconds: float, num_bytes: int = 0) -> None:
        """One request has been answered by so many bytes, or its client has gone (status 499)."""
        resource = request.match_info.route.resource
        route = UNKNOWN_ROUTE if resource is None else resource.canonical
        if route in UNCOUNTED_PATHS:
            return
        method = request.method if resource is not None else UNKNOWN_ROUTE
        self._requests.labels(route, method, f"{status // 100}xx").inc()
        self._seconds.labels(route, method).observe(seconds)
        self._request_bytes.labels(route).observe(request.content_length or 0)
        self._response_bytes.labels(route).observe(num_bytes)

    async def show(self, _request: web.Request) -> web.Response:
        """All metrics in Prometheus's text format."""
        return web.Response(body=generate_latest(self.registry), headers={"Content-Type": CONTENT_TYPE})
