"""POST /v1/embeddings and /pooling: vectors of texts, token ids and conversations."""

from __future__ import annotations

import sys
import time
from array import array
from base64 import b64encode
from typing import Any

from aiohttp import web

from ..engine.pooling.outputs import PoolingOutput
from ..scheduler.pooling_params import PoolingParams
from .body import read_body, value_error
from .context import CONTEXT
from .errors import json_response, not_supported
from .pooling_inputs import check_inputs, pool, pooling_of, read_prompts
from .pooling_protocol import (
    EmbeddingData,
    EmbeddingRequest,
    PooledData,
    PoolingResponse,
    embedding_decoder,
    pooling_decoder,
)

_FORMATS = ("float", "base64", "bytes", "bytes_only")
_DTYPES = ("float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2")
_ENDIANNESS = ("native", "little", "big")


async def create_embeddings(request: web.Request) -> web.Response:
    """One embedding of each input."""
    context = request.app[CONTEXT]
    await pooling_of(context, "embed", "Embeddings")
    body = await read_body(request, embedding_decoder)
    inputs = check_inputs(context, body)
    check_encoding(body)
    context.check_model(body.model)
    params = PoolingParams(task="embed", dimensions=body.dimensions, use_activation=body.use_activation)
    response_id = context.response_id("embd", request, body)
    prompts = await read_prompts(context, body, inputs)
    outputs = await pool(context, request, body, prompts, params, response_id)
    data = [EmbeddingData(place, encode(body, output.outputs)) for place, output in enumerate(outputs)]
    usage = context.usage(outputs, 0)
    return json_response(PoolingResponse(response_id, int(time.time()), context.model_name, data, usage))


async def create_pooling(request: web.Request) -> web.Response:
    """What the model, or the task that is asked for, makes of each input: a vector, or one for each token."""
    context = request.app[CONTEXT]
    pooling = await pooling_of(context, None, "Pooling")
    body = await read_body(request, pooling_decoder)
    inputs = check_inputs(context, body)
    check_encoding(body)
    context.check_model(body.model)
    params = PoolingParams(
        task=body.task or pooling.tasks[0], dimensions=body.dimensions, use_activation=body.use_activation
    )
    response_id = context.response_id("pooling", request, body)
    prompts = await read_prompts(context, body, inputs)
    outputs = await pool(context, request, body, prompts, params, response_id)
    data = [PooledData(place, encode(body, output.outputs)) for place, output in enumerate(outputs)]
    usage = context.usage(outputs, 0)
    return json_response(PoolingResponse(response_id, int(time.time()), context.model_name, data, usage))


def check_encoding(body: EmbeddingRequest) -> None:
    """Raises 400 for an encoding that nobody knows, and for those that are not built."""
    for name, known, built in (
        ("encoding_format", _FORMATS, ("float", "base64")),
        ("embed_dtype", _DTYPES, ("float32",)),
        ("endianness", _ENDIANNESS, _ENDIANNESS),
    ):
        value = getattr(body, name)
        if value is not None and value not in known:
            raise value_error(f"`{name}` must be one of {', '.join(known)}, got {value}.", name)
        if value is not None and value not in built:
            raise not_supported(name, f"{name} is not supported yet by this server, use {built[0]}: {value}")


def encode(body: EmbeddingRequest, output: PoolingOutput) -> list[Any] | str:
    """The vector as numbers, or as the base64 of its float32."""
    if body.encoding_format != "base64":
        return output.tolist()
    raw = output.raw
    if body.endianness in ("little", "big") and body.endianness != sys.byteorder:
        values = array("f", raw)
        values.byteswap()
        raw = values.tobytes()
    return b64encode(raw).decode("ascii")
