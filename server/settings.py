"""What the command line says about the HTTP side; imports nothing heavy, since the server listens before it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CorsPolicy:
    """What is allowed; "*" in a list allows everything. Without origins the server says nothing about CORS."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False

    def allows_origin(self, origin: str) -> bool:
        return "*" in self.origins or origin in self.origins

    def allows_method(self, method: str) -> bool:
        return "*" in self.methods or method in self.methods

    def allows_headers(self, names: str) -> bool:
        allowed = {name.lower() for name in self.headers}
        return "*" in allowed or all(name.strip().lower() in allowed for name in names.split(",") if name.strip())

    def origin_headers(self, origin: str) -> dict[str, str]:
        """The headers of any answer to a page of `origin`."""
        if not self.allows_origin(origin):
            return {}
        # A browser takes no wildcard together with credentials.
        anyone = "*" in self.origins and not self.credentials
        headers: dict[str, str] = {"Access-Control-Allow-Origin": "*"} if anyone else {
            "Access-Control-Allow-Origin": origin, "Vary": "Origin",
        }  # fmt: skip
        if self.credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
        return headers


@dataclass(frozen=True)
class ServerSettings:
    """What the command line says about the HTTP side."""

    model: str = ""  # the checkpoint, as it was named
    served_model_names: tuple[str, ...] = ()  # the first is reported; none: `model`
    api_keys: tuple[str, ...] = ()
    guards_as_vllm: bool = False  # the keys guard only what they do in vLLM
    chat_template: str | None = None  # source text
    response_role: str = "assistant"
    trust_request_chat_template: bool = False
    default_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    enable_auto_tool_choice: bool = False
    tool_call_parser: str | None = None  # a name in `parsing.registry`
    reasoning_parser: str | None = None  # likewise
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_request_id_headers: bool = False
    enable_server_load_tracking: bool = False
    enable_per_request_metrics: bool = False
    keep_alive_seconds: float = 0.0  # between comments in a stream that says nothing else; 0: none
    enable_log_requests: bool = False
    enable_log_outputs: bool = False
    max_log_len: int | None = None  # characters of an output that are logged
    enable_tokenizer_info: bool = False  # /tokenizer_info
    enable_profile: bool = False  # /start_profile, /stop_profile
    enable_development: bool = False  # routes for development
    enable_docs: bool = True  # /openapi.json, /docs
    access_log: bool = True
    unlogged_paths: tuple[str, ...] = ()  # left out of the access log
    ui: bool = True  # the page at /
    root_path: str = ""  # where a proxy shows this server, without a slash at the end
    fingerprint: str | None = None  # system_fingerprint of responses
    cors: CorsPolicy = field(default_factory=CorsPolicy)
