"""langchain-openai's two models, against a running server: `python check_langchain.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from report import Checks, raises

checks = Checks("langchain-openai", "langchain-core", "openai")
PROMPT = "And God said"
CONVERSATION = [
    SystemMessage("Answer briefly."),
    HumanMessage("Who was Moses?"),
    AIMessage("A prophet."),
    HumanMessage([{"type": "text", "text": "And Aaron?"}]),
]


def options(fields: dict[str, Any]) -> Any:
    shared = {"model": checks.model, "base_url": checks.api_url, "api_key": checks.api_key, "max_retries": 0}
    return {**shared, "temperature": 0, "max_tokens": 8, "timeout": 60, **fields}


def chat(**fields: Any) -> Any:
    return ChatOpenAI(**options(fields))


def completion(**fields: Any) -> Any:
    return OpenAI(**options(fields))


@checks
def a_chat_is_invoked() -> None:
    answer = chat().invoke(CONVERSATION)
    assert isinstance(answer.content, str) and answer.content
    assert answer.usage_metadata["output_tokens"] == 8
    assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + 8
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == checks.model and not answer.tool_calls


@checks
def a_streamed_chat_is_the_whole_one() -> None:
    model = chat(stream_usage=True)
    chunks = list(model.stream(CONVERSATION))
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    whole = model.invoke(CONVERSATION)
    assert total.content == whole.content and len(chunks) > 4
    assert total.usage_metadata["output_tokens"] == 8
    assert total.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]
    assert total.response_metadata["finish_reason"] == "length"


@checks
def choices_seeds_stops_and_logprobs_pass() -> None:
    model = chat(temperature=1, seed=3)
    generations = chat(temperature=1, seed=3, n=2).generate([CONVERSATION]).generations[0]
    assert generations[0].text == model.invoke(CONVERSATION).content
    assert generations[1].text == chat(temperature=1, seed=4).invoke(CONVERSATION).content
    text = chat(max_tokens=24).invoke(CONVERSATION).content
    assert chat(max_tokens=24).invoke(CONVERSATION, stop=[text[6:9]]).content == text[: text.index(text[6:9])]
    entries = chat().bind(logprobs=True, top_logprobs=2).invoke(CONVERSATION).response_metadata["logprobs"]["content"]
    assert len(entries) == 8 and all(len(entry["top_logprobs"]) == 2 for entry in entries)


@checks
def a_chain_maps_a_batch() -> None:
    chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("human", "Who was {name}?")]) | chat()
    texts = (chain | StrOutputParser()).batch([{"name": name} for name in ("Moses", "Aaron", "David")])
    alone = [chain.invoke({"name": name}).content for name in ("Moses", "Aaron", "David")]
    assert texts == alone


@checks
def a_prompt_is_completed() -> None:
    model = completion()
    whole = model.invoke(PROMPT)
    assert "".join(model.stream(PROMPT)) == whole != ""
    batch = model.generate([PROMPT, "In the beginning"])
    assert batch.generations[0][0].text == whole and batch.llm_output["token_usage"]["completion_tokens"] == 16
    assert model.batch([PROMPT, "In the beginning"]) == [generations[0].text for generations in batch.generations]
    many = completion(n=2, best_of=2, temperature=1, seed=3).generate([PROMPT])
    assert len(many.generations[0]) == 2
    text = completion(max_tokens=24).invoke(PROMPT)
    assert completion(max_tokens=24).invoke(PROMPT, stop=[text[6:9]]) == text[: text.index(text[6:9])]


@checks
def vllms_fields_pass_in_extra_body() -> None:
    limited = chat(temperature=1, extra_body={"top_k": 1, "ignore_eos": True})
    assert limited.invoke(CONVERSATION).content == chat().invoke(CONVERSATION).content


@checks
def errors_have_their_classes() -> None:
    with raises(openai.NotFoundError, "does not exist"):
        chat(model="other").invoke(CONVERSATION)
    with raises(openai.BadRequestError, "top_p"):
        chat(top_p=3).invoke(CONVERSATION)
    for model in (chat(), completion()):
        for ask in (model.invoke, lambda prompt, model=model: list(model.stream(prompt))):
            with raises(openai.BadRequestError, "maximum context length"):
                ask("word " * 10_000)
    with raises(openai.APITimeoutError):
        completion(timeout=0.3, max_tokens=900, n=16, best_of=16, temperature=1).invoke(PROMPT)
    checks.wait_until_idle()


@checks
def structured_output_is_served() -> None:
    schema = {"title": "Person", "type": "object", "properties": {"sail": {"enum": ["red", "white"]}},
              "required": ["sail"], "additionalProperties": False}  # fmt: skip
    for method in ("json_schema", "function_calling"):  # an object of any form would have no end
        model = chat(max_tokens=800).with_structured_output(schema, method=method, include_raw=True)
        answer = model.invoke(CONVERSATION)
        raw = answer["raw"]
        assert raw.tool_calls or raw.invalid_tool_calls or raw.content.lstrip().startswith("{"), raw


@checks.if_guarded
def a_wrong_key_is_refused() -> None:
    with raises(openai.AuthenticationError):
        chat(api_key="wrong").invoke(CONVERSATION)


@checks
async def thirty_two_at_once_get_what_they_get_alone() -> None:
    async def one(number: int) -> str:
        if number % 2:
            return (await chat(temperature=1, seed=number % 4).ainvoke(CONVERSATION)).content
        model = chat(temperature=1, seed=number % 4)
        return "".join([chunk.content async for chunk in model.astream(CONVERSATION)])

    alone = [await one(number) for number in range(4)]
    assert await asyncio.gather(*(one(number) for number in range(32))) == alone * 8
    batch = await completion().abatch([PROMPT] * 32)
    assert len(set(batch)) == 1


@checks
async def leaving_a_stream_frees_the_request() -> None:
    async for _ in (stream := chat(max_tokens=900, extra_body={"ignore_eos": True}).astream(CONVERSATION)):
        assert await asyncio.to_thread(checks.num_in_server) == 1
        break
    await stream.aclose()
    await asyncio.to_thread(checks.wait_until_idle)


if __name__ == "__main__":
    checks.run()
