"""A server with `--otlp-traces-endpoint`, and a collector that reads what it sends as the protocol says."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from omni_engine.engine.config import DEMO_MODEL

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
grpc = pytest.importorskip("grpc")  # the exporter needs it

COMMAND = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())"]
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SERVER_KIND = 2


class Collector(ThreadingHTTPServer):
    """Keeps the spans of all requests to /v1/traces."""

    def __init__(self):
        self.spans = []
        self.services = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for resource in trace_service.ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        attribute.value.string_value
                        for attribute in resource.resource.attributes
                        if attribute.key == "service.name"
                    }
                    collector.spans += [span for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def attributes(span):
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def spans(tmp_path_factory):
    """The spans of a plain request, one with a parent and two sequences, and one whose client left, by request id."""
    collector, port = Collector(), free_port()
    url = f"http://127.0.0.1:{port}/v1/completions"
    log = tmp_path_factory.mktemp("log") / "log"
    words = ["serve", str(DEMO_MODEL), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    words += ["--otlp-traces-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces"]
    words += ["--graph-backend", "eager", "--served-model-name", "traced"]
    environment = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "bible"}
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | environment
    )

    def complete(timeout=60.0, headers={}, **fields):  # noqa: B006
        body = {"prompt": "And it came to pass", "max_tokens": 5, "ignore_eos": True, **fields}
        headers = {"Content-Type": "application/json", **headers}
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=timeout
        ) as response:
            return json.loads(response.read())

    deadline = time.monotonic() + 60
    while True:
        try:
            complete(headers={"X-Request-Id": "plain"}, temperature=0.5, top_p=0.25)
            break
        except OSError:
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.05)
    parent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Request-Id": "child"}
    complete(headers=parent, n=2)
    with pytest.raises(OSError, match="timed out"):
        complete(timeout=0.5, headers={"X-Request-Id": "left"}, max_tokens=900)
    time.sleep(0.5)  # until the server has noticed
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0, log.read_text()
    collector.shutdown()
    assert collector.services == {"bible"}
    return {attributes(span)["gen_ai.request.id"].split("-")[1]: span for span in collector.spans}


def test_each_request_is_a_span_with_its_counts(spans):
    assert set(spans) == {"plain", "child", "left"}
    span = spans["plain"]
    assert (span.name, span.kind) == ("llm_request", SERVER_KIND)
    found = attributes(span)
    assert found["gen_ai.response.model"] == "traced"
    assert (found["gen_ai.request.n"], found["gen_ai.request.max_tokens"]) == (1, 5)
    assert (found["gen_ai.request.temperature"], found["gen_ai.request.top_p"]) == (0.5, 0.25)
    assert found["gen_ai.usage.completion_tokens"] == 5
    assert found["gen_ai.usage.prompt_tokens"] > 3
    assert attributes(spans["child"])["gen_ai.usage.num_sequences"] == 2
    assert attributes(spans["child"])["gen_ai.usage.completion_tokens"] == 10


def test_times_add_up(spans):
    span, found = spans["plain"], attributes(spans["plain"])
    latency = {name.rsplit(".", 1)[1]: value for name, value in found.items() if ".latency." in name}
    whole = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert abs(whole - latency["e2e"]) < 1e-3
    assert 0 <= latency["time_in_queue"] <= latency["time_to_first_token"] < latency["e2e"]
    parts = latency["time_in_model_prefill"] + latency["time_in_model_decode"]
    assert abs(parts - latency["time_in_model_inference"]) < 1e-6
    assert latency["time_in_queue"] + parts <= latency["e2e"]


def test_a_span_belongs_to_the_callers_trace(spans):
    assert spans["child"].trace_id.hex() == TRACE_ID
    assert spans["child"].parent_span_id.hex() == PARENT_ID
    assert not spans["plain"].parent_span_id
    assert spans["plain"].trace_id != spans["child"].trace_id


def test_a_client_that_left_is_told_of_as_aborted(spans):
    reasons = attributes(spans["left"])["gen_ai.response.finish_reasons"]
    assert [value.string_value for value in reasons.values] == ["abort"]
    assert 0 < attributes(spans["left"])["gen_ai.usage.completion_tokens"] < 900


class GrpcCollector:
    """A collector of the protocol's other form: the method Export of its trace service, over gRPC."""

    def __init__(self):
        self.spans = []
        self.authorities = []

        def export(request, context):
            self.authorities += [value for key, value in context.invocation_metadata() if key == "tenant"]
            self.spans += [
                span for resource in request.resource_spans for s in resource.scope_spans for span in s.spans
            ]
            return trace_service.ExportTraceServiceResponse()

        method = grpc.unary_unary_rpc_method_handler(
            export,
            request_deserializer=trace_service.ExportTraceServiceRequest.FromString,
            response_serializer=trace_service.ExportTraceServiceResponse.SerializeToString,
        )
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server = grpc.server(ThreadPoolExecutor(2))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": method}),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def close(self):
        self._server.stop(0).wait()


@pytest.mark.parametrize("scheme", ["http://", pytest.param("", marks=pytest.mark.full)])
def test_spans_are_sent_by_grpc(scheme):
    """By vLLM's default protocol, with headers; the exporter of the server in a process of its own."""
    collector, port = GrpcCollector(), free_port()
    words = ["serve", str(DEMO_MODEL), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--enforce-eager"]
    words += ["--otlp-traces-endpoint", f"{scheme}127.0.0.1:{collector.port}", "--served-model-name", "traced"]
    environment = {"OTEL_EXPORTER_OTLP_TRACES_HEADERS": "tenant=bible", "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true"}
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | environment)  # fmt: skip
    body = json.dumps({"prompt": "And it came to pass", "max_tokens": 5, "ignore_eos": True}).encode()
    headers = {
        "Content-Type": "application/json",
        "X-Request-Id": "grpc",
        "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01",
    }
    deadline = time.monotonic() + 60
    try:
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
                urllib.request.urlopen(request, timeout=60).read()
                break
            except OSError:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        collector.close()
    assert process.returncode == 0, output
    (span,) = collector.spans
    found = attributes(span)
    assert (span.name, span.kind, span.trace_id.hex()) == ("llm_request", SERVER_KIND, TRACE_ID)
    assert found["gen_ai.request.id"] == "cmpl-grpc-0" and found["gen_ai.usage.completion_tokens"] == 5
    assert collector.authorities == ["bible"]


@pytest.mark.parametrize(
    ("environment", "told"),
    [({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "must be grpc or http/protobuf: http/json")],
)
def test_what_cannot_be_exported_to_is_refused_at_the_start(environment, told):
    words = ["serve", str(DEMO_MODEL), "--otlp-traces-endpoint", "http://127.0.0.1:1", "--port", str(free_port())]
    done = subprocess.run([*COMMAND, *words], env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert told in done.stderr
    assert "Traceback" not in done.stderr
