"""litellm's OpenAI-like providers against a running server: `python check_litellm.py BASE_URL [--api-key KEY]`."""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import reads a list from the network
import litellm
from report import Checks, raises

litellm.suppress_debug_info = True
checks = Checks("litellm", "openai")
PROVIDERS = ("openai", "hosted_vllm")
PROMPT = "And God said"
CONVERSATION: list[Any] = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "Who was Moses?"}]},
]


def options(provider: str, fields: dict[str, Any]) -> dict[str, Any]:
    model = fields.pop("model", checks.model)
    return {
        "model": f"{provider}/{model}", "api_base": checks.api_url, "api_key": checks.api_key, "max_tokens": 8,
        "temperature": 0, "num_retries": 0, **fields,
    }  # fmt: skip


def chat(provider: str, messages: Any = CONVERSATION, **fields: Any) -> Any:
    return litellm.completion(messages=messages, **options(provider, fields))


def complete(provider: str, prompt: Any = PROMPT, **fields: Any) -> Any:
    return litellm.text_completion(prompt=prompt, **options(provider, fields))


@checks
def both_providers_answer_a_chat() -> None:
    answers = [chat(provider) for provider in PROVIDERS]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content != ""
    for answer in answers:
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 8
        assert answer.choices[0].message.role == "assistant" and not answer.choices[0].message.tool_calls


@checks
def streams_rebuild_to_the_whole_answer() -> None:
    for provider in PROVIDERS:
        chunks = list(chat(provider, stream=True, stream_options={"include_usage": True}))
        built = litellm.stream_chunk_builder(chunks, messages=CONVERSATION)
        whole = chat(provider)
        assert built.choices[0].message.content == whole.choices[0].message.content
        assert built.choices[0].finish_reason == "length"
        assert built.usage.completion_tokens == 8 and built.usage.prompt_tokens == whole.usage.prompt_tokens


@checks
def choices_seeds_stops_and_logprobs_pass() -> None:
    for provider in PROVIDERS:
        many = chat(provider, n=2, seed=3, temperature=1)
        assert many.choices[1].message.content == chat(provider, seed=4, temperature=1).choices[0].message.content
        text = chat(provider, max_tokens=24).choices[0].message.content
        cut = chat(provider, max_tokens=24, stop=[text[6:9]]).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text[: text.index(text[6:9])], "stop")
        entries = chat(provider, logprobs=True, top_logprobs=2).choices[0].logprobs.content
        assert len(entries) == 8 and all(len(entry.top_logprobs) == 2 for entry in entries)


@checks
def vllms_fields_pass() -> None:
    answer = chat("hosted_vllm", extra_body={"top_k": 1, "ignore_eos": True, "return_token_ids": True}, temperature=1)
    assert answer.choices[0].message.content == chat("hosted_vllm").choices[0].message.content
    assert chat("hosted_vllm", temperature=1, top_k=1).choices[0].message.content == answer.choices[0].message.content


@checks
def prompts_are_completed() -> None:
    for provider in (*PROVIDERS, "text-completion-openai"):
        whole = complete(provider)
        pieces = [chunk.choices[0].text or "" for chunk in complete(provider, stream=True)]
        assert "".join(pieces) == whole.choices[0].text != ""
    two = complete("text-completion-openai", [PROMPT, "In the beginning"], logprobs=1)
    assert [choice.index for choice in two.choices] == [0, 1] and two.choices[0].text == whole.choices[0].text
    assert len(two.choices[1].logprobs.tokens) == 8


@checks
def errors_have_their_classes() -> None:
    for provider in PROVIDERS:
        with raises(litellm.NotFoundError, "does not exist"):
            chat(provider, model="other")
        with raises(litellm.BadRequestError, "temperature"):
            chat(provider, temperature=-1)
        with raises(litellm.ContextWindowExceededError, "maximum context length"):
            chat(provider, [{"role": "user", "content": "word " * 10_000}])
        with raises(litellm.ContextWindowExceededError, "maximum context length"):
            chat(provider, [{"role": "user", "content": "word " * 10_000}], stream=True)
        with raises(litellm.BadRequestError, "not supported yet"):
            chat(provider, extra_body={"watermarking": True})
        with raises(litellm.Timeout):
            chat(provider, n=16, max_tokens=900, temperature=1, timeout=0.3)
    checks.wait_until_idle()


@checks.if_guarded
def a_wrong_key_is_refused() -> None:
    for provider in PROVIDERS:
        with raises(litellm.AuthenticationError):
            chat(provider, api_key="wrong")


@checks
async def thirty_two_at_once_get_what_they_get_alone() -> None:
    async def one(number: int) -> str:
        provider, seed = PROVIDERS[number % 2], number % 4
        fields: dict[str, Any] = options(provider, {"messages": CONVERSATION, "temperature": 1, "seed": seed})
        if number % 3:
            return (await litellm.acompletion(**fields)).choices[0].message.content
        stream = await litellm.acompletion(stream=True, **fields)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    alone = [await one(number) for number in range(4)]
    assert await asyncio.gather(*(one(number) for number in range(32))) == alone * 8


@checks
def the_router_balances_over_two_deployments() -> None:
    deployments: list[Any] = [
        {"model_name": "bible", "litellm_params": options(provider, {"temperature": 0})} for provider in PROVIDERS
    ]
    router = litellm.Router(model_list=deployments, num_retries=0)
    texts = {router.completion("bible", CONVERSATION).choices[0].message.content for _ in range(4)}  # type: ignore[union-attr]
    assert len(texts) == 1


if __name__ == "__main__":
    checks.run()
