"""POST /score and /rerank: how well documents fit a query."""

from __future__ import annotations

import time

from aiohttp import web

from ..engine.pooling.outputs import PoolingRequestOutput, ScoringOutput
from ..scheduler.pooling_params import PoolingParams
from .body import read_body, value_error
from .context import CONTEXT, ServerContext
from .errors import caller_errors, json_response
from .pooling_inputs import check_body, check_count, pool, pooling_of
from .pooling_protocol import (
    PoolingBody,
    PoolingResponse,
    RerankDocument,
    RerankResponse,
    RerankResult,
    RerankUsage,
    ScoreData,
    ScoreRequest,
    Texts,
    rerank_decoder,
    score_decoder,
)

_PAIRS = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2"))


async def create_scores(request: web.Request) -> web.Response:
    """The score of one text against every other, or of as many in pairs."""
    context = request.app[CONTEXT]
    await pooling_of(context, None, "Score")
    body = await read_body(request, score_decoder)
    check_body(body)
    first, second = _pair(body)
    context.check_model(body.model)
    response_id = context.response_id("score", request, body)
    outputs = await _scores(context, request, body, first, second, response_id)
    data = [ScoreData(place, output.outputs.score) for place, output in enumerate(outputs)]
    usage = context.usage(outputs, 0)
    return json_response(PoolingResponse(response_id, int(time.time()), context.model_name, data, usage))


async def rerank(request: web.Request) -> web.Response:
    """The documents by their score, the best first."""
    context = request.app[CONTEXT]
    await pooling_of(context, None, "Rerank")
    body = await read_body(request, rerank_decoder)
    check_body(body)
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    if not documents:
        raise value_error("`documents` must not be empty.", "documents")
    check_count(len(documents), "documents")
    if body.top_n is not None and body.top_n < 0:
        raise value_error("`top_n` must not be negative; 0 means all.", "top_n")
    context.check_model(body.model)
    response_id = context.response_id("score", request, body)
    outputs = await _scores(context, request, body, body.query, documents, response_id)
    results = [
        RerankResult(place, RerankDocument(documents[place]), output.outputs.score)
        for place, output in enumerate(outputs)
    ]
    results.sort(key=lambda result: result.relevance_score, reverse=True)
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    usage = RerankUsage(num_tokens, num_tokens)
    return json_response(RerankResponse(response_id, context.model_name, usage, results[: body.top_n or len(results)]))


def _pair(body: ScoreRequest) -> tuple[Texts, Texts]:
    """The texts under whichever pair of names they were given."""
    given = {name for pair in _PAIRS for name in pair if getattr(body, name) is not None}
    for first, second in _PAIRS:
        if given == {first, second}:
            for name in (first, second):
                texts = getattr(body, name)
                check_count(1 if isinstance(texts, str) else len(texts), name)
            return getattr(body, first), getattr(body, second)
    names = ", or ".join(f"`{first}` and `{second}`" for first, second in _PAIRS)
    raise value_error(f"give {names}.", sorted(given)[0] if given else "queries")


async def _scores(
    context: ServerContext,
    request: web.Request,
    body: PoolingBody,
    first: Texts,
    second: Texts,
    response_id: str,
) -> list[PoolingRequestOutput[ScoringOutput]]:
    with caller_errors():
        plan = await context.engine.plan_scores(first, second, context.settings.chat_template)
    params = plan.params(PoolingParams(use_activation=body.use_activation))
    return plan.scores(await pool(context, request, body, plan.prompts, params, response_id))
