"""A layer and a gear of small models on an NPU, with what the plain bodies make of the same on the host.

The models are made up: few and narrow layers, but every size that an NPU operator prescribes is the published one
(latent rank 512, rope dimension 64, indexer dimension 128). Their weights are dummies, drawn alike on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...kvcache.tensors import allocate_kv_tensors
from ...models.config_parser import parse_config
from ...models.dummy_weights import initialise_dummy_weights
from ...models.forward_context import ForwardContext
from ...models.kv_spec import kv_cache_spec
from ...models.layers.decoder import CausalDecoder
from ...models.npu_weights import pack_for_npu
from ...models.parallel import ParallelLayout
from ...models.registry import resolve
from ...ops.npu.op_checks import Results, difference
from ...ops.table import npu_table
from ..graphs.runner import GraphInputs, GraphKey, GraphRunner
from ..row_state import RowTable

BLOCK_SIZE, NUM_BLOCKS, WIDTH = 128, 7, 2
BOUND = 0.03  # bfloat16 through every op of a step, in other orders of summation
POSITIONS = (5, 130, 200)
TOKENS = (195, 348, 206)  # after these the likeliest token of each model stands well before the next
BLOCKS = ((1, 0), (2, 3), (4, 5))

_SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "torch_dtype": "bfloat16", "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_SMALL, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "kv_lora_rank": 512,
    "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 48, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 0,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-MoE": {
        **_SMALL, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
    },
    "DeepSeek-V3": {**_LATENT, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
    "DeepSeek-V3.2": {
        **_LATENT, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128,
        "index_n_heads": 8, "index_topk": 208,  # all of a context, by way of the indexer: nothing hangs on a rounding
    },
}  # fmt: skip


class _Layer(nn.Module):
    """One layer of a decoder on tokens that decode."""

    def __init__(self, model: CausalDecoder, index: int) -> None:
        super().__init__()
        self.rotary, self.layer = model.rotary, model.layers[index]

    def forward(
        self, hidden: Tensor, positions: Tensor, slots: Tensor, table: Tensor, lens: Tensor, *cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(positions)
        return self.layer(hidden, None, cos, sin, ForwardContext(positions, slots, table, lens, len(POSITIONS)), cache)


class _Gear(nn.Module):
    """The program of a gear on its buffers, one after another."""

    def __init__(self, runner: GraphRunner, key: GraphKey) -> None:
        super().__init__()
        self.program = runner.program(key)
        self.num_state = len(runner.state)
        self.parts = [len(cache) for cache in runner.caches]

    def forward(self, rows: Tensor, *flat: Tensor) -> Tensor:
        rest = list(flat[self.num_state :])
        caches = [tuple(rest.pop(0) for _ in range(count)) for count in self.parts]
        return self.program(rows, flat[: self.num_state], caches)


Prepared = tuple[Callable[..., Results], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ModelCase:
    """A part of a model's decode step."""

    build: Callable[[torch.device, bool], Prepared]  # on a device, with the NPU's ops or with the plain ones
    num_cache_parts: int  # the last inputs, which are written
    bound: float = BOUND
    expected: tuple[Tensor, ...] = field(init=False)  # the results, then the caches

    def __post_init__(self) -> None:
        run, inputs = self.build(torch.device("cpu"), False)
        with torch.inference_mode():
            results = run(*inputs)
        object.__setattr__(self, "expected", self._compared(results, inputs))

    def prepare(self, device: torch.device, in_graph: bool) -> Prepared:
        return self.build(device, True)

    def error(self, results: Results, inputs: tuple[Tensor, ...]) -> float:
        return difference(self._compared(results, inputs), self.expected)

    def _compared(self, results: Results, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert results is not None
        found = (results,) if isinstance(results, Tensor) else results
        return tuple(tensor.cpu() for tensor in (*found, *inputs[-self.num_cache_parts :]))


def layer_case(name: str, index: int) -> ModelCase:
    """Layer `index` of a model in MODELS, three requests that decode."""

    def build(device: torch.device, on_npu: bool) -> Prepared:
        model, caches = _model(name, device, on_npu)
        hidden = torch.randn(len(POSITIONS), model.config.hidden_size, generator=_generator()).bfloat16()
        slots = [BLOCKS[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for row, at in enumerate(POSITIONS)]
        inputs = (
            hidden, torch.tensor(POSITIONS), torch.tensor(slots), torch.tensor(BLOCKS, dtype=torch.int32),
            torch.tensor(POSITIONS, dtype=torch.int32) + 1,
        )  # fmt: skip
        return _Layer(model, index), (*(tensor.to(device) for tensor in inputs), *caches[index])

    return ModelCase(build, _cache_parts(name))


def gear_case(name: str, sampler: str) -> ModelCase:
    """The gear of four rows, one of them padding, of a model in MODELS: with `split` the logits are compared, with
    `greedy` the tokens."""
    key = GraphKey(len(POSITIONS) + 1, 1, sampler)

    def build(device: torch.device, on_npu: bool) -> Prepared:
        model, caches = _model(name, device, on_npu)
        state = RowTable(len(POSITIONS), WIDTH, device).state
        for tensor, values in ((state.last_token, TOKENS), (state.position, POSITIONS), (state.block_table, BLOCKS)):
            tensor[: len(POSITIONS)].copy_(torch.tensor(values, dtype=tensor.dtype))
        runner = GraphRunner(model, state, caches)
        runner.allocate((key.num_requests,))
        inputs: GraphInputs = runner.inputs(key)
        inputs.rows.copy_(torch.arange(key.num_requests))
        return _Gear(runner, key), tuple(inputs.flat())

    return ModelCase(build, 2 * _cache_parts(name))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _cache_parts(name: str) -> int:
    return 3 if name == "DeepSeek-V3.2" else 2


def _model(name: str, device: torch.device, on_npu: bool) -> tuple[CausalDecoder, list[tuple[Tensor, ...]]]:
    """With its caches, which hold something random."""
    config, layout = parse_config(MODELS[name]), ParallelLayout()
    model = resolve(config.architecture).load_class()(config, layout, dtype=torch.bfloat16, device=device).eval()
    initialise_dummy_weights(model)
    if on_npu:
        pack_for_npu(model)
        model.ops.table = npu_table()
    caches = allocate_kv_tensors(kv_cache_spec(config, layout, "bfloat16"), NUM_BLOCKS, BLOCK_SIZE, device)
    generator = _generator()
    for part in (part for cache in caches for part in cache):
        part.copy_(torch.randn(part.shape, generator=generator).bfloat16())
    return model, caches


MODEL_GROUPS: dict[str, tuple[tuple[str, Callable[[], ModelCase]], ...]] = {
    "one layer": tuple(
        (f"{name}, {kind} layer", lambda name=name, index=index: layer_case(name, index))
        for name, index, kind in (
            ("Qwen3-MoE", 0, "routed"), ("DeepSeek-V3", 0, "dense"), ("DeepSeek-V3", 1, "routed"),
            ("DeepSeek-V3.2", 1, "routed"),
        )
    ),
    "one gear": tuple(
        (f"{name}, 4x1 {sampler}", lambda name=name, sampler=sampler: gear_case(name, sampler))
        for name in MODELS for sampler in ("split", "greedy")
    ),
}  # fmt: skip
