"""Latent attention, absorbed and expanded, against the dense formula."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from omni_engine.ops.mla import mla_decode_attention, mla_prefill_attention, write_latent_cache
from omni_engine.ops.norm import rms_norm
from omni_engine.ops.rope import rotate

BLOCK_SIZE, HEADS, RANK, NOPE, ROPE, VALUE = 4, 3, 10, 6, 4, 5
CONTEXT_LENS = (5, 1, 11)
SCALE = 0.4


@dataclass
class Setup:
    up_projection: Tensor  # [heads, nope + value, rank]
    latent_cache: Tensor
    rope_cache: Tensor
    table: Tensor
    latents: list[Tensor]  # per request [tokens, rank], normalised
    rope_keys: list[Tensor]  # per request [tokens, rope], rotated


def write_contexts() -> Setup:
    generator = torch.Generator().manual_seed(5)
    counts = [-(-length // BLOCK_SIZE) for length in CONTEXT_LENS]
    blocks = (torch.randperm(sum(counts), generator=generator) + 1).split(counts)
    setup = Setup(
        up_projection=torch.randn(HEADS, NOPE + VALUE, RANK, generator=generator),
        latent_cache=torch.full((sum(counts) + 1, BLOCK_SIZE, 1, RANK), 1e4),
        rope_cache=torch.full((sum(counts) + 1, BLOCK_SIZE, 1, ROPE), 1e4),
        table=torch.zeros(len(CONTEXT_LENS), max(counts), dtype=torch.int32),
        latents=[],
        rope_keys=[],
    )
    weight = torch.rand(RANK, generator=generator) + 0.5
    for row, (ids, length) in enumerate(zip(blocks, CONTEXT_LENS, strict=True)):
        setup.table[row, : len(ids)] = ids
        positions = torch.arange(length)
        slots = ids[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        joined = torch.randn(length, RANK + ROPE, generator=generator)
        angles = positions.unsqueeze(1) * torch.tensor([1.0, 0.1])
        cos, sin = angles.cos(), angles.sin()
        write_latent_cache(joined, weight, 1e-6, cos, sin, True, setup.latent_cache, setup.rope_cache, slots)
        setup.latents.append(rms_norm(joined[:, :RANK], weight, 1e-6))
        setup.rope_keys.append(rotate(joined[:, None, RANK:], cos, sin, True)[:, 0])
    return setup


def dense_attention(setup: Setup, row: int, query_nope: Tensor, query_rope: Tensor) -> Tensor:
    """Keys and values of every head rebuilt from the latents; the queries are the last tokens of the context."""
    latents, rope_keys = setup.latents[row], setup.rope_keys[row]
    expanded = torch.einsum("tl,hrl->thr", latents, setup.up_projection)
    keys = torch.cat((expanded[..., :NOPE], rope_keys[:, None].expand(-1, HEADS, -1)), dim=-1)
    scores = torch.einsum("qhd,thd->hqt", torch.cat((query_nope, query_rope), dim=-1), keys) * SCALE
    chunk, context = len(query_nope), len(latents)
    future = torch.arange(context) > torch.arange(context - chunk, context).unsqueeze(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thv->qhv", weights, expanded[..., NOPE:])


def absorbed(setup: Setup, query_nope: Tensor, query_rope: Tensor) -> Tensor:
    key_up, value_up = setup.up_projection.split((NOPE, VALUE), dim=1)
    lens = torch.tensor(CONTEXT_LENS, dtype=torch.int32)
    attended = mla_decode_attention(
        torch.einsum("rhn,hnl->rhl", query_nope, key_up),
        query_rope,
        setup.latent_cache,
        setup.rope_cache,
        setup.table,
        lens,
        SCALE,
    )
    return torch.einsum("rhl,hvl->rhv", attended, value_up)


def test_absorbed_decode_equals_the_dense_formula() -> None:
    setup = write_contexts()
    query_nope, query_rope = torch.randn(3, HEADS, NOPE), torch.randn(3, HEADS, ROPE)
    output = absorbed(setup, query_nope, query_rope)
    for row in range(3):
        expected = dense_attention(setup, row, query_nope[row : row + 1], query_rope[row : row + 1])
        torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-4, atol=1e-5)


def test_expanded_prefill_equals_the_dense_formula() -> None:
    setup = write_contexts()
    query_lens = (5, 1, 4)
    query_nope, query_rope = torch.randn(10, HEADS, NOPE), torch.randn(10, HEADS, ROPE)
    output = mla_prefill_attention(
        query_nope,
        query_rope,
        setup.up_projection,
        setup.latent_cache,
        setup.rope_cache,
        setup.table,
        query_lens,
        CONTEXT_LENS,
        SCALE,
    )
    chunks = zip(output.split(query_lens), query_nope.split(query_lens), query_rope.split(query_lens), strict=True)
    for row, (part, nope, rope) in enumerate(chunks):
        torch.testing.assert_close(part, dense_attention(setup, row, nope, rope), rtol=1e-4, atol=1e-5)


def test_absorbed_decode_equals_expanded_prefill() -> None:
    setup = write_contexts()
    query_nope, query_rope = torch.randn(3, HEADS, NOPE), torch.randn(3, HEADS, ROPE)
    caches = (setup.latent_cache, setup.rope_cache, setup.table)
    expanded = mla_prefill_attention(
        query_nope, query_rope, setup.up_projection, *caches, (1, 1, 1), CONTEXT_LENS, SCALE
    )
    torch.testing.assert_close(absorbed(setup, query_nope, query_rope), expanded, rtol=1e-4, atol=1e-5)


def test_the_rope_key_counts() -> None:
    setup = write_contexts()
    query_nope, query_rope = torch.randn(3, HEADS, NOPE), torch.randn(3, HEADS, ROPE)
    right = absorbed(setup, query_nope, query_rope)
    setup.rope_cache.zero_()
    assert (right - absorbed(setup, query_nope, query_rope)).abs().max() > 1e-2
