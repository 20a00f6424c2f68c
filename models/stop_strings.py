"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStringMatcher:
    """Searches for any of `stop` while text streams through, whatever the pieces are cut into.

    The match that completes first wins; of those completing at the same character, the one that starts first. Text is
    held back only while it may still become part of a match. Time is linear in the text: an Aho-Corasick automaton
    (Aho, Corasick 1975) walks one step per character. After a match, or after `flush`, nothing more may be pushed.
    """

    def __init__(self, stop: Sequence[str], include_in_output: bool = False) -> None:
        if "" in stop:
            raise ValueError("stop cannot contain an empty string.")
        self._automaton = _Automaton(stop)
        self._include_in_output = include_in_output
        self._state = 0
        self._held = ""  # the longest end of the text that begins a stop string
        self._ended = False

    def fresh(self) -> StopStringMatcher:
        """A matcher of the same strings for another text; what was built from them is shared."""
        matcher = StopStringMatcher((), self._include_in_output)
        matcher._automaton = self._automaton
        return matcher

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add `text`; returns the text that is now final, and the stop string if one has just been completed.

        The final text ends before the match, or behind it with `include_in_output`; what follows it is dropped.
        With `may_stop=False` stop strings that are completed by `text` are passed over, but one may begin in it.
        """
        assert not self._ended, "pushed text after the end"
        automaton = self._automaton
        state = self._state
        for position, character in enumerate(text):
            state = automaton.step(state, character)
            matched = automaton.longest_match[state]
            if matched is not None and may_stop:
                self._ended = True
                seen = self._held + text[: position + 1]
                self._held = ""
                return (seen if self._include_in_output else seen[: len(seen) - len(matched)]), matched
        self._state = state
        seen = self._held + text
        keep = automaton.depth[state]
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep], None

    def flush(self) -> str:
        """The text still held back, when no more will come."""
        self._ended = True
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Aho-Corasick. State 0 is the root; a state stands for the longest end of the text that begins a pattern."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._children: list[dict[str, int]] = [{}]
        self._fallback: list[int] = [0]
        self.depth: list[int] = [0]
        self.longest_match: list[str | None] = [None]  # the longest pattern that ends in this state
        for pattern in patterns:
            self._insert(pattern)
        self._link()

    def step(self, state: int, character: str) -> int:
        while True:
            following = self._children[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self._fallback[state]

    def _insert(self, pattern: str) -> None:
        state = 0
        for character in pattern:
            following = self._children[state].get(character)
            if following is None:
                following = len(self._children)
                self._children[state][character] = following
                self._children.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.longest_match.append(None)
            state = following
        self.longest_match[state] = pattern

    def _link(self) -> None:
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._children[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                # A pattern that is a state's whole path starts before any that is only the end of it.
                if self.longest_match[child] is None:
                    self.longest_match[child] = self.longest_match[self._fallback[child]]
                queue.append(child)
