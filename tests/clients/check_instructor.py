"""instructor's modes without tools, against a running server: `python check_instructor.py BASE_URL [--api-key KEY]`.

The bundled demo cannot write JSON: two of its tokens are let through, so that it must answer `{}`.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import logging
from typing import Any, Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel
from report import Checks, raises

checks = Checks("instructor", "openai", "pydantic")
logging.getLogger("instructor").setLevel(logging.CRITICAL)  # it logs every attempt
MESSAGES: list[Any] = [{"role": "user", "content": "Who was Moses?"}]


class Anything(BaseModel):
    """Every field may be missing."""

    name: str = "nobody"


class Boat(BaseModel, extra="forbid"):  # else the demo would add fields for ever
    sail: Literal["red", "white"]


class Person(BaseModel):
    name: str


def patched(mode: instructor.Mode, **options: Any) -> Any:
    client = openai.OpenAI(base_url=checks.api_url, api_key=checks.api_key, timeout=60, max_retries=0)
    return instructor.from_openai(client, mode=mode, model=checks.model, **options)


def braces() -> dict[str, Any]:
    """Fields of a request that leave `{}` as the only answer."""
    opened, closed = (token_id(text) for text in "{}")
    only = {"allowed_token_ids": [opened, closed], "bad_words": ["{{"], "include_stop_str_in_output": True}
    return {"logit_bias": {str(opened): 100}, "stop": "}", "max_tokens": 4, "temperature": 0, "extra_body": only}


def token_id(text: str) -> int:
    client = openai.OpenAI(base_url=checks.server_url, api_key=checks.api_key)
    return client.post("/tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)["tokens"][0]  # type: ignore[index]


@checks
def markdown_json_becomes_a_model() -> None:
    made, answer = patched(instructor.Mode.MD_JSON).create_with_completion(
        response_model=Anything, messages=MESSAGES, max_retries=0, **braces()
    )
    assert isinstance(made, Anything) and answer.choices[0].message.content == "{}"


@checks
def markdown_json_streams_partial_models() -> None:
    partial = patched(instructor.Mode.MD_JSON).create_partial(response_model=Anything, messages=MESSAGES, **braces())
    assert list(partial)[-1].name in ("nobody", None)


@checks
def an_answer_that_does_not_validate_is_retried() -> None:
    with raises(InstructorRetryException, "name") as caught:
        patched(instructor.Mode.MD_JSON).create(response_model=Person, messages=MESSAGES, max_retries=2, **braces())
    assert caught[0].n_attempts >= 2 and caught[0].total_usage.completion_tokens >= 4


@checks
def without_a_model_the_plain_answer_comes() -> None:
    answer = patched(instructor.Mode.MD_JSON).create(response_model=None, messages=MESSAGES, max_tokens=8)
    assert answer.choices[0].message.content and answer.usage.completion_tokens <= 8


@checks
def modes_that_the_grammar_enforces_make_models() -> None:
    # The demo fills other modes with as much as there is room for.
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        made = patched(mode).create(response_model=Boat, messages=MESSAGES, max_retries=0, max_tokens=800)
        assert made.sail in ("red", "white"), (mode, made)


@checks
async def thirty_two_at_once_get_their_models() -> None:
    async with openai.AsyncOpenAI(base_url=checks.api_url, api_key=checks.api_key, timeout=60) as plain:
        many: Any = instructor.from_openai(plain, mode=instructor.Mode.MD_JSON, model=checks.model)
        fields = braces()
        made = await asyncio.gather(
            *(many.create(response_model=Anything, messages=MESSAGES, max_retries=0, **fields) for _ in range(32))
        )
    assert [one.name for one in made] == ["nobody"] * 32


if __name__ == "__main__":
    checks.run()
