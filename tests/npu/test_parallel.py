"""Decode steps of one rank of many, lowered with fake process groups: which collectives there are, of which groups."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.graphs.runner import GraphKey
from omni_engine.models.expert_placement import ExpertPlacement
from omni_engine.models.parallel import ParallelLayout
from omni_engine.ops import comm, moe
from omni_engine.ops.npu import dispatch
from omni_engine.ops.rank_group import RankGroup

PUBLISHED = Path(__file__).parents[1] / "models" / "test_config_parser.py"
DENSE, ROUTED = 1, 2  # layers of each kind
RANK = 3
COMMUNICATOR = "experts of all ranks"
COLLECTIVES = (
    "HcomAllReduce", "HcomAllGather", "HcomReduceScatter", "MoeDistributeDispatchV2", "MoeDistributeCombineV2",
)  # fmt: skip


def with_groups(world_size: int) -> Iterator[None]:
    """Process groups whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def eight() -> Iterator[None]:
    yield from with_groups(8)


@pytest.fixture
def sixty_four() -> Iterator[None]:
    yield from with_groups(64)


def group_name(ranks: range) -> str:
    group: Any = dist.new_group(list(ranks))
    return group.group_name


def config_of(folder: Path, name: str = "DEEPSEEK_V3") -> EngineConfig:
    """The published widths, one dense layer and two routed ones."""
    specification = importlib.util.spec_from_file_location("published_configs", PUBLISHED)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    (folder / "config.json").write_text(json.dumps(getattr(module, name)))
    fewer = {"num_hidden_layers": DENSE + ROUTED, "first_k_dense_replace": DENSE}
    return EngineConfig.from_args(
        EngineArgs(model=str(folder), load_format="dummy", skip_tokenizer_init=True, hf_overrides=fewer)
    )


def lower(config: EngineConfig, layout: ParallelLayout, gear: int) -> Any:
    from omni_engine.engine.npu.lowering import lower_step

    return lower_step(config, GraphKey(gear, 1, "greedy"), layout)


def collectives(step: Any) -> Counter[tuple[str, str]]:
    """How many of each kind, with the group that its node names."""
    return Counter(
        (node.type, node.attributes.get("group") or node.attributes.get("group_ep"))
        for node in step.graph.nodes if node.type in COLLECTIVES
    )  # fmt: skip


def tensor_and_expert() -> ParallelLayout:
    return ParallelLayout(
        tensor_size=8, tensor_rank=RANK, tensor_group=group_name(range(8)),
        expert_size=8, expert_rank=RANK, expert_group=group_name(range(8)), expert_communicator=COMMUNICATOR,
    )  # fmt: skip


def test_tensor_and_expert_parallel_steps_name_their_groups(graphs, eight, tmp_path) -> None:
    step = lower(config_of(tmp_path), tensor_and_expert(), 16)
    found = collectives(step)
    (tensor,) = {group for (kind, group) in found if kind.startswith("Hcom")}
    assert tensor.endswith("rank_list=0,1,2,3,4,5,6,7")
    assert found == {
        ("HcomAllReduce", tensor): 2 * DENSE + ROUTED,  # behind attention, and behind a dense feed-forward layer
        ("HcomReduceScatter", tensor): ROUTED,  # of the shared expert
        ("HcomAllGather", tensor): ROUTED + 1,  # of a routed layer's tokens, and of the logits
        ("MoeDistributeDispatchV2", COMMUNICATOR): ROUTED,
        ("MoeDistributeCombineV2", COMMUNICATOR): ROUTED,
    }
    weights = {one.shape for one in step.graph.inputs.values() if one.frozen}
    assert {(32, 7168, 4096), (32, 2048, 7168), (16160, 7168), (7168, 2048)} <= weights
    assert step.graph.copied_inputs == [] and sorted(step.cache_shapes) == sorted(
        shape for shape in step.graph.mutated if len(shape) == 4
    )
    dispatched = [node for node in step.graph.nodes if node.type == "MoeDistributeDispatchV2"]
    assert {(node.attributes["ep_world_size"], node.attributes["ep_rank_id"]) for node in dispatched} == {(8, RANK)}
    assert {node.attributes["moe_expert_num"] for node in dispatched} == {256}


def test_tokens_that_do_not_divide_are_padded(graphs, eight, tmp_path) -> None:
    step = lower(config_of(tmp_path), tensor_and_expert(), 12)
    assert step.graph.work["MoeDistributeDispatchV2"] == ROUTED
    assert any(kind.startswith("Pad") for kind in step.graph.work)


