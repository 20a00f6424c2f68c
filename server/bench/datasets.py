"""The data sets of the benchmarks: what is asked for, how long the prompts are and how much of them is shared."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .arguments import count, non_negative_float, positive_float, positive_int, ratio
from .prompts import BenchRequest, PromptMaker
from .traces import read_trace, trace_requests

# vLLM leaves out ShareGPT conversations outside these lengths, in tokens.
_SHAREGPT_SHORTEST = 4
_SHAREGPT_LONGEST_PROMPT = 1024
_SHAREGPT_LONGEST = 2048


@dataclass(frozen=True)
class DatasetOptions:
    """What requests to make; the fields are the flags. Lengths are in tokens."""

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 1000
    seed: int = 0
    input_len: int | None = None
    output_len: int | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    disable_shuffle: bool = False
    no_oversample: bool = False
    trace: str | None = None
    trace_time_scale: float = 1.0
    trace_length_scale: float = 1.0

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> DatasetOptions:
        """The options of parsed flags; raises ValueError for flags that contradict each other."""
        given = vars(arguments)
        options = cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})
        if options.dataset_name == "trace" and options.trace is None:
            raise ValueError("a trace needs a file: give it as --trace FILE")
        if options.dataset_name == "sharegpt" and options.trace is None and options.dataset_path is None:
            raise ValueError("the sharegpt data set needs a file: give it as --dataset-path FILE")
        return options

    @property
    def text_only(self) -> bool:
        """Whether the prompts are given texts, so that there is no choice between text and token ids."""
        return self.trace is None and self.dataset_name == "sharegpt"

    @property
    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.natural_seed)

    @property
    def natural_seed(self) -> int:
        return self.seed % 2**63


def add_dataset_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """The flags of `DatasetOptions`, but for --seed, which some commands have already."""
    add = parser.add_argument_group("data set").add_argument
    add("--dataset-name", choices=("random", "sharegpt", "prefix_repetition", "trace"), default=default,
        help=f"kind of requests (default: {default})")  # fmt: skip
    add("--dataset-path", metavar="FILE", help="JSON of conversations for sharegpt")
    add("--num-prompts", type=positive_int, default=1000, help="number of requests (default: 1000)")
    add("--input-len", type=positive_int, help="prompt tokens, of random and prefix_repetition (there: the suffix)")
    add("--output-len", type=positive_int, help="tokens to generate, of every data set but a trace")
    add("--random-input-len", type=positive_int, default=1024, help="prompt tokens (default: 1024)")
    add("--random-output-len", type=positive_int, default=128, help="tokens to generate (default: 128)")
    add("--random-range-ratio", type=ratio, default=0.0,
        help="lengths vary evenly by this share to both sides; under 1 (default: 0)")  # fmt: skip
    add("--random-prefix-len", type=count, default=0,
        help="tokens that all prompts begin with, on top of the input length (default: 0)")  # fmt: skip
    add("--sharegpt-output-len", type=positive_int, help="tokens to generate (default: as in the conversation)")
    add("--prefix-repetition-prefix-len", type=positive_int, default=256, help="tokens per prefix (default: 256)")
    add("--prefix-repetition-suffix-len", type=positive_int, default=256, help="own tokens (default: 256)")
    add("--prefix-repetition-num-prefixes", type=positive_int, default=10, help="different prefixes (default: 10)")
    add("--prefix-repetition-output-len", type=positive_int, default=128, help="tokens to generate (default: 128)")
    add("--disable-shuffle", action="store_true", help="keep the order of the file, or of the prefixes")
    add("--no-oversample", action="store_true", help="send fewer requests rather than repeat those of a small file")
    add("--trace", metavar="FILE",
        help="requests like this trace's first --num-prompts: Azure's CSV or Mooncake's JSON lines")  # fmt: skip
    add("--trace-time-scale", type=non_negative_float, default=1.0,
        help="multiplies the trace's times: 0.5 is twice as fast, 0 all at once (default: 1)")  # fmt: skip
    add("--trace-length-scale", type=positive_float, default=1.0,
        help="multiplies the trace's lengths, for small models (default: 1)")  # fmt: skip


def make_requests(options: DatasetOptions, maker: PromptMaker) -> list[BenchRequest]:
    """The requests; the same options give the same ones. Raises ValueError or OSError."""
    if options.trace is not None:
        rows = read_trace(options.trace, options.num_prompts)
        return trace_requests(
            rows,
            maker,
            seed=options.natural_seed,
            time_scale=options.trace_time_scale,
            length_scale=options.trace_length_scale,
        )
    if options.dataset_name == "sharegpt":
        return _sharegpt(options, maker)
    return _random(options, maker) if options.dataset_name == "random" else _prefix_repetition(options, maker)


def _random(options: DatasetOptions, maker: PromptMaker) -> list[BenchRequest]:
    generator = options.generator
    prefix = maker.draw(generator, options.random_prefix_len)
    input_lens = _lengths(generator, options, options.input_len or options.random_input_len)
    output_lens = _lengths(generator, options, options.output_len or options.random_output_len)
    requests = []
    for input_len, output_len in zip(input_lens, output_lens, strict=True):
        prompt, length = maker.build([prefix, maker.draw(generator, input_len)])
        requests.append(BenchRequest(prompt, length, output_len))
    return requests


def _lengths(generator: np.random.Generator, options: DatasetOptions, middle: int) -> list[int]:
    low = max(1, math.floor(middle * (1 - options.random_range_ratio)))
    high = math.ceil(middle * (1 + options.random_range_ratio))
    return generator.integers(low, high, size=options.num_prompts, endpoint=True).tolist()


def _prefix_repetition(options: DatasetOptions, maker: PromptMaker) -> list[BenchRequest]:
    generator = options.generator
    num_prefixes = options.prefix_repetition_num_prefixes
    prefixes = [maker.draw(generator, options.prefix_repetition_prefix_len) for _ in range(num_prefixes)]
    suffix_len = options.input_len or options.prefix_repetition_suffix_len
    output_len = options.output_len or options.prefix_repetition_output_len
    requests = []
    # Each prefix as often as the others, one more of the first ones where the number does not divide.
    for prefix in sorted(index % num_prefixes for index in range(options.num_prompts)):
        prompt, length = maker.build([prefixes[prefix], maker.draw(generator, suffix_len)])
        requests.append(BenchRequest(prompt, length, output_len))
    return _shuffled(requests, options, generator)


def _sharegpt(options: DatasetOptions, maker: PromptMaker) -> list[BenchRequest]:
    assert options.dataset_path is not None  # `of` has checked it
    conversations = _conversations(options.dataset_path)
    conversations = _shuffled(conversations, options, options.generator)
    wanted_len = options.output_len or options.sharegpt_output_len
    requests: list[BenchRequest] = []
    for question, answer in conversations:
        if len(requests) == options.num_prompts:
            break
        prompt_len = maker.text_length(question)
        output_len = wanted_len or len(maker.tokens.encode(answer, add_special_tokens=False))
        if (
            _SHAREGPT_SHORTEST <= prompt_len <= _SHAREGPT_LONGEST_PROMPT
            and (wanted_len or output_len >= _SHAREGPT_SHORTEST)
            and prompt_len + output_len <= _SHAREGPT_LONGEST
        ):
            requests.append(BenchRequest(question, prompt_len, output_len))
    if not requests:
        raise ValueError(
            f"no conversation has a prompt of {_SHAREGPT_SHORTEST} to {_SHAREGPT_LONGEST_PROMPT} tokens and at most "
            f"{_SHAREGPT_LONGEST} with its answer: {options.dataset_path}"
        )
    if options.no_oversample:
        return requests
    return [requests[index % len(requests)] for index in range(options.num_prompts)]


def _conversations(path: str) -> list[tuple[str, str]]:
    """First question and first answer of every conversation of at least two turns."""
    try:
        entries: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        turns = [entry["conversations"] for entry in entries]
        return [(str(turn[0]["value"]), str(turn[1]["value"])) for turn in turns if len(turn) >= 2]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f'not a ShareGPT file, which is a JSON list of {{"conversations": [{{"value": …}}, …]}}: {path}'
        ) from error


def _shuffled(items: list[Any], options: DatasetOptions, generator: np.random.Generator) -> list[Any]:
    if options.disable_shuffle:
        return items
    return [items[index] for index in generator.permutation(len(items))]
