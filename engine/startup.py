"""From an `EngineConfig` to a loaded model, its KV tensors and its scheduler, with the memory accounted for."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

import torch

from ..kvcache.budget import (
    KVCacheBudget,
    available_kv_bytes,
    check_model_fit,
    format_bytes,
    sequence_bytes,
    size_kv_cache,
)
from ..kvcache.manager import KVCacheManager
from ..kvcache.spec import KVCacheSpec
from ..kvcache.tensors import allocate_kv_tensors
from ..ops.cpu.huge_pages import ask_for_huge_pages
from ..ops.cpu.malloc import keep_freed_memory
from ..ops.npu import library
from ..scheduler.draft_depth import DraftDepth
from ..scheduler.scheduler import Scheduler, SchedulerConfig
from .build import build_models, cache_spec, load_models, make_drafting
from .config import EngineConfig
from .graphs.startup import GraphShape, start_graphs
from .model_runner import ModelRunner
from .npu.limits import for_npu, most_blocks
from .phases import PhaseTimer
from .pooling.runner import PoolingRunner
from .structured.store import GrammarStore

logger = logging.getLogger(__name__)
GIB = 1 << 30
# On a CPU the cache shares the machine's memory with everything else, so it stays small unless it is asked to grow.
DEFAULT_CPU_KV_BYTES = 4 * GIB
# A cache that holds every row at full length this many times over keeps prefixes enough; small models need no more.
CPU_KV_ROWS = 4
MEMORY_CGROUP = "/sys/fs/cgroup"


@dataclass(frozen=True)
class CoreParts:
    """What an engine core is made of."""

    scheduler: Scheduler
    runner: ModelRunner | PoolingRunner
    max_model_len: int
    num_blocks: int
    gears: list[int] = field(default_factory=list)  # batch sizes of its graphs
    grammars: GrammarStore | None = None  # where tokens are sampled


def load_core_parts(
    config: EngineConfig, timer: PhaseTimer, acceptance_rates: tuple[float, ...] | None = None
) -> CoreParts:
    """Check that it fits, load, allocate. Raises ValueError, with the arithmetic and what to change."""
    device = resolve_device(config.args.device)
    if device.type == "npu":
        config = for_npu(config)
    spec = cache_spec(config)
    if device.type == "cpu":
        ask_for_huge_pages()
        keep_freed_memory()
    max_num_seqs = config.max_num_seqs(device.type)
    weight_bytes = sum(tensor.nbytes for tensor in build_models(config, torch.device("meta")).tensors())
    workspace = workspace_bytes(config, max_num_seqs)
    check_fit(config, spec, device, weight_bytes, workspace)
    timer.done("configuration")
    start = time.monotonic()
    models = load_models(config, device)
    logger.info("weights loaded in %.1f s", time.monotonic() - start)
    timer.done("weights", weight_bytes)
    budget = size_cache(config, spec, device, max_num_seqs, workspace)
    logger.info("memory on %s:\n%s", device, budget.table(weight_bytes, workspace))
    manager = KVCacheManager(
        spec, budget.num_blocks, budget.block_size, enable_prefix_caching=config.args.enable_prefix_caching
    )
    limits = scheduler_config(config, max_num_seqs, budget.max_model_len)
    parts = allocate_kv_tensors(spec, budget.num_blocks, budget.block_size, device)
    grammars = GrammarStore(config.tokenizer_path, config.model.vocab_size, config.model.eos_token_ids)
    runner = ModelRunner(
        models.decoder,
        parts,
        vocab_size=config.model.vocab_size,
        block_size=budget.block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=budget.max_model_len,
        device=device,
        logprobs_mode=config.args.logprobs_mode,
        drafting=make_drafting(config, models.drafter, max_num_seqs, budget.max_model_len, device, acceptance_rates),
        grammars=grammars,
        caches_prefixes=config.args.enable_prefix_caching,
    )
    timer.done("KV cache", budget.kv_bytes)
    shape = GraphShape(budget.num_blocks, max_num_seqs, budget.max_model_len)
    start_graphs(config, models, runner.graphs, shape, acceptance_rates)
    timer.done("graphs")
    depth = None if config.speculation is None else DraftDepth(config.speculation.choice.depths)
    gears = list(runner.graphs.gears)
    return CoreParts(
        Scheduler(limits, manager, depth), runner, budget.max_model_len, budget.num_blocks, gears, grammars
    )


def scheduler_config(config: EngineConfig, max_num_seqs: int, max_model_len: int) -> SchedulerConfig:
    """The limits of an engine whose longest sequence has `max_model_len` tokens."""
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_chunked_prefill=config.args.enable_chunked_prefill,
        long_prefill_token_threshold=config.args.long_prefill_token_threshold,
        max_prefill_share=config.args.max_prefill_share,
        policy=config.args.scheduling_policy,
        max_num_queued_reqs=config.args.max_num_queued_reqs,
        max_num_queued_tokens=config.args.max_num_queued_tokens,
    )


def resolve_device(name: str) -> torch.device:
    """cpu, cuda, cuda:N, npu or npu:N; auto takes cuda or npu where there is one. Of an NPU, its library is loaded."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "npu" if library.is_available() else "cpu"
    if name.partition(":")[0] == "npu":
        return _resolve_npu(name)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N, npu or npu:N: {name}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is not supported yet, only cpu, cuda and npu are: {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch finds no CUDA device here; use --device cpu: {name}")
    return device


def _resolve_npu(name: str) -> torch.device:
    try:
        library.import_torch_npu()
    except ImportError as error:
        raise ValueError(f"{error}; or use --device cpu: {name}") from error
    index = name.removeprefix("npu").removeprefix(":") or "0"
    count = torch.get_device_module("npu").device_count()
    if not index.isdecimal() or int(index) >= count:
        raise ValueError(f"device must be npu or npu:N with N below {count}, the number of NPUs here: {name}")
    device = torch.device("npu", int(index))
    torch.get_device_module("npu").set_device(device)
    library.load(device)
    return device


def workspace_bytes(config: EngineConfig, max_num_seqs: int) -> int:
    """Most bytes a step needs beside weights and cache: float32 logits and noise, and a layer's activations."""
    model = config.model
    tokens = max_num_seqs * (1 if config.speculation is None else 1 + config.speculation.choice.num_drafts)
    logits = 3 * 4 * tokens * model.vocab_size
    width = max(model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim)
    return logits + 4 * 4 * config.max_num_batched_tokens * width


def check_fit(config: EngineConfig, spec: KVCacheSpec, device: torch.device, weight_bytes: int, workspace: int) -> None:
    """ValueError, with the arithmetic, where a sequence does not fit beside weights and workspace (bytes)."""
    check_model_fit(
        spec,
        config.block_size,
        config.block_size if config.max_model_len is None else config.max_model_len,
        weight_bytes=weight_bytes,
        available_bytes=available_bytes(device, config.args.gpu_memory_utilization),
        workspace_bytes=workspace,
        device=str(device),
    )


def available_bytes(device: torch.device, utilization: float) -> int:
    """Bytes this process may still take on `device`; on a CPU, what the kernel and the control group leave."""
    if device.type != "cpu":
        free, total = torch.get_device_module(device).mem_get_info(device)
        return available_kv_bytes(total, total - free, utilization)
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        with open(f"{MEMORY_CGROUP}/memory.max") as limit, open(f"{MEMORY_CGROUP}/memory.current") as current:
            text = limit.read().strip()
            if text != "max":
                available = min(available, int(text) - int(current.read()))
    except (OSError, ValueError):
        pass  # no control group, or an older kind: the kernel's word has to do
    return max(0, available)


def size_cache(
    config: EngineConfig, spec: KVCacheSpec, device: torch.device, max_num_seqs: int, workspace: int
) -> KVCacheBudget:
    """The cache by the caller's number of bytes or blocks, or from the memory that is free with the weights loaded."""
    args = config.args
    longest = config.max_model_len or config.model.derived_max_model_len
    kv_bytes = args.kv_cache_memory_bytes
    free_bytes = available_bytes(device, args.gpu_memory_utilization)
    if kv_bytes is not None and kv_bytes > free_bytes:
        raise ValueError(
            f"kv_cache_memory_bytes is more than the {free_bytes} bytes ({format_bytes(free_bytes)}) that are free on "
            f"{device} with the weights loaded: {kv_bytes}"
        )
    if kv_bytes is None:
        kv_bytes = round_down(max(0, free_bytes - workspace))
        if device.type == "cpu":
            one = sequence_bytes(spec, config.block_size, longest)
            wanted = _cpu_kv_bytes() or max(DEFAULT_CPU_KV_BYTES, one)
            kv_bytes = min(kv_bytes, wanted, CPU_KV_ROWS * max_num_seqs * one)
    if device.type == "npu":
        most = most_blocks(spec, config.block_size)
        if args.num_gpu_blocks_override is not None and args.num_gpu_blocks_override > most:
            raise ValueError(
                f"num_gpu_blocks_override must be at most {most} on an NPU, whose attention takes caches of less than "
                f"2**31 elements: {args.num_gpu_blocks_override}"
            )
        kv_bytes = min(kv_bytes, most * spec.bytes_per_block(config.block_size))
    logger.debug("KV cache budget %s", format_bytes(kv_bytes))
    return size_kv_cache(
        spec,
        config.block_size,
        kv_bytes,
        longest,
        fit_max_model_len=config.max_model_len is None,
        num_blocks=args.num_gpu_blocks_override,
    )


def round_down(num_bytes: int) -> int:
    """At most 1/16 less, so that what is free by chance changes the size of the cache, which compiled graphs depend on,
    in few steps."""
    unit = 1 << max(0, num_bytes.bit_length() - 5)
    return num_bytes // unit * unit


def _cpu_kv_bytes() -> int | None:
    """VLLM_CPU_KVCACHE_SPACE, in GiB, as vLLM's CPU build reads it; 0 or unset: our default."""
    text = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "0")
    try:
        return int(float(text) * GIB) or None
    except ValueError as error:
        raise ValueError(f"VLLM_CPU_KVCACHE_SPACE must be a number of GiB: {text}") from error
