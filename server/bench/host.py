"""`omni-engine bench host`: the time a decode step takes on the host, beside the graph that it calls.

The graph is a stand-in that returns at once, so what is left is the engine's own: nothing has to be subtracted, and the
figure does not depend on a model. It is a benchmark of its own because it needs no checkpoint and no compiler.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...engine.config import EngineArgs, EngineConfig
from ...engine.graphs.decode_loop import DecodeLoop, StepTimes, TimedGraphs
from ...engine.speculation.config import choose_speculation
from ..arguments import parse_json_object
from .arguments import BenchParser, batch_sizes, count, fixed_depth, positive_int, write_json

BLOCK_SIZE = 16
# As small as a model can be: its weights and cache are needed to start, and no step computes with them.
NEAR_ZERO_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 8,
    "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip
# The same with a layer that predicts, where that is what drafts.
NEAR_ZERO_PREDICTING_MODEL = {
    **NEAR_ZERO_MODEL, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": None,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip
# What a step may cost on the host, in microseconds.
TARGET_STEP, TARGET_REQUEST = 150.0, 3.0
ROWS = {
    "schedule": "schedule", "step_input": "StepInput", "launch": "padding", "step_output": "StepOutput",
    "update": "update",
}  # fmt: skip


def host_parser() -> BenchParser:
    parser = BenchParser(
        "bench host", "", "Time what a decode step takes beside its graph, with one that does nothing."
    )
    add = parser.add_argument_group("benchmark").add_argument
    add("--batch-sizes", type=batch_sizes, default=(1, 32, 256), help="requests per step (default: 1,32,256)")
    add("--context-len", type=positive_int, default=128, help="tokens stored before the first step (default: 128)")
    add("--num-steps", type=positive_int, default=500, help="steps that are timed (default: 500)")
    add("--num-steps-warmup", type=count, default=100, help="steps before them (default: 100)")
    add("--sampler", choices=("greedy", "gumbel"), default="greedy",
        help="what the requests ask for; sampling is part of the graph for both (greedy)")  # fmt: skip
    add("--speculative-config", type=parse_json_object, default={}, metavar="JSON",
        help="speculate by mtp or ngram, all drafts being accepted, which is the most work for the host")  # fmt: skip
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    return parser


def run_host(arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints a table and saves JSON."""
    arguments.speculative_config = fixed_depth(arguments.speculative_config)
    num_drafts = _num_drafts(arguments.speculative_config)
    results = []
    num_steps = arguments.num_steps_warmup + arguments.num_steps
    total = num_steps * len(arguments.batch_sizes)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="step", disable=arguments.disable_tqdm) as bar:
        for size in arguments.batch_sizes:
            bar.set_description(f"Batch size {size}")
            loop = _loop(Path(folder), arguments, size, num_steps * (1 + num_drafts))
            times: list[StepTimes] = []
            cpu_seconds: list[float] = []
            for _ in range(num_steps):
                start = time.thread_time()
                times.append(loop.step())
                cpu_seconds.append(time.thread_time() - start)
                bar.update()
            first = arguments.num_steps_warmup
            brought = (loop.context_len - arguments.context_len) / num_steps
            results.append(host_result(size, times[first:], cpu_seconds[first:], brought))
    print(host_table(results))
    if arguments.output_json is not None:
        write_json(arguments.output_json, {
            "context_len": arguments.context_len, "num_steps": arguments.num_steps, "sampler": arguments.sampler,
            **({"speculative_config": arguments.speculative_config} if num_drafts else {}),
            "target_us": {"per_step": TARGET_STEP, "per_request": TARGET_REQUEST}, "results": results,
        })  # fmt: skip
    return 0


def _num_drafts(speculative_config: dict[str, Any]) -> int:
    """Drafts per step and request; ValueError for a method that needs a model."""
    choice = choose_speculation(speculative_config)
    if choice is None:
        return 0
    if choice.method == "draft_model":
        raise ValueError(
            "this benchmark needs no model, nor one that drafts: what the host does is the same by mtp or ngram; take "
            f"one of them as the method of --speculative-config: {choice.method}"
        )
    return choice.num_drafts


