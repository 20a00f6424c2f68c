"""`ChatTemplate` renders what transformers' `apply_chat_template` renders, and contains what a template may do."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from omni_engine.models.chat_template import ChatTemplate, select_chat_template
from omni_engine.models.template_sandbox import compile_template, render_bounded

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

MISC = """{% for message in messages if message.role != 'system' %}
  {%- if loop.index > 3 %}{% break %}{% endif %}
  {% generation %}{% set x = 1 %}{{ message.content }}{% endgeneration %}
  {{ message | tojson }} {{ message.missing }} {{ x }} {{ message.items() | list | length }}
    {# a comment #}
{% else %}none{% endfor %}
{{ documents | length if documents else 0 }} {{ eos_token }} {{ pad_token }}
{{ "%05d" % 7 }} {{ 3 * 4 ** 2 }} {{ 'ab' * 2 }}
"""

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Über <b>&</b> 天气", "parameters": {}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": [1, 2]}}}
PLAIN: list[dict[str, Any]] = [
    {"role": "system", "content": " You are <brief>. "},
    {"role": "user", "content": "Hi & bye 😀\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
    {"role": "user", "content": "next"},
]
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sun": true}', "tool_call_id": "c1"},
    {"role": "assistant", "content": "fine", "reasoning": "because"},
]
DEVELOPER = [{"role": "developer", "content": "rules"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIALS)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        pytest.param(source, messages, id=f"{name}, {kind}")
        for name, source in {"chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "misc": MISC}.items()
        for kind, messages in {"plain": PLAIN, "tools": WITH_TOOLS, "developer": DEVELOPER}.items()
        if (name, kind) != ("chatml", "tools")  # this template cannot show a message without content
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"template_kwargs": {"enable_thinking": False, "date_string": "today", "bos_token": "[B]"}},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"documents": [{"title": "t", "text": "x"}]},
    ],
    ids=["default", "no prompt", "with tools", "variables", "continue", "documents"],
)
def test_rendering_equals_transformers(
    reference: PreTrainedTokenizerFast, source: str, messages: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    template = ChatTemplate(source, **SPECIALS)
    for_reference = {"add_generation_prompt": True, **options, **options.get("template_kwargs", {})}
    for_reference.pop("template_kwargs", None)
    try:
        expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **for_reference)
    except ValueError:
        with pytest.raises(ValueError, match="continue_final_message"):
            template.render(messages, **options)
        return
    assert template.render(messages, **options) == expected


def test_the_caller_s_messages_are_left_alone() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
    ChatTemplate(CHATML).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages[1] == {"role": "assistant", "content": "b"}
    assert messages[0] == {"role": "user", "content": [{"type": "text", "text": "a"}]}


LOOP_ONLY = "{% for m in messages %}{% for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, "string"),
        (LLAMA3, "string"),
        (QWEN3, "string"),
        (LOOP_ONLY, "openai"),
        ("{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}", "openai"),
        (
            "{% macro show(c) %}{% if c is string %}{{ c }}{% else %}"
            "{% for p in c %}{{ p.text }}{% endfor %}{% endif %}{% endmacro %}"
            "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
            "openai",
        ),
        ("{% for m in messages %}{% for line in m.content.split('x') %}{{ line }}{% endfor %}{% endfor %}", "string"),
        ("{% for m in messages %}{% for call in m.tool_calls %}{{ call }}{% endfor %}{% endfor %}", "string"),
    ],
)
def test_the_content_format_is_read_from_the_template(source: str, expected: str) -> None:
    assert ChatTemplate(source).content_format == expected


def test_text_parts_are_joined_by_newlines_for_string_templates() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rendered = ChatTemplate(CHATML).render([{"role": "user", "content": parts}], add_generation_prompt=False)
    assert rendered == "<|im_start|>user\na\nb<|im_end|>\n"


def test_strings_become_parts_where_the_template_only_loops() -> None:
    messages = [{"role": "user", "content": "ab"}, {"role": "user", "content": [{"type": "text", "text": "c"}]}]
    assert ChatTemplate(LOOP_ONLY).render(messages) == "[ab][c]"


def test_the_content_format_can_be_given() -> None:
    template = ChatTemplate("{{ messages[0].content }}", content_format="openai")
    assert template.render([{"role": "user", "content": "a"}]) == "[{'type': 'text', 'text': 'a'}]"
    with pytest.raises(ValueError, match="content_format must be one of"):
        ChatTemplate("", content_format="xml")


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "image", 7])
def test_media_parts_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="does not support content parts of type"):
        ChatTemplate(CHATML).render([{"role": "user", "content": [{"type": kind, "url": "x"}]}])


def test_tool_arguments_as_json_text_render_as_objects() -> None:
    as_text = [*WITH_TOOLS]
    as_text[1] = {
        **WITH_TOOLS[1],
        "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Köln", "days": [1, 2]}'}}],
    }
    template = ChatTemplate(LLAMA3, **SPECIALS)
    assert template.render(as_text) == template.render(WITH_TOOLS)


def test_tool_arguments_stay_text_where_the_template_joins_strings() -> None:
    source = "{% for call in messages[0].tool_calls %}{{ 'x' + call['function']['arguments'] }}{% endfor %}"
    for arguments in ('{"a": 1}', {"a": 1}):
        call = {"function": {"name": "f", "arguments": arguments}}
        assert ChatTemplate(source).render([{"role": "assistant", "tool_calls": [call]}]) == 'x{"a": 1}'


def test_missing_content_is_none_only_where_the_template_asks() -> None:
    message = {"role": "assistant", "content": None}
    asks = ChatTemplate("{% if messages[0]['content'] is none %}none{% endif %}")
    assert asks.render([message]) == "none"
    assert ChatTemplate("{{ 'content' in messages[0] }}").render([message]) == "False"


def test_arguments_that_are_no_json_are_refused() -> None:
    call = {"function": {"name": "f", "arguments": "{"}}
    with pytest.raises(ValueError, match="arguments of a tool call must be JSON"):
        ChatTemplate(QWEN3).render([{"role": "assistant", "tool_calls": [call]}])


def test_template_variables_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ add_generation_prompt }}")
    hostile = {"messages": [], "add_generation_prompt": 3, "self": 1, "template": 2}
    assert template.render([{"role": "user", "content": "a"}], template_kwargs=hostile) == "aTrue"


def test_raise_exception_gives_the_template_s_message() -> None:
    with pytest.raises(ValueError, match=r"^roles must alternate$"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render(PLAIN)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x' * 999999999 }}", "too large"),
        ("{{ 9 ** (9 ** 9) }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested"),
        ("{% include 'x' %}", "loader"),
    ],
)
def test_errors_of_a_template_are_value_errors(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render(PLAIN)


def test_a_template_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not compile: .*endfor"):
        ChatTemplate("{% for x in messages %}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% if a %}{% endif %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 20 }}{% endfor %}",
    ],
)
def test_a_template_that_runs_too_long_is_stopped(source: str) -> None:
    template, _ = compile_template(source)
    started = time.perf_counter()
    with pytest.raises(ValueError, match="took too long"):
        render_bounded(template, {}, max_seconds=0.2)
    assert time.perf_counter() - started < 5


def test_a_template_that_writes_too_much_is_stopped() -> None:
    template, _ = compile_template("{% for a in range(99999) %}{{ 'xxxxxxxxxx' }}{% endfor %}")
    with pytest.raises(ValueError, match="more than 1000 characters"):
        render_bounded(template, {}, max_characters=1000)


def test_the_limits_of_one_rendering_do_not_reach_the_next() -> None:
    slow, _ = compile_template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(ValueError, match="took too long"):
        render_bounded(slow, {}, max_seconds=0.05)
    assert ChatTemplate(CHATML).render(DEVELOPER).startswith("<|im_start|>developer")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must not be empty"),
        ([{"content": "a"}], "needs a role"),
        (["a"], "must be an object"),
        ([{"role": "user", "content": 7}], "string or a list of parts"),
        ([{"role": "user", "content": [7]}], "must be an object with a type"),
        ([{"role": "user", "content": [{"type": "text", "text": 7}]}], "needs its text as a string"),
        ([{"role": "user", "content": "a", "tool_calls": 7}], "tool_calls must be a list"),
        ([{"role": "user", "content": "a", "x": object()}], "JSON types, not: object"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(CHATML).render(messages)


def test_deeply_nested_messages_are_refused() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        ChatTemplate(CHATML).render([{"role": "user", "content": "a", "x": nested}])


def test_continuing_needs_a_message_that_the_template_shows() -> None:
    silent = ChatTemplate("{{ messages | length }}")
    options = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(ValueError, match="does not show the last message"):
        silent.render(PLAIN, **options)
    with pytest.raises(ValueError, match="cannot both be true"):
        silent.render(PLAIN, continue_final_message=True)
    with pytest.raises(ValueError, match="with content to continue"):
        ChatTemplate(CHATML).render([{"role": "assistant", "tool_calls": []}], **options)


def test_templates_are_selected_by_name() -> None:
    named = {"default": "a", "tool_use": "b"}
    assert select_chat_template("x", has_tools=True) == "x"
    assert select_chat_template(named) == "a"
    assert select_chat_template(named, has_tools=True) == "b"
    assert select_chat_template({"default": "a"}, has_tools=True) == "a"
    with pytest.raises(ValueError, match=r"none is named default.*--chat-template: rag"):
        select_chat_template({"rag": "x"})


@pytest.mark.parametrize("templates", [None, {}])
def test_a_missing_template_says_how_to_give_one(templates: Any) -> None:
    with pytest.raises(ValueError, match="--chat-template"):
        select_chat_template(templates)
