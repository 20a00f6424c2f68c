"""What torch-npu's operators compute, as plain kernels for the CPU.

Written from the operators' documentation and not from the project's own bodies, so that comparing the two means
something. A kernel is called without the arguments that have their default value, so the defaults are the schemas'. In
float64 where the documentation does not say otherwise, rounded once at the end.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_npu = torch.library.Library("npu", "IMPL", "CPU")
_air = torch.library.Library("air", "IMPL", "CPU")


def cpu(name: str, library: torch.library.Library = _npu) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        library.impl(name, kernel, allow_override=True)
        return kernel

    return register


# --- norms, activations, rope ---


@cpu("npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    wide = x.double()
    reciprocal = 1 / torch.sqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * reciprocal * gamma.double()).to(x.dtype), reciprocal.float()


@cpu("npu_format_cast")
def format_cast(input: Tensor, acl_format: int) -> Tensor:
    """Storage formats have no meaning on a CPU; shape and values stay."""
    return input.clone()


@cpu("npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    y, reciprocal = rms_norm(total, gamma, epsilon)
    return y, reciprocal, total


@cpu("npu_dynamic_quant")
def dynamic_quant(x: Tensor, **unused: Any) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1) / 127
    return torch.round(x.float() / scale.unsqueeze(-1)).to(torch.int8), scale


@cpu("npu_add_rms_norm_dynamic_quant")
def add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6, output_mask: Any = None, **unused: Any
) -> tuple[Tensor, ...]:
    y, _, total = add_rms_norm(x1, x2, gamma, epsilon)
    quantised, scale = dynamic_quant(y)
    return quantised, quantised.new_empty(1), total, scale, scale.new_empty(1)


@cpu("npu_swiglu")
def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    left, right = x.double().chunk(2, dim)
    return (left * torch.sigmoid(left) * right).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


@cpu("npu_rotary_mul")
def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    assert rotary_mode == "half" and rotate is None
    return (x.double() * cos.double() + rotate_half(x.double()) * sin.double()).to(x.dtype)


@cpu("npu_interleave_rope")
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2).reshape(x.shape)
    return rotary_mul(halves, cos, sin)


# --- caches ---


@cpu("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    *,
    cache_mode: str = "PA_NZ",
    **unused: Any,
) -> None:
    assert cache_mode == "Norm"
    block_size = key_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        key_cache[slot // block_size, slot % block_size] = key[token]
        value_cache[slot // block_size, slot % block_size] = value[token]


@cpu("npu_scatter_nd_update_")
def scatter_nd_update(target: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    depth = indices.shape[-1]
    rows = updates.reshape(-1, *target.shape[depth:])
    for row, index in zip(rows, indices.reshape(-1, depth).tolist(), strict=True):
        target[tuple(index)] = row
    return target


@cpu("npu_kv_rmsnorm_rope_cache_v2")
def kv_rmsnorm_rope_cache(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
    epsilon: float = 1e-5, cache_mode: str = "Norm", **unused: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert cache_mode == "PA"
    rank = gamma.shape[0]
    latents = rms_norm(kv[..., :rank], gamma, epsilon)[0].flatten(0, 2)
    keys = interleave_rope(kv[..., rank:], cos, sin).flatten(0, 2)
    scatter_pa_kv_cache(keys.unsqueeze(1), latents.unsqueeze(1), k_cache, ckv_cache, index, cache_mode="Norm")
    return kv.new_empty(1), kv.new_empty(1)


# --- attention ---


def pages(cache: Tensor, block_table: Tensor, request: int, length: int, block_size: int) -> Tensor:
    """The first `length` tokens of a request: [length, the rest of a token]."""
    positions = torch.arange(length)
    blocks = block_table[request, positions // block_size].long()
    return cache[blocks, positions % block_size].double()


def softmax_of_visible(scores: Tensor, hidden: Tensor) -> Tensor:
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.nan_to_num(weights)  # a row that sees nothing


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, actual_seq_kvlen: Any, block_table: Tensor,
    num_query_heads: int = 1, num_key_value_heads: int = 0, softmax_scale: float = 1.0, input_layout: str = "BSH",
    block_size: int = 0, sparse_mode: int = 0,
    atten_mask: Tensor | None = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None, **unused: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert input_layout == "BSND"
    requests, tokens, heads, dim = query.shape
    assert heads == num_query_heads and key.shape[1] == block_size
    if sparse_mode == 3:  # aligned at the bottom right, by a mask of one fixed form
        assert atten_mask is not None and torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    else:
        assert sparse_mode == 0
    output = torch.empty_like(query)
    for request in range(requests):
        length = int(actual_seq_kvlen[request])
        keys = pages(key, block_table, request, length, block_size).view(length, num_key_value_heads, dim)
        values = pages(value, block_table, request, length, block_size).view(length, num_key_value_heads, dim)
        parts = query[request].double()
        if query_rope is not None and key_rope is not None:
            rope = pages(key_rope, block_table, request, length, block_size).view(length, 1, -1)
            keys, parts = torch.cat((keys, rope), -1), torch.cat((parts, query_rope[request].double()), -1)
        hidden = torch.zeros(tokens, length, dtype=torch.bool)
        if sparse_mode == 3:
            hidden = torch.arange(length) > torch.arange(length - tokens, length).unsqueeze(1)
        elif atten_mask is not None:
            hidden = atten_mask[request, 0, :, :length]
        for head in range(heads):
            group = head // (heads // num_key_value_heads)
            scores = parts[:, head] @ keys[:, group].T * softmax_scale
            output[request, :, head] = (softmax_of_visible(scores, hidden) @ values[:, group]).to(query.dtype)
    return output, query.new_zeros(1, dtype=torch.float32)


@cpu("npu_fused_infer_attention_score_v2")
def fused_attention_of_numbers(*tensors: Tensor, actual_seq_kvlen: list[int], **arguments: Any) -> Any:
    assert all(isinstance(length, int) for length in actual_seq_kvlen)
    return fused_attention(*tensors, actual_seq_kvlen=actual_seq_kvlen, **arguments)


@cpu("npu_fused_infer_attention_score_v2", _air)
def fused_attention_of_a_tensor(*tensors: Tensor, actual_seq_kvlen: Tensor, **arguments: Any) -> Any:
    assert actual_seq_kvlen.dtype == torch.int64
    return fused_attention(*tensors, actual_seq_kvlen=actual_seq_kvlen.tolist(), **arguments)


def spans(ends: Tensor) -> list[tuple[int, int]]:
    """Rows of each request, from the running sums that the layout TND wants."""
    bounds = [0, *ends.tolist()]
    return list(itertools.pairwise(bounds))


@cpu("npu_lightning_indexer")
def lightning_indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, actual_seq_lengths_query: Tensor, actual_seq_lengths_key: Tensor,
    block_table: Tensor, layout_query: str, layout_key: str, sparse_count: int = 2048, sparse_mode: int = 3,
    **unused: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert (layout_query, layout_key, sparse_mode) == ("TND", "PA_BSND", 3) and weights.dtype == query.dtype
    selected = torch.full((query.shape[0], 1, sparse_count), -1, dtype=torch.int32)
    for request, (start, end) in enumerate(spans(actual_seq_lengths_query)):
        length = int(actual_seq_lengths_key[request])
        keys = pages(key, block_table, request, length, key.shape[1]).view(length, -1)
        for row in range(start, end):
            visible = length - (end - 1 - row)
            products = torch.relu(query[row].double() @ keys[:visible].T)
            scores = weights[row].double() @ products
            count = min(visible, sparse_count)
            selected[row, 0, :count] = scores.topk(count).indices.to(torch.int32)
    return selected, query.new_empty(0)


@cpu("npu_sparse_flash_attention")
def sparse_flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sparse_indices: Tensor, scale_value: float, *, block_table: Tensor,
    actual_seq_lengths_query: Tensor, actual_seq_lengths_kv: Tensor, query_rope: Tensor, key_rope: Tensor,
    sparse_block_size: int = 1, layout_query: str, layout_kv: str, sparse_mode: int = 3, attention_mode: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert (layout_query, layout_kv, sparse_mode, attention_mode) == ("TND", "PA_BSND", 3, 2)
    assert sparse_block_size == 1 and value.data_ptr() == key.data_ptr()
    output = torch.empty_like(query)
    for request, (start, end) in enumerate(spans(actual_seq_lengths_query)):
        length = int(actual_seq_lengths_kv[request])
        latents = pages(key, block_table, request, length, key.shape[1]).view(length, -1)
        ropes = pages(key_rope, block_table, request, length, key.shape[1]).view(length, -1)
        for row in range(start, end):
            visible = length - (end - 1 - row)
            chosen = [index for index in sparse_indices[row, 0].tolist() if 0 <= index < visible]
            scores = query[row].double() @ latents[chosen].T + query_rope[row].double() @ ropes[chosen].T
            output[row] = ((scores * scale_value).softmax(-1) @ latents[chosen]).to(query.dtype)
    return output, query.new_empty(0), query.new_empty(0)


@cpu("npu_mla_prolog_v3")
def mla_prolog(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor,
    kr_cache: Tensor, *, cache_index: Tensor, rmsnorm_epsilon_cq: float = 1e-5, rmsnorm_epsilon_ckv: float = 1e-5,
    cache_mode: str = "PA_BSND", **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert cache_mode == "PA_BSND"
    tokens, heads, nope = token_x.shape[0], weight_uk.shape[0], weight_uk.shape[1]
    low_rank = rms_norm((token_x.double() @ weight_dq.double()).bfloat16(), rmsnorm_gamma_cq, rmsnorm_epsilon_cq)[0]
    queries = (low_rank.double() @ weight_uq_qr.double()).bfloat16().view(tokens, heads, -1)
    latent = torch.einsum("thd,hdr->thr", queries[..., :nope].double(), weight_uk.double()).bfloat16()
    cos, sin = rope_cos.view(tokens, 1, 1, -1), rope_sin.view(tokens, 1, 1, -1)
    rope = interleave_rope(queries[..., nope:].unsqueeze(2), cos, sin).squeeze(2)
    kv = (token_x.double() @ weight_dkv_kr.double()).bfloat16().view(tokens, 1, 1, -1)
    kv_rmsnorm_rope_cache(
        kv, rmsnorm_gamma_ckv, cos, sin, cache_index, kr_cache, kv_cache, epsilon=rmsnorm_epsilon_ckv, cache_mode="PA"
    )
    empty = token_x.new_empty(1)
    return latent, rope, empty, empty, empty


# --- products ---


@cpu("npu_transpose_batchmatmul")
def transpose_batchmatmul(
    x: Tensor, weight: Tensor, *, perm_x1: Any, perm_x2: Any, perm_y: Any, **unused: Any
) -> Tensor:
    product = x.permute(*perm_x1).double() @ weight.permute(*perm_x2).double()
    return product.permute(*perm_y).contiguous().to(x.dtype)


@cpu("npu_quant_matmul")
def quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor, bias: Tensor | None = None, output_dtype: Any,
    **unused: Any,
) -> Tensor:  # fmt: skip
    result = (x1.long() @ x2.long()).double() * scale.double() * pertoken_scale.double().unsqueeze(1)
    return (result if bias is None else result + bias.double()).to(DTYPES[output_dtype])


# What torch hands to a parameter `int?` for a dtype.
DTYPES = {3: torch.int32, 5: torch.float16, 15: torch.bfloat16}


@cpu("npu_grouped_matmul")
def grouped_matmul(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, split_item: int = 0, group_type: Any = None,
    group_list_type: int = 0, scale: Any = None, per_token_scale: Any = None, output_dtype: Any = None, **unused: Any,
) -> list[Tensor]:  # fmt: skip
    assert (split_item, group_type, group_list_type) == (3, 0, 1)
    (rows,), (matrices,) = x, weight
    dtype = DTYPES.get(output_dtype, rows.dtype)
    output = torch.full((rows.shape[0], matrices.shape[2]), 77, dtype=dtype)  # what is behind the last group is garbage
    start = 0
    for expert, load in enumerate(group_list.tolist()):
        part = slice(start, start + load)
        if rows.dtype == torch.int8:
            product = (rows[part].long() @ matrices[expert].long()).double()
            if scale is not None:
                product = product * scale[0][expert].double() * per_token_scale[0][part].double().unsqueeze(1)
        else:
            product = rows[part].double() @ matrices[expert].double()
        output[part] = product.to(dtype)
        start += load
    return [output]


@cpu("npu_dequant_swiglu_quant")
def dequant_swiglu_quant(
    x: Tensor, *, weight_scale: Tensor, activation_scale: Tensor, group_index: Tensor, activate_left: bool = False,
    quant_mode: int = 0, **unused: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert activate_left and quant_mode == 1
    quantised = torch.full((x.shape[0], x.shape[1] // 2), 77, dtype=torch.int8)
    scales = torch.full((x.shape[0],), math.nan)
    start = 0
    for expert, load in enumerate(group_index.tolist()):
        part = slice(start, start + load)
        wide = x[part].double() * weight_scale[expert].double() * activation_scale[part].double().unsqueeze(1)
        quantised[part], scales[part] = dynamic_quant(swiglu(wide))
        start += load
    return quantised, scales


# --- mixture of experts ---


@cpu("npu_moe_gating_top_k")
def moe_gating_top_k(
    x: Tensor, k: int, *, bias: Tensor | None = None, k_group: int = 1, group_count: int = 1,
    group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0, routed_scaling_factor: float = 1.0,
    eps: float = 1e-20, **unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert renorm == 0
    scores = torch.sigmoid(x.double()) if norm_type == 1 else x.double().softmax(-1)
    choice = scores if bias is None else scores + bias.double()
    if group_count > 1:
        groups = choice.view(x.shape[0], group_count, -1)
        best = groups.sort(-1, descending=True).values
        of_group = best[..., 0] if group_select_mode == 0 else best[..., :2].sum(-1)
        order = of_group.argsort(dim=-1, descending=True, stable=True)
        choice = groups.clone()
        for row in range(x.shape[0]):
            choice[row, order[row, k_group:]] = -math.inf
        choice = choice.view(x.shape)
    chosen = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
    weights = scores.gather(1, chosen)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), chosen.to(torch.int32), scores.float()


@cpu("npu_moe_init_routing_v2")
def moe_init_routing(
    x: Tensor, expert_idx: Tensor, *, expert_num: int, expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False, quant_mode: int = -1, active_expert_range: list[int], row_idx_type: int = 0,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (expert_tokens_num_type, expert_tokens_num_flag, row_idx_type) == (1, True, 0)
    assert active_expert_range == [0, expert_num]
    chosen = expert_idx.flatten()
    order = chosen.argsort(stable=True)
    row_of = torch.empty_like(chosen)
    row_of[order] = torch.arange(len(order), dtype=torch.int32)
    rows, scales = x[order // expert_idx.shape[1]], torch.full((len(order),), math.nan)
    if quant_mode == 1:
        rows, scales = dynamic_quant(rows)
    return rows, row_of, torch.bincount(chosen, minlength=expert_num), scales


@cpu("npu_moe_finalize_routing")
def moe_finalize_routing(
    rows: Tensor, skip1: None, skip2: None, bias: None, scales: Tensor, row_of: Tensor, expert_of: None,
    drop_pad_mode: int = 0, k: int = 1,
) -> Tensor:  # fmt: skip
    assert drop_pad_mode == 2 and scales.dtype == rows.dtype
    tokens, chosen = scales.shape
    of_token = rows[row_of.long()].view(tokens, chosen, -1)
    return (of_token.double() * scales.double().unsqueeze(-1)).sum(1).to(rows.dtype)


class World:
    """Ranks as threads of one process: `exchange` returns what every rank has brought, when all have."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size)
        self._brought: list[Any] = [None] * size

    def exchange(self, rank: int, brought: Any) -> list[Any]:
        self._brought[rank] = brought
        self._barrier.wait(timeout=60)
        everything = list(self._brought)
        self._barrier.wait(timeout=60)
        return everything


