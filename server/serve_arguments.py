"""The flags of `omni-engine serve`, and the settings that they come to."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .. import __version__
from ..engine.config import DEMO_MODEL, EngineArgs
from ..engine.core_launch import DEFAULT_STEP_TIMEOUT_SECONDS
from ..engine.logs import FORMATS, LEVELS
from .arguments import CommandParser, add_engine_arguments, parse_json_object, parse_size
from .environment import read_flag, read_number
from .settings import CorsPolicy, ServerSettings
from .sockets import HeaderLimits, TlsFiles

DEMO_NAME = "demo"  # what the API calls the bundled model, whose path is an installation's own affair
STEP_TIMEOUT_VARIABLE = "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"
FINGERPRINT_MODES = ("full", "hash", "none")


def serve_parser() -> CommandParser:
    parser = CommandParser("serve", "[MODEL]", "Serve a model over HTTP with the OpenAI API.")
    parser.add_argument(
        "model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id; none: the demo"
    )
    parser.add_argument("--config", help="YAML file of flags and their values; the command line goes before it")
    parser.add_argument(
        "--print-config", action="store_true", help="print all flags with their values as YAML, and end"
    )
    _add_listening(parser.add_argument_group("listening"))
    _add_http(parser.add_argument_group("HTTP"))
    add_api_arguments(parser.add_argument_group("API"))
    _add_logging(parser.add_argument_group("logging"))
    _add_tracing(parser.add_argument_group("tracing"))
    add_engine_arguments(parser)
    return parser


def _add_listening(group: Any) -> None:
    add = group.add_argument
    add("--host", help="address to listen on (default: all interfaces)")
    add("--port", type=int, default=8000, help="port to listen on; 0: any free one (default: 8000)")
    add("--uds", help="unix socket to listen on, instead of host and port")
    add("--root-path", default="", help="path under which a proxy shows this server")
    add("--ssl-certfile", help="certificate file; with it the server speaks HTTPS")
    add("--ssl-keyfile", help="key of the certificate, if it is in a file of its own")
    add("--ssl-ca-certs", help="certificates of those who sign the clients' certificates")
    add("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=0,
        help="clients need 0: no certificate, 1: if any then a valid one, 2: a valid one (default: 0)")  # fmt: skip
    add("--ssl-ciphers", help="ciphers in OpenSSL's format")
    add("--enable-ssl-refresh", action=argparse.BooleanOptionalAction, default=False,
        help="load the certificate anew when its files change")  # fmt: skip
    limits = HeaderLimits()
    add("--h11-max-incomplete-event-size", type=parse_size, default=limits.field_bytes, metavar="BYTES",
        help=f"largest request line or header (default: {limits.field_bytes})")  # fmt: skip
    add("--h11-max-header-count", type=parse_size, default=limits.num_fields, metavar="COUNT",
        help=f"most headers of a request (default: {limits.num_fields})")  # fmt: skip
    add("--shutdown-timeout", type=float, default=0.0,
        help="seconds that running requests may take to end after SIGTERM (default: 0, they are aborted)")  # fmt: skip
    add("--restart-core", action=argparse.BooleanOptionalAction, default=False,
        help="load a lost engine core anew instead of ending the server; its requests get an error")  # fmt: skip
    add("--engine-hang-timeout", type=parse_seconds, metavar="SECONDS",
        help="the core counts as hung, and is killed, after so long in one step; 0: never (default: 300, or "
        f"{STEP_TIMEOUT_VARIABLE})")  # fmt: skip


def _add_http(group: Any) -> None:

    def add_switch(flag: str, text: str) -> None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)

    add = group.add_argument
    add("--api-key", nargs="+", default=[], help="keys of which clients must send one (or set VLLM_API_KEY)")
    add("--api-key-mode", choices=("all", "vllm"), default="all",
        help="what keys guard: all routes but health, by bearer token or x-api-key; or as vLLM only /v1, /v2, "
        "/inference and /cohere, by bearer token (default: all)")  # fmt: skip
    add("--allowed-origins", type=parse_texts, default=[], help="JSON list of origins whose pages may call the server")
    add("--allowed-methods", type=parse_texts, default=["*"], help='JSON list of methods for them (default: ["*"])')
    add("--allowed-headers", type=parse_texts, default=["*"], help='JSON list of headers for them (default: ["*"])')
    add_switch("--allow-credentials", "let them send cookies and authorization")
    add_switch("--enable-force-include-usage", "send usage in every stream, in every chunk")
    add_switch("--enable-request-id-headers", "send X-Request-Id with every response")
    add_switch("--enable-server-load-tracking", "count the requests in progress, for /load")
    add_switch(
        "--enable-tokenizer-info-endpoint", "show the tokenizer's settings and the chat template at /tokenizer_info"
    )
    add_switch("--disable-fastapi-docs", "do without /openapi.json, /docs and /redoc")
    add("--sse-keep-alive-interval", type=parse_seconds, default=0.0, metavar="SECONDS",
        help="send a comment in streams that say nothing for so long; 0: none (default: 0)")  # fmt: skip


def add_api_arguments(group: Any) -> None:
    """The flags about what requests may say and what answers look like."""

    def add_switch(flag: str, text: str) -> None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)

    add = group.add_argument
    add("--served-model-name", nargs="+", default=[], help="names of the model in the API; the first is reported")
    add("--chat-template", help="Jinja file, or the template itself, if not the model's own")
    add("--response-role", default="assistant", help="role of the answers of chat completions (default: assistant)")
    add_switch("--trust-request-chat-template", "let requests bring a chat template of their own")
    add("--default-chat-template-kwargs", type=parse_json_object, default={},
        help="JSON of variables for the chat template, where a request sets none")  # fmt: skip
    add_switch("--enable-auto-tool-choice", "find tool calls in answers (tool_choice auto); needs --tool-call-parser")
    add("--tool-call-parser", metavar="NAME", help="format of the model's tool calls, for --enable-auto-tool-choice")
    add("--reasoning-parser", metavar="NAME", help="format of the model's reasoning, which answers show apart")
    add_switch("--return-tokens-as-token-ids", 'show the tokens of logprobs as "token_id:N"')
    add_switch("--enable-prompt-tokens-details", "report cached prompt tokens in usage")
    add_switch("--enable-per-request-metrics", "report the times of a request with one sequence in its answer")
    add("--ui", action=argparse.BooleanOptionalAction, default=True,
        help="serve the page at /: chat and live engine (default: yes)")  # fmt: skip
    add("--fingerprint-mode", type=parse_fingerprint_mode, choices=FINGERPRINT_MODES, default="full",
        help="system_fingerprint of responses: version and a hash of the settings, hash, none (full)")  # fmt: skip


def _add_logging(group: Any) -> None:
    def add_switch(flag: str, text: str) -> None:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)

    add = group.add_argument
    levels = tuple(level.lower() for level in LEVELS)
    add("--log-level", type=str.lower, choices=levels, help="least level that is logged (default: info)")
    add("--log-format", choices=FORMATS, help="lines for people or JSON objects (default: text)")
    add_switch("--enable-log-requests", "log the parameters of every request")
    add_switch("--enable-log-outputs", "log the answer to every request")
    add("--max-log-len", type=parse_size, metavar="CHARACTERS", help="most characters of an answer that are logged")
    add_switch("--disable-uvicorn-access-log", "log no line per request")
    add("--disable-access-log-for-endpoints", type=parse_paths, default=[], metavar="PATHS",
        help="paths without a line per request, with commas between them")  # fmt: skip


def _add_tracing(group: Any) -> None:
    group.add_argument("--otlp-traces-endpoint", metavar="URL",
        help="OpenTelemetry collector that gets a span of every request; needs omni-engine[tracing]")  # fmt: skip


def parse_texts(text: str) -> list[str]:
    """A JSON list of strings."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from error
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f"not a JSON list of strings: {text}")
    return value


