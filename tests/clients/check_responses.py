"""The openai SDK's Responses API, against a running server: `python check_responses.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import time
from typing import Any

import openai
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from report import Checks, raises

checks = Checks("openai", "pydantic")
client = openai.OpenAI(base_url=checks.api_url, api_key=checks.api_key, timeout=60, max_retries=0)
model = checks.model
events_type: Any = TypeAdapter(ResponseStreamEvent)
INPUT = "Who was Moses?"


def respond(**fields: Any) -> Any:
    """The SDK's response, once its type has accepted strictly what the server sent."""
    fields = {"model": model, "temperature": 0, "max_output_tokens": 8, "input": INPUT, **fields}
    raw = client.responses.with_raw_response.create(**fields)
    Response.model_validate_json(raw.content, strict=True)
    return raw.parse()


def stream(**fields: Any) -> list[Any]:
    """The SDK's events; each is of a known type and was accepted strictly as it was sent."""
    fields = {"model": model, "temperature": 0, "max_output_tokens": 8, "input": INPUT, "stream": True, **fields}
    with client.responses.with_streaming_response.create(**fields) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    for line in lines:
        events_type.validate_json(line.removeprefix("data: "), strict=True)
    numbers = [json.loads(line.removeprefix("data: "))["sequence_number"] for line in lines]
    assert numbers == list(range(len(numbers)))
    return list(client.responses.create(**fields))


@checks
def a_response_is_whole() -> None:
    response = respond()
    assert response.id.startswith("resp_") and response.status == "incomplete" and response.output_text
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == 8
    assert response.usage.total_tokens == response.usage.input_tokens + 8


@checks
def a_streamed_response_is_the_whole_one() -> None:
    events = stream()
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.incomplete" and events[-1].response.output_text == text == respond().output_text


@checks
def the_streaming_helper_of_the_sdk_follows() -> None:
    with client.responses.stream(model=model, input=INPUT, temperature=0, max_output_tokens=8) as events:
        kinds = [event.type for event in events]
    assert kinds[-1] == "response.incomplete" and "response.output_text.delta" in kinds


@checks
def logprobs_are_those_of_the_text() -> None:
    response = respond(include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = response.output[0].content[0].logprobs
    assert len(logprobs) == 8 and all(len(entry.top_logprobs) == 2 for entry in logprobs)
    assert logprobs[0].logprob == logprobs[0].top_logprobs[0].logprob  # temperature 0


@checks
def a_response_is_stored_continued_and_deleted() -> None:
    first = respond()
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = respond(previous_response_id=first.id, input="Why?")
    assert second.usage.input_tokens > first.usage.input_tokens + 8
    listed = client.responses.input_items.list(second.id, order="asc")
    assert [item.role for item in listed] == ["user", "assistant", "user"]
    client.responses.delete(first.id)
    with raises(openai.NotFoundError, "not found"):
        client.responses.retrieve(first.id)
    with raises(openai.NotFoundError):
        respond(previous_response_id=first.id)
    kept_by_nobody = respond(store=False)
    with raises(openai.NotFoundError):
        client.responses.retrieve(kept_by_nobody.id)


@checks
def the_output_of_a_response_is_input_of_the_next() -> None:
    first = respond()
    items: list[Any] = [{"role": "user", "content": INPUT}, *first.output, {"role": "user", "content": "Why?"}]
    assert respond(input=items).output_text == respond(previous_response_id=first.id, input="Why?").output_text


@checks
def a_response_is_made_in_the_background() -> None:
    promise = respond(background=True)
    assert promise.status == "queued"
    deadline = time.monotonic() + 30
    while (response := client.responses.retrieve(promise.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert response.output_text == respond().output_text


@checks
def a_response_in_the_background_is_cancelled() -> None:
    promise = respond(background=True, max_output_tokens=400, extra_body={"ignore_eos": True})
    assert client.responses.cancel(promise.id).status == "cancelled"
    checks.wait_until_idle()
    assert client.responses.retrieve(promise.id).status == "cancelled"
    with raises(openai.BadRequestError, "Cannot cancel a synchronous response."):
        client.responses.cancel(respond().id)


@checks
def a_stream_in_the_background_is_read_again() -> None:
    events = list(client.responses.create(model=model, input=INPUT, max_output_tokens=8, background=True, stream=True))
    again = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=2))
    assert [event.sequence_number for event in again] == list(range(3, len(events)))


@checks
def what_is_not_supported_is_refused() -> None:
    with raises(openai.BadRequestError, "web_search"):
        respond(tools=[{"type": "web_search"}])
    with raises(openai.BadRequestError, "background can only be used when `store` is true"):
        respond(background=True, store=False)
    with raises(openai.NotFoundError, "does not exist"):
        respond(model="some/other")


@checks
def a_stream_that_is_left_leaves_nothing_running() -> None:
    with client.responses.create(
        model=model, input=INPUT, stream=True, max_output_tokens=400, extra_body={"ignore_eos": True}
    ) as events:
        assert next(iter(events)).type == "response.created"
    checks.wait_until_idle()


checks.run()
