"""llama-index's OpenAI-like model against a running server: `python check_llamaindex.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
import gc
from typing import Any, Literal

import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from report import Checks, raises

checks = Checks("llama-index-llms-openai-like", "llama-index-core", "openai")
PROMPT = "And God said"
CONVERSATION = [
    ChatMessage(role="system", content="Answer briefly."),
    ChatMessage(role="user", content="Who was Moses?"),
]


def model(**fields: Any) -> Any:
    shared = {"model": checks.model, "api_base": checks.api_url, "api_key": checks.api_key, "is_chat_model": True}
    return OpenAILike(**{**shared, "temperature": 0, "max_tokens": 8, "max_retries": 0, "timeout": 60, **fields})


@checks
def a_chat_is_answered() -> None:
    answer = model().chat(CONVERSATION)
    assert answer.message.role == "assistant" and answer.message.content
    assert answer.raw.usage.completion_tokens == 8 and answer.raw.choices[0].finish_reason == "length"


@checks
def a_streamed_chat_is_the_whole_one() -> None:
    pieces = list(model().stream_chat(CONVERSATION))
    assert len(pieces) > 4
    assert "".join(piece.delta or "" for piece in pieces) == model().chat(CONVERSATION).message.content


@checks
async def the_async_ways_say_the_same() -> None:
    whole = model().chat(CONVERSATION).message.content
    assert (await model().achat(CONVERSATION)).message.content == whole
    assert "".join([piece.delta or "" async for piece in await model().astream_chat(CONVERSATION)]) == whole


@checks
def a_text_is_completed() -> None:
    plain = model(is_chat_model=False)
    whole = plain.complete(PROMPT).text
    assert whole and "".join(piece.delta or "" for piece in plain.stream_complete(PROMPT)) == whole


@checks
def a_tool_is_called_where_one_is_required() -> None:
    def weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city."""
        return city

    tool = FunctionTool.from_defaults(weather)
    caller = model(is_function_calling_model=True, max_tokens=800)
    answer = caller.chat_with_tools([tool], user_msg="Paris?", tool_required=True)
    calls = caller.get_tool_calls_from_response(answer)
    assert [call.tool_name for call in calls] == ["weather"] * len(calls) and calls
    assert all(list(call.tool_kwargs) == ["city"] for call in calls)


@checks
def logprobs_are_read() -> None:
    answer = model(logprobs=True, top_logprobs=2).chat(CONVERSATION)
    assert len(answer.logprobs) == 8
    assert all(len(position) == 2 and all(one.logprob <= 0 for one in position) for position in answer.logprobs)


@checks
def a_wrong_value_is_a_bad_request() -> None:
    with raises(openai.BadRequestError, "top_p"):
        model(additional_kwargs={"top_p": 7}).chat(CONVERSATION)


@checks.if_guarded
def a_wrong_key_is_refused() -> None:
    with raises(openai.AuthenticationError):
        model(api_key="wrong").chat(CONVERSATION)


@checks
def a_stream_that_is_left_ends_in_the_server() -> None:
    stream = model(max_tokens=2000, additional_kwargs={"extra_body": {"ignore_eos": True}}).stream_chat(CONVERSATION)
    next(stream)
    stream.close()
    del stream  # the framework closes the connection when nobody holds the answer any more
    gc.collect()
    checks.wait_until_idle()


if __name__ == "__main__":
    checks.run()
