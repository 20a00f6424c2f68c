"""POST /classify: the label of each input, and the probabilities of all."""

from __future__ import annotations

import time

from aiohttp import web

from ..models.pooling_config import ClassifierConfig
from ..scheduler.pooling_params import PoolingParams
from .body import read_body
from .context import CONTEXT
from .errors import json_response
from .pooling_inputs import check_inputs, pool, pooling_of, read_prompts
from .pooling_protocol import ClassificationData, PoolingResponse, classification_decoder


async def classify(request: web.Request) -> web.Response:
    """Classify each input, or a conversation."""
    context = request.app[CONTEXT]
    classifier = (await pooling_of(context, "classify", "Classification")).classifier
    assert classifier is not None  # of whoever has the task
    body = await read_body(request, classification_decoder)
    inputs = check_inputs(context, body)
    context.check_model(body.model)
    params = PoolingParams(task="classify", use_activation=body.use_activation)
    response_id = context.response_id("classify", request, body)
    prompts = await read_prompts(context, body, inputs)
    outputs = await pool(context, request, body, prompts, params, response_id)
    data = [_data(place, output.outputs.tolist(), classifier) for place, output in enumerate(outputs)]
    usage = context.usage(outputs, 0)
    return json_response(PoolingResponse(response_id, int(time.time()), context.model_name, data, usage))


def _data(place: int, probs: list[float], classifier: ClassifierConfig) -> ClassificationData:
    best = probs.index(max(probs))
    label = classifier.labels[best] if best < len(classifier.labels) else f"LABEL_{best}"
    return ClassificationData(place, label, probs, len(probs))
