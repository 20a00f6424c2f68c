"""Which tokens a request may have next: its reasoning, a spent thinking budget, its grammar, and its end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...models.tokenizer import Tokenizer
from ...scheduler.structured_outputs import ReasoningSpan
from .grammar_request import MEAN_MASK_SECONDS

# What masks of a grammar may cost a request beyond their mean, once. A step cannot cost much more than the library's
# own limits allow; this ends requests in which every step does.
EXTRA_MASK_SECONDS = 0.5

THINKING, CLOSING, CONTENT, ENDED = range(4)


class _State(NamedTuple):
    """Where a request stands, but for its matcher, which knows its own place."""

    phase: int
    num_output: int = 0  # tokens so far
    num_thoughts: int = 0  # of these, reasoning that counts
    tail: bytes = b""  # THINKING: the last bytes, where an end may have begun
    num_closed: int = 0  # CLOSING: tokens of the end that have been written
    num_matched: int = 0  # tokens the matcher has taken


class Vocabulary:
    """The tokens' bytes, and what depends on them alone; shared by all requests."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.num_words = -(-vocab_size // 32)
        self._spans: dict[tuple[str, ...], ReasoningMarks] = {}

    def marks(self, span: ReasoningSpan) -> ReasoningMarks:
        key = (*span.ends, "", *span.starts, "", *span.barred)
        if key not in self._spans:
            if len(self._spans) > 64:  # a server has one; embedded callers may have others
                self._spans.clear()
            self._spans[key] = ReasoningMarks(self, span)
        return self._spans[key]


class ReasoningMarks:
    """The texts of a `ReasoningSpan` as tokens, and as bytes where they are not a token each."""

    def __init__(self, vocabulary: Vocabulary, span: ReasoningSpan) -> None:
        tokenizer = vocabulary.tokenizer
        self._vocabulary = vocabulary
        self.closing = tokenizer.encode(span.ends[0], add_special_tokens=False)
        ids = {text: tokenizer.token_to_id(text) for text in (*span.ends, *span.starts, *span.barred)}
        self.end_ids = {ids[text] for text in span.ends} - {None}
        self.start_ids = {ids[text] for text in span.starts} - {None}
        self.barred = sorted({token_id for text in span.barred if (token_id := ids[text]) is not None})
        self.end_bytes = [text.encode() for text in span.ends if ids[text] is None]
        self.longest = max(map(len, self.end_bytes), default=0)
        last_bytes = {end[-1:] for end in self.end_bytes}
        self._may_cross = [
            token_id
            for token_id in range(vocabulary.vocab_size if last_bytes else 0)
            if any(last in tokenizer.token_bytes(token_id)[:-1] for last in last_bytes)
        ]
        self._crossing: dict[bytes, list[int]] = {}

    def find_end(self, text: bytes) -> int:
        """Where the first end in `text` ends, -1 if there is none."""
        places = [found + len(end) for end in self.end_bytes if (found := text.find(end)) >= 0]
        return min(places, default=-1)

    def crossing(self, tail: bytes) -> list[int]:
        """Tokens that would end the reasoning behind `tail` and go on: what they go on with has met no grammar."""
        if not self.end_bytes:
            return []
        begun = max((tail[at:] for end in self.end_bytes for at in range(len(tail)) if end.startswith(tail[at:])),
                    key=len, default=b"")  # fmt: skip
        if begun not in self._crossing:
            token_bytes = self._vocabulary.tokenizer.token_bytes
            self._crossing[begun] = [
                token_id
                for token_id in self._may_cross
                if 0 <= self.find_end(begun + token_bytes(token_id)) < len(begun) + len(token_bytes(token_id))
            ]
        return self._crossing[begun]


