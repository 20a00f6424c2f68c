"""The routes of pooling models; on a server whose model has not their task they answer 404."""

from __future__ import annotations

from aiohttp import web

from .classification import classify
from .embeddings import create_embeddings, create_pooling
from .pooling_protocol import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    PoolingResponse,
    RerankRequest,
    RerankResponse,
    ScoreRequest,
)
from .scoring import create_scores, rerank

_HANDLERS = {
    "/v1/embeddings": create_embeddings,
    "/pooling": create_pooling,
    "/classify": classify,
    "/score": create_scores,
    "/v1/score": create_scores,
    "/rerank": rerank,
    "/v1/rerank": rerank,
    "/v2/rerank": rerank,
}
_BODIES = {
    create_embeddings: (EmbeddingRequest, PoolingResponse),
    create_pooling: (PoolingRequest, PoolingResponse),
    classify: (ClassificationRequest, PoolingResponse),
    create_scores: (ScoreRequest, PoolingResponse),
    rerank: (RerankRequest, RerankResponse),
}
# By path: what a request's body may be, and what the answer.
POOLING_BODIES = {path: ((_BODIES[handler][0],), (_BODIES[handler][1],)) for path, handler in _HANDLERS.items()}


def add_pooling_routes(app: web.Application, prefix: str) -> None:
    """Add them under `prefix`, a root path or nothing."""
    app.add_routes([web.post(prefix + path, handler) for path, handler in _HANDLERS.items()])
