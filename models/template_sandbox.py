"""Compiles and runs Jinja chat templates: a sandbox with limits on time and output, and what a template asks for.

The environment is the one that published templates are written for (transformers' `apply_chat_template`): trimmed
blocks, loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`, a `generation` tag.
"""

from __future__ import annotations

import contextvars
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARACTERS = 64 * 1024 * 1024
MAX_RENDER_SECONDS = 30.0
_MAX_REPEATED_LENGTH = 1 << 20  # "x" * n in a template
_MAX_POWER_BITS = 4096

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline", default=float("inf"))


class _RaisedByTemplate(jinja2.TemplateError):
    """The template called raise_exception: the message is for the user as it stands."""


class _OverLimit(jinja2.TemplateError):
    """The template ran too long or wrote too much."""


@dataclass(frozen=True)
class TemplateTraits:
    """What a template does with its input, read from its syntax tree."""

    loops_over_content: bool  # for part in message.content
    asks_if_content_is_string: bool
    asks_if_content_is_none: bool
    joins_arguments_to_strings: bool  # "…" + call.function.arguments: it expects JSON text


def compile_template(source: str) -> tuple[jinja2.Template, TemplateTraits]:
    """Compile `source`; a syntax error raises ValueError."""
    try:
        tree = _ENVIRONMENT.parse(source)
        traits = _read_traits(tree)
        _count_iterations(tree)
        return _ENVIRONMENT.from_string(tree), traits
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise ValueError(f"the chat template does not compile: {error}") from error


def render_bounded(
    template: jinja2.Template,
    variables: Mapping[str, Any],
    *,
    max_characters: int = MAX_OUTPUT_CHARACTERS,
    max_seconds: float = MAX_RENDER_SECONDS,
) -> str:
    """Render within the limits; whatever goes wrong in the template is a ValueError with its message.

    Time is checked at every piece of output, loop iteration and call; one filter over a huge value is not interrupted.
    """
    token = _deadline.set(time.monotonic() + max_seconds)
    chunks: list[str] = []
    length = 0
    try:
        for chunk in template.generate(variables):
            _check_deadline()
            length += len(chunk)
            if length > max_characters:
                raise _OverLimit(f"it wrote more than {max_characters} characters")
            chunks.append(chunk)
    except _RaisedByTemplate as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # the template is foreign code: nothing it does may take the server down
        message = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"the chat template failed on these messages: {message}") from error
    finally:
        _deadline.reset(token)
    return "".join(chunks)


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise _OverLimit("it took too long")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def tick(self) -> str:
        """Called once per loop iteration of every template, see `_count_iterations`."""
        _check_deadline()
        return ""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check_deadline()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                    _require_small(len(value) * count <= _MAX_REPEATED_LENGTH)
            if isinstance(left, int) and isinstance(right, int):
                _require_small(left.bit_length() + right.bit_length() <= _MAX_POWER_BITS)
        elif isinstance(left, int) and isinstance(right, int):
            _require_small(left.bit_length() * right <= _MAX_POWER_BITS)
        return super().call_binop(context, operator, left, right)


def _require_small(holds: bool) -> None:
    if not holds:
        raise jinja2.exceptions.SecurityError("the result of * or ** is too large")


class _GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks the assistant's text for training; here it only is a scope."""

    tags = {"generation"}  # noqa: RUF012  (as the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise _RaisedByTemplate(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _make_environment()


def _count_iterations(tree: nodes.Template) -> None:
    """Start the body of every loop with a call of `tick`: a loop without output would otherwise run unchecked."""
    for loop in tree.find_all(nodes.For):
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        statement = nodes.ExprStmt(tick)
        for node in (statement, *statement.find_all(nodes.Node)):
            node.set_lineno(loop.lineno).set_environment(_ENVIRONMENT)
        loop.body.insert(0, statement)


def _read_traits(tree: nodes.Template) -> TemplateTraits:
    content_names = _names_of_content(tree)

    def is_content(node: nodes.Node) -> bool:
        return _is_content(node, content_names)

    tests = [test for test in tree.find_all(nodes.Test) if is_content(test.node)]
    joined = [side for add in tree.find_all(nodes.Add) for side in (add.left, add.right)]
    joined += [side for concat in tree.find_all(nodes.Concat) for side in concat.nodes]
    return TemplateTraits(
        loops_over_content=any(is_content(loop.iter) for loop in tree.find_all(nodes.For)),
        asks_if_content_is_string=any(test.name == "string" for test in tests),
        asks_if_content_is_none=any(test.name == "none" for test in tests),
        joins_arguments_to_strings=any(_field_name(node) == "arguments" for node in joined),
    )


def _names_of_content(tree: nodes.Template) -> frozenset[str]:
    """Variables that may hold a message's content: assigned from it, or parameters of macros that get it."""
    names: set[str] = set()
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        found = set(names)
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, found):
                found.add(assignment.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is None:
                continue
            pairs = [(p.name, a) for p, a in zip(macro.args, call.args, strict=False)]
            pairs += [(keyword.key, keyword.value) for keyword in call.kwargs]
            found.update(name for name, argument in pairs if _is_content(argument, found))
        if found == names:
            return frozenset(names)
        names = found


def _is_content(node: nodes.Node | None, names: set[str] | frozenset[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Filter):
        return _is_content(node.node, names)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    return _field_name(node) == "content"


def _field_name(node: nodes.Node | None) -> str | None:
    """ "x" for the expressions `….x` and `…["x"]`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None
