"""What a decode step becomes on an NPU: lowered by TorchAir on a simulated device, on which nothing is computed."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kvcache.tensors import allocate_kv_tensors
from ...models.parallel import ONE_RANK, ParallelLayout
from ...ops.npu import library
from ...ops.npu.simulator import graphs
from ...ops.npu.simulator.text import graph_text
from ...ops.table import npu_table
from ..build import Models, build_models, cache_spec, make_drafting
from ..config import EngineConfig
from ..graphs.runner import GraphKey, GraphRunner
from ..row_state import RowTable, table_width
from .limits import check_npu, npu_block_size

DEVICE = "npu:0"
NUM_BLOCKS = 16  # a graph does not depend on how many there are but for the caches' first size


@dataclass(frozen=True)
class LoweredStep:
    """The one graph of a gear, and what it is given."""

    key: GraphKey
    graph: graphs.Lowered
    cache_shapes: tuple[tuple[int, ...], ...]  # layer by layer, the drafter's behind the model's
    hidden_size: int
    cache_bytes_per_token: int
    weight_shapes: tuple[tuple[int, ...], ...]  # without tables of angles
    weight_bytes: int
    nodes_per_part: dict[str, int]  # of the work: before the layers, each layer, head and sampling, drafting
    operators: tuple[str, ...]  # that the installed CANN is asked for by name
    optional: tuple[str, ...]  # inputs and attributes of operators that it is asked for
    seconds: float  # of tracing and lowering

    @property
    def text(self) -> str:
        """A line per input and node."""
        return graph_text(self.graph)


def lower_step(config: EngineConfig, key: GraphKey, layout: ParallelLayout = ONE_RANK) -> LoweredStep:
    """Lowers the program of a gear twice with the same buffers, as two steps would call it, for one rank of `layout`,
    whose process groups are there. The weights are memory that nobody has written. Raises ValueError where there is not
    one graph for both, and what tracing raises."""
    check_npu(config)
    device = torch.device(DEVICE)
    library.load(device)
    block_size = npu_block_size(config)
    max_model_len = config.max_model_len or config.model.derived_max_model_len
    models = build_models(config, device, layout)
    models.pack()
    models.bind(npu_table())
    drafting = make_drafting(config, models.drafter, key.num_requests, max_model_len, device, None)
    num_drafts = 0 if drafting is None else drafting.num_drafts
    spec = cache_spec(config, layout)
    caches = allocate_kv_tensors(spec, NUM_BLOCKS, block_size, device)
    table = RowTable(key.num_requests, table_width(max_model_len, num_drafts, block_size), device, num_drafts)
    runner = GraphRunner(models.decoder, table.state, caches, drafting)
    runner.allocate((key.num_requests,))
    program, inputs = runner.program(key), tuple(runner.inputs(key))
    graphs.asked.operators.clear()
    graphs.asked.optional.clear()
    start = time.perf_counter()
    found = graphs.lower_all(program, inputs, inputs, frozen_parameter=True)
    seconds = time.perf_counter() - start
    if len(found) != 1:
        raise ValueError(f"a gear must lower to one graph for all of its steps: {len(found)}")
    parts = [part for cache in caches for part in cache]
    angles = {tuple(models.decoder.rotary.cos.shape)}
    weights = [tensor for tensor in models.tensors() if tuple(tensor.shape) not in angles]
    return LoweredStep(
        key=key,
        graph=found[0],
        cache_shapes=tuple(tuple(part.shape) for part in parts),
        hidden_size=config.model.hidden_size,
        cache_bytes_per_token=sum(part.nbytes for part in parts) // (NUM_BLOCKS * block_size),
        weight_shapes=tuple(tuple(weight.shape) for weight in weights),
        weight_bytes=sum(weight.nbytes for weight in weights),
        nodes_per_part=_nodes_per_part(found[0], models, caches),
        operators=tuple(sorted(graphs.asked.operators)),
        optional=tuple(
            f"{operator}.{name}"
            for operator, *names in sorted(graphs.asked.optional)
            for part in names
            for name in part
        ),
        seconds=seconds,
    )


def _nodes_per_part(graph: graphs.Lowered, models: Models, caches: list[tuple[Tensor, ...]]) -> dict[str, int]:
    """A node belongs to the last part whose weights or caches it depends on; one that depends on constants alone, to
    the first part that uses it."""
    num_layers = len(models.decoder.layers)
    names = ["before the layers", *(f"layer {index}" for index in range(num_layers)), "head and sampling", "drafting"]
    own = {id(tensor) for tensor in (*models.decoder.parameters(), *models.decoder.buffers())}
    part_of = {tensor.data_ptr(): len(names) - 1 for tensor in models.tensors() if id(tensor) not in own}
    for name, tensor in (*models.decoder.named_parameters(), *models.decoder.named_buffers()):
        layer = re.match(r"layers\.(\d+)\.", name)
        part_of[tensor.data_ptr()] = (
            1 + int(layer[1]) if layer else (1 + num_layers) * name.startswith(("norm", "head"))
        )
    for index, cache in enumerate(caches):
        part_of |= {part.data_ptr(): 1 + index if index < num_layers else len(names) - 1 for part in cache}
    found = {name: part_of.get(graph.addresses[one.index], 0) for name, one in graph.inputs.items()}
    producers = {node.name: [source.rsplit(":", 1)[0] for source in node.inputs] for node in graph.nodes}
    for node in graph.nodes:
        parts = [found[name] for name in (node.name, *producers[node.name]) if name in found]
        if parts:
            found[node.name] = max(parts)
    varies = set(found)
    for node in reversed(graph.nodes):
        for name in producers[node.name]:
            if name not in varies and node.name in found:
                found[name] = min(found.get(name, len(names)), found[node.name])
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        counts[names[found.get(node.name, 0)]] += node.type not in graphs.FRAME
    return {name: counts[name] for name in names if counts[name]}
