"""--enable-log-outputs: what each request was answered with, one line per choice once it is complete."""

from __future__ import annotations

import logging

from ..engine.outputs import RequestOutput

logger = logging.getLogger(__name__)


class OutputLog:
    """Collects the text of one request's choices, whole or in pieces; `max_length` characters of it are logged."""

    def __init__(self, request_id: str, max_length: int | None) -> None:
        self._request_id = request_id
        self._max_length = max_length
        self._texts: dict[int, list[str]] = {}
        self._num_tokens: dict[int, int] = {}

    def add(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            pieces = self._texts.setdefault(completion.index, [])
            pieces.append(completion.text)
            num_tokens = self._num_tokens.get(completion.index, 0) + len(completion.token_ids)
            self._num_tokens[completion.index] = num_tokens
            if completion.finish_reason is not None:
                logger.info(
                    "Generated response %s: choice: %d, output: %r, tokens: %d, finish_reason: %s",
                    self._request_id, completion.index, "".join(pieces)[: self._max_length], num_tokens,
                    completion.finish_reason,
                )  # fmt: skip