def parse_paths(text: str) -> list[str]:
    """Paths with commas between them; a JSON list does too."""
    if text.startswith("["):
        return parse_texts(text)
    return [path.strip() for path in text.split(",") if path.strip()]


def parse_seconds(text: str) -> float:
    """A finite number, not negative."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"not a number of seconds, 0 or more: {text}")
    return seconds


def parse_fingerprint_mode(text: str) -> str:
    if text == "custom":
        raise argparse.ArgumentTypeError(f"not supported yet: {text}")
    return text


def server_settings(arguments: argparse.Namespace, args: EngineArgs) -> ServerSettings:
    """What the HTTP side is told; ValueError if the chat template cannot be read or a parser is not known."""
    root_path = arguments.root_path.strip("/")
    check_parsers(arguments)
    names = arguments.served_model_name or ([DEMO_NAME] if args.model == str(DEMO_MODEL) else [])
    return ServerSettings(
        model=args.model,
        served_model_names=tuple(names),
        api_keys=tuple(key for key in arguments.api_key or [os.environ.get("VLLM_API_KEY", "")] if key),
        guards_as_vllm=arguments.api_key_mode == "vllm",
        chat_template=read_chat_template(arguments.chat_template),
        response_role=arguments.response_role,
        trust_request_chat_template=arguments.trust_request_chat_template,
        default_chat_template_kwargs=arguments.default_chat_template_kwargs,
        enable_auto_tool_choice=arguments.enable_auto_tool_choice,
        tool_call_parser=arguments.tool_call_parser or None,
        reasoning_parser=arguments.reasoning_parser or None,
        return_tokens_as_token_ids=arguments.return_tokens_as_token_ids,
        enable_prompt_tokens_details=arguments.enable_prompt_tokens_details,
        enable_force_include_usage=arguments.enable_force_include_usage,
        enable_request_id_headers=arguments.enable_request_id_headers,
        enable_server_load_tracking=arguments.enable_server_load_tracking,
        enable_per_request_metrics=arguments.enable_per_request_metrics,
        keep_alive_seconds=arguments.sse_keep_alive_interval,
        enable_log_requests=arguments.enable_log_requests,
        enable_log_outputs=arguments.enable_log_outputs,
        max_log_len=arguments.max_log_len,
        enable_tokenizer_info=arguments.enable_tokenizer_info_endpoint,
        enable_profile=args.profiler_config is not None,
        enable_development=read_flag("VLLM_SERVER_DEV_MODE"),
        enable_docs=not arguments.disable_fastapi_docs,
        access_log=not arguments.disable_uvicorn_access_log,
        unlogged_paths=tuple(arguments.disable_access_log_for_endpoints),
        ui=arguments.ui,
        root_path=f"/{root_path}" if root_path else "",
        fingerprint=fingerprint(arguments.fingerprint_mode, args),
        cors=CorsPolicy(
            tuple(arguments.allowed_origins),
            tuple(arguments.allowed_methods),
            tuple(arguments.allowed_headers),
            arguments.allow_credentials,
        ),
    )


def check_parsers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for the name of a parser that is not known, and for automatic tool choice without one."""
    if arguments.enable_auto_tool_choice and not arguments.tool_call_parser:
        raise ValueError("name the format of the model's tool calls with --tool-call-parser beside: "
            "--enable-auto-tool-choice")  # fmt: skip
    if not (arguments.tool_call_parser or arguments.reasoning_parser):
        return
    # Looking through the installed packages takes time that a start without parsers need not spend.
    from .parsing.registry import supported_reasoning_parsers, supported_tool_parsers

    for flag, name, supported in (
        ("--tool-call-parser", arguments.tool_call_parser, supported_tool_parsers),
        ("--reasoning-parser", arguments.reasoning_parser, supported_reasoning_parsers),
    ):
        if name and name not in (known := supported()):
            raise ValueError(f"{flag} must be one of {', '.join(known)}: {name}")


