"""Cross-origin requests: what a browser is told before and with an answer."""

from __future__ import annotations

import pytest

from omni_engine.server.settings import CorsPolicy

PAGE = "https://page.example"
ASKED = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


async def options(client, headers):
    async with client.session.options(client.address + "/v1/completions", headers=headers) as response:
        return response.status, response.headers, await response.text()


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (CorsPolicy((PAGE,)), True),
        (CorsPolicy(("*",)), True),
        (CorsPolicy(("https://other.example",)), False),
        (CorsPolicy((PAGE,), methods=("GET",)), False),
        (CorsPolicy((PAGE,), methods=("GET", "POST")), True),
        (CorsPolicy((PAGE,), headers=("X-Other",)), False),
        (CorsPolicy((PAGE,), headers=("Authorization",)), True),
    ],
)
def test_a_preflight_is_answered_by_the_policy_even_without_a_key(serve, policy, allowed):
    async def scenario(client, _engine):
        status, headers, text = await options(client, ASKED)
        assert status == (200 if allowed else 400)
        assert text == "OK" if allowed else text.startswith("Disallowed CORS")
        if allowed:
            assert headers["Access-Control-Allow-Origin"] in (PAGE, "*")
            assert "POST" in headers["Access-Control-Allow-Methods"]
            assert headers["Access-Control-Allow-Headers"] == "authorization"

    serve(scenario, cors=policy, api_keys=("secret",))


@pytest.mark.parametrize("stream", [False, True])
def test_answers_carry_the_origin_they_are_for(serve, stream):
    async def scenario(client, _engine):
        body = {"prompt": "a", "stream": stream}
        async with client.session.post(
            client.address + "/v1/completions", json=body, headers={"Origin": PAGE}
        ) as response:
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert response.headers["Access-Control-Allow-Credentials"] == "true"
            assert response.headers["Vary"] == "Origin"

    serve(scenario, cors=CorsPolicy((PAGE,), credentials=True))


def test_errors_carry_it_too_so_that_a_page_can_read_them(serve):
    async def scenario(client, _engine):
        async with client.session.get(client.address + "/nothing", headers={"Origin": PAGE}) as response:
            assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (404, "*")

    serve(scenario, cors=CorsPolicy(("*",)))


@pytest.mark.parametrize("policy", [CorsPolicy(), CorsPolicy(("https://other.example",))])
def test_a_page_that_is_not_allowed_gets_no_header(serve, policy):
    async def scenario(client, _engine):
        async with client.session.get(client.address + "/version", headers={"Origin": PAGE}) as response:
            assert response.status == 200
            assert "Access-Control-Allow-Origin" not in response.headers

    serve(scenario, cors=policy)


def test_credentials_and_a_wildcard_become_the_very_origin():
    assert CorsPolicy(("*",), credentials=True).origin_headers(PAGE)["Access-Control-Allow-Origin"] == PAGE
