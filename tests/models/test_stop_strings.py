"""`StopStringMatcher` against a naive search of the whole text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from omni_engine.models.stop_strings import StopStringMatcher

LETTERS = st.text(alphabet="ab\U0001f600", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\U0001f600", min_size=1, max_size=5), max_size=4)


def run(stop: list[str], text: str, cuts: list[int], include: bool = False) -> tuple[str, str | None]:
    """All text emitted and the stop string matched, with `text` pushed in pieces that end at `cuts`."""
    matcher = StopStringMatcher(stop, include)
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    emitted = ""
    for a, b in pairwise(bounds):
        piece, matched = matcher.push(text[a:b])
        emitted += piece
        if matched is not None:
            return emitted, matched
    return emitted + matcher.flush(), None


def search(stop: list[str], text: str, include: bool) -> tuple[str, str | None]:
    """The same by looking at every prefix of the text."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            matched = max(ending, key=len)
            return text[: end if include else end - len(matched)], matched
    return text, None


@settings(max_examples=500, deadline=None)
@given(stop=STOPS, text=LETTERS, cuts=st.lists(st.integers(0, 30), max_size=8), include=st.booleans())
@example(stop=["abab", "ba"], text="aabab", cuts=[1, 2, 3, 4], include=False)
@example(stop=["ab", "b"], text="ab", cuts=[1], include=False)
def test_any_chunking_equals_a_search_of_the_whole_text(
    stop: list[str], text: str, cuts: list[int], include: bool
) -> None:
    assert run(stop, text, cuts, include) == search(stop, text, include)


@settings(max_examples=300, deadline=None)
@given(stop=STOPS, text=LETTERS)
def test_exactly_the_possible_beginning_of_a_match_is_held_back(stop: list[str], text: str) -> None:
    matcher = StopStringMatcher(stop)
    emitted = ""
    for position, character in enumerate(text, 1):
        piece, matched = matcher.push(character)
        emitted += piece
        if matched is not None:
            return
        seen = text[:position]
        begins = [k for k in range(1, position + 1) if any(s.startswith(seen[position - k :]) for s in stop)]
        assert position - len(emitted) == max(begins, default=0)


def test_the_earliest_completing_match_wins() -> None:
    assert run(["bcde", "cd"], "abcdef", []) == ("ab", "cd")


def test_of_two_matches_with_the_same_end_the_one_that_starts_first_wins() -> None:
    assert run(["cd", "bcd"], "abcdef", []) == ("a", "bcd")


def test_the_stop_string_is_included_on_request() -> None:
    assert run(["cd"], "abcdef", [3], include=True) == ("abcd", "cd")


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopStringMatcher([])
    assert matcher.push("text") == ("text", None)
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStringMatcher(["a", ""])


def test_time_is_linear_in_hostile_text() -> None:
    stop = ["a" * 20_000 + "b", "a" * 10_000 + "c"]

    def seconds(length: int) -> float:
        matcher = StopStringMatcher(stop)
        started = time.perf_counter()
        for _ in range(0, length, 50):
            matcher.push("a" * 50)
        return time.perf_counter() - started

    short = min(seconds(40_000) for _ in range(3))
    assert min(seconds(320_000) for _ in range(3)) < 8 * short * 3


def test_a_fresh_matcher_starts_anew_with_the_same_strings() -> None:
    matcher = StopStringMatcher(["abc"])
    assert matcher.push("xab") == ("x", None)
    other = matcher.fresh()
    assert other.push("c") == ("c", None)
    assert other.push("abc") == ("", "abc")
    assert matcher.push("c") == ("", "abc")
