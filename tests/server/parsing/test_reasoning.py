"""Reasoning and content, in text and in token ids."""

from __future__ import annotations

from typing import Any

import pytest

from omni_engine.server.parsing.reasoning.tags import BaseThinkingReasoningParser, TagReasoningParser
from omni_engine.server.parsing.reasoning_parser import ReasoningParser
from omni_engine.server.parsing.registry import REASONING_PARSERS

VOCAB = {
    "<think>": 1,
    "</think>": 2,
    "<tool_call>": 3,
    "<|im_start|>": 4,
    "<|tool_calls_section_begin|>": 5,
    "<|user|>": 6,
}


class Vocabulary:
    """What a parser asks of a tokenizer of transformers."""

    def __init__(self, vocab: dict[str, int]) -> None:
        self._vocab = vocab

    def get_vocab(self) -> dict[str, int]:
        return self._vocab

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(map(chr, ids))


def parser_of(name: str, **options: Any) -> ReasoningParser:
    return REASONING_PARSERS.get(name)(Vocabulary(VOCAB), chat_template_kwargs=options)


def divided(name: str, text: str, **options: Any) -> tuple[str | None, str | None]:
    return parser_of(name, **options).extract_reasoning(text, None)


@pytest.mark.parametrize("name", ["deepseek_r1", "qwen3", "glm45", "kimi_k2", "tags"])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>Hm.</think>Yes.", "Hm.", "Yes."),
        ("Hm.</think>Yes.", "Hm.", "Yes."),  # the template wrote the start tag into the prompt
        ("\n <think>Hm.</think>\n\nYes.", "Hm.", "\n\nYes."),
        ("Hm.", "Hm.", None),  # cut off
        ("<think>Hm.</thi", "Hm.</thi", None),
        (" Hm.</think>", " Hm.", None),
    ],
)
def test_text_before_the_end_tag_is_reasoning(name: str, text: str, reasoning: str, content: str | None) -> None:
    assert divided(name, text) == (reasoning, content)


def test_empty_reasoning_is_none_or_empty_as_in_vllm() -> None:
    assert divided("deepseek_r1", "</think>Yes.") == ("", "Yes.")
    assert divided("kimi_k2", "<think></think>Yes.") == (None, "Yes.")


def test_the_templates_switch_is_the_parsers() -> None:
    text = "Yes.</think>"
    assert divided("deepseek_v3", text) == (None, text)
    assert (
        divided("deepseek_v3", text, thinking=True)
        == divided("deepseek_v3", text, enable_thinking=True)
        == ("Yes.", None)
    )
    for name in ("qwen3", "glm45", "kimi_k2"):
        assert divided(name, text) == ("Yes.", None)
        assert divided(name, text, enable_thinking=False) == (None, text)
    assert divided("deepseek_r1", text, thinking=False) == ("Yes.", None)  # R1 has no switch


@pytest.mark.parametrize(("name", "marker"), [("qwen3", "<tool_call>"), ("kimi_k2", "<|tool_calls_section_begin|>")])
def test_a_tool_call_ends_reasoning_and_is_content(name: str, marker: str) -> None:
    assert divided(name, f"<think>Hm. {marker}x") == ("Hm." if name == "kimi_k2" else "Hm. ", f"{marker}x")
    assert divided("deepseek_r1", f"Hm. {marker}x") == (f"Hm. {marker}x", None)


def test_stray_tags_are_dropped_where_models_write_them() -> None:
    text = "<think>a<think>b</think>c</think>d"
    assert divided("qwen3", text) == ("ab", "cd")
    assert divided("deepseek_r1", text) == ("a<think>b", "c</think>d")


def test_glm_may_reason_again() -> None:
    assert divided("glm45", "<think>a\n</think>b<think>c \n</think>d") == ("ac", "bd")
    assert divided("qwen3", "<think>a\n</think>b<think>c") == ("a\n", "b<think>c")


def test_granite_writes_sentences_and_may_not_reason() -> None:
    assert divided("granite", "Here's my thought process: Hm. Here is my response: Yes.") == (" Hm. ", " Yes.")
    assert divided("granite", "Here is my answer.") == (None, "Here is my answer.")


