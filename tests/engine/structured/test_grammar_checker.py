"""Constraints are checked in a process that can be ended, and what was found is remembered."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import omni_engine
from omni_engine import Engine, SamplingParams, ValidationError
from omni_engine.engine.errors import RequestRejectedError
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


def slow(number):
    """One of many grammars that each take far longer than they may."""
    return constraint(json={"type": "object", "properties": {f"p{number} {index}": {} for index in range(6000)}})


def children(checker):
    pid = checker._process.pid
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in texts for word in text.split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_dead(*pids):
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def test_what_takes_too_long_costs_its_own_process_and_not_the_others(checker):
    checker.check(constraint(regex="s"))
    pid, killed = checker._process.pid, checker.num_killed
    start = time.monotonic()
    assert "too long" in refusal(checker, **SLOW)
    assert time.monotonic() - start < checker_module.CHECK_SECONDS + 5
    assert checker._process.pid == pid and checker.num_killed == killed + 1
    wait_until_dead(*children(checker))
    assert checker.check(constraint(regex="t"))


def in_threads(*calls):
    """What each of these came to, an exception or what it returned, and after how many seconds."""

    def timed(call):
        start = time.monotonic()
        try:
            told = call()
        except Exception as error:
            told = error
        return told, time.monotonic() - start

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(timed, calls))


def test_an_honest_grammar_does_not_wait_for_slow_ones(checker):
    """Slow ones in all places but one: they have their whole second, and the last place is free for others."""
    for attempt in range(5):  # on a machine that is busy elsewhere, a hundredth of a second may become one
        numbers = range(10 * attempt, 10 * attempt + checker_module.MAX_AT_ONCE - 1)
        slow_ones = [(lambda number=number: checker.check(slow(number))) for number in numbers]
        *told, (answers, seconds) = in_threads(
            *slow_ones,
            lambda attempt=attempt: [checker.check(constraint(regex=f"h{attempt}{letter}")) for letter in "abc"],
        )
        for error, slow_seconds in told:
            assert isinstance(error, ValidationError) and "too long" in error.message
            assert slow_seconds >= checker_module.CHECK_SECONDS
        if isinstance(answers, list) and seconds < checker_module.CHECK_SECONDS:
            break
    else:
        raise AssertionError((answers, seconds))
    wait_until_dead(*children(checker))


def test_slow_ones_in_all_places_lose_them_to_those_that_wait(checker):
    num_slow, busy = 2 * checker_module.MAX_AT_ONCE, checker.num_busy
    slow_ones = [(lambda number=number: checker.check(slow(100 + number))) for number in range(num_slow)]
    *told, (grammar, seconds) = in_threads(*slow_ones, lambda: checker.check(constraint(regex="i1")))
    assert isinstance(grammar, str), grammar
    assert seconds < checker_module.WAIT_SECONDS + 1
    for error, seconds in told:
        assert isinstance(error, (ValidationError, RequestRejectedError)), error
        assert seconds < checker_module.WAIT_SECONDS + checker_module.CHECK_SECONDS + 1
    rejected = [error for error, _ in told if isinstance(error, RequestRejectedError)]
    assert rejected and checker.num_busy == busy + len(rejected)
    # Nothing was remembered of those: alone, the same grammar gets its verdict.
    number = next(number for number, (error, _) in enumerate(told) if isinstance(error, RequestRejectedError))
    with pytest.raises(ValidationError, match="too long"):
        checker.check(slow(100 + number))


def test_without_shares_the_honest_one_finds_no_place(checker, monkeypatch):
    """The control of the test before: it is the shares that make room."""
    monkeypatch.setattr(checker_module, "SHARE_SECONDS", 60.0)
    monkeypatch.setattr(checker_module, "CHECK_SECONDS", 3.0)
    slow_ones = [(lambda number=number: checker.check(slow(200 + number))) for number in range(4)]
    *_, (error, seconds) = in_threads(*slow_ones, lambda: time.sleep(0.3) or checker.check(constraint(regex="j1")))
    assert isinstance(error, RequestRejectedError) and seconds >= checker_module.WAIT_SECONDS


def test_who_came_too_long_ago_is_told_at_once(checker, monkeypatch):
    monkeypatch.setattr(checker_module, "MAX_AT_ONCE", 0)
    start = time.monotonic()
    with pytest.raises(RequestRejectedError, match="again"):
        checker.check(constraint(regex="k1"), start - checker_module.WAIT_SECONDS)
    assert time.monotonic() - start < 0.5


def test_a_grammar_that_many_ask_for_at_once_is_tried_out_once(checker):
    before = checker.num_checked
    told = in_threads(*[lambda: checker.check(constraint(regex="[a-z]{2}l1"))] * 12)
    assert len({grammar for grammar, _ in told}) == 1 and checker.num_checked == before + 1


def test_nested_repetition_is_linear(checker):
    """What blows up a backtracking matcher: compiling it and walking it take no longer than for a plain expression."""
    import llguidance

    from omni_engine.engine.structured.compiler import LIMITS, GrammarCompiler
    from omni_engine.models.tokenizer import load_tokenizer

    compiler = GrammarCompiler(load_tokenizer(str(DEMO)), 2048, [1])
    letter = compiler.tokenizer.encode("a", add_special_tokens=False)[-1]
    spent = {}
    for length in (250, 500, 1000, 2000):
        grammar = checker.check(constraint(regex="(a+)+$"))
        matcher = llguidance.LLMatcher(compiler._library, grammar, limits=LIMITS)
        start = time.process_time()
        assert matcher.consume_tokens([letter] * length) and not matcher.is_error()
        assert matcher.compute_bitmask()
        spent[length] = time.process_time() - start
    assert spent[2000] < 1.0, spent
    assert spent[2000] < 60 * max(spent[250], 0.001), "eight times the text, by far not its square"
    start = time.process_time()
    re.fullmatch("(a+)+$", "a" * 22 + "b")  # the control: a matcher that backtracks, on a hundredth of the text
    assert time.process_time() - start > 4 * spent[250]


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
    assert checker.check(constraint(regex="v")), "it died between two, which is nobody's fault"


def test_a_grammar_that_kills_its_process_is_refused(checker, monkeypatch):
    """As the library does when it finds no memory."""
    monkeypatch.setattr(checker_module, "CHECK_SECONDS", 60.0)  # a machine that stalls must not be what ends it
    checker.check(constraint(regex="w"))
    pid = checker._process.pid
    wait_until_dead(*children(checker))

    def kill_the_child():
        deadline = time.monotonic() + 5
        while not (found := [child for child in children(checker) if is_alive(child)]):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.2)  # until it has begun: what dies before is tried again
        os.kill(found[0], signal.SIGABRT)

    (error, _), (nothing, _) = in_threads(lambda: checker.check(slow(300)), kill_the_child)
    assert nothing is None and "memory" in error.message
    assert checker.check(constraint(regex="y")) and checker._process.pid == pid


def test_a_process_that_hangs_is_replaced(checker):
    checker.check(constraint(regex="o"))
    pid = checker._process.pid
    os.kill(pid, signal.SIGSTOP)
    assert "too long" in refusal(checker, regex="p")
    assert checker.check(constraint(regex="q")) and checker._process.pid != pid
    wait_until_dead(pid)


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