class RowConstraint:
    """One request's constraint. `matcher` is llguidance's, at its beginning, or None where only reasoning is limited.

    `accept` takes the tokens that the request has got, `fill_masks` says what may come behind them and behind drafts.
    What goes wrong is in `error`, and nothing is masked then.

    A mask is int32 [words], one bit per token, the lowest bit first. `ending` tokens, EOS and the request's stop
    tokens, are allowed where the grammar is satisfied and `min_tokens` reached; earlier only if nothing else is left.
    `stopping` are those of them at which the request really ends.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        matcher: Any,
        *,
        ending: Sequence[int],
        stopping: Sequence[int],
        min_tokens: int = 0,
        reasoning: ReasoningSpan | None = None,
        budget: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.error: str | None = None
        self._matcher = matcher
        self._ending = sorted(set(ending))
        self._stopping = frozenset(stopping)
        self._min_tokens = min_tokens
        self._budget = budget
        self._marks = None if reasoning is None else vocabulary.marks(reasoning)
        self._state = _State(CONTENT if reasoning is None else THINKING)
        self._seconds = 0.0
        self._num_masks = 0
        self._open_closing()

    def accept(self, token_ids: Sequence[int]) -> None:
        """Take in tokens of the request, in order."""
        for token_id in token_ids:
            if self.error is not None:
                return
            if not self._advance(token_id):
                self.error = (
                    "no token is left that the structure, allowed_token_ids, logit_bias and bad_words allow together; "
                    f"sampled: {token_id}"
                )

    def fill_masks(self, drafts: Sequence[int], masks: np.ndarray) -> None:
        """Write the masks of the next token and of those behind each draft. masks: int32 [1 + drafts, words]; behind
        a draft that cannot be accepted everything is allowed. Changes nothing in the request."""
        masks[:] = -1
        if self.error is not None:
            return
        start = time.thread_time()
        state = self._state
        self._fill(masks[0])
        for place, token_id in enumerate(drafts):
            if self.error is not None or token_id < 0 or not masks[place, token_id // 32] >> (token_id % 32) & 1:
                break
            if not self._advance(token_id):
                break
            self._fill(masks[place + 1])
        behind = self._state.num_matched - state.num_matched
        if behind and not self._matcher.rollback(behind):
            self.error = self._reason()
        self._state = state
        self._seconds += time.thread_time() - start
        self._num_masks += 1 + len(drafts)
        if self._seconds > EXTRA_MASK_SECONDS + MEAN_MASK_SECONDS * self._num_masks:
            self.error = f"the grammar costs too much time, in seconds so far: {self._seconds:.2f}"
        if self.error is not None:
            masks[:] = -1

    def _advance(self, token_id: int) -> bool:
        """Move behind a token; False if it cannot stand here."""
        state = self._state._replace(num_output=self._state.num_output + 1)
        if state.phase in (THINKING, CLOSING):
            self._state = self._think(state, token_id)
        elif state.phase == ENDED:
            self._state = state
            return token_id in self._ending
        elif self._matcher is None:
            self._state = state
        elif token_id in self._ending and state.num_output >= self._min_tokens and self._matcher.is_accepting():
            self._state = state._replace(phase=ENDED)
        elif self._matcher.try_consume_tokens([token_id]) == 1:
            self._state = state._replace(num_matched=state.num_matched + 1)
        elif token_id in self._ending and self._matcher.is_accepting() and not self._matcher.is_error():
            self._state = state  # before min_tokens, where nothing else was left: it is no end yet
        else:
            return False
        self._open_closing()
        return True

    def _think(self, state: _State, token_id: int) -> _State:
        marks = self._marks
        assert marks is not None
        if token_id in marks.end_ids:
            return state._replace(phase=CONTENT)
        if state.phase == CLOSING:
            if token_id != marks.closing[state.num_closed]:  # of a request that goes on after an error
                return state
            state = state._replace(num_closed=state.num_closed + 1)
            return state._replace(phase=CONTENT) if state.num_closed == len(marks.closing) else state
        if token_id in self._stopping and state.num_output >= self._min_tokens:
            return state._replace(phase=ENDED)
        tail = b""
        if marks.end_bytes:
            tail = state.tail + self.vocabulary.tokenizer.token_bytes(token_id)
            if marks.find_end(tail) >= 0:
                return state._replace(phase=CONTENT)
            tail = tail[-(marks.longest - 1) :] if marks.longest > 1 else b""
        return state._replace(tail=tail, num_thoughts=state.num_thoughts + (token_id not in marks.start_ids))

    def _open_closing(self) -> None:
        """Once the budget is spent, the end of the reasoning is all that can be written."""
        state = self._state
        if state.phase == THINKING and self._budget is not None and state.num_thoughts >= self._budget:
            self._state = state._replace(phase=CLOSING)

    def _fill(self, mask: np.ndarray) -> None:
        """What may come next. mask: int32 [words], contiguous."""
        state, marks = self._state, self._marks
        if state.phase == CLOSING:
            assert marks is not None
            mask[:] = 0
            _set_bits(mask, [marks.closing[state.num_closed]])
        elif state.phase == ENDED:
            mask[:] = 0
            _set_bits(mask, self._ending)
        elif state.phase == CONTENT and self._matcher is not None:
            self._fill_by_grammar(mask)
        else:
            mask[:] = -1
            if self._matcher is not None:
                assert marks is not None
                _clear_bits(mask, marks.barred)
                _clear_bits(mask, marks.crossing(state.tail))
            if state.num_output < self._min_tokens:
                _clear_bits(mask, self._ending)

    def _fill_by_grammar(self, mask: np.ndarray) -> None:
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            self.error = self._reason()
            mask[:] = -1
            return
        if not matcher.is_accepting():
            return
        if self._state.num_output < self._min_tokens:
            saved = mask.copy()
            _clear_bits(mask, self._ending)
            if mask.any():
                return
            mask[:] = saved
        _set_bits(mask, self._ending)

    def _reason(self) -> str:
        from .compiler import reason

        return f"the grammar cannot be followed any further: {reason(self._matcher)}"


def _set_bits(mask: np.ndarray, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        mask.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)


def _clear_bits(mask: np.ndarray, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        mask.view(np.uint32)[token_id // 32] &= np.uint32(~(1 << token_id % 32) & 0xFFFFFFFF)
