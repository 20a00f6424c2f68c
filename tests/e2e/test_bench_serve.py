"""`omni-engine bench serve` against `omni-engine serve`: exact token counts over HTTP."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())"]


@pytest.fixture(scope="module")
def port(make_checkpoint):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = make_checkpoint("DeepseekV3ForCausalLM")
    words = ["serve", str(path), "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield port
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def bench(port, tmp_path, *words):
    file = tmp_path / "result.json"
    command = [
        *COMMAND, "bench", "serve", "--port", str(port), "--ready-check-timeout-sec", "60", "--ignore-eos",
        "--disable-tqdm", "--save-result", "--save-detailed", "--result-filename", str(file), *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done, json.loads(file.read_text())


@pytest.mark.parametrize("form", ["token-ids", "text"])
def test_the_server_counts_the_tokens_that_were_asked_for(port, tmp_path, form):
    done, result = bench(
        port, tmp_path, "--num-prompts", "6", "--input-len", "40", "--output-len", "5", "--random-prefix-len", "16",
        "--random-range-ratio", "0.25", "--prompt-format", form, "--max-concurrency", "3",
    )  # fmt: skip
    assert "Successful requests:                     6 " in done.stdout
    assert "could not be adjusted" not in done.stderr
    assert all(46 <= length <= 66 for length in result["input_lens"]) and len(set(result["input_lens"])) > 1
    assert result["total_input_tokens"] == sum(result["input_lens"])
    assert all(3 <= length <= 7 for length in result["output_lens"])
    # A token may bring no text (half a character), but brings a chunk.
    assert [len(gaps) for gaps in result["itls"]] == [length - 1 for length in result["output_lens"]]
    assert result["max_concurrent_requests"] <= 3


def test_chat_with_the_servers_tokenizer(port, tmp_path):
    words = ("--backend", "openai-chat", "--skip-tokenizer-init", "--num-prompts", "3", "--input-len", "20")
    done, result = bench(port, tmp_path, *words, "--output-len", "4", "--request-rate", "20")
    assert "/tokenize" in done.stderr
    assert result["output_lens"] == [4, 4, 4]
    assert all(length > 20 for length in result["input_lens"])  # with the template's own tokens
