"""`omni-engine graph lower`: the graph that a decode step becomes on an NPU, on a machine that has none."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.config import EngineArgs, EngineConfig
from ..engine.floor import decode_cost, floor_seconds
from ..engine.npu.chips import CHIPS, chip_rates
from ..engine.npu.simulated import load_simulated_npu
from .arguments import CommandParser, add_engine_arguments, engine_args, parse_size
from .graph_commands import format_bytes, format_table
from .serve_arguments import take_model_argument

if TYPE_CHECKING:
    from ..engine.npu.lowering import LoweredStep

_MEANING = (
    "Lower a decode step with torch-npu's own TorchAir on a simulated device, which computes nothing: no weights are "
    "read, and nothing is said about how fast or how right the step would be. Of the model only config.json is needed."
)
_SAMPLERS = ("greedy", "gumbel", "split")


def run_lower(words: Sequence[str]) -> int:
    parser = CommandParser("graph lower", "[MODEL]", _MEANING)
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("lower").add_argument
    add("--gear", metavar="N", type=_positive, required=True, help="requests per step")
    add("--target", choices=("npu",), required=True, help="the device to lower for")
    add(
        "--layers", metavar="L", type=_positive, help="only so many layers, of which one is dense if the first ones are"
    )
    add("--sampler", choices=_SAMPLERS, default="greedy", help="what stands behind the logits (greedy)")
    add("--chip", choices=tuple(CHIPS), default="910C", help="whose published peaks the floor is reckoned with (910C)")
    add(
        "--context-len",
        metavar="TOKENS",
        type=parse_size,
        default=4096,
        help="stored per request, for the floor (4096)",
    )
    add("-o", "--output", metavar="FILE", type=Path, help="write the graph here and not on the terminal")
    add("--json", action="store_true", help="print the summary as JSON")
    add_engine_arguments(parser)
    arguments = parser.parse(words)
    take_model_argument(parser, arguments)
    args = replace(engine_args(arguments), load_format="dummy", skip_tokenizer_init=True)
    config = _config(args, arguments.layers)
    load_simulated_npu()
    from ..engine.graphs.runner import GraphKey
    from ..engine.npu.lowering import lower_step

    tokens = 1 if config.speculation is None else 1 + config.speculation.choice.num_drafts
    step = lower_step(config, GraphKey(arguments.gear, tokens, arguments.sampler))
    text = step.text
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    summary = _summary(config, step, arguments)
    if arguments.json:
        print(json.dumps(summary, indent=2))
        return 0
    if arguments.output is None:
        print(text)
    _show(summary)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer: {text}")
    return int(text)


def _config(args: EngineArgs, layers: int | None) -> EngineConfig:
    config = EngineConfig.from_args(args)
    if layers is None or layers >= config.model.num_layers:
        return config
    fewer: dict[str, Any] = {"num_hidden_layers": layers}
    if config.checkpoint.config.get("first_k_dense_replace"):
        fewer["first_k_dense_replace"] = 1
    return EngineConfig.from_args(replace(args, hf_overrides={**args.hf_overrides, **fewer}))


def _summary(config: EngineConfig, step: LoweredStep, arguments: argparse.Namespace) -> dict[str, Any]:
    cost = decode_cost(
        config.model, step.key.num_requests, arguments.context_len, step.key.tokens_per_request, dtype=config.dtype
    )
    floor = floor_seconds(cost, chip_rates(arguments.chip))
    streams = {node.stream for node in step.graph.nodes}
    return {
        "model": config.model.architecture,
        "gear": str(step.key),
        "layers": config.model.num_layers,
        "lowering_seconds": round(step.seconds, 1),
        "nodes": dict(step.graph.work.most_common()),
        "nodes_per_part": step.nodes_per_part,
        "streams": len(streams),
        "weight_bytes": step.weight_bytes,
        "cache_bytes_per_token": step.cache_bytes_per_token,
        "cann_operators": step.operators,
        "cann_optional": step.optional,
        "floor": {
            "chip": arguments.chip,
            "seconds": floor.seconds,
            "bound": floor.bound,
            "context_len": arguments.context_len,
            "source": CHIPS[arguments.chip].source,
        },
    }


def _show(summary: dict[str, Any]) -> None:
    floor = summary["floor"]
    print(format_table(("node", "count"), [(name, str(count)) for name, count in summary["nodes"].items()]))
    print()
    print(format_table(("part", "nodes"), [(name, str(count)) for name, count in summary["nodes_per_part"].items()]))
    print()
    facts = {
        "model": f"{summary['model']}, {summary['layers']} layers, gear {summary['gear']}",
        "nodes": f"{sum(summary['nodes'].values())} in one graph, lowered in {summary['lowering_seconds']} s",
        "streams": str(summary["streams"]),
        "weights": format_bytes(summary["weight_bytes"]),
        "KV cache": f"{format_bytes(summary['cache_bytes_per_token'])} per token",
        "CANN operators": ", ".join(summary["cann_operators"]) or "none asked for by name",
        "CANN optional": ", ".join(summary["cann_optional"]) or "none",
        "floor": f"{floor['seconds'] * 1e3:.3f} ms on {floor['chip']} with {floor['context_len']} tokens stored per "
        f"request, bound by {floor['bound']}; drafting is not counted ({floor['source']})",
    }
    print("\n".join(f"{name:<16}{text}" for name, text in facts.items()))
    print("Lowered without hardware: nothing has been computed, and CANN has not seen the graph.")
