"""Pooling models served over HTTP: a real process each, compared with the engine in this one."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_engine import LLM, PoolingParams

TEXTS = ["The harbour lies below the town.", "A", "Three plus four is seven; seven times eight is fifty-six."]
MODULES = (("Pooling", {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True}), ("Normalize", {}))
PROMPTS = {"prompts": {"query": "Find: ", "document": ""}, "default_prompt_name": None}


class Server:
    def __init__(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = "from omni_engine.server.cli import main; import sys; sys.exit(main())"
        words = [sys.executable, "-c", command, "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen([*words, *flags, "--served-model-name", "tiny"])

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        return response.status, json.loads(text) if text else None

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.call("POST", path, body)

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.call("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"the server did not get ready: {self.process.poll()}")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


@pytest.fixture(scope="module")
def embedder(make_pooling_checkpoint: Callable[..., Path]) -> Path:
    return make_pooling_checkpoint("Qwen3ForCausalLM", MODULES, PROMPTS, "Qwen3Model", matryoshka_dimensions=[8, 32])


@pytest.fixture(scope="module")
def servers(
    embedder: Path, make_pooling_checkpoint: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> Iterator[dict[str, Server]]:
    """By what they are for: they load side by side."""
    chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    started = {
        "embed": Server(str(embedder), "--chat-template", chat_template, "--max-num-batched-tokens", "32",
                        "--max-num-seqs", "4"),
        "score": Server(str(make_pooling_checkpoint("BertForSequenceClassification", num_labels=1))),
        "classify": Server(str(make_pooling_checkpoint("BertForSequenceClassification", num_labels=3))),
        "generate": Server(str(make_checkpoint("Qwen3ForCausalLM"))),
    }  # fmt: skip
    try:
        for server in started.values():
            server.wait_ready()
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.fixture(scope="module")
def llm(embedder: Path) -> LLM:
    return LLM(str(embedder))


def vectors(body: dict[str, Any]) -> np.ndarray:
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert all(item["object"] == "embedding" for item in body["data"])
    return np.array([item["embedding"] for item in body["data"]])


def test_embeddings_are_those_of_the_engine(servers: dict[str, Server], llm: LLM) -> None:
    server = servers["embed"]
    expected = np.array([output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)])
    status, body = server.post("/v1/embeddings", {"model": "tiny", "input": TEXTS})
    assert status == 200 and body["object"] == "list" and body["model"] == "tiny" and body["id"].startswith("embd-")
    assert np.abs(vectors(body) - expected).max() < 1e-5
    ids = [output.prompt_token_ids for output in llm.embed(TEXTS, use_tqdm=False)]
    count = sum(map(len, ids))
    assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (count, count)
    assert body["usage"]["completion_tokens"] == 0
    assert np.abs(vectors(server.post("/v1/embeddings", {"input": ids})[1]) - expected).max() < 1e-5
    assert np.abs(vectors(server.post("/v1/embeddings", {"input": ids[0]})[1]) - expected[:1]).max() < 1e-5
    assert np.abs(vectors(server.post("/v1/embeddings", {"input": TEXTS[0]})[1]) - expected[:1]).max() < 1e-5
    many = server.post("/v1/embeddings", {"input": TEXTS * 100})[1]
    assert np.abs(vectors(many) - np.tile(expected, (100, 1))).max() < 1e-5


@pytest.mark.parametrize(("endianness", "dtype"), [(None, "=f4"), ("little", "<f4"), ("big", ">f4")])
def test_base64_is_the_same_vector(servers: dict[str, Server], endianness: str | None, dtype: str) -> None:
    plain = vectors(servers["embed"].post("/v1/embeddings", {"input": TEXTS})[1])
    fields = {"encoding_format": "base64"} | ({} if endianness is None else {"endianness": endianness})
    body = servers["embed"].post("/v1/embeddings", {"input": TEXTS, **fields})[1]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), dtype) for item in body["data"]]
    assert np.array_equal(np.array(decoded), plain.astype(np.float32))


def test_fewer_dimensions_are_the_first_ones_normalised(servers: dict[str, Server], llm: LLM) -> None:
    raw = llm.encode(TEXTS, PoolingParams(use_activation=False), use_tqdm=False)
    cut = np.array([output.outputs.data[:8] for output in raw])
    body = servers["embed"].post("/v1/embeddings", {"input": TEXTS, "dimensions": 8})[1]
    assert np.abs(vectors(body) - cut / np.linalg.norm(cut, axis=1, keepdims=True)).max() < 1e-5
    body = servers["embed"].post("/v1/embeddings", {"input": TEXTS, "dimensions": 8, "use_activation": False})[1]
    assert np.abs(vectors(body) - cut).max() < 1e-5


def test_a_text_is_cut_before_its_end_token(servers: dict[str, Server], llm: LLM) -> None:
    whole = llm.embed(TEXTS[2], use_tqdm=False)[0].prompt_token_ids
    for side, kept in ((None, [*whole[:4], whole[-1]]), ("left", whole[-5:])):
        fields = {} if side is None else {"truncation_side": side}
        body = servers["embed"].post("/v1/embeddings", {"input": TEXTS[2], "truncate_prompt_tokens": 5, **fields})[1]
        expected = llm.embed({"prompt_token_ids": kept}, use_tqdm=False)[0].outputs.embedding
        assert body["usage"]["prompt_tokens"] == 5
        assert np.abs(vectors(body)[0] - np.array(expected)).max() < 1e-5


def test_prompts_and_conversations_are_written_out(servers: dict[str, Server], llm: LLM) -> None:
    server = servers["embed"]
    named = vectors(server.post("/v1/embeddings", {"input": TEXTS, "prompt_name": "query"})[1])
    expected = llm.embed([f"Find: {text}" for text in TEXTS], use_tqdm=False)
    assert np.abs(named - np.array([output.outputs.embedding for output in expected])).max() < 1e-5
    chat = vectors(server.post("/v1/embeddings", {"messages": [{"role": "user", "content": "Ahoy"}]})[1])
    prompt: Any = {"prompt": "user: Ahoy\n", "add_special_tokens": False}
    assert np.abs(chat[0] - np.array(llm.embed(prompt, use_tqdm=False)[0].outputs.embedding)).max() < 1e-5


def test_pooling_gives_vectors_of_tokens(servers: dict[str, Server], llm: LLM) -> None:
    status, body = servers["embed"].post("/pooling", {"input": TEXTS, "task": "token_embed"})
    outputs = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
    assert status == 200
    for item, output in zip(body["data"], outputs, strict=True):
        assert item["object"] == "pooling"
        assert np.abs(np.array(item["data"]) - output.outputs.data).max() < 1e-5
    body = servers["embed"].post("/pooling", {"input": TEXTS})[1]
    assert np.array(body["data"][0]["data"]).shape == (64,)


def test_embeddings_score_by_their_cosine(servers: dict[str, Server]) -> None:
    server = servers["embed"]
    found = vectors(server.post("/v1/embeddings", {"input": TEXTS})[1])
    status, body = server.post("/score", {"text_1": TEXTS[0], "text_2": TEXTS})
    assert status == 200 and body["data"][0]["object"] == "score"
    assert [item["score"] for item in body["data"]] == pytest.approx((found @ found[0]).tolist(), abs=1e-5)


def test_documents_are_ranked_by_their_score(servers: dict[str, Server]) -> None:
    server = servers["score"]
    scores = [item["score"] for item in server.post("/v1/score", {"queries": "Where?", "documents": TEXTS})[1]["data"]]
    assert len(set(scores)) == 3 and all(0 < score < 1 for score in scores)
    order = sorted(range(3), key=lambda place: -scores[place])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        status, body = server.post(path, {"query": "Where?", "documents": TEXTS})
        assert status == 200 and [item["index"] for item in body["results"]] == order
        assert [item["relevance_score"] for item in body["results"]] == pytest.approx(sorted(scores)[::-1], abs=1e-6)
        assert [item["document"]["text"] for item in body["results"]] == [TEXTS[place] for place in order]
    body = server.post("/rerank", {"query": "Where?", "documents": TEXTS, "top_n": 2})[1]
    assert [item["index"] for item in body["results"]] == order[:2]
    pairs = server.post("/score", {"data_1": TEXTS, "data_2": TEXTS[::-1]})[1]["data"]
    single = server.post("/score", {"data_1": TEXTS[2], "data_2": TEXTS[0]})[1]["data"]
    assert len(pairs) == 3 and pairs[2]["score"] == pytest.approx(single[0]["score"], abs=1e-6)


def test_inputs_are_classified(servers: dict[str, Server]) -> None:
    status, body = servers["classify"].post("/classify", {"input": TEXTS})
    assert status == 200 and body["id"].startswith("classify-")
    for item in body["data"]:
        assert item["num_classes"] == 3 and sum(item["probs"]) == pytest.approx(1, abs=1e-5)
        assert item["label"] == f"LABEL_{int(np.argmax(item['probs']))}"
    raw = servers["classify"].post("/classify", {"input": TEXTS, "use_activation": False})[1]["data"]
    exps = np.exp(np.array([item["probs"] for item in raw]))
    probs = np.array([item["probs"] for item in body["data"]])
    assert np.abs(exps / exps.sum(1, keepdims=True) - probs).max() < 1e-5


EMBED = "/v1/embeddings"
BAD = [
    ("embed", EMBED, {}, 400, "input"),
    ("embed", EMBED, {"input": []}, 400, "input"),
    ("embed", EMBED, {"input": [[]]}, 400, "prompt"),
    ("embed", EMBED, {"input": ["a", 1]}, 400, "input"),
    ("embed", EMBED, {"input": {"a": 1}}, 400, "body.input"),
    ("embed", EMBED, {"input": [515]}, 400, "prompt"),
    ("embed", EMBED, {"input": "town " * 400}, 400, "input_tokens"),
    ("embed", EMBED, {"input": "a" * 100_000}, 400, "input_text"),
    ("embed", EMBED, {"input": ["a"] * 2049}, 400, "input"),
    ("embed", EMBED, {"input": "a", "messages": []}, 400, "input"),
    ("embed", EMBED, {"messages": []}, 400, "messages"),
    ("embed", EMBED, {"input": "a", "dimensions": 16}, 400, "dimensions"),
    ("embed", EMBED, {"input": "a", "dimensions": 0}, 400, "dimensions"),
    ("embed", EMBED, {"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ("embed", EMBED, {"input": "a", "encoding_format": "bytes"}, 400, "encoding_format"),
    ("embed", EMBED, {"input": "a", "embed_dtype": "float7"}, 400, "embed_dtype"),
    ("embed", EMBED, {"input": "a", "truncate_prompt_tokens": 5000}, 400, "truncate_prompt_tokens"),
    ("embed", EMBED, {"input": "a", "truncate_prompt_tokens": -2}, 400, "body.truncate_prompt_tokens"),
    ("embed", EMBED, {"input": "a", "truncate_prompt_tokens": 0}, 400, "prompt"),
    ("embed", EMBED, {"input": "a", "truncation_side": "middle"}, 400, "truncation_side"),
    ("embed", EMBED, {"input": "a", "normalize": True}, 400, "normalize"),
    ("embed", EMBED, {"input": "a", "prompt_name": "nobody"}, 400, "prompt_name"),
    ("embed", EMBED, {"input": "a", "model": "other"}, 404, "model"),
    ("embed", "/pooling", {"input": "a", "task": "classify"}, 400, "task"),
    ("embed", "/pooling", {"input": "a", "task": "plugin"}, 400, "task"),
    ("embed", "/classify", {"input": "a"}, 404, None),
    ("embed", "/v1/completions", {"prompt": "a"}, 404, None),
    ("embed", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, 404, None),
    ("embed", "/score", {"text_1": "a"}, 400, "text_1"),
    ("embed", "/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, 400, "queries"),
    ("score", "/rerank", {"query": "a", "documents": []}, 400, "documents"),
    ("score", "/rerank", {"documents": ["a"]}, 400, "body.query"),
    ("score", "/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, 400, "top_n"),
    ("score", "/rerank", {"query": "a", "documents": ["town " * 400]}, 400, "input_tokens"),
    ("score", EMBED, {"input": "a"}, 404, None),
    ("classify", "/score", {"text_1": "a", "text_2": "b"}, 400, "num_labels"),
    ("classify", "/pooling", {"input": "a", "dimensions": 8}, 400, "dimensions"),
    ("generate", EMBED, {"input": "a"}, 404, None),
    ("generate", EMBED, {}, 404, None),
    ("generate", "/pooling", {"input": "a"}, 404, None),
    ("generate", "/classify", {"input": "a"}, 404, None),
    ("generate", "/rerank", {"query": "a", "documents": ["a"]}, 404, None),
]  # fmt: skip


@pytest.mark.parametrize(("server", "path", "body", "status", "param"), BAD)
def test_bad_requests_are_told_what_is_wrong(
    servers: dict[str, Server], server: str, path: str, body: Any, status: int, param: str | None
) -> None:
    found, answer = servers[server].post(path, body)
    assert found == status, answer
    assert answer["error"]["code"] == status and answer["error"]["param"] == param and answer["error"]["message"]


def test_a_pooling_server_counts_what_it_computes(servers: dict[str, Server]) -> None:
    assert servers["score"].post("/score", {"text_1": "one", "text_2": "two"})[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", servers["score"].port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:")}
    assert values["vllm:prompt_tokens_total"] > 0 and values["vllm:generation_tokens_total"] == 0
    assert values["vllm:num_requests_running"] == 0 and values["vllm:request_prompt_tokens_count"] > 0
