"""Sampling ops: hashed Gumbel noise, top-k / top-p / min-p masks, penalties and log probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

# Candidates looked at before falling back to a full sort; vocabularies are 30k-250k and nuclei are small.
TOP_P_CANDIDATES = 1024


def _wrap(value: int, bits: int) -> int:
    """`value` as a signed integer of `bits` bits, the form torch's wrapping arithmetic wants."""
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))


_GOLDEN64 = _wrap(0x9E3779B97F4A7C15, 64)
_MIX64_1 = _wrap(0xBF58476D1CE4E5B9, 64)
_MIX64_2 = _wrap(0x94D049BB133111EB, 64)
_GOLDEN32 = _wrap(0x9E3779B1, 32)
_MIX32_1 = _wrap(0x7FEB352D, 32)
_MIX32_2 = _wrap(0x846CA68B, 32)


def _shift_right(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical right shift of a signed tensor (torch shifts arithmetically)."""
    return (x >> count) & ((1 << (bits - count)) - 1)


def _row_keys(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Two int32 keys per row from (seed, position): the splitmix64 finaliser, applied once to each."""
    x = seeds
    for word in (positions, torch.zeros_like(positions)):
        x = (x ^ word) + _GOLDEN64
        x = (x ^ _shift_right(x, 30, 64)) * _MIX64_1
        x = (x ^ _shift_right(x, 27, 64)) * _MIX64_2
        x = x ^ _shift_right(x, 31, 64)
    return x.to(torch.int32), (x >> 32).to(torch.int32)


def likeliest(logits: Tensor) -> Tensor:
    """The first of each row's largest entries: float32 [rows, vocab] -> int64 [rows]."""
    return logits.argmax(dim=-1)


def likeliest_by_loops(logits: Tensor) -> Tensor:
    """As `likeliest`, but for NaNs. For graphs that Inductor compiles for a CPU: it makes plain vector loops of a
    largest entry and of a smallest index, but not of an argmax."""
    if not torch.compiler.is_compiling():
        return likeliest(logits)
    last = logits.shape[-1] - 1
    tokens = torch.arange(last + 1, dtype=torch.int32, device=logits.device)
    return torch.where(logits == logits.amax(dim=-1, keepdim=True), tokens, last).amin(dim=-1).to(torch.int64)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise that is a pure function of (seed, position, token id).

    seeds, positions: int64 [rows]. Returns float32 [rows, vocab_size]. A row's noise does not depend on the other
    rows, so argmax(logits / T + noise) samples softmax(logits / T) (Gumbel-max, Gumbel 1954; Maddison et al. 2014)
    and gives a request the same token whatever batch it is in. The token hash is the 32-bit "lowbias32" mixer
    (C. Wellons, hash-prospector) with one key added before it and one xored in between its rounds. Values lie in
    about [-2.9, 22.2].
    """
    first, second = _row_keys(seeds, positions)
    tokens = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device) * _GOLDEN32
    x = tokens[None, :] + first[:, None]  # [rows, vocab], wrapping
    x ^= _shift_right(x, 16, 32)
    x *= _MIX32_1
    x ^= second[:, None]
    x ^= _shift_right(x, 15, 32)
    x *= _MIX32_2
    x ^= _shift_right(x, 16, 32)
    # 31 bits keep small uniforms exact in float32, and those make the large noise values that decide.
    uniform = ((x & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31
    exponential = -torch.log1p(-uniform.clamp_(max=1 - 2.0**-24))
    return -torch.log(exponential)


def apply_token_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> None:
    """-inf for every token whose bit is not set, in place, in some rows.

    logits: float32 [n, vocab], mutated; rows: int64 [m]; bitmask: int32 [m, ceil(vocab / 32)], one bit per token, the
    lowest bit first.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    allowed = ((bitmask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, : logits.shape[-1]].to(torch.bool)
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def mask_min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """-inf where the probability is under min_p times the row's highest.

    logits: float32 [rows, vocab]; min_p: float32 [rows], 0 leaves a row as it is. Source: arXiv:2407.01082.
    """
    threshold = logits.amax(dim=-1, keepdim=True) + torch.log(min_p)[:, None]  # log(0) = -inf keeps all
    return logits.masked_fill(logits < threshold, -torch.inf)


def mask_top_k_top_p(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the top k tokens, then outside the nucleus of mass p of what is left.

    logits: float32 [rows, vocab]; top_k: int64 [rows], vocab or more for none; top_p: float32 [rows], 1 for none.
    Tokens that tie with the last one kept are kept, so the result depends on the row alone. The nucleus holds every
    token before which less than p of the mass lies (Holtzman et al., arXiv:1904.09751). Looks at the largest
    candidates first; falls back to a full sort where they do not hold enough mass.
    """
    vocab_size = logits.shape[-1]
    limit = top_k.clamp(max=vocab_size)
    has_top_p = bool((top_p < 1).any())
    widest = int(torch.where(limit < vocab_size, limit, 0).max())
    width = min(vocab_size, max(widest, TOP_P_CANDIDATES if has_top_p else 1))
    thresholds, exact = _thresholds(logits, limit, top_p, width)
    if not bool(exact.all()):
        thresholds, _ = _thresholds(logits, limit, top_p, vocab_size)
    return logits.masked_fill(logits < thresholds[:, None], -torch.inf)


def _thresholds(logits: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Per row the smallest logit to keep, [rows], and whether `width` candidates were enough to know it."""
    vocab_size = logits.shape[-1]
    values = logits.topk(width, dim=-1).values  # descending
    no_top_k = top_k >= vocab_size
    kth = values.gather(1, (top_k.clamp(max=width) - 1)[:, None]).squeeze(1)
    kth = torch.where(no_top_k, torch.full_like(kth, -torch.inf), kth)
    in_top_k = values >= kth[:, None]
    # Mass left by top-k: its candidates where they are all here, the whole vocabulary where there is no top-k.
    total = torch.where(
        no_top_k, logits.logsumexp(-1), values.masked_fill(~in_top_k, -torch.inf).logsumexp(-1)
    )  # ties of the k-th beyond the candidates are left out of the mass, never out of the result
    probabilities = torch.exp(values - total[:, None]).masked_fill(~in_top_k, 0.0)
    before = probabilities.cumsum(-1) - probabilities
    kept = in_top_k & ((before < top_p[:, None]) | (top_p[:, None] >= 1))
    kept[:, 0] = True
    last = kept.sum(-1) - 1  # kept is a prefix, as mass only grows
    nucleus = values.gather(1, last[:, None]).squeeze(1)
    unlimited = top_p >= 1
    threshold = torch.where(unlimited, kth, torch.maximum(kth, nucleus))
    ended_inside = last < width - 1
    exact = (width == vocab_size) | unlimited | ended_inside | ~no_top_k
    return threshold, exact


def apply_penalties(
    logits: Tensor, seen: Tensor, output_counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Repetition (prompt and output, arXiv:1909.05858), then frequency and presence penalties (output; OpenAI).

    logits: float32 [rows, vocab]; seen: bool [rows, vocab], token occurs in prompt or output; output_counts:
    float32 [rows, vocab]; the penalties: float32 [rows]. Returns new logits.
    """
    factor = torch.where(logits > 0, 1.0 / repetition[:, None], repetition[:, None])
    logits = torch.where(seen, logits * factor, logits)
    logits = logits - frequency[:, None] * output_counts
    return logits - presence[:, None] * (output_counts > 0)


def token_ranks(logprobs: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The log probability of each row's token and its rank from 1: one more than the tokens above it.

    logprobs: float32 [rows, vocab]; token_ids: int64 [rows]. Returns float32 [rows], int64 [rows].
    """
    chosen = logprobs.gather(1, token_ids[:, None])
    return chosen.squeeze(1), (logprobs > chosen).sum(-1) + 1
