"""Which requests are refused when they come: those that can never run, and those for which the queue is too long."""

from __future__ import annotations

from collections.abc import Container

from ..kvcache.manager import KVCacheManager
from .config import SchedulerConfig
from .queue import WaitingQueue
from .request import RequestInput, length_limit


def reason_to_refuse(
    source: RequestInput, known_ids: Container[str], waiting: WaitingQueue, config: SchedulerConfig, kv: KVCacheManager
) -> tuple[str, str] | None:
    """(error_kind, message) where the request cannot be taken, now or ever. `known_ids`: those in use."""
    num_prompt = len(source.prompt_token_ids)
    if source.request_id in known_ids:
        return "invalid", f"a request with this id is running already; choose another: {source.request_id}"
    if not num_prompt:
        return "invalid", "the prompt must hold at least one token: 0"
    if source.pooling is not None and num_prompt > config.max_model_len:
        return "invalid", (
            f"the model's maximum context length is {config.max_model_len} tokens; shorten the prompt, its number of "
            f"tokens is: {num_prompt}"
        )
    if source.pooling is None and num_prompt >= config.max_model_len:
        return "invalid", (
            f"the model's maximum context length is {config.max_model_len} tokens, output included; "
            f"shorten the prompt, its number of tokens is: {num_prompt}"
        )
    if num_prompt > config.max_num_batched_tokens and not config.enable_chunked_prefill:
        return "invalid", (
            "without chunked prefill a prompt must fit into one step of max_num_batched_tokens="
            f"{config.max_num_batched_tokens}; enable chunked prefill, raise it or shorten the prompt, "
            f"its number of tokens is: {num_prompt}"
        )
    # The KV of the last token is never needed: nothing follows it. Only a prompt that is pooled is computed whole.
    num_blocks = kv.blocks_for(length_limit(source, config.max_model_len) - (source.pooling is None))
    if num_blocks > kv.pool.num_usable:
        return "invalid", (
            f"the KV cache holds {kv.pool.num_usable} blocks of {kv.block_size} tokens; lower max_tokens, shorten "
            f"the prompt or enlarge the cache: {num_prompt} prompt tokens and "
            f"{length_limit(source, config.max_model_len) - num_prompt} output tokens need blocks: {num_blocks}"
        )
    max_requests, max_tokens = config.max_num_queued_reqs, config.max_num_queued_tokens
    if max_requests is not None and len(waiting) >= max_requests:
        return "queue_full", f"too many requests are waiting (max_num_queued_reqs); retry later: {max_requests}"
    if max_tokens is not None and waiting.num_prompt_tokens >= max_tokens:
        return (
            "queue_full",
            f"too many prompt tokens are waiting (max_num_queued_tokens); retry later: {max_tokens}",
        )
    return None