def test_sixty_four_ranks_with_redundant_experts(graphs, sixty_four, tmp_path) -> None:
    held = [{*range(4 * rank, 4 * rank + 4), (4 * rank + 4) % 256} for rank in range(64)]
    pattern = [[[int(expert in own) for expert in range(256)]] * (ROUTED + 1) for own in held]
    layout = ParallelLayout(
        expert_size=64, expert_rank=RANK, expert_group=group_name(range(64)), expert_communicator=COMMUNICATOR,
        placement=ExpertPlacement.from_pattern(pattern),
    )  # fmt: skip
    step = lower(config_of(tmp_path), layout, 4)
    assert collectives(step) == {
        ("MoeDistributeDispatchV2", COMMUNICATOR): ROUTED, ("MoeDistributeCombineV2", COMMUNICATOR): ROUTED,
    }  # fmt: skip
    dispatched = [node for node in step.graph.nodes if node.type == "MoeDistributeDispatchV2"]
    assert {node.attributes["moe_expert_num"] for node in dispatched} == {64 * 5}
    shapes = Counter(one.shape for one in step.graph.inputs.values() if one.frozen)
    assert shapes[(5, 7168, 4096)] == ROUTED
    tables = [one for one in step.graph.inputs.values() if one.shape == (256,) and not one.frozen]
    assert len(tables) == ROUTED  # which copy serves: an input, so that experts may move without another graph
    assert step.graph.copied_inputs == []


def test_one_rank_has_no_collective(graphs, tmp_path) -> None:
    assert collectives(lower(config_of(tmp_path), ParallelLayout(), 4)) == {}


def test_a_collective_that_a_layer_forgets_is_missing(graphs, eight, monkeypatch, tmp_path) -> None:
    from omni_engine.engine.npu import lowering as graph_lowering

    build = graph_lowering.build_models

    def forgetting(*arguments: Any) -> Any:
        models = build(*arguments)
        models.decoder.layers[0].mlp.down_proj.group = RankGroup()
        return models

    monkeypatch.setattr(graph_lowering, "build_models", forgetting)
    found = collectives(lower(config_of(tmp_path), tensor_and_expert(), 8))
    assert sum(count for (kind, _), count in found.items() if kind == "HcomAllReduce") == 2 * DENSE + ROUTED - 1


def test_the_npus_experts_of_two_ranks_are_those_of_one(references) -> None:
    torch.manual_seed(0)
    ranks, experts, tokens, dim, inter = 2, 8, 3, 1024, 32
    references.worlds[COMMUNICATOR] = references.World(ranks)
    gate_up, down = (torch.randn(experts, *shape).bfloat16() / 20 for shape in ((2 * inter, dim), (dim, inter)))
    hidden, weights = torch.randn(ranks, tokens, dim).bfloat16(), torch.rand(ranks, tokens, 3)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(ranks * tokens)]).view(ranks, tokens, 3)
    results: dict[int, torch.Tensor] = {}

    def run(rank: int) -> None:
        group = RankGroup(ranks, rank, "unused", COMMUNICATOR)
        mine = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
        packed = [part[mine].transpose(1, 2).contiguous() for part in (gate_up, down)]
        results[rank] = dispatch.dispatched_experts(hidden[rank], weights[rank], ids[rank].int(), *packed, group=group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(ranks):
        expected = moe.routed_experts(hidden[rank], weights[rank], ids[rank], gate_up, down).float()
        assert float((results[rank].float() - expected).norm() / expected.norm()) < 0.01
        assert float((results[1 - rank].float() - expected).norm() / expected.norm()) > 0.5


@pytest.mark.parametrize(
    ("collective", "kind"),
    [
        (comm.all_reduce, "HcomAllReduce"),
        (comm.all_gather, "HcomAllGather"),
        (comm.reduce_scatter, "HcomReduceScatter"),
        (comm.all_to_all, "HcomAllToAllV"),
    ],
)
def test_collectives_lower_with_the_name_of_their_group(graphs, eight, collective, kind: str) -> None:
    group = RankGroup(4, RANK, group_name(range(4)))
    graph = graphs.lower(lambda tensor: collective(tensor, group), torch.zeros(8, 16, device="npu:0"))
    assert graph.work[kind] == 1
    assert graph.only(kind).attributes["group"].endswith("rank_list=0,1,2,3")
