"""The documentation names what the code has: flags, request fields, dependencies, and files it links to."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from omni_engine.server.parsing.registry import supported_reasoning_parsers, supported_tool_parsers
from omni_engine.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from omni_engine.server.serve_arguments import serve_parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def unnamed(names: set[str], text: str) -> set[str]:
    """Those of `names` that do not stand in `text` between backquotes."""
    return names - set(re.findall(r"`([\w.-]+)(?:: [^`]*)?`", text))


def dead_links(page: str, text: str) -> list[str]:
    return [target for target in LINK.findall(text) if not (ROOT / page).parent.joinpath(target).exists()]


def test_every_flag_of_serve_is_documented() -> None:
    flags = {flag for flag in serve_parser()._option_string_actions if flag.startswith("--")}
    flags = {flag for flag in flags if not flag.startswith("--no-")} - {"--help"}
    assert unnamed(flags, read("docs/getting-started.md")) == set()


def test_every_parser_is_documented() -> None:
    names = {*supported_tool_parsers(), *supported_reasoning_parsers()}
    assert names and unnamed(names, read("docs/getting-started.md")) == set()


@pytest.mark.parametrize("request_type", [CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest])
def test_every_request_field_is_documented(request_type: type[msgspec.Struct]) -> None:
    assert unnamed(set(request_type.__struct_fields__), read("docs/api.md")) == set()


def test_every_dependency_has_its_reason() -> None:
    text = read("pyproject.toml")
    wanted = set(re.findall(r'"([\w.-]+)>=([^"]+)"', text)) - {("setuptools", "77")}
    rows = set(re.findall(r"^\| ([\w.-]+) \| `>=([^`]+)` \|", read("docs/dependencies.md"), re.MULTILINE))
    assert wanted == rows


def test_what_is_not_named_is_noticed() -> None:
    text = "| `--port` | `max_tokens: 0` | --host |"
    assert unnamed({"--port", "max_tokens", "--host", "prompt"}, text) == {"--host", "prompt"}
    assert dead_links("README.md", "[a](docs/log.md) [b](docs/none.md#x) [c](https://x.y/none)") == ["docs/none.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    assert dead_links(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_have_short_lines(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []  # a table's row cannot wrap
