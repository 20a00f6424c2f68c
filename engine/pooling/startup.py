"""From an `EngineConfig` to a loaded pooling model and its scheduler."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch
from torch import nn

from ...kvcache.budget import KVCacheBudget, format_bytes
from ...kvcache.manager import KVCacheManager
from ...kvcache.tensors import TORCH_DTYPES, allocate_kv_tensors
from ...models.checkpoint import Checkpoint, read_tensor_headers
from ...models.dummy_weights import initialise_dummy_weights
from ...models.kv_spec import kv_cache_spec
from ...models.parallel import ParallelLayout
from ...models.pooling import DenseWeights, PoolingModel
from ...models.weights import load_weights
from ...ops.cpu.huge_pages import ask_for_huge_pages
from ...ops.cpu.malloc import keep_freed_memory
from ...ops.table import OpTable, cuda_table
from ...scheduler.scheduler import Scheduler
from ..config import EngineConfig
from ..graphs.startup import bind_kernels
from ..phases import PhaseTimer
from ..startup import (
    CoreParts,
    available_bytes,
    check_fit,
    resolve_device,
    scheduler_config,
    size_cache,
    workspace_bytes,
)
from .runner import PoolingRunner

logger = logging.getLogger(__name__)


def load_pooling_parts(config: EngineConfig, timer: PhaseTimer) -> CoreParts:
    """Check that it fits, load, allocate. Raises ValueError, with the arithmetic and what to change."""
    device = resolve_device(config.args.device)
    if device.type == "npu":
        raise ValueError(f"pooling does not run on an NPU yet; use --device cpu: {device}")
    if device.type == "cpu":
        ask_for_huge_pages()
        keep_freed_memory()
    max_num_seqs = config.max_num_seqs(device.type)
    shell = build_pooling_model(config, torch.device("meta"))
    weight_bytes = sum(tensor.nbytes for tensor in (*shell.parameters(), *shell.buffers()))
    workspace = workspace_bytes(config, max_num_seqs)
    caches_nothing = config.model.encoder is not None
    spec = kv_cache_spec(config.model, ParallelLayout(), config.dtype)
    if caches_nothing:
        _check_encoder_fits(weight_bytes + workspace, device, config.args.gpu_memory_utilization)
    else:
        check_fit(config, spec, device, weight_bytes, workspace)
    timer.done("configuration")
    start = time.monotonic()
    model = build_pooling_model(config, device)
    _fill(model, config)
    logger.info("weights loaded in %.1f s", time.monotonic() - start)
    timer.done("weights", weight_bytes)
    if caches_nothing:
        # A block is a place for one prompt, however long, and no memory stands behind it.
        length = config.max_model_len or config.model.derived_max_model_len
        budget = KVCacheBudget(max_num_seqs + 1, length, 0, length)
        manager = KVCacheManager(None, budget.num_blocks, length, enable_prefix_caching=False)
    else:
        budget = size_cache(config, spec, device, max_num_seqs, workspace)
        manager = KVCacheManager(
            spec, budget.num_blocks, budget.block_size, enable_prefix_caching=config.args.enable_prefix_caching
        )
        logger.info("memory on %s:\n%s", device, budget.table(weight_bytes, workspace))
    limits = scheduler_config(config, max_num_seqs, budget.max_model_len)
    if caches_nothing:
        if limits.max_num_batched_tokens < budget.max_model_len:
            raise ValueError(
                f"an encoder computes a prompt in one step: max_num_batched_tokens must be at least max_model_len, "
                f"{budget.max_model_len}: {limits.max_num_batched_tokens}"
            )
        limits = replace(limits, enable_chunked_prefill=False, long_prefill_token_threshold=0)
    kernels = bind_kernels(lambda table: _bind(model, table)) if device.type == "cpu" else None
    if device.type == "cuda":
        _bind(model, cuda_table())
    runner = PoolingRunner(
        model,
        [] if caches_nothing else allocate_kv_tensors(spec, budget.num_blocks, budget.block_size, device),
        block_size=budget.block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=budget.max_model_len,
        device=device,
        kernels=kernels,
    )
    timer.done("KV cache", budget.kv_bytes)
    return CoreParts(Scheduler(limits, manager), runner, budget.max_model_len, budget.num_blocks)


def build_pooling_model(config: EngineConfig, device: torch.device) -> PoolingModel:
    """The modules, their memory allocated and not filled."""
    assert config.pooling is not None
    model = PoolingModel(
        config.model,
        config.pooling,
        ParallelLayout(),
        dtype=TORCH_DTYPES[config.dtype],
        device=device,
        stored_names=config.checkpoint.tensors,
    )
    return model.eval()


def _fill(model: PoolingModel, config: EngineConfig) -> None:
    assert config.pooling is not None
    layers: list[tuple[nn.Module | DenseWeights, Checkpoint]] = [(model, config.checkpoint)]
    for index, dense in enumerate(config.pooling.dense):
        folder = config.checkpoint.path / dense.folder
        tensors = {} if config.args.load_format == "dummy" else read_tensor_headers(folder)
        layers.append((DenseWeights(model, index), Checkpoint(folder, {}, tensors=tensors)))
    for module, checkpoint in layers:
        if config.args.load_format == "dummy":
            initialise_dummy_weights(module, config.args.seed)  # type: ignore[arg-type]
        else:
            load_weights(module, checkpoint, config=config.model)  # type: ignore[arg-type]


def _bind(model: PoolingModel, table: OpTable) -> None:
    model.ops.table = table


def _check_encoder_fits(needed: int, device: torch.device, utilization: float) -> None:
    available = available_bytes(device, utilization)
    if needed > available:
        raise ValueError(
            f"The model does not fit on {device}: weights and workspace need {format_bytes(needed)}. Free memory "
            f"there, or use a smaller model. Available: {format_bytes(available)}"
        )