worlds: dict[str, World] = {}  # by the name of their communicator


@cpu("npu_moe_distribute_dispatch_v2")
def moe_distribute_dispatch(
    x: Tensor, expert_ids: Tensor, group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, *,
    x_active_mask: Tensor | None = None, quant_mode: int = 0, **unused: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, chosen = expert_ids.shape
    local = moe_expert_num // ep_world_size
    capacity = tokens * ep_world_size * min(local, chosen)
    live = torch.ones(tokens, dtype=torch.bool) if x_active_mask is None else x_active_mask
    assert torch.equal(live, live.sort(descending=True).values), "those that take part come first"
    everyone = worlds[group_ep].exchange(ep_rank_id, (x, expert_ids, live))
    sources = [
        (expert, rank, token, choice)
        for rank, (_, ids, mask) in enumerate(everyone)
        for token in range(tokens) if mask[token]
        for choice, expert in enumerate(ids[token].tolist()) if expert // local == ep_rank_id
    ]  # fmt: skip
    sources.sort()
    rows, scales = torch.full((capacity, x.shape[1]), 77, dtype=x.dtype), torch.full((capacity,), math.nan)
    for row, (_, rank, token, _) in enumerate(sources):
        rows[row] = everyone[rank][0][token]
    if quant_mode == 2:
        rows, scales = dynamic_quant(rows)
    assist = torch.zeros(capacity, 128, dtype=torch.int32)
    assist[: len(sources), :4] = torch.tensor(sources, dtype=torch.int32).view(-1, 4)
    assist[0, 127] = len(sources)
    loads = torch.bincount(torch.tensor([source[0] - ep_rank_id * local for source in sources]), minlength=local)
    counts, none = torch.zeros(ep_world_size * local, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return rows, scales, assist.flatten(), loads, counts, none, scales.new_empty(0)


@cpu("npu_moe_distribute_combine_v2")
def moe_distribute_combine(
    expand_x: Tensor, expert_ids: Tensor, assist_info: Tensor, ep_send_counts: Tensor, expert_scales: Tensor,
    group_ep: str, ep_world_size: int, ep_rank_id: int, moe_expert_num: int, **unused: Any,
) -> Tensor:  # fmt: skip
    assist = assist_info.view(-1, 128)
    sources = assist[: int(assist[0, 127]), :4].tolist()
    everyone = worlds[group_ep].exchange(ep_rank_id, (sources, expand_x))
    output = torch.zeros(expert_ids.shape[0], expand_x.shape[1], dtype=torch.float64)
    for their_sources, their_rows in everyone:
        for row, (_, rank, token, choice) in enumerate(their_sources):
            if rank == ep_rank_id:
                output[token] += their_rows[row].double() * expert_scales[token, choice].double()
    return output.to(expand_x.dtype)
