"""What `bench serve` measures: the server, its model, and the tokenizer that counts its tokens."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from ...models.checkpoint import resolve_model
from ...models.tokenizer import load_tokenizer
from .arguments import BenchParser
from .datasets import DatasetOptions
from .prompts import LocalTokens, ServerTokens, Tokens

_RETRY_SECONDS = 1.0
_MODELS_TIMEOUT_SECONDS = 30.0
_TAKES_TOKEN_IDS = ("vllm", "omni-engine")  # what such servers name as the owner of their models


@dataclass(frozen=True)
class Target:
    """The server and the model that are measured."""

    base_url: str
    endpoint: str
    chat: bool
    headers: dict[str, str]
    model_id: str
    served_name: str
    root: str | None  # where the server says that the model comes from
    owner: str | None  # whom it names as the owner of its models


async def find_target(arguments: argparse.Namespace) -> Target:
    """Ask the server for its models, within the time of the ready check if there is one."""
    base_url = (arguments.base_url or f"http://{_bracketed(arguments.host)}:{arguments.port}").rstrip("/")
    chat = arguments.backend == "openai-chat"
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    headers.update(arguments.header)
    card: Mapping[str, Any] = {}
    try:
        cards = await _models(arguments, base_url, headers)
        wanted = arguments.served_model_name or arguments.model
        card = next((each for each in cards if wanted in (None, each.get("id"))), cards[0] if cards else {})
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        if arguments.model is None:
            raise ValueError(
                f"the server does not tell its models, name one with --model ({error}): {base_url}"
            ) from error
    model_id = arguments.model or card.get("id")
    if not model_id:
        raise ValueError(f"the server has no models, name one with --model: {base_url}")
    return Target(
        base_url=base_url,
        endpoint=arguments.endpoint or ("/v1/chat/completions" if chat else "/v1/completions"),
        chat=chat,
        headers=headers,
        model_id=model_id,
        served_name=arguments.served_model_name or model_id,
        root=card.get("root"),
        owner=card.get("owned_by"),
    )


async def _models(arguments: argparse.Namespace, base_url: str, headers: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The cards of GET /v1/models; a server that cannot be reached yet is tried again as long as may be waited."""
    deadline = time.monotonic() + arguments.ready_check_timeout_sec
    timeout = aiohttp.ClientTimeout(total=max(_MODELS_TIMEOUT_SECONDS, arguments.ready_check_timeout_sec))
    async with open_session(arguments, timeout) as session:
        while True:
            try:
                async with session.get(f"{base_url}/v1/models", headers=headers) as response:
                    response.raise_for_status()
                    answer = await response.json(content_type=None)
                    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
                        raise ValueError("the answer to /v1/models is not a list of models")
                    return answer["data"]
            except (aiohttp.ClientError, asyncio.TimeoutError):
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)


def open_session(arguments: argparse.Namespace, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, ssl=not arguments.insecure)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def tokens_of(arguments: argparse.Namespace, target: Target) -> Tokens:
    """The tokenizer that was named, else the model's if it is here, else the server's own."""
    server = (target.base_url, target.served_name, target.headers)
    if arguments.skip_tokenizer_init:
        return ServerTokens(*server)
    if arguments.tokenizer is not None:
        return LocalTokens(load_tokenizer(resolve_model(arguments.tokenizer)), arguments.tokenizer)
    for name in (target.model_id, target.root):
        if name:
            try:
                return LocalTokens(load_tokenizer(resolve_model(name)), name)
            except (OSError, ValueError):
                continue
    return ServerTokens(*server)


def sends_text(parser: BenchParser, arguments: argparse.Namespace, options: DatasetOptions, target: Target) -> bool:
    wanted = arguments.prompt_format
    if wanted == "token-ids" and (target.chat or options.text_only):
        parser.error("only made-up prompts for completions can be token ids: --prompt-format token-ids")
    if wanted != "auto":
        return wanted == "text"
    return target.chat or options.text_only or target.owner not in _TAKES_TOKEN_IDS


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
