"""POST /invocations: SageMaker's one route, which takes the bodies of several."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from .body import read_body, value_error
from .chat import create_chat_completion
from .completions import create_completion
from .embeddings import create_embeddings
from .scoring import create_scores, rerank


class _Kinds(msgspec.Struct):
    """The field by which a body is known."""

    messages: Any = None
    prompt: Any = None
    input: Any = None
    query: Any = None
    queries: Any = None


_decoder = msgspec.json.Decoder(_Kinds)
_ROUTES = (
    ("messages", create_chat_completion),
    ("prompt", create_completion),
    ("input", create_embeddings),
    ("query", rerank),
    ("queries", create_scores),
)


async def invoke(request: web.Request) -> web.StreamResponse:
    """Answer as the route would that takes such a body: chat, completions, embeddings, rerank or score."""
    kinds = await read_body(request, _decoder)
    for name, handler in _ROUTES:
        if getattr(kinds, name) is not None:
            return await handler(request)  # it reads the same body again, which is kept
    names = " or ".join(f"`{name}`" for name, _ in _ROUTES)
    raise value_error(f"the body must have {names}.")
