"""`omni-engine serve`: from the command line to a listening socket, and on to the server.

What this module imports is what the first answer to /health waits for, so it is little; the server itself is imported
once the socket listens.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from ..engine.core_launch import launch_core
from ..engine.imports import quick_imports
from ..engine.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, set_up_logging
from ..engine.phases import PhaseTimer, process_age
from ..engine.tracing import otlp_exporter
from .arguments import engine_args
from .config_file import config_text, parse_with_config
from .early import EarlyAnswers
from .serve_arguments import header_limits, serve_parser, server_settings, step_timeout, take_model_argument, tls_files
from .settings import ServerSettings
from .sockets import bind, bind_unix, remove_unix


def run_serve(words: Sequence[str]) -> int:
    """Serve as the command line says, until a signal; returns the exit status."""
    parser = serve_parser()
    arguments = parse_with_config(parser, words)
    for variable, value in ((LEVEL_VARIABLE, arguments.log_level), (FORMAT_VARIABLE, arguments.log_format)):
        if value is not None:
            os.environ[variable] = value
    set_up_logging()
    take_model_argument(parser, arguments)
    args = engine_args(arguments)
    if arguments.shutdown_timeout < 0:
        parser.error(f"--shutdown-timeout must not be negative: {arguments.shutdown_timeout}")
    settings = server_settings(arguments, args)
    tls = tls_files(parser, arguments)
    limits = header_limits(parser, arguments)
    hang_timeout = step_timeout(arguments)
    endpoint = arguments.otlp_traces_endpoint
    exporter = otlp_exporter(endpoint) if endpoint else None
    if arguments.print_config:
        print(config_text(arguments, args), end="")
        return 0
    tls_context = None if tls is None else tls.context()
    listener = bind(arguments.host, arguments.port) if arguments.uds is None else bind_unix(arguments.uds)
    with contextlib.ExitStack() as stack:
        stack.enter_context(listener)
        # Until the event loop takes signals over, an end is an orderly one too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        if arguments.uds is not None:
            stack.callback(remove_unix, arguments.uds)
        # A TLS handshake needs the event loop, so its clients wait for the server itself.
        early = stack.enter_context(EarlyAnswers(listener, _early_paths(settings))) if tls is None else None
        timer = PhaseTimer(process_age())
        timer.done("until the port was open")
        core = launch_core()
        stack.callback(core.kill)
        with quick_imports():
            import asyncio

            from .lifecycle import Server

        timer.done("imports")
        server = Server(
            args,
            settings,
            listener,
            arguments.shutdown_timeout,
            tls=tls_context,
            refreshed_tls=tls if arguments.enable_ssl_refresh else None,
            limits=limits,
            restart_core=arguments.restart_core,
            hang_timeout=hang_timeout,
            core=core,
            early=early,
            timer=timer,
            exporter=exporter,
        )
        asyncio.run(server.run())
    return 0


def _early_paths(settings: ServerSettings) -> tuple[str, ...]:
    return tuple(prefix + path for prefix in ("", settings.root_path) for path in ("/health", "/ping"))
