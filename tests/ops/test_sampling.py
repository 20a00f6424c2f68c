"""Sampling ops against numpy, plain sorts and the chi-squared test."""

import numpy as np
import pytest
import torch

from omni_engine.ops import sampling


def _mix64(x: int) -> int:
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def _reference_noise(seed: int, position: int, token: int) -> float:
    """The same hash in Python integers of unlimited size, so no wrap-around is taken on trust."""
    mask64, mask32 = (1 << 64) - 1, (1 << 32) - 1
    x = seed & mask64
    for word in (position, 0):
        x = _mix64(((x ^ word) + 0x9E3779B97F4A7C15) & mask64)
    first, second = x & mask32, x >> 32
    h = (token * 0x9E3779B1 + first) & mask32
    h ^= h >> 16
    h = (h * 0x7FEB352D) & mask32
    h ^= second
    h ^= h >> 15
    h = (h * 0x846CA68B) & mask32
    h ^= h >> 16
    uniform = min((np.float32(h & 0x7FFFFFFF) + 0.5) * 2.0**-31, 1 - 2.0**-24)
    return float(-np.log(-np.log1p(-uniform)))


def test_noise_equals_the_hash_in_unbounded_integers():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    positions = [0, 1, 7, 2**31, 99, 163839]
    noise = sampling.gumbel_noise(torch.tensor(seeds), torch.tensor(positions), 1000)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        expected = [_reference_noise(seed, position, token) for token in range(1000)]
        np.testing.assert_allclose(noise[row].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_noise_of_a_row_does_not_depend_on_the_other_rows():
    seeds, positions = torch.arange(50) * 977, torch.arange(50)
    whole = sampling.gumbel_noise(seeds, positions, 333)
    for row in (0, 17, 49):
        alone = sampling.gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 333)
        assert torch.equal(whole[row], alone[0])


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_samples_follow_the_softmax(vary):
    draws, vocab_size = 40_000, 50
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 1.5
    counter, fixed = torch.arange(draws), torch.full((draws,), 42)
    seeds, positions = (counter, fixed) if vary == "seed" else (fixed, counter)
    tokens = (logits + sampling.gumbel_noise(seeds, positions, vocab_size)).argmax(-1)
    expected = logits.softmax(-1) * draws
    observed = tokens.bincount(minlength=vocab_size)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    # 49 degrees of freedom: mean 49, standard deviation 9.9; 98 is five of them away.
    assert statistic < 98
    shifted = float(((observed.roll(1) - expected) ** 2 / expected).sum())
    assert shifted > 98  # negative control


def test_noise_at_neighbouring_positions_and_tokens_is_uncorrelated():
    noise = sampling.gumbel_noise(torch.full((400,), 7), torch.arange(400), 500)
    z = (noise - noise.mean()) / noise.std()
    for a, b in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[1:, 1:], z[:-1, :-1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def _plain_mask(logits: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """One row, by a full sort and a loop."""
    order = logits.argsort(descending=True).tolist()
    if k < len(order):
        kth = logits[order[k - 1]]
        order = [token for token in order if logits[token] >= kth]
    probabilities = logits[order].double().softmax(-1)
    keep, before = [], 0.0
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        if p < 1 and before >= p and keep:
            break
        keep.append(token)
        before += probability
    mask = torch.full_like(logits, -torch.inf)
    mask[keep] = logits[keep]
    return mask


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("vocab_size", [40, 3000])
def test_top_k_and_top_p_equal_a_plain_sort(scale, vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(12, vocab_size, generator=generator) * scale
    top_k = torch.tensor([1, 2, 5, 39, vocab_size, vocab_size, 7, vocab_size, 1, vocab_size, 20, vocab_size])
    top_p = torch.tensor([1.0, 0.5, 0.9, 1.0, 0.1, 0.95, 1e-6, 1.0, 0.3, 0.999, 0.7, 0.5])
    masked = sampling.mask_top_k_top_p(logits, top_k, top_p)
    for row in range(12):
        expected = _plain_mask(logits[row], int(top_k[row]), float(top_p[row]))
        assert torch.equal(masked[row], expected), row


def test_top_k_keeps_ties_of_the_last_one():
    masked = sampling.mask_top_k_top_p(
        torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), torch.tensor([2]), torch.tensor([1.0])
    )
    assert torch.isfinite(masked).tolist() == [[False, True, True, True, False]]


def test_min_p_keeps_what_is_near_the_best():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 3))
    masked = sampling.mask_min_p(logits, torch.tensor([0.0, 0.2, 1.0]))
    assert torch.isfinite(masked).sum(-1).tolist() == [4, 3, 1]


def test_penalties_follow_their_formulas():
    logits = torch.tensor([[2.0, -2.0, 1.0, 3.0]])
    seen = torch.tensor([[True, True, False, True]])
    counts = torch.tensor([[0.0, 2.0, 0.0, 1.0]])
    one = torch.ones(1)
    result = sampling.apply_penalties(logits, seen, counts, one * 2, one * 0.5, one * 0.25)
    assert result.tolist() == [[1.0, -4.0 - 1.0 - 0.25, 1.0, 1.5 - 0.5 - 0.25]]


def test_rank_counts_the_tokens_above():
    logprobs, ranks = sampling.token_ranks(torch.tensor([[0.1, 0.4, 0.3], [0.2, 0.2, 0.6]]), torch.tensor([2, 0]))
    assert ranks.tolist() == [2, 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.3, 0.2]))


def test_the_likeliest_token_is_the_first_of_the_largest_also_in_a_graph():
    logits = torch.randn(6, 1000).bfloat16().float()  # with ties
    logits[1, [7, 500, 999]] = 9.0
    logits[2, 999] = 9.0
    logits[3] = -torch.inf
    logits[4, 5:] = -torch.inf
    expected = torch.from_numpy(logits.numpy().argmax(axis=-1))
    for body in (sampling.likeliest, sampling.likeliest_by_loops, torch.compile(sampling.likeliest_by_loops)):
        result = body(logits)
        assert result.dtype == torch.int64 and torch.equal(result, expected)
