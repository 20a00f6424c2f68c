"""How an engine that starts gets its graphs: what they depend on, and the backend that makes them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import platform
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from ...kvcache.tensors import allocate_kv_tensors
from ...models.parallel import ParallelLayout
from ...ops.cache_folder import cache_root
from ...ops.cpu.build import KernelsUnavailable, chosen_form, cpu_features, is_built, load_kernels
from ...ops.npu import library
from ...ops.table import OpTable, cpu_table, cuda_table, npu_table
from ..build import Models, build_models, cache_spec, make_drafting
from ..config import EngineConfig
from ..npu.graphs import NpugraphExGraphs, TorchairGraphs
from ..npu.limits import check_lengths_known
from ..row_state import RowTable, table_width
from ..speculation.config import Speculation
from .cache import GraphCache, GraphCacheError
from .config import NPU_BACKENDS, GraphChoice, GraphConfig, choose_graphs, resolve_graphs
from .key import CacheKey, GraphShape, installed_versions
from .runner import CudaGraphs, EagerGraphs, GraphRunner
from .supply import GraphError, InductorGraphs, SupplyPlan
from .worker import WorkerJob

logger = logging.getLogger(__name__)


def start_graphs(
    config: EngineConfig,
    models: Models,
    graphs: GraphRunner,
    shape: GraphShape,
    acceptance_rates: tuple[float, ...] | None = None,
) -> None:
    """Bind the ops of the device and begin to make the graphs. Raises GraphError where they are required and cannot be
    made; else what is missing is logged, and steps run eager."""
    device = graphs.state.position.device
    if device.type == "cpu":
        graphs.kernels = bind_kernels(models.bind)
    elif device.type == "cuda":
        models.bind(cuda_table())
    choice = choose_graphs(config.args)
    chosen = resolve_graphs(choice, device.type, shape.max_num_seqs)
    if device.type == "npu":
        models.bind(npu_table(with_hints=chosen.backend == TorchairGraphs.name))
    if not chosen.gears:
        return
    if chosen.backend == "eager":
        graphs.use(EagerGraphs(), chosen.gears)
    elif chosen.backend == "cudagraph":
        graphs.use(CudaGraphs(), chosen.gears)
    elif chosen.backend in NPU_BACKENDS:
        graphs.use(_npu_graphs(config, shape, choice, chosen, acceptance_rates), chosen.gears)
    else:
        try:
            cache = GraphCache(choice.cache_dir)
            plan = _supply_plan(config, shape, cache, acceptance_rates)
            backend = InductorGraphs(plan, cache, required=chosen.required)
        except (GraphCacheError, KernelsUnavailable, OSError) as error:
            if chosen.required:
                raise GraphError(f"the graphs that are required cannot be made: {error}") from error
            logger.warning("there will be no compiled graphs, steps run eager: %s", error)
            return
        graphs.use(backend, chosen.gears)


def _npu_graphs(
    config: EngineConfig,
    shape: GraphShape,
    choice: GraphChoice,
    chosen: GraphConfig,
    acceptance_rates: tuple[float, ...] | None,
) -> TorchairGraphs | NpugraphExGraphs:
    """Raises ValueError where a backend cannot hold the model's steps."""
    if chosen.backend == NpugraphExGraphs.name:
        check_lengths_known(config)
        return NpugraphExGraphs(chosen.required)
    fields = {**key_fields(config, shape, TorchairGraphs.name, acceptance_rates), **library.versions()}
    return TorchairGraphs(
        cache_root() if choice.cache_dir is None else choice.cache_dir,
        lambda key: CacheKey({**fields, **key._asdict()}),
        chosen.required,
    )


def build_kernels() -> None:
    """Build the C++ kernels now if there are none yet, so that an engine that is loaded next has them at once."""
    with contextlib.suppress(KernelsUnavailable):  # whose engines say so
        cpu_table()


def bind_kernels(bind_table: Callable[[OpTable], None]) -> threading.Thread | None:
    """Let layers call the C++ kernels: at once if they are built, else when the thread that is returned has built
    them."""

    def bind() -> None:
        try:
            load_kernels(low_priority=True)  # a start and its first requests go before
            bind_table(cpu_table())
        except KernelsUnavailable as error:
            logger.warning("the plain torch operators are used: %s", error)

    if is_built():
        bind()
        return None
    thread = threading.Thread(target=bind, name="kernels", daemon=True)
    thread.start()
    return thread


def _supply_plan(
    config: EngineConfig, shape: GraphShape, cache: GraphCache, acceptance_rates: tuple[float, ...] | None
) -> SupplyPlan:
    num_threads = torch.get_num_threads()
    fields = {
        **key_fields(config, shape, InductorGraphs.name, acceptance_rates),
        "num_threads": num_threads,
        "machine": platform.machine(),
        "cpu": _digest(sorted(cpu_features())),
        "kernels": chosen_form(),
    }
    job = WorkerJob(dataclasses.asdict(config.args), shape, num_threads, str(cache.root), acceptance_rates)
    return SupplyPlan(job, fields)


def key_fields(
    config: EngineConfig, shape: GraphShape, backend: str, acceptance_rates: tuple[float, ...] | None
) -> dict[str, Any]:
    """What a graph depends on, on every device."""
    speculation = config.speculation
    return {
        **installed_versions(),
        "backend": backend,
        "model": config.model.architecture,
        "config": _digest(config.model),
        "dtype": config.dtype,
        "layout": dataclasses.asdict(ParallelLayout()),
        "draft_depth": 0 if speculation is None else speculation.choice.num_drafts,
        "speculation": _speculation_field(speculation, acceptance_rates),
        "block_size": config.block_size,
        **dataclasses.asdict(shape),
    }


def _speculation_field(speculation: Speculation | None, acceptance_rates: tuple[float, ...] | None) -> str:
    """What graphs with drafts depend on; the number of drafts to be verified is in each graph's own key."""
    if speculation is None:
        return "none"
    choice = speculation.choice
    details = [choice.min_n, choice.max_n, speculation.draft_model, acceptance_rates, choice.remembers]
    return f"{choice.method} {_digest(details)}"


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]


def build_graph_shell(
    config: EngineConfig, shape: GraphShape, acceptance_rates: tuple[float, ...] | None = None
) -> GraphRunner:
    """The programs of an engine with its shapes and none of its contents, to compile graphs from.

    The memory of weights and caches is only reserved: nobody writes to it, so it takes none.
    """
    device = torch.device("cpu")
    models = build_models(config, device)
    models.bind(cpu_table())
    drafting = make_drafting(config, models.drafter, shape.max_num_seqs, shape.max_model_len, device, acceptance_rates)
    num_drafts = 0 if drafting is None else drafting.num_drafts
    table = RowTable(
        shape.max_num_seqs, table_width(shape.max_model_len, num_drafts, config.block_size), device, num_drafts
    )
    caches = allocate_kv_tensors(cache_spec(config), shape.num_blocks, config.block_size, device)
    runner = GraphRunner(models.decoder, table.state, caches, drafting)
    runner.allocate((shape.max_num_seqs,))
    return runner
