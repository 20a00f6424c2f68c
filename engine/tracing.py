"""OpenTelemetry spans of requests, sent to a collector (`--otlp-traces-endpoint`)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace.export import SpanExporter

    from .output_processor import RequestState

PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PROTOCOLS = ("grpc", "http/protobuf")
SPAN_NAME = "llm_request"
NANOSECONDS = 1_000_000_000


class RequestTracer:
    """Makes one span of kind SERVER for each request that has ended, with vLLM's name and attributes, and hands it to
    `exporter`, in the background and in batches. Its parent is the span of the caller, if `caller` was entered with
    the headers of the request (https://www.w3.org/TR/trace-context/). Imports OpenTelemetry when it is made."""

    def __init__(self, exporter: SpanExporter, model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.model_name = model_name
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()
        name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "omni-engine"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("omni_engine", __version__)

    @contextmanager
    def caller(self, headers: Mapping[str, str]) -> Iterator[None]:
        """Within it, and in tasks that begin there, requests belong to the span that `headers` name in `traceparent`;
        without that header, to none. The names of headers are in lower case, or their case does not matter."""
        from opentelemetry import context

        if "traceparent" not in headers:
            yield
            return
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        token = context.attach(self._propagator.extract(carrier))
        try:
            yield
        finally:
            context.detach(token)

    def finish(self, state: RequestState) -> None:
        """A request has ended, whichever way."""
        request, stats = state.request, state.stats
        ended = time.time()
        attributes: dict[str, Any] = {
            "gen_ai.response.model": self.model_name,
            "gen_ai.request.id": state.request_id,
            "gen_ai.request.n": state.params.n,
            "gen_ai.request.temperature": state.params.temperature,
            "gen_ai.request.top_p": state.params.top_p,
            "gen_ai.usage.prompt_tokens": len(request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": stats.num_generation_tokens,
            "gen_ai.usage.num_sequences": len(state.sequences),
            "gen_ai.latency.e2e": ended - stats.arrival_time,
            "gen_ai.response.finish_reasons": _finish_reasons(state),
        }
        if state.params.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = state.params.max_tokens
        if stats.first_token_ts:
            now = time.monotonic()
            attributes |= {
                "gen_ai.latency.time_in_queue": stats.scheduled_ts - stats.queued_ts,
                "gen_ai.latency.time_to_first_token": ended - (now - stats.first_token_ts) - stats.arrival_time,
                "gen_ai.latency.time_in_model_prefill": stats.first_token_ts - stats.scheduled_ts,
                "gen_ai.latency.time_in_model_decode": stats.last_token_ts - stats.first_token_ts,
                "gen_ai.latency.time_in_model_inference": stats.last_token_ts - stats.scheduled_ts,
            }
        span = self._tracer.start_span(
            SPAN_NAME, kind=self._kind, start_time=int(stats.arrival_time * NANOSECONDS), attributes=attributes
        )
        span.end(int(ended * NANOSECONDS))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def _finish_reasons(state: RequestState) -> Sequence[str]:
    return [sequence.finish_reason or "abort" for sequence in state.sequences]


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to the collector at `endpoint` by the protocol that the environment names, grpc without one. Raises
    ValueError for another protocol, and where OpenTelemetry is not installed."""
    protocol = os.environ.get(PROTOCOL_VARIABLE) or "grpc"
    if protocol not in PROTOCOLS:
        raise ValueError(f"{PROTOCOL_VARIABLE} must be {' or '.join(PROTOCOLS)}: {protocol}")
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=endpoint)
    except ImportError as error:
        raise ValueError(
            f"--otlp-traces-endpoint needs OpenTelemetry; install omni-engine[tracing]: {error}"
        ) from error