def tls_files(parser: CommandParser, arguments: argparse.Namespace) -> TlsFiles | None:
    """The files of HTTPS, or None for plain HTTP."""
    rest = {
        "keyfile": arguments.ssl_keyfile,
        "ca_certs": arguments.ssl_ca_certs,
        "cert_reqs": arguments.ssl_cert_reqs,
        "ciphers": arguments.ssl_ciphers,
    }
    if arguments.ssl_certfile is None:
        given = [f"--ssl-{name.replace('_', '-')}" for name, value in rest.items() if value]
        given += ["--enable-ssl-refresh"] * arguments.enable_ssl_refresh
        if given:
            parser.error(f"HTTPS needs --ssl-certfile too, beside: {given[0]}")
        return None
    return TlsFiles(arguments.ssl_certfile, **rest)


def header_limits(parser: CommandParser, arguments: argparse.Namespace) -> HeaderLimits:
    for name in ("h11_max_incomplete_event_size", "h11_max_header_count"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1: {getattr(arguments, name)}")
    return HeaderLimits(arguments.h11_max_incomplete_event_size, arguments.h11_max_header_count)


def step_timeout(arguments: argparse.Namespace) -> float:
    """Seconds in one step after which the core counts as hung; raises ValueError for a wrong variable."""
    given = arguments.engine_hang_timeout
    return read_number(STEP_TIMEOUT_VARIABLE, DEFAULT_STEP_TIMEOUT_SECONDS) if given is None else given


def fingerprint(mode: str, args: EngineArgs) -> str | None:
    """Changes when the version or a setting of the engine changes, because then answers may."""
    if mode == "none":
        return None
    settings = json.dumps([__version__, dataclasses.asdict(args)], sort_keys=True, default=str)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
    return digest if mode == "hash" else f"omni-engine-{__version__}-{digest}"


def take_model_argument(parser: CommandParser, arguments: argparse.Namespace) -> None:
    """The model may be given by position or as --model, but not as two different ones; none means the demo."""
    given = arguments.model_argument
    if given is not None:
        if getattr(arguments, "model", given) != given:
            parser.error(f"two models are given, {given} and --model: {arguments.model}")
        arguments.model = given


def read_chat_template(text: str | None) -> str | None:
    """The template in the file `text`, or `text` itself if it is one."""
    if text is None or "{" in text or "\n" in text:
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the chat template cannot be read ({error.strerror}): {text}") from error
