"""The openai SDK, any major version, against a running server: `python check_openai.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import openai
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from report import Checks, raises

checks = Checks("openai", "pydantic")
client = openai.OpenAI(base_url=checks.api_url, api_key=checks.api_key, timeout=60, max_retries=0)
model = checks.model
PROMPT = "And God said"
CONVERSATION: list[Any] = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Who was Moses?"},
    {"role": "assistant", "content": "A prophet."},
    {"role": "user", "content": [{"type": "text", "text": "And who"}, {"type": "text", "text": "was Aaron?"}]},
]


def complete(prompt: Any = PROMPT, **fields: Any) -> Any:
    return create(client.completions, Completion, {"prompt": prompt, "max_tokens": 8, **fields})


def chat(messages: Any = CONVERSATION, **fields: Any) -> Any:
    kind = ChatCompletionChunk if fields.get("stream") else ChatCompletion
    return create(client.chat.completions, kind, {"messages": messages, "max_completion_tokens": 8, **fields})


def create(resource: Any, kind: Any, fields: dict[str, Any]) -> Any:
    """The SDK's answer, or all chunks of its stream, once its type has accepted strictly what the server sent.

    What the SDK itself parses says little: it converts what does not fit.
    """
    fields = {"model": model, "temperature": 0, **fields}
    if not fields.get("stream"):
        raw = resource.with_raw_response.create(**fields)
        accept(kind, raw.content)
        return raw.parse()
    with resource.with_streaming_response.create(**fields) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    for line in lines[:-1]:
        accept(kind, line.removeprefix("data: "))
    return list(resource.create(**fields))


def accept(kind: Any, text: str | bytes) -> None:
    """Validates without any conversion, but for the two nulls that OpenAI sends against its own types."""
    sent = json.loads(text)
    for choice in sent["choices"] if kind is Completion else ():
        choice["finish_reason"] = choice["finish_reason"] or "stop"  # all but the last chunk of a stream
        logprobs = choice["logprobs"] or {"token_logprobs": []}
        if logprobs["token_logprobs"][:1] == [None]:  # an echoed prompt's first token
            logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}
    kind.model_validate_json(json.dumps(sent), strict=True)


def texts(chunks: list[Any], num_choices: int = 1) -> list[str]:
    """What the chunks of a stream add up to, by choice."""
    pieces = [""] * num_choices
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        pieces[choice.index] += (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
    return pieces


@checks
def models_are_listed_and_retrieved() -> None:
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    Model.model_validate_json(client.models.with_raw_response.retrieve(model).content, strict=True)
    with raises(openai.NotFoundError, "does not exist"):
        client.models.retrieve("some/other")


@checks
def a_completion_is_whole() -> None:
    answer = complete()
    assert answer.id.startswith("cmpl-") and answer.model == model and answer.system_fingerprint
    assert answer.choices[0].text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


@checks
def a_completion_without_temperature_uses_the_servers() -> None:
    assert client.completions.create(model=model, prompt=PROMPT).usage.completion_tokens <= 16


@checks
def a_streamed_completion_is_the_whole_one() -> None:
    chunks = complete(stream=True, stream_options={"include_usage": True})
    assert texts(chunks) == [complete().choices[0].text]
    assert [chunk.choices for chunk in chunks].index([]) == len(chunks) - 1
    assert chunks[-1].usage == complete().usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


@checks
def token_ids_are_a_prompt() -> None:
    spelled = complete(extra_body={"return_token_ids": True}).choices[0]
    ids = spelled.prompt_token_ids
    assert complete(ids).choices[0].text == spelled.text
    two = complete([ids, ids[:-1]])
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].text == spelled.text
    assert two.usage.prompt_tokens == 2 * len(ids) - 1


@checks
def choice_i_of_prompt_p_has_index_pn_plus_i() -> None:
    prompts = [PROMPT, "In the beginning"]
    answer = complete(prompts, n=3, seed=7, temperature=1)
    alone = [complete(prompt, n=3, seed=7, temperature=1) for prompt in prompts]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [c.text for one in alone for c in one.choices]
    streamed = complete(prompts, n=3, seed=7, temperature=1, stream=True)
    assert texts(streamed, 6) == [choice.text for choice in answer.choices]


@checks
def a_seed_gives_the_same_text_again() -> None:
    many = complete(n=2, seed=11, temperature=1, max_tokens=12)
    one = complete(seed=12, temperature=1, max_tokens=12)
    assert many.choices[1].text == one.choices[0].text != many.choices[0].text


@checks
def echo_repeats_the_prompt_with_its_logprobs() -> None:
    answer = complete(echo=True, logprobs=2)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT) and len(choice.text) > len(PROMPT)
    logprobs = choice.logprobs
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert len(logprobs.tokens) == answer.usage.total_tokens == len(logprobs.text_offset)
    prompt_only = complete(echo=True, max_tokens=0, logprobs=1)
    assert prompt_only.choices[0].text == PROMPT and prompt_only.usage.completion_tokens == 0
    assert texts(complete(echo=True, stream=True)) == [choice.text]


@checks
def logprobs_of_a_completion_fit_its_text() -> None:
    choice = complete(logprobs=3).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.text_offset == [len("".join(logprobs.tokens[:i])) for i in range(8)]
    assert all(len(top) in (3, 4) and max(top.values()) <= 0 for top in logprobs.top_logprobs)
    streamed = [chunk.choices[0].logprobs for chunk in complete(logprobs=3, stream=True)]
    assert [token for part in streamed for token in part.tokens] == logprobs.tokens
    assert [offset for part in streamed for offset in part.text_offset] == logprobs.text_offset


@checks
def a_stop_string_ends_the_text_before_it() -> None:
    whole = complete(max_tokens=24).choices[0].text
    stop = whole[9:12]
    for answer in (complete(max_tokens=24, stop=stop), complete(max_tokens=24, stop=["never", stop])):
        choice = answer.choices[0]
        assert choice.text == whole[: whole.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    chunks = complete(max_tokens=24, stop=stop, stream=True)
    assert texts(chunks) == [whole[: whole.index(stop)]] and chunks[-1].choices[0].finish_reason == "stop"


@checks
def vllms_fields_pass_in_extra_body() -> None:
    fields = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True, "min_tokens": 4, "priority": 1,
              "stop_token_ids": [2000], "skip_special_tokens": False, "return_token_ids": True}  # fmt: skip
    choice = complete(temperature=1, extra_body=fields, extra_headers={"X-Request-Id": "mine"})
    assert choice.id == "cmpl-mine" and len(choice.choices[0].token_ids) == 8
    biased = complete(logit_bias={"100": 100}, extra_body={"return_token_ids": True})
    assert biased.choices[0].token_ids == [100] * 8


@checks
def fields_without_effect_are_accepted() -> None:
    complete(user="me", presence_penalty=0, frequency_penalty=0, top_p=1, best_of=1, suffix=None)
    chat(user="me", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True)


@checks
def a_null_is_a_field_left_out() -> None:
    shared = ("n", "seed", "stop", "stream", "stream_options", "logit_bias", "logprobs", "presence_penalty",
              "frequency_penalty", "top_p", "max_tokens", "user")  # fmt: skip
    nulls: dict[str, Any] = dict.fromkeys(shared)
    whole = complete(max_tokens=16).choices[0].text
    assert complete(**nulls, echo=None, best_of=None, suffix=None).choices[0].text == whole
    for_chat = dict.fromkeys(
        ("top_logprobs", "tools", "tool_choice", "response_format", "functions", "function_call", "modalities", "audio",
         "prediction", "reasoning_effort", "service_tier", "store", "metadata", "parallel_tool_calls")
    )  # fmt: skip
    whole = chat().choices[0].message
    assert chat(**nulls, **for_chat).choices[0].message == whole
    asks_for_nothing: dict[str, Any] = {
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "modalities": ["text"],
    }
    assert chat(**asks_for_nothing).choices[0].message == whole


@checks
def a_chat_answer_is_whole() -> None:
    answer = chat()
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.system_fingerprint
    message = answer.choices[0].message
    assert message.role == "assistant" and isinstance(message.content, str)
    assert not message.tool_calls and message.refusal is None
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.usage.completion_tokens <= 8


@checks
def a_developer_may_speak() -> None:
    spoken = {
        role: chat([{"role": role, "content": "Be brief."}, *CONVERSATION[1:]]) for role in ("system", "developer")
    }
    assert spoken["developer"].choices[0].message == spoken["system"].choices[0].message


@checks
def a_streamed_chat_is_the_whole_one() -> None:
    chunks = chat(stream=True, stream_options={"include_usage": True})
    whole = chat()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert texts(chunks) == [whole.choices[0].message.content]
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == len({chunk.created for chunk in chunks}) == 1
    continuous = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in chat(stream=True, stream_options=continuous)]
    assert counts == sorted(counts) and counts[-1] == 8


@checks
def chat_choices_have_seeds_of_their_own() -> None:
    whole = [choice.message.content for choice in chat(n=3, seed=5, temperature=1).choices]
    assert whole[2] == chat(seed=7, temperature=1).choices[0].message.content
    assert texts(chat(n=3, seed=5, temperature=1, stream=True), 3) == whole


@checks
def logprobs_of_a_chat_fit_its_text() -> None:
    choice = chat(logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 2 for token in content)
    assert all(token.top_logprobs[0].token == token.token for token in content), "greedy takes the likeliest"
    chunks = chat(logprobs=True, top_logprobs=2, stream=True)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert chat(logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


@checks
def the_sdks_stream_helper_adds_up() -> None:
    text = chat().choices[0].message.content
    stop = text[-3:]  # the helper takes an answer that max_tokens cut for a failure
    stream_helper = getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream
    with stream_helper(
        model=model, messages=CONVERSATION, max_tokens=24, temperature=0, logprobs=True, top_logprobs=1, stop=stop,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == text[: text.index(stop)]
    assert final.usage.completion_tokens == len(final.choices[0].logprobs.content)


@checks
def errors_have_their_classes() -> None:
    with raises(openai.NotFoundError, "does not exist") as caught:
        complete(model="other")
    assert (caught[0].param, caught[0].type, caught[0].status_code) == ("model", "NotFoundError", 404)
    assert str(caught[0].code) == "404"
    wrong: dict[str, Any] = {"temperature": -1, "top_p": 2, "n": 0, "logprobs": 999, "stop": ["a"] * 65, "seed": 2**70,
                             "max_tokens": -1, "stream_options": {"include_usage": True}}  # fmt: skip
    for field, value in wrong.items():
        with raises(openai.BadRequestError) as caught:
            complete(**{field: value})
        assert caught[0].param.removeprefix("body.") == field, (field, caught[0].param)
    for stream in (False, True):
        with raises(openai.BadRequestError, "maximum context length"):
            complete([5] * 100_000, stream=stream)
        with raises(openai.BadRequestError, "maximum context length"):
            chat([{"role": "user", "content": "word " * 100_000}], stream=stream)
    with raises(openai.BadRequestError, "logprobs"):
        chat(top_logprobs=2)
    with raises(openai.BadRequestError, "role"):
        chat([{"content": "nobody says so"}])
    with raises(openai.BadRequestError, "messages"):
        chat([])
    with raises(openai.APIStatusError, "413") as caught:
        complete("x" * (33 * 2**20))


@checks
def tools_are_served_where_the_server_knows_their_format() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    try:
        answer = chat(tools=[tool])
    except openai.BadRequestError as error:
        assert "requires --enable-auto-tool-choice and --tool-call-parser" in str(error), error
        assert chat(tools=[tool], tool_choice="none").choices[0].message.content is not None
        return
    message = answer.choices[0].message
    assert message.tool_calls or message.content or message.reasoning
    chunks = list(chat(tools=[tool], stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length", "tool_calls")


@checks
def what_is_not_built_is_refused() -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    with raises(openai.BadRequestError, "not supported yet"):
        chat(tools=[tool], tool_choice="none", extra_body={"watermarking": True})
    with raises(openai.BadRequestError, "image"):
        chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}])
    with raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="words")


@checks.if_guarded
def a_wrong_key_is_refused() -> None:
    stranger = openai.OpenAI(base_url=checks.api_url, api_key="wrong", max_retries=0)
    with raises(openai.AuthenticationError):
        stranger.models.list()
    with raises(openai.AuthenticationError):
        stranger.chat.completions.create(model=model, messages=CONVERSATION, stream=True)


@checks
def a_timeout_frees_the_request() -> None:
    with raises(openai.APITimeoutError):
        complete(n=16, temperature=1, max_tokens=900, extra_body={"ignore_eos": True}, timeout=0.3)
    checks.wait_until_idle()


@checks
def leaving_a_stream_frees_the_request() -> None:
    shared: dict[str, Any] = {
        "model": model,
        "stream": True,
        "n": 8,
        "max_tokens": 900,
        "extra_body": {"ignore_eos": True},
    }
    for begin in (
        lambda: client.completions.create(prompt=PROMPT, **shared),
        lambda: client.chat.completions.create(messages=CONVERSATION, **shared),
    ):
        with begin() as stream:
            for _ in itertools.islice(stream, 20):
                pass
            assert (running := checks.num_in_server()) == 8, running
        checks.wait_until_idle()


def async_client() -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=checks.api_url, api_key=checks.api_key, timeout=60, max_retries=0)


@checks
async def thirty_two_at_once_get_what_they_get_alone() -> None:
    alone = [complete(seed=seed, temperature=1).choices[0].text for seed in range(4)]

    async def one(many: openai.AsyncOpenAI, number: int) -> str:
        fields: dict[str, Any] = {"prompt": PROMPT, "seed": number % 4, "max_tokens": 8, "temperature": 1}
        if number % 2:
            return (await many.completions.create(model=model, **fields)).choices[0].text
        stream = await many.completions.create(model=model, stream=True, **fields)
        return texts([chunk async for chunk in stream])[0]

    async with async_client() as many:
        together = await asyncio.gather(*(one(many, number) for number in range(32)))
    assert together == alone * 8


@checks
async def a_cancelled_task_frees_the_request() -> None:
    async with async_client() as many:
        body: dict[str, Any] = {"model": model, "max_tokens": 900, "n": 16, "extra_body": {"ignore_eos": True}}
        tasks = [asyncio.create_task(many.chat.completions.create(messages=CONVERSATION, **body)) for _ in range(4)]
        try:
            for _ in range(100):
                await asyncio.sleep(0.05)
                if (running := await asyncio.to_thread(checks.num_in_server)) == 64:
                    break
            assert running == 64
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(checks.wait_until_idle)


if __name__ == "__main__":
    checks.run()
