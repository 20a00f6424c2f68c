"""`omni-engine serve`: its flags, and the life of the server from bind to shutdown."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from .. import __version__
from ..engine.async_engine import AsyncEngine
from ..engine.config import EngineArgs
from .app import build_app
from .arguments import CommandParser, add_engine_arguments, engine_args, parse_json_object
from .context import ServerSettings

LISTEN_BACKLOG = 2048
# Once their requests are aborted, handlers need only this long to write their last words.
HANDLER_GRACE_SECONDS = 2.0
DEATH_POLL_SECONDS = 0.5


def serve_parser() -> CommandParser:
    parser = CommandParser("serve", "MODEL", "Serve a model over HTTP with the OpenAI API.")
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", help="address to listen on (default: all interfaces)")
    add("--port", type=int, default=8000, help="port to listen on; 0: any free one (default: 8000)")
    add("--served-model-name", nargs="+", default=[], help="names of the model in the API; the first is reported")
    add("--api-key", nargs="+", default=[], help="keys of which clients must send one (or set VLLM_API_KEY)")
    add("--chat-template", help="Jinja file, or the template itself, if not the model's own")
    add("--response-role", default="assistant", help="role of the answers of chat completions (default: assistant)")
    add("--shutdown-timeout", type=float, default=0.0,
        help="seconds that running requests may take to end after SIGTERM (default: 0, they are aborted)")  # fmt: skip
    add("--trust-request-chat-template", action="store_true", help="let requests bring a chat template of their own")
    add("--default-chat-template-kwargs", type=parse_json_object, default={},
        help="JSON of variables for the chat template, where a request sets none")  # fmt: skip
    add("--return-tokens-as-token-ids", action="store_true", help='show the tokens of logprobs as "token_id:N"')
    add("--enable-prompt-tokens-details", action="store_true", help="report cached prompt tokens in usage")
    add("--enable-force-include-usage", action="store_true", help="send usage in every stream, in every chunk")
    add("--enable-request-id-headers", action="store_true", help="send X-Request-Id with every response")
    add_engine_arguments(parser)
    return parser


def run_serve(parser: CommandParser, arguments: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit status."""
    take_model_argument(parser, arguments)
    args = engine_args(arguments)
    if arguments.shutdown_timeout < 0:
        parser.error(f"--shutdown-timeout must not be negative: {arguments.shutdown_timeout}")
    settings = ServerSettings(
        model=args.model,
        served_model_names=tuple(arguments.served_model_name),
        api_keys=tuple(key for key in arguments.api_key or [os.environ.get("VLLM_API_KEY", "")] if key),
        chat_template=read_chat_template(arguments.chat_template),
        response_role=arguments.response_role,
        trust_request_chat_template=arguments.trust_request_chat_template,
        default_chat_template_kwargs=arguments.default_chat_template_kwargs,
        return_tokens_as_token_ids=arguments.return_tokens_as_token_ids,
        enable_prompt_tokens_details=arguments.enable_prompt_tokens_details,
        enable_force_include_usage=arguments.enable_force_include_usage,
        enable_request_id_headers=arguments.enable_request_id_headers,
    )
    with bind(arguments.host, arguments.port) as listener:
        asyncio.run(_Server(args, settings, listener, arguments.shutdown_timeout).run())
    return 0


def take_model_argument(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """The model may be given by position or as --model, but not as two different ones."""
    given = arguments.model_argument
    if given is not None:
        if getattr(arguments, "model", given) != given:
            parser.error(f"two models are given, {given} and --model: {arguments.model}")
        arguments.model = given
    if not getattr(arguments, "model", ""):
        parser.error("no model is given: name a checkpoint directory or a model id")


def read_chat_template(text: str | None) -> str | None:
    """The template in the file `text`, or `text` itself if it is one."""
    if text is None or "{" in text or "\n" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the chat template cannot be read ({error.strerror}): {text}") from error


def bind(host: str | None, port: int) -> socket.socket:
    """A listening socket. It accepts connections from now on; they are answered once the server runs."""
    family = socket.AF_INET6 if host and ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host or "", port))
        listener.listen(LISTEN_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"cannot listen ({reason}); choose another --host or --port: {host or '*'}:{port}") from error
    return listener


class _Server:
    """One run of the server: listen, load, serve, drain."""

    def __init__(
        self, args: EngineArgs, settings: ServerSettings, listener: socket.socket, shutdown_timeout: float
    ) -> None:
        self.listener = listener
        self.settings = settings
        self.shutdown_timeout = shutdown_timeout
        self.engine = AsyncEngine.from_engine_args(args, start=False)
        self.stop = asyncio.Event()  # the first signal
        self.hurry = asyncio.Event()  # the second

    async def run(self) -> None:
        """Serve until a signal. Raises what kept the model from loading, or what the engine died of."""
        started = time.monotonic()
        loop = asyncio.get_running_loop()
        for name in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(name, self._on_signal)
        app = build_app(self.engine, self.settings)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=HANDLER_GRACE_SECONDS)
        await runner.setup()
        site = web.SockSite(runner, self.listener, backlog=LISTEN_BACKLOG)
        await site.start()
        address = self._address()
        _note(f"omni-engine {__version__} listens on {address} and loads {self.settings.model}")
        try:
            if await self._load():
                _note(f"ready after {time.monotonic() - started:.1f} s: {address}/v1/chat/completions")
                await self._serve()
            await site.stop()
            await self._drain()
        finally:
            await self.engine.shutdown()
            await runner.cleanup()

    def _on_signal(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()

    async def _load(self) -> bool:
        """Start the engine and wait until it is ready; False if a signal came first."""
        loading = asyncio.create_task(self._start_engine())
        stopping = asyncio.create_task(self.stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        loaded = loading.done()
        await _cancel(loading, stopping)
        if loaded:
            loading.result()
        return loaded

    async def _start_engine(self) -> None:
        await self.engine.start()
        await self.engine.wait_ready()

    async def _serve(self) -> None:
        keeps_alive = os.environ.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "0").lower() in ("1", "true")
        while not self.stop.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stop.wait(), DEATH_POLL_SECONDS)
            error = self.engine.dead_error
            if error is not None and not keeps_alive:
                raise error

    async def _drain(self) -> None:
        """Let running requests end within the timeout; a second signal cuts it short."""
        draining = asyncio.create_task(self.engine.shutdown(self.shutdown_timeout))
        hurrying = asyncio.create_task(self.hurry.wait())
        await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(draining, hurrying)

    def _address(self) -> str:
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait for it to end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
