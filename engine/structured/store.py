"""The engine core's grammars: compiled in the background before their requests are let in, and kept for others."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...models.tokenizer import Tokenizer, load_tokenizer
from ...scheduler.plan import NewRow
from ...scheduler.request import RequestInput
from .constraint import RowConstraint, Vocabulary

if TYPE_CHECKING:
    from .compiler import GrammarCompiler

MAX_GRAMMARS = 128  # compiled ones that are kept


class GrammarStore:
    """Makes a request's constraint. What comes here has been compiled and tried out by a `GrammarChecker`, so it is
    known to take little; nothing else may come here. The library and the tokenizer are loaded with the first request.
    """

    def __init__(self, tokenizer_path: str | Path | None, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self._tokenizer_path = tokenizer_path
        self._eos_token_ids = eos_token_ids
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._vocabulary: Vocabulary | None = None
        self._compiler: GrammarCompiler | None = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def prepare(self, request: RequestInput) -> Future[None]:
        """Have everything ready that `constraint` needs for this request; the result tells of its failure."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        return self._thread.submit(self._prepare, request.grammar)

    def _prepare(self, grammar: str | None) -> None:
        with self._lock:
            self._load()
            if grammar is not None:
                self._matcher(grammar)

    def constraint(self, new: NewRow) -> RowConstraint:
        """The constraint of a request as it stands: behind its output so far, if it was preempted."""
        with self._lock:
            self._load()
            assert self._vocabulary is not None
            matcher = None if new.grammar is None else self._matcher(new.grammar).deep_copy()
        params, stop_ids = new.params, new.params.stop_token_ids or ()
        constraint = RowConstraint(
            self._vocabulary,
            matcher,
            ending=[*new.eos_token_ids, *stop_ids],
            stopping=stop_ids if params.ignore_eos else [*new.eos_token_ids, *stop_ids],
            min_tokens=params.min_tokens,
            reasoning=params.reasoning,
            budget=params.thinking_token_budget,
        )
        constraint.accept(new.token_ids[new.num_prompt_tokens :])
        return constraint

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _load(self) -> None:
        if self._vocabulary is None:
            if self._tokenizer_path is None:
                raise ValueError("structured outputs and thinking budgets need a tokenizer: None")
            self._tokenizer = load_tokenizer(self._tokenizer_path)
            self._vocabulary = Vocabulary(self._tokenizer, self.vocab_size)

    def _matcher(self, grammar: str) -> Any:
        """A matcher at its beginning, to be copied."""
        matcher = self._compiled.get(grammar)
        if matcher is None:
            if self._compiler is None:
                from .compiler import GrammarCompiler

                assert self._tokenizer is not None
                self._compiler = GrammarCompiler(self._tokenizer, self.vocab_size, self._eos_token_ids)
            matcher = self._compiled[grammar] = self._compiler.compile(grammar)
            while len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher
