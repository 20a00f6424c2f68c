"""The decode step as the graph compiler sees it: exported whole, and equal to the step that runs eager."""

from __future__ import annotations

import pytest
import torch

from omni_engine import Engine
from omni_engine.engine.graphs.runner import GraphKey
from omni_engine.ops.table import PLAIN

ROWS = 3
MODELS = {
    "DeepseekV3": ("DeepseekV3ForCausalLM", {}),
    "DeepseekV32": ("DeepseekV32ForCausalLM", {}),
    "GlmMoeDsa": ("GlmMoeDsaForCausalLM", {}),
    "GlmMoeDsa-sharing": (
        "GlmMoeDsaForCausalLM",
        {"num_hidden_layers": 3, "indexer_types": ["full", "shared", "full"]},
    ),
}


@pytest.fixture
def make_runner(make_checkpoint):
    """The graph runner of an engine without experts, whose plain body reads on the host, in the midst of three rows."""

    def make(architecture, **overrides):
        path = make_checkpoint(architecture, **{"first_k_dense_replace": 3, **overrides})
        engine = Engine(
            str(path),
            dtype="float32",
            max_num_seqs=ROWS,
            max_model_len=64,
            num_gpu_blocks_override=12,
            graph_backend="eager",
            cudagraph_capture_sizes=[ROWS],
        )
        graphs = engine._core.runner.graphs
        graphs.wait(60)
        graphs.model.ops.table = PLAIN
        generator = torch.Generator().manual_seed(0)
        for cache in graphs.caches:
            for part in cache:
                part.normal_(generator=generator)
        state = graphs.state
        state.last_token[:ROWS] = torch.tensor([9, 8, 7])
        state.position[:ROWS] = torch.tensor([33, 3, 0])  # beyond the selection, below it, and with nothing before
        state.block_table[:ROWS, :3] = torch.tensor([[1, 5, 2], [3, 0, 0], [4, 0, 0]])
        graphs._rows.copy_(torch.tensor([0, 1, 2]))
        return graphs

    return make


@pytest.mark.parametrize("sampler", ["greedy", "split"])
@pytest.mark.parametrize("model", MODELS)
def test_an_exported_step_equals_the_eager_one(make_runner, model, sampler):
    architecture, overrides = MODELS[model]
    graphs = make_runner(architecture, **overrides)
    key = GraphKey(ROWS, 1, sampler)
    inputs = graphs.inputs(key)
    tensors = inputs.flat()
    before = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        expected = graphs.program(key)(*inputs)
        after = [tensor.clone() for tensor in tensors]
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        exported = torch.export.export(graphs.program(key), tuple(inputs), strict=False)
        assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True)), "exporting computes nothing"
        output = exported.module()(*inputs)
    assert torch.equal(output, expected)
    assert all(torch.equal(*pair) for pair in zip(tensors, after, strict=True)), "written in place as eagerly"
    written = sum(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    parts = sum(map(len, graphs.caches))
    assert written == parts + (2 if sampler == "greedy" else 0)


def test_an_exported_step_selects_by_what_is_in_its_tensors(make_runner):
    """The control: one graph for all lengths, and the indexer's keys count in it."""
    graphs = make_runner("DeepseekV32ForCausalLM")
    key = GraphKey(ROWS, 1, "split")
    inputs = graphs.inputs(key)
    with torch.no_grad():
        step = torch.export.export(graphs.program(key), tuple(inputs), strict=False).module()
        first = step(*inputs).clone()
        graphs.caches[0][2].neg_()
        changed = [not torch.equal(*rows) for rows in zip(step(*inputs), first, strict=True)]
        assert changed == [True, False, False]  # only the first row has more tokens than the selection
        graphs.state.position[1] = 14
        second = step(*inputs)
        assert torch.equal(second, graphs.program(key)(*inputs))
        assert not torch.equal(second[1], first[1])
