"""The offline workloads W1 to W4: which prompts an engine gets, how many tokens it makes, and what is counted.

Standard library only, because workers run under the interpreters of other engines. Prompts are drawn token ids, anew
for every sample, so that no prefix cache serves one sample from another. Decoding is greedy, an end of text is ignored.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FIRST_TOKEN, LAST_TOKEN = 10, 31_990  # within the vocabulary of every checkpoint, and none of its special tokens

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], Sequence[Sequence[int]]]  # prompts, tokens to make for each -> those that each got


@dataclass(frozen=True)
class Workload:
    """`requests` prompts of `shared` equal and `own` different tokens, from each of which `output` tokens are made."""

    name: str
    requests: int
    shared: int
    own: int
    output: int
    metric: str  # tpot_ms | ttft_ms | output_tokens_per_second
    summary: str

    @property
    def lower_is_better(self) -> bool:
        return self.metric != "output_tokens_per_second"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", 32, 0, 128, 128, "output_tokens_per_second", "32 requests, 128 tokens in, 128 out, all at once"),
        Workload("W2b1", 1, 0, 32, 65, "tpot_ms", "time per token, batch 1, 32 tokens in"),
        Workload("W2b8", 8, 0, 32, 65, "tpot_ms", "time per token, batch 8, 32 tokens in"),
        Workload("W2b32", 32, 0, 32, 65, "tpot_ms", "time per token, batch 32, 32 tokens in"),
        Workload("W3", 1, 0, 2048, 1, "ttft_ms", "one prompt of 2048 tokens"),
        Workload("W4", 32, 512, 32, 32, "output_tokens_per_second", "32 requests that share 512 of 544 tokens, 32 out"),
    )
}


def draw_prompts(workload: Workload, seed: int) -> Prompts:
    """The prompts of one sample; other seeds draw other ones, shared part included."""
    generator = random.Random(f"{workload.name}/{seed}")

    def tokens(count: int) -> list[int]:
        return [generator.randint(FIRST_TOKEN, LAST_TOKEN) for _ in range(count)]

    shared = tokens(workload.shared)
    return [shared + tokens(workload.own) for _ in range(workload.requests)]


def measure(workload: Workload, seed: int, generate: Generate) -> float:
    """One sample of the workload's metric. Raises RuntimeError if an answer has another length than was asked for.

    A time per token is the time of a whole run less that of one that ends at the first token, so that prefill, queue
    and the way into and out of the engine are not in it.
    """
    if workload.metric == "tpot_ms":
        first = _seconds(draw_prompts(workload, 2 * seed), 1, generate)
        whole = _seconds(draw_prompts(workload, 2 * seed + 1), workload.output, generate)
        return (whole - first) / (workload.output - 1) * 1e3
    seconds = _seconds(draw_prompts(workload, seed), workload.output, generate)
    return seconds * 1e3 if workload.metric == "ttft_ms" else workload.requests * workload.output / seconds


def _seconds(prompts: Prompts, output: int, generate: Generate) -> float:
    begin = time.perf_counter()
    answers = generate(prompts, output)
    seconds = time.perf_counter() - begin
    lengths = [len(tokens) for tokens in answers]
    if lengths != [output] * len(prompts):
        raise RuntimeError(f"every answer must have {output} tokens: {lengths}")
    return seconds
