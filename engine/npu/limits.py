"""What the NPU's operators demand of an engine's sizes, refused before anything is loaded; torch-free.

The ranges are documented with the operators, see `ops.npu`: fused attention for all but the sparse layers.
"""

from __future__ import annotations

from dataclasses import replace

from ...kvcache.spec import KVCacheSpec
from ..config import EngineConfig

MOST_ELEMENTS = 2**31 - 1  # of a cache tensor: offsets are computed in 32 bits
DEFAULT_BLOCK_SIZE = 128  # what every attention operator takes, with one token per request and with more
LATENT_BLOCK_SIZES = (16, 128)
LARGEST_BLOCK_SIZE = 512
MOST_TOKENS = 16  # of a request in one step, its drafts included


def npu_block_size(config: EngineConfig) -> int:
    """Tokens per block of the KV cache: what was asked for, or 128. Raises ValueError with what to change."""
    wanted = config.args.block_size or DEFAULT_BLOCK_SIZE
    draft_model = None if config.speculation is None else config.speculation.draft_model
    if any(model is not None and model.mla is not None for model in (config.model, draft_model)):
        if wanted not in LATENT_BLOCK_SIZES:
            raise ValueError(
                f"block_size must be 16 or 128 on an NPU, as latent attention (MLA) takes no other; use 128: {wanted}"
            )
        return wanted
    unit = 16 if config.speculation is None else 128
    if wanted % unit or wanted > LARGEST_BLOCK_SIZE:
        drafts = "" if config.speculation is None else " with speculation"
        raise ValueError(
            f"block_size must be a multiple of {unit} up to {LARGEST_BLOCK_SIZE} on an NPU{drafts}; use 128: {wanted}"
        )
    return wanted


def check_npu(config: EngineConfig) -> None:
    """Refuse what the operators do not take. Raises ValueError with what to change."""
    npu_block_size(config)
    if config.dtype == "float32":
        raise ValueError(f"dtype must be bfloat16 or float16 on an NPU, whose attention takes no other: {config.dtype}")
    tokens = 1 if config.speculation is None else 1 + config.speculation.choice.num_drafts
    if tokens > MOST_TOKENS:
        raise ValueError(
            f"num_speculative_tokens must be at most {MOST_TOKENS - 1} on an NPU, whose attention takes {MOST_TOKENS} "
            f"tokens per request: {tokens - 1}"
        )


def check_lengths_known(config: EngineConfig) -> None:
    """Refuse what `npugraph_ex` cannot hold, as the host must tell it every length before a replay. Raises ValueError
    with what to change."""
    if any(window is not None for window in config.model.sliding_windows):
        raise ValueError(
            "graph_backend npugraph_ex has no sliding windows, whose mask depends on lengths; use torchair for: "
            f"{config.model.architecture}"
        )
    choice = None if config.speculation is None else config.speculation.choice
    if choice is not None and (choice.method == "draft_model" or (choice.method == "mtp" and choice.num_drafts > 1)):
        raise ValueError(
            "graph_backend npugraph_ex drafts one token with method mtp, or any with ngram, as the lengths of deeper "
            f"drafts are known on the device only; use torchair for: {choice.method} with {choice.num_drafts}"
        )


def for_npu(config: EngineConfig) -> EngineConfig:
    """The configuration with the block size that it has on an NPU. Raises ValueError with what to change."""
    check_npu(config)
    return replace(config, args=replace(config.args, block_size=npu_block_size(config)))


def most_blocks(spec: KVCacheSpec, block_size: int) -> int:
    """The largest number of blocks with which every cache tensor stays under 2**31 elements."""
    parts = (part for group in spec.groups for part in group.parts)
    return min(MOST_ELEMENTS // (block_size * part.heads * part.dim) for part in parts)
