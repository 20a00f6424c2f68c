"""The one side input of a forward pass: where this step's tokens stand and where their KV lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ForwardContext:
    """Requests are ordered: first those that decode, then those that prefill a chunk. All that decode have the same
    number of tokens: the newest one, and behind it the drafts that are to be verified, if there are any.

    A decode-only step has empty `prefill_*` tuples, so that all that changes from step to step is a tensor.
    Every token's KV is written before any attention of that layer reads, so requests of one step may share blocks.
    Block 0 is the null block: padding points there, and nobody reads it unmasked.
    """

    positions: Tensor  # int64 [tokens]
    slots: Tensor  # int64 [tokens]: block_id * block_size + offset
    block_table: Tensor  # int32 [requests, max_blocks], padded with 0
    context_lens: Tensor  # int32 [requests]: tokens in the cache once this step has written
    num_decode: int  # requests [0, num_decode) decode
    prefill_query_lens: tuple[int, ...] = ()  # tokens of requests [num_decode, requests)
    prefill_context_lens: tuple[int, ...] = ()  # their context_lens, on the host
    tokens_per_request: int = 1  # of those that decode
    decode_lengths: list[int] | None = None  # context_lens of those that decode, where attention takes numbers
    handed_on: dict[str, Any] = field(default_factory=dict)  # by a layer to later ones of the same forward
    token_types: Tensor | None = None  # int64 [tokens], of an encoder that tells segments apart; None: all 0

    @property
    def num_decode_tokens(self) -> int:
        """Tokens [0, num_decode_tokens) are those of the requests that decode, a request's side by side."""
        return self.num_decode * self.tokens_per_request

    @property
    def attention_lengths(self) -> Tensor | list[int]:
        """context_lens of the requests that decode, as the device's attention takes them: as numbers where the host
        was told them, else int32 [num_decode]."""
        return self.context_lens[: self.num_decode] if self.decode_lengths is None else self.decode_lengths