def test_any_pair_of_tags() -> None:
    parser = TagReasoningParser(None, start="[THINK]", end="[/THINK]", needs_start=True)
    assert parser.extract_reasoning("[THINK]a[/THINK]b", None) == ("a", "b")
    assert parser.extract_reasoning("b [THINK]a[/THINK]", None) == (None, "b [THINK]a[/THINK]")
    assert (parser.reasoning_start_str, parser.reasoning_end_str) == ("[THINK]", "[/THINK]")
    with pytest.raises(ValueError, match="must not be empty"):
        TagReasoningParser(None, start="")


def test_harmony_analysis_is_reasoning() -> None:
    text = "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>" \
        "<|start|>assistant<|channel|>final<|message|>c"  # fmt: skip
    assert divided("openai_gptoss", text) == ("a\nb", "c")
    assert parser_of("openai_gptoss").is_reasoning_end([]) is True
    with pytest.raises(NotImplementedError, match="token ids"):
        parser_of("openai_gptoss").extract_content_ids([1])


@pytest.mark.parametrize(
    ("ids", "ended"),
    [
        ([], False), ([9, 1, 9], False), ([1, 9, 2], True), ([9, 2], True), ([1, 2, 9, 1], False),
        ([1, 9, 2, 9, 4, 9], False),  # of an earlier message
        ([2, 4, 1, 9, 2, 9], True), ([2, 6, 9], False),
    ],
)  # fmt: skip
def test_the_end_of_reasoning_in_a_prompt(ids: list[int], ended: bool) -> None:
    for name in ("deepseek_r1", "qwen3", "glm45", "kimi_k2"):
        assert parser_of(name).is_reasoning_end(ids) is ended
    assert parser_of("deepseek_v3").is_reasoning_end(ids) is True  # thinking is off


def test_a_tool_call_ends_reasoning_in_token_ids() -> None:
    assert parser_of("qwen3").is_reasoning_end([1, 9, 3]) is True
    assert parser_of("qwen3").is_reasoning_end([3, 9, 1, 9]) is False
    assert parser_of("qwen3").is_reasoning_end_streaming([1, 9, 3], [3]) is True
    assert parser_of("deepseek_r1").is_reasoning_end_streaming([1, 9, 3], [3]) is False
    assert parser_of("qwen3").extract_content_ids([1, 9, 3, 8]) == [3, 8]


def test_tags_that_are_several_tokens_are_looked_for_in_the_text() -> None:
    parser = TagReasoningParser(Vocabulary({}))
    for text, ended in [
        ("<think>a</think>b", True),
        ("</think><|im_start|>x<think>", False),
        ("</think><|im_start|>x", False),
    ]:
        assert parser.is_reasoning_end(list(map(ord, text))) is ended


@pytest.mark.parametrize(
    ("ids", "count"),
    [([1, 8, 9, 2, 7], 2), ([8, 9, 2, 7], 2), ([8, 9], 2), ([0, 1, 8, 2, 7], 1), ([1, 8, 1, 8, 2, 8, 2], 3)],
)
def test_reasoning_tokens_are_counted_without_the_tags(ids: list[int], count: int) -> None:
    assert parser_of("deepseek_r1").count_reasoning_tokens(ids) == count
    assert parser_of("deepseek_v3").count_reasoning_tokens(ids) == 0


def test_a_plugin_on_vllms_base_needs_its_tokens() -> None:
    class Plugin(BaseThinkingReasoningParser):
        @property
        def start_token(self) -> str:
            return "<think>"

        @property
        def end_token(self) -> str:
            return "</think>"

    assert Plugin(Vocabulary(VOCAB)).end_token_id == 2
    assert Plugin(Vocabulary(VOCAB)).extract_reasoning("a</think>b", None) == ("a", "b")
    with pytest.raises(RuntimeError, match="could not locate think start/end tokens"):
        Plugin(Vocabulary({}))
    with pytest.raises(ValueError, match="tokenizer must be passed"):
        Plugin(None)
