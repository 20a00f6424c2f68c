"""How many KV blocks fit into the memory there is: the arithmetic, its refusals and the table that is printed."""

from __future__ import annotations

from dataclasses import dataclass

from .spec import KVCacheSpec


@dataclass(frozen=True)
class KVCacheBudget:
    """The size of a KV cache. `num_blocks` counts the null block, which holds no tokens."""

    num_blocks: int
    block_size: int  # tokens
    bytes_per_block: int
    max_model_len: int  # tokens of the longest sequence, prompt and output together

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def num_tokens(self) -> int:
        """Tokens that have room in the cache."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def max_concurrency(self) -> float:
        """How many sequences of max_model_len fit side by side."""
        return (self.num_blocks - 1) / blocks_for(self.max_model_len, self.block_size)

    def table(self, weight_bytes: int, other_bytes: int = 0) -> str:
        """Where the memory goes, one line each: what is printed at start. `other_bytes`: workspace, graphs."""
        rows = [("weights", format_bytes(weight_bytes), "")]
        if other_bytes:
            rows.append(("workspace", format_bytes(other_bytes), ""))
        rows += [
            ("KV cache", format_bytes(self.kv_bytes), f"{format_bytes(self.bytes_per_block)} per block"),
            ("KV blocks", f"{self.num_blocks:,}", f"of {self.block_size} tokens, one of them the null block"),
            ("KV tokens", f"{self.num_tokens:,}", ""),
            ("concurrency", f"{self.max_concurrency:.2f}x", f"at {self.max_model_len:,} tokens per request"),
        ]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {note}".rstrip() for name, size, note in rows)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def sequence_bytes(spec: KVCacheSpec, block_size: int, num_tokens: int) -> int:
    """Bytes of a cache that holds one sequence of `num_tokens`: its blocks and the null block."""
    return (blocks_for(num_tokens, block_size) + 1) * spec.bytes_per_block(block_size)


def available_kv_bytes(total_bytes: int, used_bytes: int, utilization: float, workspace_bytes: int = 0) -> int:
    """Bytes left for the cache on a device: total * utilization - used - workspace; 0 where nothing is left.

    `used_bytes` is what the device has in use, by whomever, with the weights loaded; `workspace_bytes` is what a step
    and the graphs will need on top.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu_memory_utilization must be in (0, 1]: {utilization}")
    return max(0, int(total_bytes * utilization) - used_bytes - workspace_bytes)


def longest_sequence(spec: KVCacheSpec, block_size: int, kv_bytes: int) -> int:
    """Tokens of the longest sequence that a cache of `kv_bytes` holds."""
    return max(0, kv_bytes // spec.bytes_per_block(block_size) - 1) * block_size


def size_kv_cache(
    spec: KVCacheSpec,
    block_size: int,
    kv_bytes: int,
    max_model_len: int,
    *,
    fit_max_model_len: bool = False,
    num_blocks: int | None = None,
) -> KVCacheBudget:
    """The cache for `kv_bytes`, or of exactly `num_blocks` (the null block included) where that is given.

    With `fit_max_model_len` ("auto") `max_model_len` is an upper limit and is lowered to what fits. Otherwise
    ValueError, with the arithmetic, where not one sequence of `max_model_len` fits.
    """
    bytes_per_block = spec.bytes_per_block(block_size)
    if num_blocks is None:
        num_blocks = kv_bytes // bytes_per_block
        remedy = "raise kv_cache_memory_bytes (or gpu_memory_utilization; on a CPU VLLM_CPU_KVCACHE_SPACE)"
    else:
        kv_bytes = num_blocks * bytes_per_block
        remedy = "raise num_gpu_blocks_override"
    longest = longest_sequence(spec, block_size, kv_bytes)
    if longest < 1:
        raise ValueError(
            f"The KV cache needs at least 2 blocks of {block_size} tokens, {format_bytes(2 * bytes_per_block)}: "
            f"{remedy}. Available: {format_bytes(kv_bytes)}"
        )
    if fit_max_model_len:
        max_model_len = min(max_model_len, longest)
    if max_model_len > longest:
        blocks = blocks_for(max_model_len, block_size)
        needed = sequence_bytes(spec, block_size, max_model_len)
        raise ValueError(
            f"To serve at least one request with the model's max seq len ({max_model_len}), {format_bytes(needed)} KV "
            f"cache is needed ({blocks} blocks of {block_size} tokens and the null block, {bytes_per_block} bytes "
            f"each), which is larger than the available KV cache memory ({format_bytes(kv_bytes)}). "
            f"Either {remedy}, or lower max_model_len. The estimated maximum model length is: {longest}"
        )
    return KVCacheBudget(num_blocks, block_size, bytes_per_block, max_model_len)


@dataclass(frozen=True)
class ModelFit:
    """What a model needs before it is loaded, against the memory there is. All in bytes."""

    weight_bytes: int
    workspace_bytes: int
    min_kv_bytes: int  # one sequence and the null block
    available_bytes: int

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.workspace_bytes + self.min_kv_bytes


def check_model_fit(
    spec: KVCacheSpec,
    block_size: int,
    max_model_len: int,
    *,
    weight_bytes: int,
    available_bytes: int,
    workspace_bytes: int = 0,
    device: str = "cpu",
) -> ModelFit:
    """Refuse a model before anything is loaded: ValueError unless its weights, a step's workspace and the KV of one
    sequence of `max_model_len` fit into `available_bytes`. For a length yet to be fitted ("auto"), pass block_size."""
    fit = ModelFit(weight_bytes, workspace_bytes, sequence_bytes(spec, block_size, max_model_len), available_bytes)
    if fit.needed_bytes <= available_bytes:
        return fit
    sums = (
        f"{format_bytes(weight_bytes)} weights + {format_bytes(workspace_bytes)} workspace + "
        f"{format_bytes(fit.min_kv_bytes)} KV cache for one request of {max_model_len} tokens = "
        f"{format_bytes(fit.needed_bytes)}"
    )
    room = available_bytes - weight_bytes - workspace_bytes
    longest = longest_sequence(spec, block_size, room)
    if longest:
        remedy = f"lower max_model_len (at most {longest} tokens fit)"
    else:
        remedy = "use a smaller model, a narrower dtype, or a device with more memory"
    raise ValueError(
        f"The model does not fit on {device}: {sums}. Free memory there, or {remedy}. "
        f"Available: {format_bytes(available_bytes)}"
    )


def format_bytes(num_bytes: int) -> str:
    """Binary units, e.g. 1.50 GiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
