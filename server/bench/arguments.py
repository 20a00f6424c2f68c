"""What the benchmark commands' flags have in common: a parser that knows vLLM's, and checked values."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arguments import CommandParser, parse_size

# Flags of `vllm bench` 0.32 that are not built.
_NOT_BUILT_NAMES = """
--asr-max-audio-len-sec --asr-min-audio-len-sec --blazedit-max-distance --blazedit-min-distance --burstgpt-path
--custom-output-len --custom-skip-chat-template --dataset --enable-multimodal-chat --hf-max-batch-size --hf-name --hf-
output-len --hf-split --hf-subset --lora-assignment --lora-modules --lora-path --plot-dataset-stats --plot-timeline
--probe-request-rate --profile --random-batch-size --random-cv --random-mm-base-items-per-request --random-mm-bucket-
config --random-mm-limit-mm-per-prompt --random-mm-num-mm-items-range-ratio --spec-bench-category --spec-bench-output-
len --timeline-itl-thresholds --use-beam-search
"""
_NOT_BUILT = frozenset(_NOT_BUILT_NAMES.split())


class BenchParser(CommandParser):
    """The parser of one benchmark; what only vLLM's has is answered as not supported yet."""

    def _unknown_flag(self, word: str) -> str:
        flag = word.split("=")[0].split(".")[0]
        return f"not supported yet: {flag}" if flag in _NOT_BUILT else super()._unknown_flag(word)


def positive_int(text: str) -> int:
    value = parse_size(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {text}")
    return value


def count(text: str) -> int:
    value = parse_size(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {text}")
    return value


def batch_sizes(text: str) -> tuple[int, ...]:
    """Counts with commas between them, in rising order: 1,8,32."""
    return tuple(sorted({positive_int(size) for size in text.split(",")}))


def positive_float(text: str) -> float:
    """A number above 0; inf is one."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0: {text}")
    return value


def non_negative_float(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0: {text}")
    return value


def ratio(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and under 1: {text}")
    return value


def key_value(text: str) -> tuple[str, str]:
    """KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"not KEY=VALUE: {text}")
    return key, value


def fixed_depth(speculative_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config for a benchmark of single steps, which are all alike: every step verifies all drafts. Raises
    ValueError where it asks for something else."""
    if not speculative_config:
        return {}
    if speculative_config.get("adaptive_depth"):
        raise ValueError(
            "this benchmark times steps of one depth, num_speculative_tokens; leave adaptive_depth out of "
            "--speculative-config, or set it to false: true"
        )
    return {**speculative_config, "adaptive_depth": False}


def write_json(path: str, value: Any) -> None:
    """Write `value` into a file of its own; raises OSError."""
    Path(path).write_text(json.dumps(value, indent=4) + "\n", encoding="utf-8")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not a number: {text}") from error
