"""What decoders promise besides their logits: slots, shares, ignored tensors, and a decode step without host reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from omni_engine.kvcache.tensors import allocate_kv_tensors
from omni_engine.models.config_parser import parse_config
from omni_engine.models.forward_context import ForwardContext
from omni_engine.models.kv_spec import kv_cache_spec
from omni_engine.models.layers.decoder import CausalDecoder
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve

META = torch.device("meta")
EVERY_DECODER = pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"]
)


def build(directory: Path, layout: ParallelLayout | None = None, device: torch.device = META) -> CausalDecoder:
    config = parse_config(json.loads((directory / "config.json").read_text()))
    decoder = resolve(config.architecture).load_class()
    return decoder(config, layout or ParallelLayout(), dtype=torch.float32, device=device)


def decode_once(model: CausalDecoder) -> torch.Tensor:
    """One decode step of three requests on the meta device, which has shapes and no values to read."""
    spec = kv_cache_spec(model.config, ParallelLayout(), "float32")
    context = ForwardContext(
        positions=torch.zeros(3, dtype=torch.int64, device=META),
        slots=torch.zeros(3, dtype=torch.int64, device=META),
        block_table=torch.zeros(3, 4, dtype=torch.int32, device=META),
        context_lens=torch.zeros(3, dtype=torch.int32, device=META),
        num_decode=3,
    )
    input_ids = torch.zeros(3, dtype=torch.int64, device=META)
    return model.logits(model(input_ids, context, allocate_kv_tensors(spec, 5, 16, META)))


@EVERY_DECODER
def test_slots_name_every_tensor_of_the_file_once_with_its_shape(
    architecture: str, make_checkpoint: Callable[..., Path]
) -> None:
    directory = make_checkpoint(architecture)
    slots = list(build(directory).weight_slots())
    with safe_open(directory / "model.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert sorted(slot.name for slot in slots) == sorted(stored)
    assert {slot.name: slot.stored_shape for slot in slots} == stored


@EVERY_DECODER
def test_slots_fill_every_parameter(architecture: str, make_checkpoint: Callable[..., Path]) -> None:
    model = build(make_checkpoint(architecture), device=torch.device("cpu"))
    for parameter in model.parameters():
        parameter.fill_(0.0)
    for slot in model.weight_slots():
        slot.target.add_(1.0)
    assert all(bool((parameter == 1.0).all()) for parameter in model.parameters())


@EVERY_DECODER
def test_shares_of_two_ranks_cover_each_tensor(architecture: str, make_checkpoint: Callable[..., Path]) -> None:
    directory = make_checkpoint(architecture)
    first, second = (list(build(directory, ParallelLayout(2, rank)).weight_slots()) for rank in range(2))
    split = 0
    for one, other in zip(first, second, strict=True):
        assert one.name == other.name and one.stored_shape == other.stored_shape
        if one.shard is None or other.shard is None:
            assert one.shard is other.shard is None
            continue
        split += 1
        assert (one.shard.start, one.shard.stop) == (0, other.shard.start)
        assert other.shard.stop == one.shard.size == other.shard.size
    assert split > len(first) / 3


def test_heads_that_do_not_divide_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="must be divisible by the tensor parallel size 3"):
        build(make_checkpoint("LlamaForCausalLM"), ParallelLayout(3, 0))


def test_tied_embeddings_hold_one_tensor(make_checkpoint: Callable[..., Path]) -> None:
    tied = build(make_checkpoint("LlamaForCausalLM", tie_word_embeddings=True))
    assert "lm_head.weight" not in {slot.name for slot in tied.weight_slots()}
    assert tied.ignored_weights("lm_head.weight")
    assert not build(make_checkpoint("LlamaForCausalLM")).ignored_weights("lm_head.weight")


def test_prediction_layers_behind_the_decoder_are_ignored(make_checkpoint: Callable[..., Path]) -> None:
    model = build(make_checkpoint("DeepseekV3ForCausalLM", num_nextn_predict_layers=1))
    assert model.ignored_weights("model.layers.3.eh_proj.weight")
    assert not model.ignored_weights("model.layers.2.eh_proj.weight")
    assert not model.ignored_weights("model.layers.4.eh_proj.weight")


def test_latent_up_projection_is_a_view_of_the_loaded_weight(make_checkpoint: Callable[..., Path]) -> None:
    model = build(make_checkpoint("DeepseekV3ForCausalLM"), device=torch.device("cpu"))
    attention = model.get_submodule("layers.0.attention")
    assert attention.up_projection.data_ptr() == attention.kv_b_proj.weight.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"])
def test_a_decode_step_reads_no_value_on_the_host(architecture: str, make_checkpoint: Callable[..., Path]) -> None:
    dense = {"first_k_dense_replace": 3} if architecture.startswith("Deepseek") else {}
    model = build(make_checkpoint(architecture, **dense))
    assert decode_once(model).shape == (3, model.config.vocab_size)


def test_the_plain_experts_do_read_on_the_host(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        decode_once(build(make_checkpoint("Qwen3MoeForCausalLM")))


def chunks_beside_decoding() -> ForwardContext:
    """A request that decodes behind 5 tokens, and chunks of 4 and 3 tokens of which the second has 2 before it."""
    return ForwardContext(
        positions=torch.tensor([5, 0, 1, 2, 3, 2, 3, 4]),
        slots=torch.tensor([16 + 5, 32, 33, 34, 35, 48 + 2, 48 + 3, 48 + 4]),
        block_table=torch.tensor([[1], [2], [3]], dtype=torch.int32),
        context_lens=torch.tensor([6, 4, 5], dtype=torch.int32),
        num_decode=1,
        prefill_query_lens=(4, 3),
        prefill_context_lens=(4, 5),
    )


@EVERY_DECODER
@pytest.mark.parametrize("wanted", [[0, 4, 7], [2], list(range(8))], ids=str)
def test_the_last_layer_feeds_forward_only_the_tokens_that_are_wanted(
    architecture: str, wanted: list[int], make_checkpoint: Callable[..., Path]
) -> None:
    model = build(make_checkpoint(architecture), device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(generator=generator).div_(parameter.shape[-1] ** 0.5)
    spec = kv_cache_spec(model.config, ParallelLayout(), "float32")
    stored = allocate_kv_tensors(spec, 5, 16, torch.device("cpu"))
    for part in itertools.chain.from_iterable(stored):
        part.normal_(generator=generator)
    caches = [tuple(part.clone() for part in cache) for cache in stored]
    input_ids, context = torch.randint(5, 100, (8,), generator=generator), chunks_beside_decoding()
    fed: list[int] = []
    for layer in model.layers:
        mlp = layer.get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda _, arguments: fed.append(len(arguments[0])))
    with torch.inference_mode():
        every = model(input_ids, context, stored)
        some = model(input_ids, chunks_beside_decoding(), caches, torch.tensor(wanted))
    layers = len(model.layers)
    assert fed == [8] * layers + [8] * (layers - 1) + [len(wanted)]
    torch.testing.assert_close(some, every[wanted])
    for one, other in zip(stored, caches, strict=True):
        for part, same in zip(one, other, strict=True):
            assert torch.equal(part, same)
