"""Python literals become the JSON that ast.literal_eval and json.dumps make of them, and nothing else is accepted."""

from __future__ import annotations

import ast
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_engine.server.parsing.python_literals import read_literal
from omni_engine.server.parsing.text_stream import TextStream


def converted(text: str, piece: int = 1) -> tuple[bool, str, str]:
    """Whether `text` begins with a literal, its JSON, and what follows it."""
    stream = TextStream()
    pieces: list[str] = []
    reading = read_literal(stream, pieces.append)
    at = 0
    try:
        next(reading)
        while at < len(text):
            stream.feed(text[at : at + piece])
            at += piece
            next(reading)
        stream.ended = True
        next(reading)
    except StopIteration as stopped:
        return stopped.value, "".join(pieces), stream.text[stream.position :] + text[at:]
    raise AssertionError("a reader must stop at the end of the text")


def python_value(text: str) -> Any:
    """What Python makes of a literal, or of an f-string without fields."""
    node = ast.parse(f"({text.strip()})", mode="eval").body
    if isinstance(node, ast.JoinedStr):
        return "".join(ast.literal_eval(part) for part in node.values)
    return ast.literal_eval(node)


def without_python(value: Any) -> Any:
    """`value` with the types of JSON; keys as json.dumps writes them."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else json.dumps(key): without_python(each) for key, each in value.items()}
    return [without_python(each) for each in value] if isinstance(value, (list, tuple)) else value


keys = st.text(max_size=5) | st.integers() | st.booleans() | st.none()
leaves = st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(values, st.integers(1, 9))
def test_a_literal_is_what_python_reads(value: Any, piece: int) -> None:
    found, text, rest = converted(repr(value) + ")", piece)
    assert (found, rest[:1] or ")") == (True, ")")
    assert json.loads(text) == without_python(python_value(repr(value)))


@pytest.mark.parametrize(
    "text",
    [
        r"'Martha\'s \"Vineyard\" \x41\u00e9\U0001F600\101\n\t\a\d\\'", '"""three "quotes" \n"""', "''''a'''", "''",
        r"r'raw \n \' x'", "f'no field'", "f'{{a}}'", "u'x'", "'a' 'b'\n\"c\"", "rf'{{\\d}}'", "'a' r'\\b'", "'\\\n'",
        "0x1F", "0b101", "0o17", "-0x_ff", "1_000", "+7", "-0", "00", "1.", ".5", "-.5e-3", "1e5", "1_0.0_1e1_0", "5.0",
        "(1)", "(1,)", "()", "((1, 2), 3)", "[1,]", "{1: 2, 'a': (None)}", "{'a'}", "{1, 2,}",
        "{'a': {1: {2: 3}}}", "{}",
        "{True: False, None: 1.5}", "[ ]", "( )", "{ }", "[{'a': [{'b'}]}]", " [ 1 , 2 ] ",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # of the oracle
def test_every_spelling_of_a_literal(text: str) -> None:
    expected = python_value(text)
    for piece in (1, 3, 100):
        found, json_text, _ = converted(text, piece)
        assert found
        got = json.loads(json_text)
        assert got == without_python(_lists_for_sets(expected))
        assert type(got) is type(without_python(_lists_for_sets(expected)))


def _lists_for_sets(value: Any) -> Any:
    if isinstance(value, (set, list, tuple)):
        return [_lists_for_sets(each) for each in value]
    return {key: _lists_for_sets(each) for key, each in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize(
    "text",
    [
        "x", "f(1)", "__import__('os')", "1 + 1", "b'bytes'", "1j", "...", "not True", "~5", "inf", "nan",
        "1e999", "f'{x}'",
        "'open", "[1, 2", "{'a': 1", "{'a': }", "{[1]: 2}", "{'a': 1, 2}", "[1 2]", "(1, 2]", "lambda: 0", "-",
        "1.2.3", "''x",
        "'\\xZZ'", "'\\N{DASH}'", "'\\UFFFFFFFF'", "", "0x", "[*a]", "{**a}", "1_", "--5", "0x" + "f" * 5000,
    ],
)  # fmt: skip
def test_what_is_no_literal_is_refused(text: str) -> None:
    assert all(
        not (found and not rest.strip()) for found, _, rest in (converted(text, piece) for piece in (1, 4, 9999))
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("true", "true"), ("null", "null"), ("[false, None]", "[false, null]"),  # JSON's names
        ("007", "7"), ("12345678901234567890123456789012345678901234567890", None), ("1.10", "1.10"),
        (r"'\ud83d\ude00'", r'"\ud83d\ude00"'), ("{1, 1}", "[1, 1]"), ("{'a': 1, 'a': 2}", '{"a": 1, "a": 2}'),
    ],
)  # fmt: skip
def test_what_stays_as_it_was_written(text: str, expected: str | None) -> None:
    assert converted(text)[1] == (text if expected is None else expected)


def test_deep_nesting_needs_no_recursion() -> None:
    for opening, closing in ("[]", "()", "{}"):
        depth = 30_000
        text = opening * depth + ("1, 2" if opening != "{" else "1") + closing * depth
        found, json_text, _ = converted(text, 1000)
        assert found and json_text.count("[") == (1 if opening == "(" else depth)


def test_random_text_is_read_the_same_in_any_pieces() -> None:
    draw = random.Random(0)
    atoms = [*"[](){}'\",:\\ \n1ax-.+_{", "'a'", "f'", "r'", "\\u", "0x", "None", "'''"]
    for _ in range(3000):
        text = "".join(draw.choices(atoms, k=draw.randint(1, 12)))
        assert converted(text, 1) == converted(text, 2) == converted(text, 99)
