"""Models split over ranks: shapes at DeepSeek-V3's published widths, who reads what, and the same logits as unsplit."""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from omni_engine.kvcache.tensors import allocate_kv_tensors
from omni_engine.models.config_parser import parse_config
from omni_engine.models.expert_placement import ExpertPlacement
from omni_engine.models.forward_context import ForwardContext
from omni_engine.models.kv_spec import kv_cache_spec
from omni_engine.models.layers.decoder import CausalDecoder
from omni_engine.models.layers.moe import MoE
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve
from omni_engine.models.weights import WeightSlot, load_weights
from omni_engine.ops import comm, moe
from omni_engine.ops.rank_group import RankGroup

META, CPU = torch.device("meta"), torch.device("cpu")
ROUTED = "model.layers.3.mlp."  # the first routed layer of DeepSeek-V3


def published(name: str) -> dict[str, Any]:
    """config.json as it was published, from the tests of the parser."""
    file = Path(__file__).with_name("test_config_parser.py")
    specification = importlib.util.spec_from_file_location("published_configs", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return dict(getattr(module, name))


@pytest.fixture(scope="module")
def deepseek() -> dict[str, Any]:
    """DeepSeek-V3 with its three dense layers and two of the 58 routed ones."""
    return {**published("DEEPSEEK_V3"), "num_hidden_layers": 5}


def build(
    raw: dict[str, Any], layout: ParallelLayout, device: torch.device = META, dtype: torch.dtype = torch.bfloat16
) -> CausalDecoder:
    config = parse_config(raw)
    return resolve(config.architecture).load_class()(config, layout, dtype=dtype, device=device)


def redundant_pattern(ranks: int, layers: int, experts: int, copies: int) -> np.ndarray:
    """[ranks, layers, experts]: the experts in order over the ranks, and on each rank `copies` more of the next's."""
    pattern = np.zeros((ranks, layers, experts), np.uint8)
    local = experts // ranks
    for rank in range(ranks):
        for layer in range(layers):
            pattern[rank, layer, rank * local : (rank + 1) * local] = 1
            first = ((rank + 1 + layer) % ranks) * local
            pattern[rank, layer, first : first + copies] = 1
    return pattern


def tensor_and_expert(rank: int) -> ParallelLayout:
    """TP 8 x EP 8, over the same eight ranks."""
    return ParallelLayout(tensor_size=8, tensor_rank=rank, expert_size=8, expert_rank=rank)


def shapes(model: CausalDecoder) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_a_rank_of_eight_by_eight_has_its_share_of_deepseek_v3(deepseek) -> None:
    found = shapes(build(deepseek, tensor_and_expert(3)))
    assert found["embedding.weight"] == (129280, 7168)
    assert found["head.weight"] == (129280 // 8, 7168)
    attention = {name.removeprefix("layers.3.attention."): shape for name, shape in found.items()}
    assert attention["down_proj.weight"] == (1536 + 512 + 64, 7168)  # latents are whole on every rank
    assert attention["q_proj.weight"] == (16 * (128 + 64), 1536)
    assert attention["kv_b_proj.weight"] == (16 * (128 + 128), 512)
    assert attention["o_proj.weight"] == (7168, 16 * 128)
    assert found["layers.0.mlp.gate_up_proj.weight"] == (2 * 18432 // 8, 7168)
    assert found["layers.0.mlp.down_proj.weight"] == (7168, 18432 // 8)
    assert found["layers.3.mlp.gate"] == (256, 7168)
    assert found["layers.3.mlp.gate_up"] == (32, 2 * 2048, 7168)  # whole experts
    assert found["layers.3.mlp.down"] == (32, 7168, 2048)
    assert found["layers.3.mlp.shared_experts.gate_up_proj.weight"] == (2 * 2048 // 8, 7168)
    spec = kv_cache_spec(parse_config(deepseek), tensor_and_expert(3), "bfloat16")
    assert spec == kv_cache_spec(parse_config(deepseek), ParallelLayout(), "bfloat16")


def test_a_rank_of_sixty_four_has_redundant_experts(deepseek) -> None:
    placement = ExpertPlacement.from_pattern(redundant_pattern(64, 2, 256, 1).tolist())
    model = build(deepseek, ParallelLayout(expert_size=64, expert_rank=10, placement=placement))
    found = shapes(model)
    assert found["layers.3.mlp.gate_up"] == (4 + 1, 2 * 2048, 7168)
    assert found["layers.3.attention.o_proj.weight"] == (7168, 128 * 128)
    assert found["layers.3.mlp.shared_experts.down_proj.weight"] == (7168, 2048)
    layers = [model.layers[index].mlp for index in (3, 4)]
    assert all(isinstance(layer, MoE) for layer in layers)
    assert [layer.local_experts for layer in layers] == [(40, 41, 42, 43, 44), (40, 41, 42, 43, 48)]
    assert [tuple(layer.selection.shape) for layer in layers] == [(256,), (256,)]


def test_all_sixty_one_layers_are_built(deepseek) -> None:
    raw = {**deepseek, "num_hidden_layers": 61}
    placement = ExpertPlacement.from_pattern(redundant_pattern(64, 59, 256, 1).tolist())  # with the prediction layer
    for layout, experts in (
        (tensor_and_expert(7), 32), (ParallelLayout(expert_size=64, expert_rank=63, placement=placement), 5),
    ):  # fmt: skip
        stacks = [shape for name, shape in shapes(build(raw, layout)).items() if name.endswith("mlp.gate_up")]
        assert stacks == [(experts, 4096, 7168)] * 58


# --- who reads what ---


LAYOUTS: dict[str, Callable[[], list[ParallelLayout]]] = {
    "TP 8 x EP 8": lambda: [tensor_and_expert(rank) for rank in range(8)],
    "EP 64, redundant": lambda: [
        ParallelLayout(expert_size=64, expert_rank=rank, placement=REDUNDANT_64) for rank in range(64)
    ],
    "TP 8": lambda: [ParallelLayout(8, rank) for rank in range(8)],
    "TP 2 in EP 8": lambda: [
        ParallelLayout(tensor_size=2, tensor_rank=rank % 2, expert_size=8, expert_rank=rank) for rank in range(8)
    ],
}
PATTERN_64 = redundant_pattern(64, 2, 256, 1)
REDUNDANT_64 = ExpertPlacement.from_pattern(PATTERN_64.tolist())


def read_twice_or_never(raw: dict[str, Any], layouts: list[ParallelLayout]) -> list[str]:
    """What is wrong with the reading of each tensor of the checkpoint, by what the layout promises."""
    whole = {slot.name: slot.stored_shape for slot in build(raw, ParallelLayout()).weight_slots()}
    readers: dict[str, list[tuple[int, WeightSlot]]] = {name: [] for name in whole}
    wrong = []
    for rank, layout in enumerate(layouts):
        model = build(raw, layout)
        for slot in model.weight_slots():
            readers[slot.name].append((rank, slot))
            if slot.stored_shape != whole[slot.name]:
                wrong.append(f"{slot.name} is expected to have the shape {slot.stored_shape}")
        unread = whole.keys() - {slot.name for slot in model.weight_slots()}
        wrong += [f"rank {rank} has no place for {name}" for name in unread if not model.ignored_weights(name)]
    for name, found in readers.items():
        expert = re.match(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
        ranks = set(range(len(layouts)))
        if expert is not None and layouts[0].expert_size > 1:
            layer, number = int(expert[1]) - 3, int(expert[2])
            ranks = (
                {number // (256 // len(layouts))}
                if layouts[0].placement is None
                else set(np.flatnonzero(PATTERN_64[:, layer, number]).tolist())
            )
        if [rank for rank, _ in found] != sorted(ranks):
            wrong.append(f"{name} is read by {[rank for rank, _ in found]}")
        pieces: dict[int, set[tuple[int, int]]] = {}
        for rank, slot in found:
            shard = slot.shard
            pieces.setdefault(layouts[rank].tensor_rank, set()).add((shard.start, shard.stop) if shard else (0, -1))
        ends = sorted({piece for of_rank in pieces.values() for piece in of_rank})
        whole_size = found[0][1].shard.size if found and found[0][1].shard else -1
        bounds = [0, *(stop for _, stop in ends)]
        if [start for start, _ in ends] != bounds[:-1] or bounds[-1] != whole_size:
            wrong.append(f"{name} is read in the parts {ends}")
    return wrong


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_read_by_the_ranks_that_need_it(deepseek, name: str) -> None:
    assert read_twice_or_never(deepseek, LAYOUTS[name]()) == []


def test_a_tensor_that_a_rank_should_read_and_does_not_is_told(deepseek, monkeypatch) -> None:
    right = ParallelLayout.experts

    def experts(self: ParallelLayout, count: int, layer: int) -> tuple[int, ...]:
        local = right(self, count, layer)
        return (0, *local[1:]) if self.expert_rank == 3 else local

    monkeypatch.setattr(ParallelLayout, "experts", experts)
    wrong = read_twice_or_never(deepseek, LAYOUTS["TP 8 x EP 8"]())
    assert f"{ROUTED}experts.96.up_proj.weight is read by []" in wrong
    assert f"{ROUTED}experts.0.up_proj.weight is read by [0, 3]" in wrong


def test_only_experts_that_exist_are_left_to_other_ranks(deepseek) -> None:
    model = build(deepseek, tensor_and_expert(1))
    assert model.ignored_weights(f"{ROUTED}experts.0.up_proj.weight")
    for name in (
        f"{ROUTED}experts.32.up_proj.weight", f"{ROUTED}experts.256.up_proj.weight", f"{ROUTED}gate.weight",
        f"{ROUTED}experts.0.up_proj.bias", "model.layers.0.mlp.experts.0.up_proj.weight",
    ):  # fmt: skip
        assert not model.ignored_weights(name)


# --- placements and layouts ---


def test_copies_take_turns_among_the_ranks() -> None:
    placement = ExpertPlacement.from_pattern([[[1, 1, 0]], [[0, 1, 1]]])
    assert [placement.local(rank, 0) for rank in range(2)] == [(0, 1), (1, 2)]
    assert [placement.selection(rank, 0) for rank in range(2)] == [(0, 1, 3), (0, 2, 3)]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ([], "must have ranks and layers: 0 ranks"),
        ([[[1, 1]], [[1]]], "the same layers and experts on every rank: rank 1"),
        ([[[1, 1, 0]], [[0, 0, 1]]], r"equally many experts on every rank: \[1, 2\]"),
        ([[[1, 1, 0]], [[1, 1, 0]]], r"layer 0 must have every expert on some rank, it lacks: \[2\]"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(pattern, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExpertPlacement.from_pattern(pattern)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor_size": 4, "expert_size": 6}, "multiple of the tensor parallel size 4: 6"),
        ({"tensor_size": 2, "tensor_rank": 1, "expert_size": 4, "expert_rank": 2}, "tensor rank 1 of 2 cannot be: 2"),
        ({"expert_size": 2, "expert_rank": 2}, r"\[0, expert size\): 2 of 2"),
        ({"expert_size": 3, "placement": ExpertPlacement((((0,),), ((1,),)), 2)}, "of the 3 ranks .*: 2"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelLayout(**fields)


def test_what_does_not_divide_is_refused(deepseek) -> None:
    placement = ExpertPlacement.from_pattern([[[1, 1, 0, 0]], [[0, 0, 1, 1]]])
    for layout, words in (
        (ParallelLayout(expert_size=3), "number of experts must be divisible by the expert parallel size 3: 256"),
        (ParallelLayout(expert_size=2, placement=placement), "placement must be of the model's 256 experts: 4"),
        (ParallelLayout(tensor_size=3), "must be divisible by the tensor parallel size 3"),
    ):
        with pytest.raises(ValueError, match=words):
            build(deepseek, layout)
    short = ExpertPlacement.from_pattern(redundant_pattern(2, 1, 256, 0).tolist())
    with pytest.raises(ValueError, match="has 1 routed layers and the model more: 2"):
        build(deepseek, ParallelLayout(expert_size=2, placement=short))


def test_a_vocabulary_that_does_not_divide_is_whole(deepseek) -> None:
    head = build({**deepseek, "vocab_size": 129281}, tensor_and_expert(3)).head
    assert head.weight.shape == (129281, 7168) and head.group == RankGroup()


# --- the same logits: ranks as threads, whose collectives meet at a barrier ---


class Ranks:
    """Stands in for the collectives: what every rank has brought, when all have."""

    def __init__(self, size: int) -> None:
        self.barriers: dict[str, threading.Barrier] = {}
        self.brought: dict[str, list[Any]] = {}
        self.lock = threading.Lock()
        self.counts: dict[str, int] = {}

    def exchange(self, kind: str, tensor: Tensor, group: RankGroup) -> list[Tensor]:
        with self.lock:
            barrier = self.barriers.setdefault(group.name, threading.Barrier(group.size))
            brought = self.brought.setdefault(group.name, [None] * group.size)
            self.counts[kind] = self.counts.get(kind, 0) + 1
        brought[group.rank] = tensor
        barrier.wait(60)
        everything = list(brought)
        barrier.wait(60)
        return everything

    def all_reduce(self, tensor: Tensor, group: RankGroup) -> Tensor:
        return tensor if group.size == 1 else torch.stack(self.exchange("all_reduce", tensor, group)).sum(0)

    def all_gather(self, tensor: Tensor, group: RankGroup) -> Tensor:
        return tensor if group.size == 1 else torch.cat(self.exchange("all_gather", tensor, group))

    def reduce_scatter(self, tensor: Tensor, group: RankGroup) -> Tensor:
        if group.size == 1:
            return tensor
        return torch.stack(self.exchange("reduce_scatter", tensor, group)).sum(0).chunk(group.size)[group.rank]


@pytest.fixture
def ranks(monkeypatch) -> Ranks:
    ranks = Ranks(0)
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        monkeypatch.setattr(comm, name, getattr(ranks, name))
    return ranks


def layouts_of(kind: str, num_layers: int, experts: int) -> Iterator[ParallelLayout]:
    pattern = np.zeros((2, num_layers, experts), np.uint8)
    pattern[0, :, : experts // 2 + 1] = 1
    pattern[1, :, experts // 2 :] = 1
    pattern[1, :, 0] = 1  # the first expert of each rank is on the other too
    placement = ExpertPlacement.from_pattern(pattern.tolist())
    for rank in range(2):
        tensor = {"tensor_size": 2, "tensor_rank": rank, "tensor_group": "tensor"}
        expert = {"expert_size": 2, "expert_rank": rank, "expert_group": "expert"}
        yield {
            "TP 2": lambda tensor=tensor, expert=expert: ParallelLayout(**tensor),
            "TP 2 x EP 2": lambda tensor=tensor, expert=expert: ParallelLayout(**tensor, **expert),
            "EP 2": lambda tensor=tensor, expert=expert: ParallelLayout(**expert),
            "EP 2, redundant": lambda tensor=tensor, expert=expert: ParallelLayout(**expert, placement=placement),
            "TP 2 x EP 2, redundant": lambda tensor=tensor, expert=expert: ParallelLayout(
                **tensor, **expert, placement=placement
            ),
        }[kind]()


TOKENS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])  # of two ranks that have tokens of their own


def logits_of(folder: Path, layout: ParallelLayout, tokens: Tensor) -> Tensor:
    """A prompt's logits [tokens, vocab], from the checkpoint."""
    model = build(json.loads((folder / "config.json").read_text()), layout, CPU, torch.float32)
    load_weights(model, folder, progress=False)
    count = len(tokens)
    context = ForwardContext(
        positions=torch.arange(count),
        slots=torch.arange(16, 16 + count),
        block_table=torch.tensor([[1]], dtype=torch.int32),
        context_lens=torch.tensor([count], dtype=torch.int32),
        num_decode=0,
        prefill_query_lens=(count,),
        prefill_context_lens=(count,),
    )
    caches = allocate_kv_tensors(kv_cache_spec(model.config, layout, "float32"), 2, 16, CPU)
    with torch.inference_mode():
        return model.logits(model(tokens, context, caches))


def split_logits(folder: Path, kind: str) -> list[Tensor]:
    raw = json.loads((folder / "config.json").read_text())
    config = parse_config(raw)
    num_experts = 2 if config.moe is None else config.moe.num_experts
    layouts = list(layouts_of(kind, config.num_layers, num_experts))
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        own = TOKENS[0 if layouts[rank].tensor_size > 1 else rank]
        results[rank] = logits_of(folder, layouts[rank], own)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [results[rank] for rank in range(2)]


CASES = [
    ("LlamaForCausalLM", "TP 2"),
    ("Qwen3MoeForCausalLM", "TP 2"),
    ("Qwen3MoeForCausalLM", "TP 2 x EP 2"),
    ("DeepseekV3ForCausalLM", "TP 2"),
    ("DeepseekV3ForCausalLM", "TP 2 x EP 2"),
    ("DeepseekV3ForCausalLM", "EP 2"),
    ("DeepseekV3ForCausalLM", "EP 2, redundant"),
    ("DeepseekV3ForCausalLM", "TP 2 x EP 2, redundant"),
    ("DeepseekV32ForCausalLM", "TP 2 x EP 2"),
]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_ranks_together_are_the_whole_model(architecture: str, kind: str, make_checkpoint, ranks: Ranks) -> None:
    folder = make_checkpoint(architecture)
    for rank, logits in enumerate(split_logits(folder, kind)):
        expected = logits_of(folder, ParallelLayout(), TOKENS[0 if kind.startswith("TP") else rank])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(logits, expected.roll(1, 0), rtol=1e-2, atol=1e-3)
    assert ranks.counts


@pytest.mark.parametrize("broken", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_collective_that_is_missing_is_seen(broken: str, make_checkpoint, ranks: Ranks, monkeypatch) -> None:
    """Each rank keeps its own part, in the shape of the result."""
    right = getattr(ranks, broken)

    def missing(tensor: Tensor, group: RankGroup) -> Tensor:
        result = right(tensor, group)
        own = tensor if tensor.shape[0] >= result.shape[0] else tensor.repeat(group.size, *[1] * (tensor.dim() - 1))
        return result if group.size == 1 else own[: result.shape[0]]

    monkeypatch.setattr(comm, broken, missing)
    folder = make_checkpoint("DeepseekV3ForCausalLM")
    expected = logits_of(folder, ParallelLayout(), TOKENS[0])
    assert not torch.allclose(split_logits(folder, "TP 2 x EP 2")[1], expected, rtol=1e-2, atol=1e-3)


def test_tokens_that_go_to_the_wrong_copy_are_seen(make_checkpoint, ranks: Ranks, monkeypatch) -> None:
    right = ExpertPlacement.selection
    monkeypatch.setattr(ExpertPlacement, "selection", lambda *arguments: right(*arguments)[::-1])
    folder = make_checkpoint("DeepseekV3ForCausalLM")
    expected = logits_of(folder, ParallelLayout(), TOKENS[0])
    assert not torch.allclose(split_logits(folder, "EP 2, redundant")[0], expected, rtol=1e-2, atol=1e-3)


def test_experts_of_two_ranks_are_those_of_one(ranks: Ranks) -> None:
    torch.manual_seed(0)
    hidden, weights = torch.randn(2, 3, 16), torch.rand(2, 3, 4)
    ids = torch.stack([torch.randperm(8)[:4] for _ in range(6)]).view(2, 3, 4)
    gate_up, down = torch.randn(8, 24, 16), torch.randn(8, 16, 12)
    results: dict[int, Tensor] = {}

    def run(rank: int) -> None:
        mine = slice(4 * rank, 4 * rank + 4)
        group = RankGroup(2, rank, "experts")
        results[rank] = moe.dispatched_experts(
            hidden[rank], weights[rank], ids[rank].int(), gate_up[mine], down[mine], group
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        expected = moe.routed_experts(hidden[rank], weights[rank], ids[rank], gate_up, down)
        torch.testing.assert_close(results[rank], expected, rtol=1e-5, atol=1e-5)
