"""The anthropic SDK against a running server: `python check_anthropic.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from report import Checks, raises

checks = Checks("anthropic", "pydantic")
client = anthropic.Anthropic(base_url=checks.server_url, api_key=checks.api_key, timeout=60, max_retries=0)
model = checks.model
events_type: Any = TypeAdapter(RawMessageStreamEvent)
MESSAGES: list[Any] = [
    {"role": "user", "content": "Who was Moses?"},
    {"role": "assistant", "content": [{"type": "text", "text": "A prophet."}]},
    {"role": "user", "content": [{"type": "text", "text": "And who"}, {"type": "text", "text": "was Aaron?"}]},
]


GREEDY = {"temperature": 0}  # newer majors have no argument for it


def ask(**fields: Any) -> Any:
    """The SDK's message, once its type has accepted strictly what the server sent."""
    fields = {"model": model, "max_tokens": 8, "messages": MESSAGES, "extra_body": GREEDY, **fields}
    raw = client.messages.with_raw_response.create(**fields)
    Message.model_validate_json(raw.text(), strict=True)
    return raw.parse()


@checks
def a_message_is_whole() -> None:
    message = ask(system="Answer briefly.")
    assert message.id.startswith("msg_") and message.content[0].text and message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 8 and message.model == model


@checks
def a_streamed_message_is_the_whole_one() -> None:
    fields: Any = {"model": model, "max_tokens": 8, "messages": MESSAGES, "extra_body": GREEDY}
    with client.messages.with_streaming_response.create(**fields, stream=True) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    for line in lines:
        events_type.validate_json(line.removeprefix("data: "), strict=True)
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    whole = ask()
    assert message.content[0].text == text == whole.content[0].text
    assert message.stop_reason == whole.stop_reason and message.usage.output_tokens == 8
    total = [each.usage.input_tokens + (each.usage.cache_read_input_tokens or 0) for each in (message, whole)]
    assert total[0] == total[1]


@checks
def cached_tokens_are_counted_apart() -> None:
    long: list[Any] = [{"role": "user", "content": "And the sons of Aaron were these. " * 20}]
    first, second = ask(messages=long), ask(messages=long)
    sums = [each.usage.input_tokens + each.usage.cache_read_input_tokens for each in (first, second)]
    assert second.usage.cache_read_input_tokens > 0 and sums[0] == sums[1]


@checks
def a_stop_sequence_ends_the_message() -> None:
    text = ask(max_tokens=30).content[0].text
    word = text.split()[2]
    message = ask(max_tokens=30, stop_sequences=[word])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", word)
    assert message.content[0].text == text[: text.index(word)]


@checks
def tokens_are_counted() -> None:
    count = client.messages.count_tokens(model=model, messages=MESSAGES, system="Answer briefly.")
    usage = ask(system="Answer briefly.").usage
    assert count.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@checks
def an_answer_goes_on_where_it_was_begun() -> None:
    whole = ask().content[0].text
    begun = whole.split()[0]
    message = ask(messages=[*MESSAGES, {"role": "assistant", "content": begun}])
    assert message.content[0].text.strip()[:5] in whole


@checks
def errors_are_the_sdks_own() -> None:
    with raises(anthropic.NotFoundError, "does not exist") as caught:
        ask(model="some/other")
    assert caught[0].body["error"]["type"] == "not_found_error"
    with raises(anthropic.BadRequestError, "'image'"):
        ask(messages=[{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}])
    with raises(anthropic.BadRequestError, "maximum context length"):
        ask(messages=[{"role": "user", "content": "a " * 50000}])


@checks.if_guarded
def a_wrong_key_is_refused() -> None:
    stranger = anthropic.Anthropic(base_url=checks.server_url, api_key="wrong", max_retries=0)
    with raises(anthropic.AuthenticationError):
        stranger.messages.create(model=model, max_tokens=8, messages=MESSAGES)


@checks
def a_stream_that_is_left_leaves_nothing_running() -> None:
    extra = {"ignore_eos": True}
    with client.messages.create(
        model=model, max_tokens=400, messages=MESSAGES, stream=True, extra_body=extra
    ) as stream:
        assert next(iter(stream)).type == "message_start"
    checks.wait_until_idle()


checks.run()
