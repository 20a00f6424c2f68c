"""Constraints are checked in a process that can be ended, and what was found is remembered."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import omni_engine
from omni_engine import Engine, SamplingParams, ValidationError
from omni_engine.engine.structured import checker as checker_module
from omni_engine.engine.structured.checker import GrammarChecker
from omni_engine.engine.structured.grammar_request import MAX_CHOICES, MAX_DEPTH, grammar_request
from omni_engine.engine.structured.worker import EXTRA_BYTES, WorkerJob
from omni_engine.scheduler.structured_outputs import StructuredOutputsParams

DEMO = Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek"
SLOW = {"json": {"type": "object", "properties": {f"p{index}": {} for index in range(6000)}}}


def constraint(**fields):
    return StructuredOutputsParams(**fields)


@pytest.fixture(scope="module")
def checker():
    checker = GrammarChecker(WorkerJob(str(DEMO), 2048, [1]))
    yield checker
    checker.close()


def refusal(checker, **fields):
    with pytest.raises(ValidationError) as caught:
        checker.check(constraint(**fields))
    return caught.value.message


def test_verdicts_are_remembered_good_and_bad(checker):
    before = checker.num_checked
    assert checker.known(constraint(regex="[ab]x")) is None
    grammar = checker.check(constraint(regex="[ab]x"))
    assert checker.check(constraint(regex="[ab]x")) == checker.known(constraint(regex="[ab]x")) == grammar
    for _ in range(2):
        assert "unclosed" in refusal(checker, regex="[ab")
    assert checker.num_checked == before + 2
    same = checker.check(constraint(json={"type": "object"}))
    assert (
        checker.check(constraint(json='{ "type" : "object" }')) == same == checker.check(constraint(json_object=True))
    )
    assert checker.check(constraint(json_object=True, disable_any_whitespace=True)) != same
    assert checker.num_checked == before + 4


def test_the_ones_used_last_are_kept(checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_KNOWN", 2)
    for regex in ("k", "l", "k", "m"):
        checker.check(constraint(regex=regex))
    assert checker.known(constraint(regex="k")) and checker.known(constraint(regex="m"))
    assert checker.known(constraint(regex="l")) is None
    assert checker._num_characters == sum(checker_module._size(*item) for item in checker._known.items())


def test_what_takes_too_long_costs_its_process_and_not_the_next_one(checker):
    checker.check(constraint(regex="s"))
    process, killed = checker._process, checker.num_killed
    start = time.monotonic()
    assert "too long" in refusal(checker, **SLOW)
    assert time.monotonic() - start < checker_module.CHECK_SECONDS + 5
    assert process.returncode == -signal.SIGKILL and checker.num_killed == killed + 1
    assert checker.check(constraint(regex="t"))


def test_with_time_enough_it_is_refused_too_and_not_killed(checker, monkeypatch):
    """The control of the limit: it is the time, not the size, that ended the process."""
    monkeypatch.setattr(checker_module, "CHECK_SECONDS", 120.0)
    killed = checker.num_killed
    fewer = {"json": {"type": "object", "properties": {f"p{index}": {} for index in range(1500)}}}
    assert "items" in refusal(checker, **fewer) or "costly" in refusal(checker, **fewer)
    assert checker.num_killed == killed


def test_a_process_that_has_died_is_replaced(checker):
    checker.check(constraint(regex="u"))
    os.kill(checker._process.pid, signal.SIGKILL)
    checker._process.wait()
    assert checker.check(constraint(regex="v")), "it died between two, which is nobody's fault"


def test_a_grammar_that_kills_the_process_is_refused(checker, monkeypatch):
    checker.check(constraint(regex="w"))
    exchange = checker._exchange

    def dies_meanwhile(process, message, timeout):
        os.kill(process.pid, signal.SIGABRT)  # as the library does when it finds no memory
        process.wait()
        return exchange(process, message, timeout)

    monkeypatch.setattr(checker, "_exchange", dies_meanwhile)
    assert "memory" in refusal(checker, regex="x")
    monkeypatch.undo()
    assert checker.check(constraint(regex="y"))


def test_the_memory_of_the_process_is_limited(checker):
    checker.check(constraint(regex="z"))
    limits = Path(f"/proc/{checker._process.pid}/limits").read_text()
    line = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert EXTRA_BYTES < int(line.split()[3]) < EXTRA_BYTES + (4 << 30)


def nested(levels):
    schema: dict = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(("fields", "text"), [
    ({"json": json.dumps(nested(MAX_DEPTH + 1))}, "levels deep"),
    ({"json": '{"a":' * 50_000 + "1" + "}" * 50_000}, "levels deep"),
    ({"json": {"enum": list(range(MAX_CHOICES + 1))}}, "values in enumerations"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, "at most 8192 texts"),
    ({"choice": ["a", ""]}, "empty text"),
    ({"regex": "a" * (1 << 20)}, "characters"),
    ({"regex": "  "}, "must not be empty"),
    ({"regex": "\ud800"}, "valid Unicode"),
    ({"json": "{"}, "not valid JSON"),
    ({"json": "[1]"}, "must be a JSON object"),
    ({"json": '{"const": NaN}'}, "not valid JSON"),
])  # fmt: skip
def test_what_is_too_large_or_no_json_is_refused_without_a_process(fields, text):
    with pytest.raises(ValidationError, match=text):
        grammar_request(constraint(**fields))


@pytest.mark.parametrize(("fields", "text"), [
    ({"json": {"$ref": "#"}}, "nothing can be written"),
    ({"json": {"$ref": "#/$defs/none"}}, "none"),
    ({"json": {"type": "banana"}}, "banana"),
    ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
    ({"json": {"type": "object", "propertyNames": {}}}, "propertyNames"),
    ({"json": {"type": "object"}, "whitespace_pattern": "("}, "unclosed"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"grammar": "start: undefined"}, "undefined"),
    ({"grammar": "root = 5"}, "neither Lark nor GBNF"),
    ({"structural_tag": {}}, "needs format"),
    ({"structural_tag": {"format": {"type": "banana"}}}, "banana"),
    ({"structural_tag": {"structures": [{"begin": "<a>", "schema": {}, "end": ""}], "triggers": ["<b"]}}, "triggers"),
])  # fmt: skip
def test_the_library_says_what_is_wrong(checker, fields, text):
    assert text in refusal(checker, **fields)


def test_objects_are_closed_on_request():
    schema = {
        "type": "object",
        "properties": {"properties": {"type": "object", "properties": {"a": {}}}, "open": {"type": "object",
                       "additionalProperties": True}, "none": {"enum": [{"type": "object"}]}},
    }  # fmt: skip
    request = grammar_request(constraint(json=schema, disable_additional_properties=True))
    closed = json.loads(request.text)
    assert closed["additionalProperties"] is False and closed["properties"].keys() == schema["properties"].keys()
    assert closed["properties"]["properties"]["additionalProperties"] is False
    assert closed["properties"]["open"]["additionalProperties"] is True
    assert closed["properties"]["none"] == schema["properties"]["none"]


def test_an_engine_without_a_tokenizer_refuses_constraints(config_only):
    engine = Engine(config_only, load_format="dummy", skip_tokenizer_init=True, max_model_len=64, enforce_eager=True)
    for fields in ({"structured_outputs": {"regex": "a"}}, {"thinking_token_budget": 4}):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            engine.generate([[5, 6]], SamplingParams(**fields))
    assert not engine.has_unfinished_requests()
    engine.close()
