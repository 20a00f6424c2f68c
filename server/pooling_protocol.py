"""The requests to a pooling model as this server reads them, and its answers: vLLM's fields and names."""

from __future__ import annotations

from typing import Any, Union

import msgspec

from .protocol import Int, TokenId, Truncation
from .responses import Usage

Texts = str | list[str]


class PoolingBody(msgspec.Struct, kw_only=True):
    """What all of them have in common. None means: not given. Fields of type Any are not built yet, or were removed;
    they are refused when they are set."""

    model: str | None = None
    user: str | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: str | None = None
    use_activation: bool | None = None
    priority: Int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    padding: Any = None
    normalize: Any = None


class InputBody(PoolingBody, kw_only=True):
    """Bodies with texts, token ids, or a conversation."""

    # str | [str] | [token id] | [[token id]]; that a list is of one kind is checked afterwards.
    input: str | list[Union[str, TokenId, list[TokenId]]] | None = None  # noqa: UP007  (msgspec, Python 3.10)
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # by default those of a text, and none beside those of a chat template
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None


class EmbeddingRequest(InputBody, kw_only=True):
    """Body of POST /v1/embeddings."""

    encoding_format: str | None = None
    embed_dtype: str | None = None
    endianness: str | None = None
    dimensions: Int | None = None
    prompt_name: str | None = None


class PoolingRequest(EmbeddingRequest, kw_only=True):
    """Body of POST /pooling."""

    task: str | None = None


class ClassificationRequest(InputBody, kw_only=True):
    """Body of POST /classify."""


class ScoreRequest(PoolingBody, kw_only=True):
    """Body of POST /score: two texts, or lists of them, under one of four pairs of names."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None

    max_tokens_per_query: Any = None
    max_tokens_per_doc: Any = None


class RerankRequest(PoolingBody, kw_only=True):
    """Body of POST /rerank."""

    query: str
    documents: Texts
    top_n: Int | None = None

    max_tokens_per_query: Any = None
    max_tokens_per_doc: Any = None


class EmbeddingData(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class PooledData(msgspec.Struct):
    index: int
    data: list[Any] | str
    object: str = "pooling"


class ClassificationData(msgspec.Struct):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ScoreData(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class PoolingResponse(msgspec.Struct):
    """The answer of all routes but rerank's."""

    id: str
    created: int
    model: str
    data: list[Any]
    usage: Usage
    object: str = "list"


class RerankDocument(msgspec.Struct):
    text: str


class RerankResult(msgspec.Struct):
    index: int
    document: RerankDocument
    relevance_score: float


class RerankUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class RerankResponse(msgspec.Struct):
    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]


embedding_decoder = msgspec.json.Decoder(EmbeddingRequest)
pooling_decoder = msgspec.json.Decoder(PoolingRequest)
classification_decoder = msgspec.json.Decoder(ClassificationRequest)
score_decoder = msgspec.json.Decoder(ScoreRequest)
rerank_decoder = msgspec.json.Decoder(RerankRequest)
