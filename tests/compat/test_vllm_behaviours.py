"""What vLLM's own tests of its OpenAI server ask of it, asked of this one; vllm_behaviours.yaml names them."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from aiohttp import ClientSession

import omni_engine
from omni_engine import EngineArgs
from omni_engine.server.settings import ServerSettings

ROOT = Path(omni_engine.__file__).parent
DEMO = ROOT / "models" / "demo" / "deepseek"
TESTS = Path(__file__).parents[1]
LIST = Path(__file__).with_name("vllm_behaviours.yaml")
COMPLETIONS, CHAT, BATCH, RESPONSES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/responses",
)
MESSAGES = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "What is 1+1?"}]
PROMPT_IDS = [10, 11, 12, 13, 14]
VOCAB_SIZE = 2048
ANY_ROLE = "{% for m in messages %}{{ m.role }}: {{ m.content or m.tool_calls }}\n{% endfor %}"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}


class Client:
    """Plain HTTP to one of the servers."""

    def __init__(self, session: ClientSession) -> None:
        self.session = session

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.session.post(path, json=body) as response:
            return response.status, await response.json()

    async def ok(self, path: str, **body: Any) -> Any:
        status, told = await self.post(path, temperature=body.pop("temperature", 0), **body)
        assert status == 200, told
        return told

    async def refused(self, path: str, **body: Any) -> str:
        """The message of a 400."""
        status, told = await self.post(path, **body)
        assert status == 400 and told["error"]["code"] == 400, told
        return told["error"]["message"]

    async def stream(self, path: str, **body: Any) -> list[Any]:
        body = {"temperature": 0, **body, "stream": True}
        async with self.session.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            lines = [line.decode().strip() async for line in response.content]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        if path != RESPONSES:
            assert data.pop() == "[DONE]"
        return [json.loads(line) for line in data]


@pytest.fixture(scope="module")
def run(servers):
    """`run(scenario, name)`: a scenario over a `Client` of the server "plain" or "tools"; both have one engine."""
    args = EngineArgs(model=str(DEMO), dtype="float32", max_model_len=512, max_num_seqs=16, enforce_eager=True)
    settings = {
        "plain": ServerSettings(model="demo", enable_prompt_tokens_details=True, trust_request_chat_template=True),
        "tools": ServerSettings(
            model="demo",
            enable_auto_tool_choice=True,
            tool_call_parser="hermes",
            reasoning_parser="deepseek_r1",
            trust_request_chat_template=True,
        ),
    }
    with servers(args, settings) as serve:
        yield lambda scenario, name="plain": serve(name, lambda session, _: scenario(Client(session)))


def test_logprobs_of_a_chat_are_as_many_as_asked_for(run):
    async def scenario(client):
        ask = {"messages": MESSAGES, "max_completion_tokens": 5}
        assert (await client.ok(CHAT, **ask, logprobs=False))["choices"][0]["logprobs"] is None
        for number in (0, 5):
            told = await client.ok(CHAT, **ask, logprobs=True, top_logprobs=number)
            assert [len(token["top_logprobs"]) for token in told["choices"][0]["logprobs"]["content"]] == [number] * 5
        for number, streams in ((21, True), (30, False)):
            assert "20" in await client.refused(CHAT, **ask, logprobs=True, top_logprobs=number, stream=streams)
        assert (await client.ok(CHAT, **ask))["choices"][0]["message"]["content"]

    run(scenario)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_prompt_logprobs_are_as_many_as_asked_for(run, path):
    ask: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": ["A robot may not", "My name is"]}

    async def scenario(client):
        def shown(told):
            return [told["prompt_logprobs"]] if path == CHAT else [c["prompt_logprobs"] for c in told["choices"]]

        assert all(logprobs is None for logprobs in shown(await client.ok(path, **ask, max_tokens=2)))
        for number in (0, 1, 2):
            for logprobs in shown(await client.ok(path, **ask, max_tokens=2, prompt_logprobs=number)):
                assert logprobs[0] is None
                assert all(max(number, 1) <= len(entry) <= number + 1 for entry in logprobs[1:])
        await client.refused(path, **ask, max_tokens=2, prompt_logprobs=-1)

    run(scenario)


def test_a_conversation_goes_on_with_its_answer(run):
    async def scenario(client):
        first = await client.ok(CHAT, messages=MESSAGES, max_completion_tokens=5, logprobs=True, top_logprobs=5)
        (choice,) = first["choices"]
        usage = first["usage"]
        assert first["id"] and choice["finish_reason"] == "length" and choice["message"]["role"] == "assistant"
        assert usage["completion_tokens"] == 5 and usage["total_tokens"] == usage["prompt_tokens"] + 5
        more = [*MESSAGES, {"role": "assistant", "content": choice["message"]["content"]}, MESSAGES[1]]
        second = await client.ok(CHAT, messages=more, max_completion_tokens=5)
        assert second["usage"]["prompt_tokens"] > usage["prompt_tokens"] + 5

    run(scenario)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_is_the_whole_answer_with_one_reason_at_its_end(run, path):
    ask: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "What is an LLM?"}

    async def scenario(client):
        whole = (await client.ok(path, **ask, max_tokens=10))["choices"][0]
        chunks = [chunk["choices"][0] for chunk in await client.stream(path, **ask, max_tokens=10)]
        if path == CHAT:
            assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == whole["message"]["content"]
            assert {chunk["delta"].get("role", "assistant") for chunk in chunks} == {"assistant"}
        else:
            assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
        reasons = [chunk["finish_reason"] for chunk in chunks if chunk.get("finish_reason")]
        assert reasons == [whole["finish_reason"]] and chunks[-1]["finish_reason"]

    run(scenario)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_in_streams_is_where_the_options_say(run, path):
    ask: dict[str, Any] = {"max_tokens": 10, "min_tokens": 10}
    ask |= {"messages": MESSAGES} if path == CHAT else {"prompt": "What is the capital of France?"}

    async def scenario(client):
        for options in ({"include_usage": False}, {"include_usage": False, "continuous_usage_stats": True}, {}):
            chunks = await client.stream(path, **ask, stream_options=options)
            assert all(chunk.get("usage") is None and chunk["choices"] for chunk in chunks)
        *chunks, last = await client.stream(path, **ask, stream_options={"include_usage": True})
        assert all(chunk.get("usage") is None for chunk in chunks) and last["choices"] == []
        usage = last["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] == 10
        both = {"include_usage": True, "continuous_usage_stats": True}
        counts = [
            chunk["usage"]["completion_tokens"] for chunk in await client.stream(path, **ask, stream_options=both)
        ]
        assert counts == sorted(counts) and counts[-1] == 10 and len(set(counts)) >= 10
        for options in ({"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": True}):
            await client.refused(path, **ask, stream_options=options)

    run(scenario)


def test_several_choices_differ_and_are_numbered(run):
    async def scenario(client):
        ask = {"max_tokens": 20, "n": 3, "temperature": 1.0, "seed": 42}
        for path, prompt in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "What is an LLM?"})):
            told = await client.ok(path, **prompt, **ask)
            assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
            texts = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in told["choices"]]
            assert len(set(texts)) == 3 and all(choice["finish_reason"] for choice in told["choices"])
            streamed, reasons = ["", "", ""], 0
            for chunk in await client.stream(path, **prompt, **ask):
                (choice,) = chunk["choices"]
                text = choice["delta"].get("content") or "" if path == CHAT else choice["text"]
                streamed[choice["index"]] += text
                reasons += choice.get("finish_reason") is not None
            assert streamed == texts and reasons == 3
        assert len((await client.ok(CHAT, messages=MESSAGES, max_tokens=4, n=1))["choices"]) == 1

    run(scenario)


def test_structured_outputs_are_what_they_must_be(run):
    schema = {"type": "object", "properties": {"result": {"type": "integer", "minimum": 0, "maximum": 99}},
              "required": ["result"], "additionalProperties": False}  # fmt: skip
    address = r"((25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])\.){3}(25[0-5]|(2[0-4]|1[0-9]|[1-9])?[0-9])"

    async def scenario(client):
        async def say(**fields):
            told = await client.ok(CHAT, messages=MESSAGES, max_completion_tokens=60, temperature=0.7, seed=1, **fields)
            return told["choices"][0]

        choice = await say(structured_outputs={"choice": ["Rust", "Ada", "Kotlin"]}, logprobs=True, top_logprobs=5)
        assert choice["message"]["content"] in ("Rust", "Ada", "Kotlin")
        assert all(top["logprob"] >= -9999 for top in choice["logprobs"]["content"][0]["top_logprobs"])
        compact = {"disable_any_whitespace": True}
        for fields in (
            {"structured_outputs": {"json": schema, **compact}},
            {
                "structured_outputs": compact,
                "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
            },
        ):
            jsonschema.validate(json.loads((await say(**fields))["message"]["content"]), schema)
        assert re.fullmatch(address, (await say(structured_outputs={"regex": address}))["message"]["content"])
        text = (await say(response_format={"type": "json_object"}))["message"]["content"]
        assert text.startswith("{")
        assert (await say(response_format={"type": "text"}))["message"]["content"]

    run(scenario)


def test_wrong_structured_outputs_are_refused(run):
    schema = {"type": "object", "properties": {"brand": {"type": "string"}, "foo": "bar"}, "required": ["brand"]}
    grammar = 'root ::= select_statementinvalidsyntax\nselect_statement ::= "SELECT " column\ncolumn ::= "a" | "b"'

    async def scenario(client):
        for wrong in (
            {"json": schema},
            {"regex": "[.*"},
            {"grammar": grammar},
            {"regex": {"1": "Python"}},
            {"grammar": ""},
        ):
            await client.refused(COMPLETIONS, prompt="A car:", structured_outputs=wrong)
        for path, prompt in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": MESSAGES})):
            assert "json_schema" in await client.refused(path, **prompt, response_format={"type": "json_schema"})
            await client.refused(path, **prompt, structured_outputs={"regex": "a", "choice": ["b"]})

    run(scenario)


def test_messages_may_have_parts_custom_roles_and_unknown_fields(run):
    async def scenario(client):
        async def say(message):  # the demo's own template knows three roles
            return (await client.ok(CHAT, messages=[message], max_tokens=8, chat_template=ANY_ROLE))["choices"][0][
                "message"
            ]["content"]

        text = "what is 1+1?"
        for role in ("user", "my-custom-role", "system"):
            plain = await say({"role": role, "content": text})
            assert plain == await say({"role": role, "content": [{"type": "text", "text": text}]})
            assert plain == await say({"role": role, "content": text, "extra_field": "0"})
        assert await client.ok(CHAT, messages=MESSAGES, max_tokens=2, unknown_field=[1])

    run(scenario)


def test_seeds_are_64_bits(run):
    async def scenario(client):
        for seed in (-(2**63) - 1, 2**63):
            message = await client.refused(CHAT, messages=MESSAGES, seed=seed)
            assert "greater_than_equal" in message or "less_than_equal" in message
        assert await client.ok(CHAT, messages=MESSAGES, seed=2**63 - 1, max_tokens=2)

    run(scenario)


def test_invocations_answer_as_the_route_does(run):
    async def scenario(client):
        for path, prompt in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "A"})):
            told = await client.ok(path, **prompt, max_tokens=5)
            same = await client.ok("/invocations", **prompt, max_tokens=5)
            assert told.keys() == same.keys() and told["choices"] == same["choices"]

    run(scenario)


def test_a_completion_counts_its_tokens(run):
    async def scenario(client):
        told = await client.ok(COMPLETIONS, prompt=PROMPT_IDS, max_tokens=5, ignore_eos=True)
        (choice,) = told["choices"]
        assert choice["finish_reason"] == "length" and choice["text"] and choice["prompt_logprobs"] is None
        usage = told["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 5, 10)
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0

    run(scenario)


def test_prompts_are_cut_on_the_side_that_is_asked_for(run):
    async def scenario(client):
        prompt = list(range(20, 28))
        for side, kept in (("right", prompt[:4]), ("left", prompt[-4:])):
            told = await client.ok(COMPLETIONS, prompt=prompt, max_tokens=1, return_token_ids=True,
                                   truncate_prompt_tokens=4, truncation_side=side)  # fmt: skip
            assert told["choices"][0]["prompt_token_ids"] == kept

    run(scenario)


def test_logprobs_of_completions_are_as_many_as_asked_for(run):
    async def scenario(client):
        ask = {"prompt": PROMPT_IDS, "max_tokens": 5}
        assert (await client.ok(COMPLETIONS, **ask, logprobs=None))["choices"][0]["logprobs"] is None
        for number in (0, 1, 5):
            logprobs = (await client.ok(COMPLETIONS, **ask, logprobs=number))["choices"][0]["logprobs"]
            assert all(max(number, 1) <= len(top) <= number + 1 for top in logprobs["top_logprobs"])
            assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 5
            echoed = (await client.ok(COMPLETIONS, **ask, logprobs=number, echo=True))["choices"][0]["logprobs"]
            assert echoed["token_logprobs"][0] is None and echoed["top_logprobs"][0] is None
            assert len(echoed["tokens"]) == 10
            assert all(max(number, 1) <= len(top) <= number + 1 for top in echoed["top_logprobs"][1:])
        for number, streams in ((21, False), (30, True)):
            await client.refused(COMPLETIONS, **ask, logprobs=number, stream=streams)

    run(scenario)


def test_equal_prompts_of_a_batch_have_equal_answers(run):
    async def scenario(client):
        for prompts in (["Hello, my name is"] * 2, [PROMPT_IDS] * 2):
            told = await client.ok(COMPLETIONS, prompt=prompts, max_tokens=5)
            first, second = told["choices"]
            assert first["text"] == second["text"]
            texts = ["", ""]
            for chunk in await client.stream(COMPLETIONS, prompt=prompts, max_tokens=5):
                (choice,) = chunk["choices"]
                texts[choice["index"]] += choice["text"]
            assert texts == [first["text"]] * 2

    run(scenario)


def test_beam_search_is_refused_by_name(run):
    async def scenario(client):
        assert "use_beam_search" in await client.refused(COMPLETIONS, prompt="a", use_beam_search=True, n=2)

    run(scenario)


def test_wrong_prompts_are_refused(run):
    async def scenario(client):
        for prompt in (None, [], ""):
            message = await client.refused(COMPLETIONS, prompt=prompt, max_tokens=5)
            assert "prompt" in message
        assert "vocabulary" in await client.refused(COMPLETIONS, prompt=[999999], max_tokens=5)
        for prompt in ([-1], [[-1]]):
            await client.refused(COMPLETIONS, prompt=prompt)
        assert "prompt_embeds" in await client.refused(COMPLETIONS, prompt_embeds="AAAA")

    run(scenario)


def test_ids_outside_the_vocabulary_are_refused_with_its_size(run):
    async def scenario(client):
        outside = VOCAB_SIZE + 1
        assert await client.ok(CHAT, messages=MESSAGES, max_tokens=5, logit_bias={str(VOCAB_SIZE - 1): 1.0})
        assert await client.ok(CHAT, messages=MESSAGES, max_tokens=5, stop_token_ids=[VOCAB_SIZE - 1])
        for wrong in ({"logit_bias": {str(outside): 1.0}}, {"stop_token_ids": [outside]}):
            message = await client.refused(CHAT, messages=MESSAGES, **wrong)
            assert str(outside) in message and str(VOCAB_SIZE) in message
        await client.refused(CHAT, messages=MESSAGES, stop_token_ids=[-1])
        assert "not_a_token_id" in await client.refused(CHAT, messages=MESSAGES, logit_bias={"not_a_token_id": 50})
        assert "logit_bias" in await client.refused(CHAT, messages=MESSAGES, logit_bias={"1": "not_a_number"})

    run(scenario)


def test_all_wrong_keys_of_a_bias_are_told(run):
    async def scenario(client):
        message = await client.refused(CHAT, messages=MESSAGES, logit_bias={"bad1": 50.0, "bad2": 20.0})
        assert "bad1" in message and "bad2" in message

    run(scenario)


def test_a_body_that_is_no_object_is_refused(run):
    async def scenario(client):
        for path in (CHAT, COMPLETIONS, RESPONSES):
            for text in ("no json{{{", '"text"', "[1]", "42", "null", ""):
                headers = {"Content-Type": "application/json"}
                async with client.session.post(path, data=text, headers=headers) as response:
                    assert response.status == 400, (path, text)
        for salt in ("", "a" * 129, "a/b"):
            assert "cache_salt" in await client.refused(CHAT, messages=MESSAGES, cache_salt=salt)
        async with client.session.post(CHAT, data="a=1") as response:
            assert response.status == 400  # a form

    run(scenario)


def test_thinking_budgets_are_whole_numbers_from_minus_one(run):
    async def scenario(client):
        for budget in (-2, 0.6, 10.5):
            for path, prompt in ((CHAT, {"messages": MESSAGES}), (COMPLETIONS, {"prompt": "a"})):
                message = await client.refused(path, **prompt, thinking_token_budget=budget)
                assert "thinking_token_budget" in message
        for budget in (10, -1):
            assert await client.ok(CHAT, messages=MESSAGES, max_tokens=2, thinking_token_budget=budget)

    run(scenario, "tools")


def test_tools_are_called_whole_and_in_streams(run):
    async def scenario(client):
        ends = [(await client.ok("/tokenize", prompt=end))["tokens"][-1] for end in ("]", "}", '"')]
        bias = dict.fromkeys(map(str, ends), 100)  # a model that knows no tools would call them until there is no room
        for wanted in ("required", NAMED):
            ask = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": wanted, "max_tokens": 400,
                   "logit_bias": bias}  # fmt: skip
            (choice,) = (await client.ok(CHAT, **ask))["choices"]
            calls = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == ("tool_calls" if wanted == "required" else "stop") and calls
            assert not choice["message"]["content"]
            for call in calls:
                assert call["type"] == "function" and call["id"] and call["function"]["name"] == "weather"
                jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
            arguments: dict[int, str] = {}
            chunks = [chunk["choices"][0] for chunk in await client.stream(CHAT, **ask)]
            for chunk in chunks:
                assert not chunk["delta"].get("content")
                for piece in chunk["delta"].get("tool_calls", ()):
                    text = piece["function"].get("arguments") or ""
                    arguments[piece["index"]] = arguments.get(piece["index"], "") + text
            assert [arguments[index] for index in sorted(arguments)] == [c["function"]["arguments"] for c in calls]
            assert sum(chunk.get("finish_reason") is not None for chunk in chunks) == 1

    run(scenario)


def test_one_token_of_a_required_call_is_no_call(run):
    async def scenario(client):
        ask = {"messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "max_completion_tokens": 1}
        (choice,) = (await client.ok(CHAT, **ask))["choices"]
        assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]

    run(scenario)


def test_tool_choices_that_contradict_the_tools_are_refused(run):
    other = {"type": "function", "function": {"name": "undefined"}}

    async def scenario(client):
        for wrong in (
            {"tool_choice": NAMED},
            {"tool_choice": other, "tools": [WEATHER]},
            {"tool_choice": {}, "tools": [WEATHER]},
            {"tool_choice": "bogus", "tools": [WEATHER]},
            {"tool_choice": "auto"},
            {"tools": []},
        ):
            await client.refused(CHAT, messages=MESSAGES, **wrong)
        ask = {"messages": MESSAGES, "max_tokens": 4}
        for fields in (
            {"tool_choice": None},
            {"tool_choice": None, "tools": [WEATHER]},
            {"tools": [WEATHER]},
            {"tool_choice": None, "structured_outputs": {"choice": ["a"]}},
            {"tool_choice": "none", "tools": [WEATHER]},
        ):
            assert await client.ok(CHAT, **ask, **fields)

    run(scenario, "tools")


def test_a_call_without_arguments_and_its_result_are_taken_back(run):
    async def scenario(client):
        for arguments in ("{}", ""):
            call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": arguments}}
            messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}]  # fmt: skip
            assert await client.ok(CHAT, messages=messages, max_tokens=4, chat_template=ANY_ROLE)

    run(scenario, "tools")


def test_a_batch_of_conversations(run):
    async def scenario(client):
        both = [[{"role": "user", "content": word}] for word in ("alpha", "beta")]
        told = await client.ok(BATCH, messages=both, max_tokens=40, structured_outputs={"choice": ["yes", "no"]})
        assert [choice["index"] for choice in told["choices"]] == [0, 1]
        assert all(choice["message"]["content"] in ("yes", "no") for choice in told["choices"])
        ask = {"messages": both[:1], "max_tokens": 3, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
        for as_ids in (False, True):
            told = await client.ok(BATCH, **ask, return_tokens_as_token_ids=as_ids)
            entries = told["choices"][0]["logprobs"]["content"]
            assert all(entry["token"].startswith("token_id:") == as_ids for entry in entries)
        plain = await client.ok(BATCH, messages=both[:1], max_tokens=4)
        echoed = await client.ok(BATCH, messages=both[:1], max_tokens=4, echo=True)
        assert (
            plain["choices"][0]["message"] == echoed["choices"][0]["message"]
        )  # the user's words are not the answer's

    run(scenario)


def test_token_ids_are_those_of_the_logprobs(run):
    async def scenario(client):
        ask = {"prompt": "Hello, world! 🚀", "max_tokens": 8, "logprobs": 1, "return_token_ids": True}
        told = await client.ok(COMPLETIONS, **ask, return_tokens_as_token_ids=True, echo=True, prompt_logprobs=1)
        (choice,) = told["choices"]
        ids = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        assert ids == choice["prompt_token_ids"] + choice["token_ids"]
        text = await client.ok("/detokenize", tokens=choice["token_ids"])
        assert choice["text"].endswith(text["prompt"])
        without = (await client.ok(COMPLETIONS, **{**ask, "return_token_ids": False}))["choices"][0]
        assert without["token_ids"] is None and without["prompt_token_ids"] is None
        chunks = await client.stream(COMPLETIONS, **ask, return_tokens_as_token_ids=True)
        shown = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        streamed = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
        assert [int(token.removeprefix("token_id:")) for token in shown] == streamed == choice["token_ids"]
        assert chunks[0]["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any(chunk["choices"][0].get("prompt_token_ids") for chunk in chunks[1:])
        first, *rest = await client.stream(CHAT, messages=MESSAGES, max_tokens=5, return_token_ids=True)
        assert first["prompt_token_ids"] and not any(chunk.get("prompt_token_ids") for chunk in rest)

    run(scenario)


def test_responses_are_stored_continued_and_not_found(run):
    async def scenario(client):
        ask = {"input": "Hello!", "max_output_tokens": 8}
        response = await client.ok(RESPONSES, **ask, instructions="Be brief.")
        async with client.session.get(f"{RESPONSES}/{response['id']}") as found:
            assert (await found.json())["id"] == response["id"]
        for _ in range(2):  # both from the same one
            assert (await client.ok(RESPONSES, **ask, previous_response_id=response["id"]))["output"]
        status, told = await client.post(f"{RESPONSES}/{response['id']}/cancel")
        assert status == 400 and "synchronous" in told["error"]["message"]
        unstored = await client.ok(RESPONSES, **ask, store=False)
        async with client.session.get(f"{RESPONSES}/{unstored['id']}") as found:
            assert found.status == 404
        assert "store" in await client.refused(RESPONSES, **ask, background=True, store=False)
        assert "effort" in str(response["reasoning"]) or response["reasoning"] is None

    run(scenario)


def test_responses_in_the_background_are_queued_and_can_be_cancelled(run):
    async def scenario(client):
        async def found(response_id):
            async with client.session.get(f"{RESPONSES}/{response_id}") as response:
                return await response.json()

        response = await client.ok(RESPONSES, input="Hi", max_output_tokens=4, background=True)
        assert response["status"] in ("queued", "in_progress")
        while (told := await found(response["id"]))["status"] in ("queued", "in_progress"):
            await asyncio.sleep(0.02)
        assert told["status"] in ("completed", "incomplete")
        response = await client.ok(RESPONSES, input="Hi", max_output_tokens=480, background=True, ignore_eos=True)
        _, cancelled = await client.post(f"{RESPONSES}/{response['id']}/cancel")
        assert cancelled["status"] == "cancelled"
        await asyncio.sleep(0.3)
        assert (await found(response["id"]))["status"] == "cancelled"

    run(scenario)


def test_responses_take_chats_and_stream_what_they_say(run):
    async def scenario(client):
        history = [
            {"role": "system", "content": "Finish with QED."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is 5 * 3?"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "15."}]},
            {"type": "reasoning", "summary": [], "encrypted_content": None},
            {"role": "user", "content": "And 2 * 3?"},
        ]
        told = await client.ok(RESPONSES, input=history, max_output_tokens=6, ignore_eos=True)
        assert told["status"] == "incomplete" and told["incomplete_details"]["reason"] == "max_output_tokens"
        extras = {"top_k": 40, "repetition_penalty": 1.2, "seed": 42, "top_p": 0.9}
        assert (await client.ok(RESPONSES, input="a", max_output_tokens=6, temperature=0.7, **extras))["output"]
        logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}
        events = await client.stream(RESPONSES, input=history, max_output_tokens=6, **logprobs)
        assert events[0]["type"] == "response.created"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        final = events[-1]["response"]["output"][-1]["content"][-1]
        assert "".join(event["delta"] for event in deltas) == final["text"]
        assert all(len(one["top_logprobs"]) == 3 for event in deltas for one in event["logprobs"])
        opened = [event["type"] for event in events if event["type"].endswith(".added")]
        closed = [
            event["type"]
            for event in events
            if event["type"] in ("response.output_item.done", "response.content_part.done")
        ]
        assert len(opened) == len(closed)
        raw = await client.ok(RESPONSES, input="Hello?", max_output_tokens=6, enable_response_messages=True)
        assert raw["input_messages"][0]["type"] == "raw_message_tokens" and raw["input_messages"][0]["tokens"]
        assert raw["output_messages"][0]["message"]

    run(scenario)


def listed() -> list[dict[str, Any]]:
    return yaml.safe_load(LIST.read_text(encoding="utf-8"))


def test_every_listed_behaviour_names_a_test_that_is_there():
    names: set[str] = set()
    for entry in listed():
        assert entry["vllm"] and entry["is"] and ("test" in entry) != ("not" in entry), entry
        assert entry["is"] not in names, entry
        names.add(entry["is"])
        if "test" in entry:
            file, _, name = entry["test"].partition("::")
            assert re.search(rf"^def {name}\(", (TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), entry


def test_most_of_the_behaviours_are_tested():
    entries = listed()
    tested = sum("test" in entry for entry in entries)
    assert len(entries) >= 80 and tested >= 0.95 * len(entries)
