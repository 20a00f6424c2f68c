"""`omni-engine compile`: make all compiled graphs of a model ahead, so that no start has to."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..engine.config import EngineArgs
from .arguments import CommandParser, add_engine_arguments, engine_args
from .graph_commands import count_graphs, format_bytes, format_table, printable
from .serve_arguments import take_model_argument

if TYPE_CHECKING:
    from ..engine.graphs.compile import CompiledGraph

_COLUMNS = ("gear", "sampler", "status", "seconds", "size")
_MEANING = (
    "Compile the decode steps of a model into the graph cache. Give the engine flags that it will be served with: what "
    "changes a graph changes its key."
)


def compile_parser() -> CommandParser:
    parser = CommandParser("compile", "[MODEL]", _MEANING)
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("compile").add_argument
    add("--json", action="store_true", help="print JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)
    return parser


def run_compile(parser: CommandParser, arguments: argparse.Namespace) -> int:
    """Fill the cache; the exit status is 1 if a graph cannot be compiled."""
    take_model_argument(parser, arguments)
    return compile_graphs(engine_args(arguments), as_json=arguments.json, show_bar=not arguments.disable_tqdm)


def compile_graphs(args: EngineArgs, *, as_json: bool, show_bar: bool) -> int:
    from ..engine.graphs.compile import compile_missing  # brings torch

    start = time.monotonic()
    with tqdm(desc="Compiling", unit="graph", disable=not show_bar) as bar:
        shown: list[tuple[int, int, str]] = []

        def on_progress(done: int, total: int, current: str) -> None:
            if shown[-1:] == [(done, total, current)] and not sys.stderr.isatty():
                return  # a log file gets a line per change, a terminal its seconds
            shown[:] = [(done, total, current)]
            bar.total = total
            bar.n = done
            bar.set_description(f"Compiling {current}" if current else "Compiled")

        graphs = compile_missing(args, on_progress)
    if as_json:
        print(json.dumps([_record(graph) for graph in graphs], indent=2))
    else:
        if graphs:
            print(format_table(_COLUMNS, [_row(graph) for graph in graphs]))
        print(f"{count_graphs(graphs)} in {time.monotonic() - start:.0f} s")
    failed = [graph for graph in graphs if graph.error is not None]
    if failed:
        cause = printable(failed[0].error or "")
        print(
            f"omni-engine compile: error: {len(failed)} of {count_graphs(graphs)} cannot be compiled, so their steps "
            f"would run eager: {cause}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _row(graph: CompiledGraph) -> tuple[str, ...]:
    key = graph.key
    gear = f"{key.num_requests} x {key.tokens_per_request}"
    if graph.error is not None:
        return gear, key.sampler, f"failed: {printable(graph.error)}", "-", "-"
    status = "was there" if graph.from_cache else "compiled"
    return gear, key.sampler, status, f"{graph.seconds:.1f}", format_bytes(graph.num_bytes)


def _record(graph: CompiledGraph) -> dict[str, Any]:
    return {
        **graph.key._asdict(),
        "from_cache": graph.from_cache,
        "seconds": graph.seconds,
        "bytes": graph.num_bytes,
        "error": graph.error,
    }
