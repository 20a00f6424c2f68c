"""POST /tokenize and /detokenize. A token is a character here, and 1 stands before a text with special tokens."""

from __future__ import annotations

import pytest

USER = [{"role": "user", "content": "hi"}]
HI = [ord(char) for char in "<user>hi"]


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "ab"}, [1, 97, 98]),
        ({"prompt": "ab", "model": "tiny/model", "add_special_tokens": False}, [97, 98]),
        ({"prompt": ""}, [1]),
        ({"prompt": "a" * 300}, [1] + [97] * 300),  # longer than the model's context
        ({"messages": USER}, HI),
        ({"messages": USER, "add_special_tokens": True}, [1, *HI]),
    ],
)
def test_tokenize_answers_with_count_context_and_ids(serve, body, tokens):
    async def scenario(client, _engine):
        status, answer = await client.post("/tokenize", body)
        assert status == 200
        assert answer == {"count": len(tokens), "max_model_len": 64, "tokens": tokens, "token_strs": None}

    serve(scenario)


def test_token_strs_are_the_entries_of_the_vocabulary(serve):
    async def scenario(client, _engine):
        _, answer = await client.post("/tokenize", {"prompt": "ab", "return_token_strs": True})
        assert answer["token_strs"] == ["^", "a", "b"]

    serve(scenario)


def test_a_conversation_is_written_out_as_the_request_says(serve):
    body = {
        "messages": USER, "add_generation_prompt": False, "continue_final_message": True,
        "chat_template_kwargs": {"enable_thinking": False}, "tools": [{"type": "function"}],
    }  # fmt: skip

    async def scenario(client, engine):
        assert (await client.post("/tokenize", body))[0] == 200
        _, options = engine.rendered[0]
        assert options["add_generation_prompt"] is False
        assert options["continue_final_message"] is True
        assert options["tools"] == [{"type": "function"}]
        assert options["chat_template_kwargs"] == {"enable_thinking": False, "lang": "de"}

    serve(scenario, default_chat_template_kwargs={"enable_thinking": True, "lang": "de"})


def test_detokenize_gives_the_text_with_special_tokens(serve):
    async def scenario(client, _engine):
        assert await client.post("/detokenize", {"tokens": [1, 97, 98]}) == (200, {"prompt": "^ab"})
        assert await client.post("/detokenize", {"tokens": []}) == (200, {"prompt": ""})

    serve(scenario)


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/tokenize", {}, 400, "either `prompt` or `messages`"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "either `prompt` or `messages`"),
        ("/tokenize", {"prompt": ["a"]}, 400, "got `array`"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "does not exist"),
        ("/tokenize", {"messages": []}, 400, "must not be empty"),
        ("/tokenize", {"messages": [{}]}, 400, "must have a role"),
        ("/tokenize", {"messages": [{"role": "refused", "content": "a"}]}, 400, "knows no role"),
        ("/tokenize", {"messages": USER, "chat_template": "x"}, 400, "--trust-request-chat-template"),
        ("/tokenize", {"messages": USER, "continue_final_message": True}, 400, "Cannot set both"),
        ("/detokenize", {}, 400, "Field required"),
        ("/detokenize", {"tokens": [-1]}, 400, ">= 0"),
        ("/detokenize", {"tokens": ["a"]}, 400, "got `str`"),
        ("/detokenize", {"tokens": [0x110000]}, 400, "out of vocabulary"),
        ("/detokenize", {"tokens": [97], "model": "other"}, 404, "does not exist"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(serve, path, body, status, text):
    async def scenario(client, _engine):
        got, answer = await client.post(path, body)
        assert (got, answer["error"]["code"]) == (status, status)
        assert text in answer["error"]["message"]

    serve(scenario)


def test_without_a_tokenizer_both_are_refused(serve):
    async def scenario(client, engine):
        engine.tokenizer = None
        for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
            status, answer = await client.post(path, body)
            assert (status, answer["error"]["type"]) == (400, "BadRequestError")

    serve(scenario)


def test_no_key_is_needed_where_keys_guard_what_they_do_in_vllm(serve):
    async def scenario(client, _engine):
        assert (await client.post("/tokenize", {"prompt": "a"}))[0] == 200

    serve(scenario, api_keys=("secret",), guards_as_vllm=True)
