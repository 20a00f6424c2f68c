"""Names, signatures and registration as vLLM's users know them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from omni_engine.server.parsing import registry
from omni_engine.server.parsing.events import Emitter
from omni_engine.server.parsing.harmony import SPECIAL_TOKENS
from omni_engine.server.parsing.messages import DeltaFunctionCall, DeltaMessage, DeltaToolCall, FunctionCall
from omni_engine.server.parsing.output_parser import message_of
from omni_engine.server.parsing.reasoning_parser import ReasoningParser, ReasoningParserManager
from omni_engine.server.parsing.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    supported_reasoning_parsers,
    supported_tool_parsers,
)
from omni_engine.server.parsing.text_stream import Reading, TextStream
from omni_engine.server.parsing.tool_parser import ToolParser, ToolParserManager

TOOLS = ("deepseek_v3", "deepseek_v31", "deepseek_v32", "hermes", "qwen3_coder", "qwen3_xml", "llama3_json",
         "llama4_json",
         "llama4_pythonic", "kimi_k2", "glm45", "glm47", "pythonic", "openai", "mistral", "granite", "xlam",
         "internlm")  # fmt: skip
REASONING = ("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "kimi_k2", "openai_gptoss", "granite", "tags")


def stream(parser: ToolParser, pieces: list[str]) -> list[DeltaMessage | None]:
    deltas = []
    so_far = ""
    for piece in pieces:
        deltas.append(parser.extract_tool_calls_streaming(so_far, so_far + piece, piece, [], [], [], None))
        so_far += piece
    return deltas


def test_the_names() -> None:
    assert set(TOOLS) <= set(supported_tool_parsers()) and set(REASONING) <= set(supported_reasoning_parsers())
    assert all(issubclass(ToolParserManager.get_tool_parser(name), ToolParser) for name in supported_tool_parsers())
    for name in supported_reasoning_parsers():
        assert issubclass(ReasoningParserManager.get_reasoning_parser(name), ReasoningParser)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"known ones are .*hermes.*: nothing"):
        ToolParserManager.get_tool_parser("nothing")
    with pytest.raises(KeyError, match=r"known ones are .*deepseek_r1.*: nothing"):
        ReasoningParserManager.get_reasoning_parser("nothing")


def test_a_parser_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys; from omni_engine.server.parsing import output_parser, registry; package = registry.__package__\n"
        "assert not [name for name in sys.modules if name.startswith((package + '.tools.', package + '.reasoning.'))]\n"
        "registry.TOOL_PARSERS.get('hermes')\n"
        "print([name for name in sys.modules if name.startswith(package + '.tools.')], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['omni_engine.server.parsing.tools.hermes'] False"


def test_streaming_methods_give_deltas() -> None:
    parser = ToolParserManager.get_tool_parser("hermes")(None)
    deltas = stream(parser, ["Hi", "<tool_", 'call>{"name": "f", "arguments": {"a"', ": 1}}</tool_call>"])
    assert deltas[0] == DeltaMessage(content="Hi") and deltas[1] is None
    call = deltas[2].tool_calls[0]
    assert (call.index, call.type, call.function) == (0, "function", DeltaFunctionCall("f", '{"a"'))
    assert deltas[3] == DeltaMessage(tool_calls=[DeltaToolCall(0, function=DeltaFunctionCall(arguments=": 1}"))])
    assert parser.finish_streaming() is None
    found = parser.extract_tool_calls('Hi<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', None)
    assert found.tool_calls[0].function == FunctionCall("f", '{"a": 1}') and found.tool_calls[0].type == "function"


def test_one_object_serves_one_stream_after_the_other() -> None:
    parser = ToolParserManager.get_tool_parser("hermes")(None)
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    first, second = (stream(parser, [text]) for _ in range(2))
    assert first[0].tool_calls[0].index == second[0].tool_calls[0].index == 0
    assert stream(parser, ["a <tool"])[0] == DeltaMessage(content="a ")
    assert parser.finish_streaming() == DeltaMessage(content="<tool")


def test_a_parser_that_joins_late_reads_what_came_before() -> None:
    parser = ReasoningParserManager.get_reasoning_parser("deepseek_r1")(None)
    delta = parser.extract_reasoning_streaming("a</thi", "a</think>b", "nk>b", [], [], [])
    assert delta == DeltaMessage(content="b")


def test_the_tools_of_the_request_are_used_where_the_parser_has_none() -> None:
    tools = [{"function": {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}}]
    request = SimpleNamespace(tools=tools)
    text = "<function=f><parameter=a>1</parameter></function>"
    parser = ToolParserManager.get_tool_parser("qwen3_coder")(None)
    assert parser.extract_tool_calls(text, request).tool_calls[0].function.arguments == '{"a": 1}'
    parser = ToolParserManager.get_tool_parser("qwen3_coder")(None, tools)
    assert parser.extract_tool_calls(text, None).tool_calls[0].function.arguments == '{"a": 1}'


@pytest.mark.parametrize(
    ("tools", "choice", "skips"), [([1], "auto", False), ([1], None, False), ([1], "none", True), (None, "auto", True)]
)
def test_special_tokens_are_kept_for_the_parser(tools: Any, choice: str | None, skips: bool) -> None:
    request = SimpleNamespace(tools=tools, tool_choice=choice, skip_special_tokens=True)
    assert ToolParserManager.get_tool_parser("kimi_k2")(None).adjust_request(request) is request
    assert request.skip_special_tokens is skips


class Characters:
    """A tokenizer of transformers with a token per character, and harmony's special tokens."""

    specials: ClassVar = {token: 0x20_0000 + number for number, token in enumerate(SPECIAL_TOKENS)}

    def get_vocab(self) -> dict[str, int]:
        return self.specials

    def encode(self, text: str) -> list[int]:
        pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
        return [
            each for piece in pieces for each in ([self.specials[piece]] if piece in self.specials else map(ord, piece))
        ]

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        names = {number: "" if skip_special_tokens else token for token, number in self.specials.items()}
        return "".join(names[each] if each in names else chr(each) for each in ids)


