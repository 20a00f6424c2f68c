"""The commands under `omni-engine bench`, and their help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_COMMANDS = {
    "serve": "send requests to a running OpenAI server and time the answers",
    "throughput": "complete many prompts in this process, as fast as it goes",
    "latency": "time one batch of equal requests, again and again",
    "startup": "time how long an engine takes to start, in fresh processes",
    "graph": "time decode steps, compiled and eager, against the floor of the machine",
    "host": "time what a decode step takes on the host, beside its graph",
    "speculative": "compare depths of speculation with none, round by round",
}


def run_bench(words: Sequence[str]) -> int:
    """Run `omni-engine bench` with these words; returns the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    command, rest = words[0], words[1:]
    if command not in _COMMANDS:
        print(
            f"omni-engine bench: error: unknown benchmark, choose from {', '.join(_COMMANDS)}: {command}",
            file=sys.stderr,
        )
        return 2
    if command == "serve":
        from .serve import run_serve_bench
        from .serve_arguments import serve_bench_parser

        parser = serve_bench_parser()
        return run_serve_bench(parser, parser.parse(rest))
    if command == "throughput":
        from .throughput import run_throughput, throughput_parser

        parser = throughput_parser()
        return run_throughput(parser, parser.parse(rest))
    if command == "latency":
        from .latency import latency_parser, run_latency

        parser = latency_parser()
        return run_latency(parser, parser.parse(rest))
    if command == "graph":
        from .graph import graph_parser, run_graph

        parser = graph_parser()
        return run_graph(parser, parser.parse(rest))
    if command == "host":
        from .host import host_parser, run_host

        return run_host(host_parser().parse(rest))
    if command == "speculative":
        from .speculative import run_speculative, speculative_parser

        parser = speculative_parser()
        return run_speculative(parser, parser.parse(rest))
    from .startup import run_startup, startup_parser

    parser = startup_parser()
    return run_startup(parser, parser.parse(rest))


def _overview() -> str:
    commands = "\n".join(f"  {name:<12}{text}" for name, text in _COMMANDS.items())
    hint = "omni-engine bench COMMAND --help shows its options."
    return f"usage: omni-engine bench COMMAND [options]\n\n{commands}\n\n{hint}"
