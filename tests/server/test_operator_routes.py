"""Routes beside the APIs: batches of chats, invocations, documentation, profiles, development, the load report."""

from __future__ import annotations

import logging

import pytest

CHAT, BATCH = "/v1/chat/completions", "/v1/chat/completions/batch"
USER = [{"role": "user", "content": "hi"}]


def test_a_batch_has_one_choice_per_conversation(serve):
    async def scenario(client, engine):
        body = {"messages": [USER, [{"role": "user", "content": "ho ho"}]], "max_tokens": 3, "request_id": "b"}
        status, answer = await client.post(BATCH, body)
        assert status == 200, answer
        assert [choice["index"] for choice in answer["choices"]] == [0, 1]
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["hel", "hel"]
        assert [prompt["prompt"] for prompt in engine.prompts] == ["<user>hi", "<user>ho ho"]
        lengths = len("<user>hi") + len("<user>ho ho")
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (lengths, 6)
        assert answer["usage"]["total_tokens"] == lengths + 6
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
        assert (answer["id"], engine.request_ids) == ("chatcmpl-b", ["chatcmpl-b-0", "chatcmpl-b-1"])

    serve(scenario, enable_prompt_tokens_details=True)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": USER}, "body.messages.0"),
        ({"messages": [USER, []]}, "messages"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_a_wrong_batch_is_refused_whole(serve, change, param):
    async def scenario(client, engine):
        status, answer = await client.post(BATCH, {"messages": [USER], **change})
        assert (status, answer["error"]["param"]) == (400, param)
        assert not engine.prompts

    serve(scenario)


def test_one_failure_ends_the_whole_batch(serve):
    async def scenario(client, engine):
        engine.hangs = True
        status, answer = await client.post(BATCH, {"messages": [USER, [{"role": "user", "content": "x" * 99}]]})
        assert (status, answer["error"]["param"]) == (400, "input_tokens")
        assert not engine.running

    serve(scenario)


def test_invocations_take_the_bodies_of_both_apis(serve):
    async def scenario(client, _engine):
        _status, chat = await client.post("/invocations", {"messages": USER})
        assert chat["object"] == "chat.completion"
        _status, completion = await client.post("/invocations", {"prompt": "hi"})
        assert completion["object"] == "text_completion"
        status, answer = await client.post("/invocations", {"messages": 5})
        assert (status, answer["error"]["param"]) == (400, "body.messages")
        assert (await client.post("/invocations", {"model": "tiny/model"}))[0] == 400
        events = await client.events("/invocations", {"messages": USER})
        assert events[-1] == "[DONE]"

    serve(scenario)


def test_the_load_is_reported_to_those_who_ask(serve):
    async def scenario(client, engine):
        engine.counters = {"kv_cache_usage": 0.25, "num_waiting": 3}
        for stream in (False, True):
            body = {"messages": USER, "stream": stream}
            found = {}
            for form in ("text", "JSON", "BIN", None):
                headers = {} if form is None else {"endpoint-load-metrics-format": form}
                async with client.session.post(client.address + CHAT, json=body, headers=headers) as response:
                    found[form] = response.headers.get("endpoint-load-metrics")
            assert found == {
                "text": "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0",
                "JSON": 'JSON {"named_metrics": {"kv_cache_usage_perc": 0.25, "num_requests_waiting": 3.0}}',
                "BIN": None,
                None: None,
            }

    serve(scenario)


def test_profiles_are_there_when_they_are_configured(serve):
    async def scenario(client, engine):
        async def post(path):
            async with client.session.post(client.address + path) as response:
                return response.status

        assert await post("/stop_profile") == 400  # none runs
        assert await post("/start_profile") == 200 and engine.profiles
        assert await post("/stop_profile") == 200 and not engine.profiles

    async def without(client, _engine):
        assert (await client.post("/start_profile"))[0] == 404

    serve(scenario, enable_profile=True)
    serve(without)


def test_routes_for_development(serve):
    async def scenario(client, engine):
        assert await client.post("/reset_prefix_cache") == (200, {"success": True})
        assert engine.num_resets == 1
        status, answer = await client.post("/reset_prefix_cache?reset_external=true")
        assert (status, answer["error"]["param"]) == (400, "reset_external")
        for path in ("/reset_mm_cache", "/reset_encoder_cache"):
            async with client.session.post(client.address + path) as response:
                assert response.status == 200
        key = {"x-api-key": "very-secret"}
        _status, info = await client.get("/server_info?config_format=json", headers=key)
        assert info["vllm_config"]["server"]["model"] == "tiny/model"
        assert info["vllm_config"]["engine"]["max_model_len"] == 64
        _status, text = await client.get("/server_info")
        assert "'max_model_len': 64" in text["vllm_config"]
        assert (await client.get("/server_info?config_format=xml"))[0] == 400

    async def guarded(client, _engine):
        assert (await client.post("/reset_prefix_cache"))[0] == 401
        _status, info = await client.get("/server_info", headers={"x-api-key": "very-secret"})
        assert "very-secret" not in str(info)

    async def without(client, _engine):
        assert (await client.post("/reset_prefix_cache"))[0] == 404
        assert (await client.get("/server_info"))[0] == 404

    serve(scenario, enable_development=True)
    serve(guarded, enable_development=True, api_keys=("very-secret",))
    serve(without)


def test_outputs_are_logged_where_that_is_wanted(serve, caplog):
    async def scenario(client, engine):
        engine.answers = ["hello", "world"]
        body = {"messages": USER, "n": 2, "temperature": 1, "request_id": "a"}
        await client.post(CHAT, body)
        await client.events(CHAT, {**body, "request_id": "b"})
        engine.answers = []
        await client.post("/v1/completions", {"prompt": "x", "request_id": "c"})

    with caplog.at_level(logging.INFO, "omni_engine.server.request_log"):
        serve(scenario, enable_log_outputs=True, max_log_len=4)
        lines = [record.getMessage() for record in caplog.records if record.name.endswith("request_log")]
    assert lines == [
        f"Generated response {name}: choice: {index}, output: {text!r}, tokens: 5, finish_reason: stop"
        for name in ("chatcmpl-a", "chatcmpl-b", "cmpl-c-0")
        for index, text in ((0, "hell"), (1, "worl"))
        if name != "cmpl-c-0" or index == 0
    ]


def test_the_tokenizers_settings_are_shown_where_that_is_wanted(serve):
    async def scenario(client, _engine):
        status, info = await client.get("/tokenizer_info")
        assert status == 200
        assert info == {
            "tokenizer_class": "FakeTokenizer", "bos_token": "^", "vocab_size": 300, "chat_template": "{{ own }}",
        }  # fmt: skip

    async def without(client, _engine):
        assert (await client.get("/tokenizer_info"))[0] == 404

    serve(scenario, enable_tokenizer_info=True, chat_template="{{ own }}")
    serve(without)


def test_every_route_is_documented_with_the_types_of_its_bodies(serve):
    async def scenario(client, _engine):
        status, found = await client.get("/openapi.json")
        assert status == 200 and found["openapi"].startswith("3.")
        expected = {"/v1/responses/{id}/cancel", "/v1/messages", BATCH, CHAT, "/tokenize", "/health", "/metrics"}
        assert expected <= set(found["paths"])
        assert "/tokenizer_info" not in found["paths"]
        schemas = found["components"]["schemas"]
        body = found["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
        fields = schemas[body["$ref"].rpartition("/")[2]]
        assert fields["required"] == ["messages"] and "top_logprobs" in fields["properties"]
        ids = [operation["operationId"] for methods in found["paths"].values() for operation in methods.values()]
        assert len(set(ids)) == len(ids)
        assert found == (await client.get("/api/openapi.json"))[1]  # once, whatever the address

    serve(scenario, root_path="/api")


def test_the_docs_page_loads_nothing_from_elsewhere(serve):
    async def scenario(client, _engine):
        for path in ("/docs", "/redoc"):
            async with client.session.get(client.address + path) as response:
                page = await response.text()
                policy = response.headers["Content-Security-Policy"]
            assert response.status == 200 and response.content_type == "text/html"
            assert "default-src 'none'" in policy and "<script" not in page and "http" not in page
            assert "/v1/chat/completions" in page and "top_logprobs" in page

    async def without(client, _engine):
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert (await client.get(path))[0] == 404

    serve(scenario)
    serve(without, enable_docs=False)
