"""schemathesis makes up requests from /openapi.json: no answer is a fault, breaks its schema or comes late."""

from __future__ import annotations

import collections
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

import omni_engine

pytestmark = pytest.mark.full
DEMO = Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek"
NUM_CASES, NUM_OF_POOLING = 2000, 300
NUM_OF_OTHERS = 5  # of a route without a body, or without a task here
MAX_SECONDS = 2.0  # for one answer of at most 4 tokens per sequence; a machine busy elsewhere gets another try
HANG_SECONDS = 30.0
TRIES = 3
DOCUMENTED_FAULTS = (501, 503)
KEY = "a key"
SEED = 20261122  # the same requests each time; what one of them finds can be found again
# Bodies that are answered with 200, so that made-up fields beside them get past the first check.
MESSAGES = [{"role": "user", "content": "Say something."}]
GOOD_BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once upon a time"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/chat/completions/batch": {"messages": [MESSAGES, MESSAGES]},
    "/v1/responses": {"input": "Say something."},
    "/v1/messages": {"model": "served", "max_tokens": 4, "messages": MESSAGES},
    "/v1/messages/count_tokens": {"model": "served", "messages": MESSAGES},
    "/invocations": {"messages": MESSAGES},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/embeddings": {"input": ["one", "two"]},
    "/pooling": {"input": ["one", "two"]},
    "/classify": {"input": ["one", "two"]},
    "/score": {"text_1": "one", "text_2": ["two", "three"]},
    "/v1/score": {"text_1": "one", "text_2": ["two", "three"]},
    "/rerank": {"query": "one", "documents": ["two", "three"]},
    "/v1/rerank": {"query": "one", "documents": ["two", "three"]},
    "/v2/rerank": {"query": "one", "documents": ["two", "three"]},
}
POOLING_PATHS = {
    path for path in GOOD_BODIES if path.endswith(("embeddings", "pooling", "classify", "score", "rerank"))
}
# Fields that make_up draws from a schema of "anything" are worth little; these are drawn instead, now and then.
SOME_JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats(allow_nan=False)
    | strategies.text(max_size=20),
    lambda inner: strategies.lists(inner, max_size=3)
    | strategies.dictionaries(strategies.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@contextmanager
def serving(log: Path, *arguments: str) -> Iterator[str]:
    """The address of a running `omni-engine serve`; it must end with status 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())", "serve"]
    command += [*arguments, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "served"]
    command += ["--api-key", KEY, "--enforce-eager", "--enable-tokenizer-info-endpoint"]
    with log.open("w") as output:
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _is_healthy(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        status = process.wait(60)
    assert status == 0, log.read_text()[-2000:]
    assert "Traceback" not in log.read_text()


def _is_healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(url + "/health", timeout=5).status == 200
    except (OSError, urllib.error.HTTPError):
        return False


class Judge:
    """Sends made-up requests, remembers how they were answered, raises where an answer is wrong."""

    def __init__(self, url: str) -> None:
        from schemathesis.checks import content_type_conformance, response_schema_conformance, status_code_conformance
        from schemathesis.core.failures import FailureGroup

        self.url = url
        self.statuses: collections.Counter[int] = collections.Counter()
        self.answered_paths: collections.Counter[str] = collections.Counter()  # with 200
        self.slowest = 0.0
        self.wrong: dict[tuple[str, str], str] = {}  # the first of each kind, by route
        self._failure_group = FailureGroup
        self._checks = [content_type_conformance, response_schema_conformance, status_code_conformance]

    def send(self, case: Any) -> None:
        from requests import Timeout

        for _ in range(TRIES):
            started = time.perf_counter()
            try:
                response = case.call(base_url=self.url, headers={"x-api-key": KEY}, timeout=HANG_SECONDS)
            except Timeout:
                response = None
            seconds = time.perf_counter() - started
            if response is not None and seconds < MAX_SECONDS:
                break
        self.slowest = max(self.slowest, seconds)
        if response is None:
            self._blame(case, "no answer", f"{seconds:.2f} s")
            return
        self.statuses[response.status_code] += 1
        self.answered_paths[case.operation.path] += response.status_code == 200
        for kind, said in self._faults(case, response, seconds):
            self._blame(case, kind, said)

    def _blame(self, case: Any, kind: str, said: str) -> None:
        self.wrong.setdefault((case.operation.label, kind), f"{case.as_curl_command()[:1000]}\n{said}")

    @property
    def num_answers(self) -> int:
        return sum(self.statuses.values())

    def _faults(self, case: Any, response: Any, seconds: float) -> Iterator[tuple[str, str]]:
        """Kind and description of all that is wrong with an answer."""
        status, text = response.status_code, response.text
        if status >= 500 and status not in DOCUMENTED_FAULTS:
            yield f"status {status}", text[:500]
        if seconds >= MAX_SECONDS:
            yield "slow", f"{seconds:.2f} s"
        if status >= 400 and not json.loads(text)["error"]["message"]:
            yield "an error without a message", text[:500]
        if status >= 400 and ("Traceback" in text or 'File "' in text):
            yield "insides of the server", text[:500]
        try:
            case.validate_response(response, checks=self._checks)
        except self._failure_group as group:
            for failure in group.exceptions:
                yield type(failure).__name__, str(failure)[:1500]


def near_a_good_body(operation: Any) -> Any:
    """Cases whose body is a good one with up to three made-up fields, of the right type or of any."""
    good = GOOD_BODIES[operation.path]

    @strategies.composite
    def cases(draw: Any) -> Any:
        case = draw(operation.as_strategy())
        made_up = case.body if isinstance(case.body, dict) else {}
        made_up.pop("model", None)  # most would end with its 404
        names = draw(strategies.lists(strategies.sampled_from(sorted(made_up)), max_size=3)) if made_up else []
        fields = {name: draw(SOME_JSON) if draw(strategies.integers(0, 9)) == 0 else made_up[name] for name in names}
        case.body = {**good, **fields}
        return case

    return cases()


def shares_of(operations: list[Any], paths: set[str], num_cases: int) -> Iterator[tuple[Any, int]]:
    """A strategy of cases and how many of them, for each route: `num_cases` over `paths`, and a few of the others."""
    from schemathesis import GenerationMode

    each = -(-num_cases // (3 * sum(operation.path in paths for operation in operations)))
    for operation in operations:
        if operation.path in paths:
            yield near_a_good_body(operation), each
            yield operation.as_strategy(), each
            yield operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), each
        else:
            yield operation.as_strategy(), NUM_OF_OTHERS


def judge_routes(url: str, paths: set[str], num_cases: int) -> Judge:
    """Sends cases to all routes, most of them to `paths`, which must have answered some with 200."""
    judge = Judge(url)
    for strategy, share in shares_of(operations_of(url), paths, num_cases):
        settings = hypothesis.settings(
            max_examples=share, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )  # fmt: skip

        @hypothesis.seed(SEED)
        @settings
        @hypothesis.given(case=strategy)
        def one(case: Any) -> None:
            judge.send(case)

        one()
    wait_until_idle(url)
    print(
        f"{judge.num_answers} answers by status {dict(sorted(judge.statuses.items()))}, slowest {judge.slowest:.2f} s"
    )
    assert not judge.wrong, "\n\n".join(f"{place}, {kind}: {said}" for (place, kind), said in judge.wrong.items())
    reached = {path for path, count in judge.answered_paths.items() if count}
    assert reached >= paths, "nothing got past the first check of these"
    return judge


def operations_of(url: str) -> list[Any]:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"x-api-key": KEY})
    return [found.ok() for found in schema.get_all_operations() if found.ok().path != "/ui/live"]  # it has no end


def num_left(url: str) -> float:
    """Requests that the engine still holds."""
    request = urllib.request.Request(f"{url}/metrics", headers={"x-api-key": KEY})
    lines = urllib.request.urlopen(request, timeout=10).read().decode().splitlines()
    counts = [line for line in lines if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))]
    assert len(counts) == 2
    return sum(float(line.split()[-1]) for line in counts)


def wait_until_idle(url: str) -> None:
    deadline = time.monotonic() + 10
    while left := num_left(url):
        assert time.monotonic() < deadline, f"requests left in the engine: {left}"
        time.sleep(0.1)


def test_no_made_up_request_is_a_fault_of_the_server(tmp_path: Path) -> None:
    flags = ["--reasoning-parser", "deepseek_r1", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    flags += [
        "--max-model-len",
        "256",
        "--override-generation-config",
        '{"max_new_tokens": 4}',
        "--trust-request-chat-template",
    ]
    with serving(tmp_path / "log", str(DEMO), *flags) as url:
        judge = judge_routes(url, GOOD_BODIES.keys() - POOLING_PATHS, NUM_CASES)
    assert judge.num_answers >= NUM_CASES


@pytest.mark.parametrize(
    ("architecture", "paths"),
    [
        ("Qwen3ForCausalLM", {"/v1/embeddings", "/pooling", "/score", "/v1/score", "/rerank"}),
        ("BertForSequenceClassification", {"/classify", "/pooling", "/score", "/v1/rerank", "/v2/rerank"}),
    ],
)
def test_no_made_up_request_is_a_fault_of_a_pooling_server(
    architecture: str, paths: set[str], make_pooling_checkpoint: Any, tmp_path: Path
) -> None:
    options = {} if architecture.startswith("Qwen3") else {"num_labels": 1}
    path = make_pooling_checkpoint(architecture, **options)
    with serving(tmp_path / "log", str(path), "--runner", "pooling", "--dtype", "float32") as url:
        judge = judge_routes(url, paths, NUM_OF_POOLING)
    assert judge.num_answers >= NUM_OF_POOLING
