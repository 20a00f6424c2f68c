"""The routes of pooling models; on a server whose model has not their task they answer 404."""

from __future__ import annotations

from aiohttp import web

from .classification import classify
from .embeddings import create_embeddings, create_pooling
from .scoring import create_scores, rerank


def add_pooling_routes(app: web.Application, prefix: str) -> None:
    """Add them under `prefix`, a root path or nothing."""
    handlers = {
        "/v1/embeddings": create_embeddings,
        "/pooling": create_pooling,
        "/classify": classify,
        "/score": create_scores,
        "/v1/score": create_scores,
        "/rerank": rerank,
        "/v1/rerank": rerank,
        "/v2/rerank": rerank,
    }
    app.add_routes([web.post(prefix + path, handler) for path, handler in handlers.items()])
