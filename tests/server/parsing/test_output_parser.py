"""The seam to the server: reasoning, content and calls of one choice."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import omni_engine
from omni_engine.models.tokenizer import Tokenizer, load_tokenizer
from omni_engine.server.parsing.messages import DeltaMessage
from omni_engine.server.parsing.output_parser import OutputParser, ParsedMessage, message_of
from omni_engine.server.parsing.reasoning.tags import TagReasoningParser
from omni_engine.server.parsing.registry import REASONING_PARSERS, TOOL_PARSERS
from omni_engine.server.parsing.tool_choice import ToolChoice

AUTO = ToolChoice("auto")
HERMES = 'Hm. </think>\n\nI look. <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n' \
    '<tool_call>{"name": "g", "arguments": {}}</tool_call>'  # fmt: skip
HARMONY = '<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary' \
    ' to=functions.f<|message|>{"a": 1}' \
    "<|call|>"  # fmt: skip


def parser_of(tools: str | None = None, reasoning: str | None = None, **options: Any) -> OutputParser:
    return OutputParser(
        None,
        tool_parser=TOOL_PARSERS.get(tools) if tools else None,
        reasoning_parser=REASONING_PARSERS.get(reasoning) if reasoning else None,
        **options,
    )


def fed(parser: OutputParser, text: str, cuts: list[int] | None = None) -> list[DeltaMessage]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    deltas = [delta for start, stop in pairwise(bounds) for delta in parser.feed(text[start:stop])]
    return deltas + parser.finish()


def parts(message: ParsedMessage) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
    return message.reasoning, message.content, calls


def parsed(parser: OutputParser, text: str) -> tuple[str | None, str | None, list[tuple[str, str]]]:
    return parts(message_of(fed(parser, text)))


CALLS = [("f", '{"a": 1}'), ("g", "{}")]


def test_reasoning_comes_first_and_calls_are_found_after_it() -> None:
    assert parsed(parser_of("hermes", "deepseek_r1", tool_choice=AUTO), HERMES) == ("Hm. ", "\n\nI look. ", CALLS)
    assert parsed(parser_of("hermes", "qwen3", tool_choice=AUTO), HERMES.replace("</think>", "")) == (
        "Hm. \n\nI look. ", None, CALLS,
    )  # fmt: skip


def test_tags_in_reasoning_are_no_calls() -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call></think>ok'
    parser = parser_of("hermes", "deepseek_r1", tool_choice=AUTO)
    assert parsed(parser, text) == (text.partition("</think>")[0], "ok", [])


def test_without_parsers_everything_is_content() -> None:
    assert parsed(parser_of(tool_choice=AUTO), HERMES) == (None, HERMES, [])
    assert parsed(parser_of("hermes"), HERMES) == (None, HERMES, [])  # tool_choice none
    assert parsed(parser_of("hermes", "deepseek_r1"), HERMES)[2] == []


def test_reasoning_can_be_left_out() -> None:
    parser = parser_of("hermes", "deepseek_r1", tool_choice=AUTO, include_reasoning=False)
    assert parsed(parser, HERMES) == (None, "\n\nI look. ", CALLS)


def test_parallel_tool_calls_off_keeps_the_first() -> None:
    assert (
        parsed(parser_of("hermes", "deepseek_r1", tool_choice=AUTO, parallel_tool_calls=False), HERMES)[2] == CALLS[:1]
    )
    required = parser_of(tool_choice=ToolChoice("required"), parallel_tool_calls=False)
    assert parsed(required, '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]')[2] == [("f", "{}")]


def test_required_reads_a_list_of_calls() -> None:
    text = '\n[{"name": "f", "parameters": {"a": "}]"}}, {"name": "g", "parameters": {}}]\nDONE'
    for tools in (None, "hermes", "qwen3_coder"):
        parser = parser_of(tools, tool_choice=ToolChoice("required"))
        assert parsed(parser, text) == (None, None, [("f", '{"a": "}]"}'), ("g", "{}")])
        assert (parser.finish_reason("stop"), parser.finish_reason("length")) == ("tool_calls", "length")
    assert parsed(parser_of(tool_choice=ToolChoice("required")), "no list") == (None, "no list", [])
    assert parsed(parser_of(None, "deepseek_r1", tool_choice=ToolChoice("required")), f"Hm.</think>{text}")[0] == "Hm."


def test_named_takes_the_whole_text_as_arguments() -> None:
    parser = parser_of("hermes", "deepseek_r1", tool_choice=ToolChoice("named", "f"))
    assert parsed(parser, 'Hm.</think>\n{"a": "<tool_call>"} \n') == ("Hm.", None, [("f", '{"a": "<tool_call>"}')])
    assert parser.finish_reason("stop") == "stop"
    assert parsed(parser_of(tool_choice=ToolChoice("named", "f")), "") == (None, None, [])


def test_finish_reason_follows_the_calls() -> None:
    parser = parser_of("hermes", tool_choice=AUTO)
    assert parser.finish_reason("stop") == "stop"
    fed(parser, HERMES)
    assert [parser.finish_reason(reason) for reason in ("stop", "length", "abort", None)] == [
        "tool_calls", "length", "abort", None,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tools", "reasoning"), [("openai", None), (None, "openai_gptoss"), ("openai", "openai_gptoss")]
)
def test_harmony_is_one_grammar_for_both(tools: str | None, reasoning: str | None) -> None:
    assert parsed(parser_of(tools, reasoning, tool_choice=AUTO), HARMONY) == ("Hm.", None, [("f", '{"a": 1}')])
    assert parsed(parser_of(tools, reasoning), HARMONY) == ("Hm.", '{"a": 1}', [])
    required = parser_of(tools, reasoning, tool_choice=ToolChoice("required"))
    assert parsed(required, HARMONY)[2] == [("f", '{"a": 1}')]


def test_a_prompt_may_have_closed_the_reasoning() -> None:
    class Vocabulary:
        def get_vocab(self) -> dict[str, int]:
            return {"<think>": 1, "</think>": 2, "<|im_start|>": 3}

    def parser(prompt: list[int]) -> OutputParser:
        reasoning = REASONING_PARSERS.get("deepseek_r1")
        return OutputParser(Vocabulary(), reasoning_parser=reasoning, prompt_token_ids=prompt)

    assert parsed(parser([3, 7, 1, 2]), "Yes.") == (None, "Yes.", [])
    assert parsed(parser([1, 7, 2, 3, 7, 1]), "Hm.</think>Yes.") == ("Hm.", "Yes.", [])
    assert [parser(prompt).is_reasoning for prompt in ([3, 7, 1, 2], [3, 1])] == [False, True]
    assert [parser(prompt).count_reasoning_tokens([8, 8, 2, 8]) for prompt in ([3, 1, 2], [3, 1])] == [0, 2]


def test_thinking_follows_the_templates_options() -> None:
    for options, expected in ((None, (None, "a</think>b", [])), ({"thinking": True}, ("a", "b", []))):
        assert parsed(parser_of(None, "deepseek_v3", chat_template_kwargs=options), "a</think>b") == expected


@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 10**6), max_size=20),
    case=st.sampled_from(
        [
            (("hermes", "deepseek_r1"), "auto", HERMES),
            (
                ("qwen3_coder", "qwen3"),
                "auto",
                "a</think>b<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>",
            ),
            (
                ("kimi_k2", "kimi_k2"),
                "auto",
                "a <|tool_calls_section_begin|><|tool_call_begin|>f:0<|tool_call_argument_begin|>{}",
            ),
            (("openai", "openai_gptoss"), "auto", HARMONY),
            ((None, "glm45"), "required", ' a \n</think> [{"name": "f", "parameters": {"b": [1, {}]}},\n{"x": 1}] c'),
            ((None, None), "named", ' {"a": " b "} '),
        ]
    ),
)
def test_deltas_add_up_to_the_whole_however_the_text_is_cut(cuts: list[int], case: Any) -> None:
    (tools, reasoning), kind, text = case

    def parser() -> OutputParser:
        return parser_of(tools, reasoning, tool_choice=ToolChoice(kind, "f"))

    deltas = fed(parser(), text, cuts)
    assert parts(message_of(deltas)) == parsed(parser(), text)
    for delta in deltas:
        kinds = (delta.content is not None, delta.reasoning is not None, bool(delta.tool_calls))
        assert sum(kinds) == 1 and len(delta.tool_calls) < 2
    firsts = {}
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        is_first = piece.index not in firsts
        firsts.setdefault(piece.index, piece)
        assert is_first is (piece.id is not None) is (piece.type is not None) is (piece.function.name is not None)


def test_arguments_come_while_they_are_written() -> None:
    parser = parser_of("hermes", tool_choice=AUTO)
    parser.feed('<tool_call>{"name": "f", "arguments": {"text": "')
    assert [parser.feed(word)[0].tool_calls[0].function.arguments for word in ("one ", "two ")] == ["one ", "two "]


@pytest.fixture(scope="module")
def demo_tokenizer() -> Tokenizer:
    return load_tokenizer(Path(omni_engine.__path__[0]) / "models" / "demo" / "deepseek")


class Tagged(TagReasoningParser):
    """Tags that are special tokens of the bundled demo model."""

    starts = ("<|system|>",)
    ends = ("<|user|>",)
    calls = ("<|assistant|>",)


@pytest.mark.parametrize("tokens_per_delta", [1, 2, 3, 100])
def test_special_tokens_that_the_text_lacks_come_back_by_their_ids(
    demo_tokenizer: Tokenizer, tokens_per_delta: int
) -> None:
    text = "<|system|>Naïve 🚢 reasoning<|user|>The wörld.<|system|>"
    ids = demo_tokenizer.encode(text, add_special_tokens=False)
    assert demo_tokenizer.decode(ids, skip_special_tokens=False) == text  # the tags are tokens
    parser = OutputParser(demo_tokenizer, reasoning_parser=Tagged, special_tokens_skipped=True)
    assert parser.needs_special_tokens
    deltas = []
    sent = 0
    for start in range(0, len(ids), tokens_per_delta):
        so_far = demo_tokenizer.decode(ids[: start + tokens_per_delta], skip_special_tokens=True).rstrip("\ufffd")
        deltas += parser.feed(so_far[sent:], ids[start : start + tokens_per_delta])
        sent = len(so_far)
    message = message_of(deltas + parser.finish())
    assert (message.reasoning, message.content) == ("Naïve 🚢 reasoning", "The wörld.<|system|>")
    # and without the ids nothing ends the reasoning
    ignorant = OutputParser(demo_tokenizer, reasoning_parser=Tagged)
    plain = demo_tokenizer.decode(ids, skip_special_tokens=True)
    assert message_of(fed(ignorant, plain)).content is None


def test_a_message_can_be_written_as_json() -> None:
    import msgspec

    deltas = fed(parser_of("hermes", tool_choice=AUTO), 'a<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    first = json.loads(msgspec.json.encode(deltas[1]))
    assert first["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
