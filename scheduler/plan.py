"""The values that cross between scheduler and model runner: `StepPlan` down, `StepOutput` up.

All are frozen, torch-free and msgpack-able, because this is where a process boundary may stand. The garbage collector
need not watch them: they hold plain values, and no cycle can run through them.
"""

from __future__ import annotations

import msgspec

from .pooling_params import Pooled, PoolingParams
from .sampling_params import SamplingParams


class NewRow(msgspec.Struct, frozen=True, array_like=True):
    """A request that the model runner has not seen, or has forgotten because it was preempted: told whole.

    `row` is its place in the runner's persistent batch, in [0, max_num_seqs). `token_ids` are its prompt and
    whatever it generated before a preemption. Its blocks come as `new_block_ids` of its entry in the plan.
    `params.seed` is never None here.
    """

    row: int
    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    eos_token_ids: list[int]  # ids that end a sequence, masked until min_tokens is reached
    bad_words_token_ids: list[list[int]]
    prompt_logprobs_start: int  # prompt positions before this one have been reported already
    grammar: str | None = None  # of `params.structured_outputs`, in the grammar library's format
    pooling: PoolingParams | None = None  # its prompt is pooled; then nothing is sampled
    segment_start: int | None = None  # tokens from here on are of the second segment (token type 1)


class StepPlan(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step computes. The lists from `rows` on are parallel, one entry per request of the step."""

    step: int
    released_rows: list[int]  # forget these before `new_rows` are taken in
    new_rows: list[NewRow]
    rows: list[int]
    num_computed: list[int]  # tokens whose KV is stored before this step; of an entry that decodes, at least so many
    num_tokens: list[int]  # tokens computed in this step: positions [num_computed, num_computed + num_tokens)
    new_block_ids: list[list[int]]  # appended to the row's block table before the step
    samples: list[bool]  # whether the entry reaches its last known token and so samples the next one, or is pooled
    num_decode: int = 0  # entries [0, num_decode) decode: they compute their newest token, and the drafts behind it
    num_drafts: int = 0  # that each of them verifies, and that are made for the next step

    @property
    def is_decode_only(self) -> bool:
        """Whether every entry decodes: the uniform step a static graph can run."""
        return self.num_decode == len(self.rows)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities at one position: first the token itself, then the most likely ones, best first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the token itself, from 1


class StepOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one step produced; keys and positions refer to entries of its plan."""

    step: int
    token_ids: list[list[int]]  # per entry: the sampled tokens, empty where the entry does not sample
    logprobs: dict[int, list[TokenLogprobs]]  # entry -> one item per sampled token
    prompt_logprobs: dict[int, list[TokenLogprobs]]  # entry -> one item per prompt position newly reported
    num_drafts: list[int] = []  # per entry that decodes: drafts that were there to be verified; none without drafts
    seconds: float = 0.0  # the step took on the device
    failures: dict[int, str] = {}  # entry -> why its request cannot go on; its tokens mean nothing
    gear: int = 0  # requests that its graph has room for; 0: it ran without a graph
    pooled: dict[int, Pooled] = {}  # entry -> what its prompt came to, in the place of tokens
