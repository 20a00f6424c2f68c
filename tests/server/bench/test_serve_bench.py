"""`omni-engine bench serve` as a whole, against a small server."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from itertools import pairwise

import pytest

from omni_engine.server.cli import main

SHORT = ("--random-input-len", "20", "--random-output-len", "3", "--disable-tqdm")


@pytest.fixture
def bench(server, capsys, monkeypatch):
    """`bench(*words)`: exit status, standard output, and standard error. Prompts are counted by the server."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def bench(*words, port=None):
        target = ("--port", str(server.port if port is None else port))
        status = main(["bench", "serve", *target, *SHORT, *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return bench


def usage_error(capsys, *words):
    with pytest.raises(SystemExit) as raised:
        main(["bench", "serve", *words])
    assert raised.value.code == 2
    return capsys.readouterr().err


def test_a_run_prints_the_block_and_nothing_else_on_standard_output(server, bench):
    status, out, err = bench("--num-prompts", "5")
    assert status == 0
    assert out.startswith("============ Serving Benchmark Result")
    assert "Successful requests:                     5 " in out
    assert "Total input tokens:                      100 " in out
    assert "Total generated tokens:                  15 " in out
    assert out.endswith("=" * 50 + "\n")
    assert f"5 prompts as token ids; tokenizer: {server.url}/tokenize" in err


def test_the_model_is_the_servers_first_unless_named(server, bench):
    bench("--num-prompts", "1")
    bench("--num-prompts", "1", "--model", "other")
    bench("--num-prompts", "1", "--model", "other", "--served-model-name", "alias")
    assert [body["model"] for body in server.bodies] == ["owner/tiny", "other", "alias"]


def test_prompts_are_token_ids_where_the_server_is_known_to_take_them(server, bench):
    bench("--num-prompts", "2")
    server.owner = "somebody"
    assert "2 prompts as text" in bench("--num-prompts", "2")[2]
    bench("--num-prompts", "2", "--prompt-format", "token-ids")
    bench("--num-prompts", "2", "--backend", "openai-chat")
    prompts = [body.get("prompt") for body in server.bodies]
    assert [type(prompt) for prompt in prompts] == [list] * 2 + [str] * 2 + [list] * 2 + [type(None)] * 2
    assert {len(prompt) for prompt in prompts[:2] + prompts[4:6]} == {20}
    assert {len(prompt.split()) for prompt in prompts[2:4]} == {20}
    assert len(server.bodies[-1]["messages"][0]["content"].split()) == 20


def test_failures_are_counted_and_told_and_the_run_goes_on(server, bench):
    server.behaviours = ["fail", "disconnect", "fail", "error_event"]
    status, out, err = bench("--num-prompts", "9", "--max-concurrency", "1")
    assert status == 0
    assert "Successful requests:                     5 " in out
    assert "Failed requests:                         4 " in out
    assert "2 x HTTP 503: overloaded now" in err
    assert "1 x error in the stream: the engine has stopped" in err


def test_a_run_without_a_single_success_fails(server, bench):
    server.default_behaviour = "fail"
    status, out, _ = bench("--num-prompts", "3")
    assert status == 1
    assert "Failed requests:                         3 " in out


def test_the_saved_result(server, bench, tmp_path):
    bench(
        "--num-prompts", "3", "--save-result", "--save-detailed", "--result-dir", str(tmp_path), "--metadata", "a=b",
        "c=d=e", "--label", "run", "--goodput", "ttft:10000", "e2el:20000", "--max-concurrency", "2",
    )  # fmt: skip
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("run-infqps-concurrency2-tiny-")
    result = json.loads(path.read_text())
    assert (result["a"], result["c"], result["completed"], result["model_id"]) == ("b", "d=e", 3, "owner/tiny")
    assert result["request_goodput"] == result["request_throughput"] > 0
    assert result["input_lens"] == [20, 20, 20] and result["output_lens"] == [3, 3, 3]
    assert result["generated_texts"] == ["w w w "] * 3
    assert result["queue_times"][2] > 0


def test_nothing_is_saved_unasked(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench("--num-prompts", "1", "--save-detailed")
    assert list(tmp_path.iterdir()) == []


def test_results_are_appended(bench, tmp_path):
    for _ in range(2):
        bench("--num-prompts", "1", "--append-result", "--result-filename", str(tmp_path / "all.jsonl"))
    assert len([json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]) == 2


def test_percentiles_and_metrics_are_chosen(bench):
    out = bench("--num-prompts", "2", "--percentile-metrics", "e2el,itl", "--metric-percentiles", "25,99.9")[1]
    assert "P25 E2EL (ms):" in out and "P99.9 ITL (ms):" in out
    assert "TTFT" not in out and "P99 " not in out


def test_warm_up_requests_are_not_measured(server, bench):
    _, out, _ = bench("--num-prompts", "2", "--num-warmups", "3", "--request-id-prefix", "x-")
    ids = [headers["X-Request-Id"] for headers in server.headers if "X-Request-Id" in headers]
    assert sorted(ids[:3]) == ["x-warmup-0", "x-warmup-1", "x-warmup-2"] and sorted(ids[3:]) == ["x-0", "x-1"]
    assert server.bodies[0] == server.bodies[1] == server.bodies[2]
    assert "Successful requests:                     2 " in out


def test_headers_and_the_api_key_go_with_every_request(server, bench, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    bench("--num-prompts", "1", "--header", "X-Team=a", "X-Other=b=c")
    assert len(server.headers) == 2
    for headers in server.headers:
        assert (headers["X-Team"], headers["X-Other"]) == ("a", "b=c")
        assert headers["Authorization"] == "Bearer secret"


def test_sampling_fields_are_sent_only_if_given(server, bench):
    bench("--num-prompts", "1", "--temperature", "0", "--top-k", "5", "--ignore-eos", "--extra-body", '{"seed": 3}')
    body = server.bodies[0]
    assert (body["temperature"], body["top_k"], body["ignore_eos"], body["seed"]) == (0, 5, True, 3)
    assert not {"top_p", "min_p", "presence_penalty", "logprobs"} & set(body)


def test_a_rate_spreads_the_requests(server, bench):
    _, out, _ = bench("--num-prompts", "10", "--request-rate", "20")
    assert server.arrivals[-1] - server.arrivals[0] > 0.25
    assert "Request rate configured (RPS):           20.00" in out


def test_a_trace_brings_its_times(server, bench, tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": t, "input_length": 30, "output_length": 2, "hash_ids": [1]} for t in (0, 1000, 3000)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bench("--trace", str(path), "--trace-time-scale", "0.2")
    gaps = [later - earlier for earlier, later in pairwise(server.arrivals)]
    assert gaps == pytest.approx([0.2, 0.4], abs=0.1)
    assert [len(body["prompt"]) for body in server.bodies] == [30, 30, 30]
    assert server.bodies[0]["prompt"] == server.bodies[1]["prompt"]


def test_the_ready_check_waits_for_the_server(server, bench):
    server.behaviours = ["fail"]
    status, _, err = bench("--num-prompts", "1", "--ready-check-timeout-sec", "10")
    assert (status, "failed requests" in err) == (0, False)
    assert len(server.bodies) == 3  # refused, ready, measured


def test_the_ready_check_waits_for_a_port_that_is_not_open_yet(server, bench):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    listener = socket.socket()

    def open_later():
        time.sleep(0.5)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        for _ in range(20):
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=relay, args=(peer, server.port), daemon=True).start()

    thread = threading.Thread(target=open_later, daemon=True)
    thread.start()
    try:
        status, out, _ = bench("--num-prompts", "2", "--ready-check-timeout-sec", "20", port=port)
    finally:
        listener.close()
    assert (status, "Successful requests:                     2 " in out) == (0, True)


def relay(peer, port):
    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    with peer, socket.create_connection(("127.0.0.1", port)) as upstream:
        threading.Thread(target=pump, args=(upstream, peer), daemon=True).start()
        pump(peer, upstream)


def test_a_server_that_never_gets_ready_is_an_error(server, bench):
    server.default_behaviour = "fail"
    status, _, err = bench("--num-prompts", "1", "--ready-check-timeout-sec", "0.5")
    assert status == 1
    assert "did not complete a first request within 0.5 s: HTTP 503: overloaded now" in err


def test_no_server_is_an_error_of_one_line(bench):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        status, out, err = bench(port=probe.getsockname()[1])
    assert (status, out) == (1, "")
    assert err.count("\n") == 1 and "does not tell its models, name one with --model" in err


def test_a_tokenizer_that_is_nowhere_is_an_error(server, bench):
    server.tokenizes = False
    status, _, err = bench()
    assert status == 1
    assert "name a checkpoint folder or a cached model id with --tokenizer" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goodput", "itl:5"], "the metric must be one of ttft, tpot, e2el: itl:5"),
        (["--goodput", "ttft"], "not a number: "),
        (["--percentile-metrics", "ttft,x"], "metrics are ttft, tpot, itl, e2el: x"),
        (["--metric-percentiles", "101"], "a percentile is at most 100: 101"),
        (["--header", "x"], "not KEY=VALUE: x"),
        (["--request-rate", "0"], "must be above 0: 0"),
        (["--request-rate", "2", "--trace", "x"], "scale them with --trace-time-scale"),
        (["--ramp-up-strategy", "linear"], "both be given"),
        (["--ramp-up-strategy", "linear", "--ramp-up-start-rps", "3", "--ramp-up-end-rps", "2"], "must be under"),
        (["--ramp-up-start-rps", "3"], "need --ramp-up-strategy"),
        (
            ["--ramp-up-strategy", "linear", "--request-rate", "2", "--ramp-up-start-rps", "1"],
            "leave out --request-rate",
        ),
        (["--dataset-name", "sharegpt"], "give it as --dataset-path FILE"),
        (["--profile"], "not supported yet: --profile"),
        (["--num-prompt", "2"], "did you mean --num-prompts?"),
    ],
)
def test_wrong_flags_are_one_line_with_the_remedy(capsys, words, message):
    error = usage_error(capsys, *words)
    assert message in error
    assert error.count("\n") == 1


def test_sharegpt_cannot_be_token_ids(server, bench, tmp_path):
    path = tmp_path / "s.json"
    path.write_text("[]")
    with pytest.raises(SystemExit):
        bench("--dataset-name", "sharegpt", "--dataset-path", str(path), "--prompt-format", "token-ids")


def test_the_benchmarks_are_listed(capsys):
    assert main(["bench", "--help"]) == 0
    overview = capsys.readouterr().out
    assert all(
        name in overview for name in ("serve", "throughput", "latency", "startup", "graph", "host", "speculative")
    )
    assert main(["bench"]) == 2
    assert main(["bench", "sweep"]) == 2
    assert "choose from serve, throughput, latency, startup, graph, host, speculative: sweep" in capsys.readouterr().err


def test_what_the_servers_drafts_came_to_is_told(server, bench, tmp_path):
    server.drafts = {"drafts_total": 100, "draft_tokens_total": 300, "accepted_tokens_total": 10}
    path = tmp_path / "result.json"
    words = ("--num-prompts", "4", "--num-warmups", "3", "--save-result", "--result-filename", str(path))
    out = bench(*words)[1]
    block = out[out.index("Speculative Decoding".center(50, "-")) :].splitlines()
    assert [line.split(":")[1].strip() for line in block[1:6]] == ["50.00", "2.50", "8", "24", "12"]
    assert block[6:] == [
        "Per-position acceptance (%):", f"{'  Position 0:':<40} {'100.00':<10}", f"{'  Position 1:':<40} {'50.00':<10}",
        "=" * 50,
    ]  # fmt: skip
    result = json.loads(path.read_text())
    assert (result["spec_decode_num_drafts"], result["spec_decode_draft_tokens"]) == (8, 24)
    assert result["spec_decode_per_position_acceptance_rates"] == [1.0, 0.5]


@pytest.mark.parametrize("why", ["no speculation", "no metrics", "no drafts"])
def test_without_drafts_nothing_is_told_of_them(server, bench, tmp_path, why):
    if why == "no metrics":
        server.drafts, server.metrics_status = {"drafts_total": 1}, 404
    path = tmp_path / "result.json"
    if why == "no drafts":
        server.drafts, server.default_behaviour = {"drafts_total": 1, "draft_tokens_total": 3}, "no_end"
    out = bench("--num-prompts", "2", "--save-result", "--result-filename", str(path))[1]
    assert "Speculative" not in out
    assert not any(name.startswith("spec_decode") for name in json.loads(path.read_text()))


def test_the_metrics_are_asked_for_with_the_key(server, bench, monkeypatch):
    server.drafts = {}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    main(["bench", "serve", "--port", str(server.port), *SHORT, "--num-prompts", "1"])
    assert [headers.get("Authorization") for headers in server.metrics_headers] == ["Bearer secret"] * 2


def test_speculation_is_asked_of_the_server_and_not_of_its_client(capsys):
    answer = usage_error(capsys, "--speculative-config", '{"method": "mtp"}')
    assert "start `omni-engine serve` with this flag" in answer
