"""`omni-engine graph lower` as a user runs it: what it prints and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_engine.server.cli import main

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 12,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(QWEN3))
    return folder


def lower(model: Path, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    status = main(["graph", "lower", str(model), "--target", "npu", *map(str, words)])
    output, errors = capsys.readouterr()
    return status, output, errors


def test_the_summary_counts_every_node_once(model, capsys, tmp_path, graphs) -> None:
    file = tmp_path / "graph.txt"
    status, output, _ = lower(model, capsys, "--gear", 8, "--layers", 3, "--json", "-o", file)
    summary = json.loads(output)
    assert status == 0 and summary["layers"] == 3 and summary["gear"] == "8x1 greedy"
    parts = summary["nodes_per_part"]
    assert list(parts) == ["before the layers", "layer 0", "layer 1", "layer 2", "head and sampling"]
    assert parts["layer 1"] == parts["layer 2"]
    assert sum(parts.values()) == sum(summary["nodes"].values())
    assert summary["nodes"]["ScatterPaKvCache"] == 3
    layer = 256 * (8 + 2 * 2) * 64 + 8 * 64 * 256 + 3 * 256 * 512 + 2 * 256 + 2 * 64
    assert summary["weight_bytes"] == 2 * (3 * layer + 1024 * 256 + 256)
    assert summary["cache_bytes_per_token"] == 3 * 2 * 2 * 64 * 2
    lines = file.read_text().splitlines()
    assert sum(" = MatMul(" in line for line in lines) == summary["nodes"]["MatMul"]
    assert sum(line.endswith(" mutated") for line in lines) == 3 * 2 + 2
    assert all("TensorMove" not in line for line in lines)


def test_the_floor_is_that_of_the_chip(model, capsys, graphs) -> None:
    floors = [
        json.loads(lower(model, capsys, "--gear", 1, "--layers", 1, "--json", "--chip", chip, "--context-len", 1000)[1])
        for chip in ("910B", "910C")
    ]
    assert floors[0]["floor"]["seconds"] / floors[1]["floor"]["seconds"] == pytest.approx(1.6 / 1.2)
    layer_and_head = floors[1]["weight_bytes"]
    cache = 1001 * floors[1]["cache_bytes_per_token"]
    assert floors[1]["floor"]["seconds"] == pytest.approx((layer_and_head + cache) / 1.6e12, rel=1e-3)


def test_the_terminal_shows_the_graph_and_its_tier(model, capsys, graphs) -> None:
    status, output, _ = lower(model, capsys, "--gear", 2, "--layers", 1, "--sampler", "gumbel")
    assert status == 0 and "BitwiseXor(" in output and "FusedInferAttentionScore" in output
    assert output.splitlines()[-1].startswith("Lowered without hardware")