def _loop(folder: Path, arguments: argparse.Namespace, num_requests: int, num_tokens: int) -> DecodeLoop:
    """A loop whose requests decode at most `num_tokens`."""
    import torch

    from ...engine.core import EngineCore
    from ...engine.graphs.runner import CaptureReport, GraphRunner

    class InstantGraphs:
        """A backend whose graphs compute nothing: every token is the same, and every draft accepted."""

        name = "instant"

        def start(self, runner: GraphRunner) -> None:
            for key in runner.keys:
                tokens = torch.ones(key.num_requests, dtype=torch.int64)
                if key.tokens_per_request > 1:  # and how many drafts there were
                    counts = torch.full((key.num_requests, 1), key.tokens_per_request - 1)
                    tokens = torch.cat((tokens.unsqueeze(1).expand(-1, key.tokens_per_request), counts), dim=1)
                runner.install(lambda tokens=tokens: tokens, CaptureReport(key, 0.0))

        def demand(self, key: Any) -> None:
            raise AssertionError(f"every gear is there from the start: {key}")

        def wait(self, timeout: float | None = None) -> bool:
            return True

        def close(self) -> None:
            pass

    length = arguments.context_len + num_tokens + 2
    blocks = num_requests * -(-length // BLOCK_SIZE) + 1
    model = NEAR_ZERO_PREDICTING_MODEL if arguments.speculative_config else NEAR_ZERO_MODEL
    (folder / "config.json").write_text(json.dumps({**model, "max_position_embeddings": length}))
    args = EngineArgs(
        str(folder), load_format="dummy", device="cpu", skip_tokenizer_init=True, max_num_seqs=num_requests,
        block_size=BLOCK_SIZE, num_gpu_blocks_override=blocks, enforce_eager=True,
        speculative_config=arguments.speculative_config,
    )  # fmt: skip
    core = EngineCore.load(EngineConfig.from_args(args))
    graphs = core.runner.graphs
    graphs.use(InstantGraphs(), (num_requests,))
    return DecodeLoop(
        core, TimedGraphs(graphs), num_requests=num_requests, context_len=arguments.context_len,
        max_steps=arguments.num_steps_warmup + arguments.num_steps, sampler=arguments.sampler,
    )  # fmt: skip


def host_result(
    num_requests: int, times: Sequence[StepTimes], cpu_seconds: Sequence[float], tokens_per_step: float = 1.0
) -> dict[str, Any]:
    """Microseconds per step, and where a step brings a request several tokens, per one of these. The total's median is
    of whole steps, not the sum of the rows' medians. The CPU time is what the total would be on a machine with nothing
    else to do: no step waits for anything."""
    rows = {
        field.name: _per_step([getattr(step, field.name) for step in times], 50)
        for field in fields(StepTimes)
        if field.name in ROWS
    }
    totals = [step.total for step in times]
    total = _per_step(totals, 50)
    per_token: dict[str, Any] = {}
    if tokens_per_step > 1:
        per_token = {
            "tokens_per_step": tokens_per_step,
            "rows_us_per_token": {name: value / tokens_per_step for name, value in rows.items()},
            "total_us_per_token": total / tokens_per_step,
        }
    return {
        "batch_size": num_requests,
        **per_token,
        "rows_us": rows,
        "total_us": total,
        "p10_us": _per_step(totals, 10),
        "p90_us": _per_step(totals, 90),
        "cpu_us": _per_step(cpu_seconds, 50),
        "target_us": TARGET_STEP + TARGET_REQUEST * num_requests,
    }


def _per_step(seconds: Sequence[float], percentile: float) -> float:
    """Microseconds. Every 16 steps all requests need a block at once, which a plain median would leave out: the
    percentile is taken over the first steps of all blocks, over the second ones and so on, and these are averaged."""
    period = min(BLOCK_SIZE, len(seconds))
    values = np.array(seconds[: len(seconds) // period * period]).reshape(-1, period)
    return float(np.percentile(values, percentile, axis=0).mean()) * 1e6


def host_table(results: list[dict[str, Any]]) -> str:
    """Microseconds per step, a column per batch size; where steps bring several tokens, per token too."""
    head = f"{'Host time per decode step (µs)':<34}" + "".join(
        f"{'batch ' + str(r['batch_size']):>12}" for r in results
    )
    lines = [head, "-" * len(head)]
    for name, label in ROWS.items():
        lines.append(f"{label:<34}" + "".join(f"{result['rows_us'][name]:>12.1f}" for result in results))
    lines.append("-" * len(head))
    totals = {"total_us": "whole step, median", "p10_us": "  p10", "p90_us": "  p90", "cpu_us": "  CPU time, median"}
    for name, label in totals.items():
        lines.append(f"{label:<34}" + "".join(f"{result[name]:>12.1f}" for result in results))
    target = f"target ({TARGET_STEP:.0f} + {TARGET_REQUEST:.0f} per request)"
    lines.append(f"{target:<34}" + "".join(f"{result['target_us']:>12.1f}" for result in results))
    if "tokens_per_step" in results[0]:
        title = f"Per token of a request ({results[0]['tokens_per_step']:g} in a step)"
        lines += ["", title, "-" * len(head)]
        for name, label in ROWS.items():
            cells = (f"{result['rows_us_per_token'][name]:>12.1f}" for result in results)
            lines.append(f"{label:<34}" + "".join(cells))
        cells = (f"{result['total_us_per_token']:>12.1f}" for result in results)
        lines.append(f"{'whole step, median':<34}" + "".join(cells))
    return "\n".join(lines)