HARMONY = (
    "<|channel|>analysis<|message|>Hmm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json"
    '<|message|>{"a": 1}<|call|><|start|>assistant<|channel|>final<|message|>Ok<|return|>'
)


@pytest.mark.parametrize("tokens_per_delta", [1, 2, 5, 1000])
@pytest.mark.parametrize("skips", [True, False])
def test_harmony_is_read_from_token_ids_where_the_text_has_no_special_tokens(
    tokens_per_delta: int, skips: bool
) -> None:
    tokenizer = Characters()
    parser: Any = ToolParserManager.get_tool_parser("openai")(tokenizer)
    ids = tokenizer.encode(HARMONY)
    for _ in range(2):  # the second answer is a new stream
        deltas = []
        for start in range(0, len(ids), tokens_per_delta):
            stop = start + tokens_per_delta
            parts = [ids[:start], ids[:stop], ids[start:stop]]
            texts = [tokenizer.decode(part, skip_special_tokens=skips) for part in parts]
            deltas.append(parser.extract_tool_calls_streaming(*texts, *parts, None))
        message = message_of([delta for delta in deltas if delta is not None])
        assert (message.reasoning, message.content) == ("Hmm", "Ok")
        assert [call.function for call in message.tool_calls] == [FunctionCall("f", '{"a": 1}')]
    found = parser.extract_tool_calls("", None, token_ids=ids)
    assert (found.content, [call.function for call in found.tool_calls]) == ("Ok", [FunctionCall("f", '{"a": 1}')])
    assert ReasoningParserManager.get_reasoning_parser("openai_gptoss")(tokenizer).count_reasoning_tokens(ids) == 3


class Shout(ToolParser):
    """Calls a function for every exclamation mark."""

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while character := (yield from stream.next()):
            if character == "!":
                emit.begin("shout")
                emit.end()
            else:
                emit.content(character)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (TOOL_PARSERS, REASONING_PARSERS):
        monkeypatch.setattr(table, "_registered", {})


@pytest.mark.usefixtures("_registered")
def test_a_class_can_be_registered() -> None:
    ToolParserManager.register_module("shout", module=Shout)
    ToolParserManager.register_module(["one", "two"])(Shout)
    ToolParserManager.register_module()(Shout)
    assert {"shout", "one", "two", "Shout"} <= set(ToolParserManager.list_registered())
    found = ToolParserManager.get_tool_parser("two")(None).extract_tool_calls("a!b!", None)
    assert (found.content, [call.function.name for call in found.tool_calls]) == ("ab", ["shout", "shout"])
    with pytest.raises(KeyError, match="there already: hermes"):
        ToolParserManager.register_module("hermes", force=False, module=Shout)
    with pytest.raises(TypeError, match="subclass of ReasoningParser"):
        ReasoningParserManager.register_module("shout", module=Shout)
    with pytest.raises(TypeError, match="a string or a list of strings"):
        ToolParserManager.register_module([1], module=Shout)


def test_files_are_refused() -> None:
    with pytest.raises(ValueError, match=r"omni_engine.tool_parsers: plugins/loud.py"):
        ToolParserManager.import_tool_parser("plugins/loud.py")
    with pytest.raises(ValueError, match=r"omni_engine.reasoning_parsers: plugin.py"):
        ReasoningParserManager.import_reasoning_parser("plugin.py")


def test_an_installed_package_brings_a_parser_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[omni_engine.tool_parsers]\nloud = shouting:Loud\n[omni_engine.reasoning_parsers]\nquiet = shouting:Quiet\n"
    )
    (tmp_path / "shouting.py").write_text(
        "from omni_engine.server.parsing.tool_parser import ToolParser\n"
        "from omni_engine.server.parsing.reasoning_parser import ReasoningParser\n"
        "class Loud(ToolParser): pass\nclass Quiet(ReasoningParser): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "loud" in registry.supported_tool_parsers() and "quiet" in registry.supported_reasoning_parsers()
    assert ToolParserManager.get_tool_parser("loud").__name__ == "Loud"
    assert issubclass(ReasoningParserManager.get_reasoning_parser("quiet"), ReasoningParser)
    with pytest.raises(NotImplementedError, match="must define grammar: Loud"):
        ToolParserManager.get_tool_parser("loud")(None).extract_tool_calls("a", None)
