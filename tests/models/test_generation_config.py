"""Sampling defaults and end-of-sequence ids of generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_engine.models.checkpoint import Checkpoint
from omni_engine.models.generation_config import extra_eos_token_ids, sampling_defaults

FILE = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [7, 9],
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "min_p": None,
    "max_new_tokens": 512,
    "transformers_version": "5.0.0",
}


def checkpoint(generation: dict[str, Any] | None = FILE) -> Checkpoint:
    return Checkpoint(Path("m"), {}, generation)


def test_vllms_fields_are_taken_under_their_sampling_names() -> None:
    assert sampling_defaults(checkpoint()) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 512}


def test_the_source_vllm_takes_nothing_from_the_file_but_its_eos_ids() -> None:
    assert sampling_defaults(checkpoint(), "vllm") == {}
    assert extra_eos_token_ids(checkpoint(), "vllm") == (7, 9)


def test_overrides_go_before_the_file_and_count_without_it() -> None:
    assert sampling_defaults(checkpoint(), "auto", {"temperature": 0.1, "top_k": None})["temperature"] == 0.1
    assert "top_k" not in sampling_defaults(checkpoint(), "auto", {"top_k": None})
    assert sampling_defaults(checkpoint(), "vllm", {"max_new_tokens": 3}) == {"max_tokens": 3}


def test_a_folder_as_source_replaces_the_models_file(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.5, "eos_token_id": 3}))
    assert sampling_defaults(checkpoint(), str(tmp_path)) == {"top_p": 0.5}
    assert extra_eos_token_ids(checkpoint(), str(tmp_path)) == (3,)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="auto, vllm or a folder"):
        sampling_defaults(checkpoint(), str(tmp_path))


def test_a_model_without_the_file_has_no_defaults() -> None:
    assert sampling_defaults(checkpoint(None)) == {}
    assert extra_eos_token_ids(checkpoint(None)) == ()


@pytest.mark.parametrize("key", ["temperature", "top_k", "max_new_tokens", "repetition_penalty"])
@pytest.mark.parametrize("value", ["hot", True, [1], float("inf")])
def test_a_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"generation_config.json: {key} must be"):
        sampling_defaults(checkpoint({key: value}))
