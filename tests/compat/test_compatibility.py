"""What docs/compatibility.md says of vLLM's endpoints, fields and flags is what the code does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from omni_engine.server.app import build_app
from omni_engine.server.messages_api.protocol import MessagesRequest
from omni_engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from omni_engine.server.request_checks import check_request
from omni_engine.server.responses_api.protocol import ResponsesRequest
from omni_engine.server.serve_arguments import serve_parser
from omni_engine.server.settings import ServerSettings
from omni_engine.server.vllm_flags import VLLM_FLAGS

_SPEC = importlib.util.spec_from_file_location("compat_table", Path(__file__).with_name("table.py"))
assert _SPEC is not None and _SPEC.loader is not None
table = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(table)

CASES = table.load_cases()
BODIES: dict[str, Any] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
NEEDED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": []},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"model": "m", "messages": [], "max_tokens": 1},
}


def all_cases() -> list[tuple[str, str, str]]:
    groups = {"endpoints": CASES["endpoints"], "flags": CASES["flags"], **CASES["fields"]}
    return [(f"{group} {name}", *case) for group, cases in groups.items() for name, case in cases.items()]


def test_every_case_has_a_status_and_says_what_differs() -> None:
    for name, status, note in all_cases():
        assert status in table.STATUSES, name
        assert bool(note) == (status in ("better", "partly")), name


def test_the_page_is_made_from_the_cases() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(CASES), "run: python tests/compat/table.py"


def routes() -> set[str]:
    from prometheus_client import CollectorRegistry

    class Engine:
        metrics_registry = CollectorRegistry()
        tracer = None

    settings = ServerSettings(
        model="m", enable_tokenizer_info=True, enable_profile=True, enable_development=True, enable_docs=True
    )
    app = build_app(Engine(), settings)  # type: ignore[arg-type]
    return {
        f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    } - {"GET /metrics/"}


def test_the_endpoints_that_are_there_are_those_that_are_listed_as_such() -> None:
    there = {name for name, (status, _note) in CASES["endpoints"].items() if status != "not yet"}
    assert there == routes()


def test_the_fields_that_are_listed_are_those_that_are_read() -> None:
    for path, cases in CASES["fields"].items():
        unknown = set(cases) - set(BODIES[path].__struct_fields__)
        assert not unknown, path


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fields_that_are_not_yet_there_are_refused_and_no_others(path: str) -> None:
    refused = set()
    for name in BODIES[path].__struct_fields__:
        body = BODIES[path](**NEEDED.get(path, {}))
        setattr(body, name, {"anything": 1})
        try:
            check_request(body)
        except Exception as error:
            if "not supported yet" in str(error):
                refused.add(name)
    listed = {name for name, (status, _note) in CASES["fields"][path].items() if status == "not yet"}
    # Fields of other servers and of older vLLMs are refused too.
    others = {"logits_processors", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "functions",
              "function_call", "prompt_embeds"}  # fmt: skip
    assert listed - others <= refused <= listed | others


def test_the_flags_that_are_there_are_those_that_are_listed_as_such() -> None:
    known = set(serve_parser()._option_string_actions)
    for flag, (status, _note) in CASES["flags"].items():
        assert (flag in known) == (status != "not yet"), flag
        assert (flag in VLLM_FLAGS) == (status == "not yet"), flag
    assert set(CASES["flags"]) >= VLLM_FLAGS
