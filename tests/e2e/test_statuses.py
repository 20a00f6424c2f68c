"""Every status that the API reference gives for the core endpoints, asked of a real server with a real engine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]
TOOL = {"type": "function", "function": {"name": "f"}}
LENGTH, VOCABULARY = 4096, 515
KEY = {"Authorization": "Bearer k"}
NO_KEY = {
    "error": {
        "message": "a valid API key is needed, as Authorization: Bearer KEY or as x-api-key: KEY",
        "type": "Unauthorized",
        "param": None,
        "code": 401,
    }
}
BODY, VALUE = "Bad Request", "BadRequestError"


class Server:
    """A running `omni-engine serve` with one row, one place in the queue, and a key."""

    def __init__(self, path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "omni_engine.server.cli", "serve", str(path), "--port", str(port), "--api-key", "k",
             "--max-num-seqs", "1", "--max-num-queued-reqs", "2", "--served-model-name", "tiny", "--dtype", "float32"],
            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while self.ask("GET", "/health")[0] != 200:
            assert self.process.poll() is None
            time.sleep(0.05)

    def request(self, method, path, body=None, headers=None):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **KEY, **(headers or {})}
        return urllib.request.Request(self.url + path, data, headers, method=method)

    def ask(self, method, path, body=None, headers=None):
        """Status and body; (None, None) where nobody answers."""
        try:
            with urllib.request.urlopen(self.request(method, path, body, headers), timeout=60) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except OSError:
            return None, None


@pytest.fixture(scope="module")
def server(make_checkpoint):
    server = Server(make_checkpoint("LlamaForCausalLM", max_position_embeddings=LENGTH))
    yield server
    server.process.kill()
    server.process.wait()


def completion(status=400, kind=VALUE, param=..., text="", **fields):
    return COMPLETIONS, {"prompt": "a", "max_tokens": 2, **fields}, status, kind, param, text


def chat(status=400, kind=VALUE, param=..., text="", **fields):
    return CHAT, {"messages": USER, "max_tokens": 2, **fields}, status, kind, param, text


WRONG = [
    # the body: missing, of a wrong type, no JSON
    (COMPLETIONS, {}, 400, BODY, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    (COMPLETIONS, b"{", 400, BODY, None, "1 validation error"),
    (CHAT, {}, 400, BODY, "body.messages", "'type': 'missing'"),
    completion(kind=BODY, param="body.prompt", prompt=5),
    completion(kind=BODY, param="body.max_tokens", max_tokens="many"),
    completion(kind=BODY, param="body.user", user=5),
    completion(kind=BODY, param="body.seed", seed=2**63),
    completion(kind=BODY, param="body.prompt.0", prompt=[-1]),
    completion(kind=BODY, param="prompt", prompt=["a"] * 1025),
    completion(kind=BODY, param="stop", stop=["ab"] * 65),
    completion(kind=BODY, param="cache_salt", cache_salt="a@b"),
    completion(kind=BODY, param="body.truncate_prompt_tokens", truncate_prompt_tokens=-2),
    completion(kind=BODY, param="truncation_side", truncation_side="middle"),
    # rules of the body
    completion(kind=BODY, param="stream_options", stream_options={"include_usage": True}),
    completion(kind=BODY, param="logprobs", logprobs=-2),
    completion(kind=BODY, param="body.logprobs", logprobs="all"),
    completion(kind=BODY, param="prompt_logprobs", prompt_logprobs=-2),
    completion(kind=BODY, param="prompt_logprobs", prompt_logprobs=1, stream=True),
    completion(kind=BODY, param="prompt_logprobs", prompt_logprobs=-1, stream=True),
    # values
    completion(
        param="logprobs", logprobs=21, text="Requested sample logprobs of 21, which is greater than max allowed"
    ),
    completion(param="logprobs", logprobs=-1, text="greater than max allowed: 20"),
    completion(param="prompt_logprobs", prompt_logprobs=21, text="greater than max allowed: 20"),
    completion(param="min_tokens", min_tokens=3),
    completion(param="max_tokens", max_tokens=0),
    completion(param="n", n=0, text="n must be at least 1, got 0."),
    completion(param="n", n=16385, text="n must be at most 16384"),
    completion(param="n", n=2, temperature=0, text="n must be 1 when using greedy sampling"),
    completion(param="temperature", temperature=-1, text="temperature must be non-negative"),
    completion(param="temperature", temperature=2.1, text="temperature must be in [0, 2]"),
    completion(param="top_p", top_p=0),
    completion(param="top_k", top_k=-2),
    completion(param="min_p", min_p=1.5),
    completion(param="presence_penalty", presence_penalty=2.5),
    completion(param="frequency_penalty", frequency_penalty=-2.5),
    completion(param="repetition_penalty", repetition_penalty=0),
    completion(param="stop", stop=""),
    completion(param="bad_words", bad_words=[""]),
    completion(param="stop_token_ids", stop_token_ids=[VOCABULARY], text="out of the vocabulary"),
    completion(param="allowed_token_ids", allowed_token_ids=[], text="must not be empty"),
    completion(param="allowed_token_ids", allowed_token_ids=[VOCABULARY], text="out of the vocabulary"),
    completion(param="logit_bias", logit_bias={str(VOCABULARY): 1}, text="out of the vocabulary"),
    completion(param="logit_bias", logit_bias={"a": 1}),
    completion(param="prompt", prompt=[VOCABULARY], text=f"Token id {VOCABULARY} is out of vocabulary"),
    completion(param="input_tokens", prompt=[5] * LENGTH, text=f"maximum context length is {LENGTH} tokens"),
    completion(param="input_tokens", prompt=[5] * (LENGTH + 1), text=f"prompt contains {LENGTH + 1} input tokens"),
    completion(param="truncate_prompt_tokens", truncate_prompt_tokens=LENGTH + 1),
    # not built, so never silence
    completion(param="use_beam_search", use_beam_search=True, stream=True),
    completion(kind=BODY, param="structured_outputs", structured_outputs={"regex": "a", "choice": ["b"]}),
    completion(kind=BODY, param="response_format", response_format={"type": "json_schema"}),
    completion(param="suffix", suffix="b"),
    completion(param="prompt_embeds", prompt_embeds="AAAA"),
    # chat
    chat(kind=BODY, param="messages", messages=[]),
    chat(kind=BODY, param="body.messages.0.role", messages=[{"content": "a"}]),
    chat(kind=BODY, param="top_logprobs", top_logprobs=2),
    chat(param="logprobs", logprobs=True, top_logprobs=21, text="greater than max allowed: 20"),
    chat(kind=BODY, param="tools", tools=[]),
    chat(kind=BODY, param="tool_choice", tool_choice="auto", text="`tools` must be set"),
    chat(kind=BODY, param="tool_choice", tools=[TOOL], tool_choice="some"),
    chat(kind=BODY, param="tool_choice", tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
    chat(param="tool_choice", tools=[TOOL], text="requires --enable-auto-tool-choice"),
    chat(kind=BODY, param="continue_final_message", continue_final_message=True, add_generation_prompt=True),
    chat(param="chat_template", chat_template="{{ 1 }}", text="--trust-request-chat-template is not set"),
    chat(kind=BODY, param="body.reasoning_effort", reasoning_effort="huge"),
    chat(messages=IMAGE, text="image"),
    chat(param="temperature", temperature=3),
    chat(param="input_tokens", messages=[{"role": "user", "content": "the boats go " * 1200}]),
    # models and addresses
    completion(404, "NotFoundError", "model", "The model `other` does not exist. Valid aliases: tiny.", model="other"),
    chat(404, "NotFoundError", "model", "does not exist", model="other"),
    ("/v1/embeddings", {"input": "a"}, 404, "Not Found", None, ""),
    ("/v1/models", {}, 405, "Method Not Allowed", None, ""),
    # /tokenize and /detokenize
    ("/tokenize", {}, 400, BODY, ..., ""),
    ("/tokenize", {"prompt": "a", "model": "other"}, 404, "NotFoundError", "model", ""),
    ("/detokenize", {"tokens": [-1]}, 400, BODY, "body.tokens.0", ""),
    ("/detokenize", {"tokens": [VOCABULARY + 10**6]}, 400, ..., ..., ""),
    ("/detokenize", {}, 400, BODY, "body.tokens", ""),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "param", "text"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_has_its_status_type_and_parameter(server, path, body, status, kind, param, text):
    got, answer = server.ask("POST", path, body)
    assert got == status, answer
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert text in error["message"]
    assert kind in (..., error["type"]), error
    assert param in (..., error["param"]), error


RIGHT = [
    completion(200, logprobs=0),
    completion(200, prompt=[5] * (LENGTH - 1), max_tokens=100),  # cut to what fits
    completion(200, prompt=["a", [5, 6], "b"][::2]),
    completion(200, echo=True, max_tokens=0, logprobs=2),
    completion(200, model=None, best_of=3, unknown={"a": 1}, guided_regex=None),
    completion(200, top_k=-1, seed=-1, user="me", length_penalty=1, stop=None),
    chat(200, logprobs=True, top_logprobs=20),
    chat(200, reasoning_effort="low", parallel_tool_calls=False, tools=[TOOL], tool_choice="none"),
    chat(200, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}),
    chat(200, response_format={"type": "text"}, add_generation_prompt=False, continue_final_message=True),
    ("/tokenize", {"messages": USER}, 200, None, None, ""),
    ("/detokenize", {"tokens": []}, 200, None, None, ""),
]


@pytest.mark.parametrize(("path", "body", "status", "kind", "param", "text"), RIGHT, ids=lambda value: str(value)[:60])
def test_what_is_right_or_asks_for_nothing_is_served(server, path, body, status, kind, param, text):
    got, answer = server.ask("POST", path, body)
    assert got == status, answer


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "body"),
    [
        ("GET", "/health", {}, 200, None),
        ("GET", "/ping", {}, 200, None),
        ("POST", "/ping", {}, 200, None),
        ("GET", "/load", KEY, 200, {"server_load": 0}),
        ("GET", "/v1/models", {"Authorization": "Bearer no"}, 401, NO_KEY),
        ("GET", "/health", {"Authorization": "Bearer no"}, 200, None),
        ("POST", COMPLETIONS, {"Authorization": "k"}, 401, NO_KEY),
    ],
)
def test_addresses_without_a_body(server, method, path, headers, status, body):
    assert server.ask(method, path, None, headers) == (status, body)


def test_a_content_type_that_is_not_json_is_a_400(server):
    status, answer = server.ask("POST", COMPLETIONS, b'{"prompt": "a"}', {"Content-Type": "text/plain"})
    assert status == 400
    assert answer["error"]["message"] == "Unsupported Media Type: Only 'application/json' is allowed"


def test_too_many_waiting_requests_are_a_503(server):
    body = {"prompt": "a", "max_tokens": LENGTH - 10, "ignore_eos": True, "stream": True}
    running = urllib.request.urlopen(server.request("POST", COMPLETIONS, body), timeout=60)
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer k\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    waiting = [socket.create_connection((host, int(port)), timeout=60) for _ in range(2)]
    for connection in waiting:
        connection.sendall(head.encode() + data)
    time.sleep(0.5)
    status, answer = server.ask("POST", COMPLETIONS, {"prompt": "a"})
    for connection in waiting:
        connection.close()
    running.close()
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (503, "Service Unavailable", 503)
    deadline = time.monotonic() + 20
    while server.ask("POST", COMPLETIONS, {"prompt": "a", "max_tokens": 1})[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
