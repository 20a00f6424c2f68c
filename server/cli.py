"""The command line: `omni-engine serve | generate | chat | run-batch | bench | compile | graph | doctor`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from .. import __version__
from ..engine.logs import logs_json, set_up_logging

_COMMANDS = {
    "serve": "serve a model over HTTP with the OpenAI API",
    "generate": "complete a prompt on the terminal",
    "chat": "talk to a model on the terminal",
    "run-batch": "answer a file of requests in OpenAI's batch format",
    "bench": "measure an engine or a running server",
    "compile": "compile a model's decode graphs ahead",
    "graph": "list, check, carry and remove compiled graphs; lower a step for an NPU",
    "doctor": "check an NPU from the bottom up: machine, operators, a layer, a gear",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 for what went wrong, 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] in ("-v", "--version"):
        print(__version__)
        return 0
    if words[0] not in _COMMANDS:
        print(f"omni-engine: error: unknown command, choose from {', '.join(_COMMANDS)}: {words[0]}", file=sys.stderr)
        return 2
    set_up_logging()
    try:
        return _run(words[0], words[1:])
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        if logs_json():
            logging.getLogger(__name__).error(_one_line(error))
        else:
            print(f"omni-engine {words[0]}: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _run(command: str, words: list[str]) -> int:
    if command == "serve":
        from .serve import run_serve

        return run_serve(words)
    if command == "bench":
        from .bench.commands import run_bench

        return run_bench(words)
    if command == "run-batch":
        from .run_batch import run_batch

        return run_batch(words)
    if command == "graph":
        from .graph_commands import run_graph

        return run_graph(words)
    if command == "doctor":
        from .doctor_command import run_doctor

        return run_doctor(words)
    if command == "compile":
        from .compile_command import compile_parser, run_compile

        parser = compile_parser()
        return run_compile(parser, parser.parse(words))
    from .terminal import chat_parser, generate_parser, run_chat, run_generate

    parser = generate_parser() if command == "generate" else chat_parser()
    run = run_generate if command == "generate" else run_chat
    return run(parser, parser.parse(words))


def _overview() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in _COMMANDS.items())
    hint = "omni-engine COMMAND --help shows its options."
    return f"usage: omni-engine COMMAND [options] | --version\n\n{commands}\n\n{hint}"


def _one_line(error: Exception) -> str:
    """The cause and its remedy; errors of unknown origin are told with their kind."""
    text = " ".join(str(error).split())
    expected = isinstance(error, (ValueError, OSError, RuntimeError)) and text
    return text if expected else f"{type(error).__name__}: {text} (OMNI_ENGINE_LOG_LEVEL=DEBUG shows where)"


if __name__ == "__main__":
    sys.exit(main())
