"""Sparse attention in whole models: selections against transformers, and dense attention where they are everything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_engine.kvcache.tensors import allocate_kv_tensors
from omni_engine.models.config_parser import parse_config
from omni_engine.models.forward_context import ForwardContext
from omni_engine.models.kv_spec import kv_cache_spec
from omni_engine.models.layers import dsa
from omni_engine.models.layers.decoder import CausalDecoder
from omni_engine.models.layers.dsa import SparseMLAAttention
from omni_engine.models.layers.mla import MLAAttention
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve
from omni_engine.models.weights import load_weights
from omni_engine.ops.dsa import indexer_scores

ARCHITECTURES = ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"]
LENGTH, TOPK, BLOCK_SIZE = 57, 8, 4
SAME = 1e-5  # scores that differ by less are one score, summed in another order


def load(directory: Path) -> CausalDecoder:
    config = parse_config(json.loads((directory / "config.json").read_text()))
    model = resolve(config.architecture).load_class()(
        config, ParallelLayout(), dtype=torch.float32, device=torch.device("cpu")
    )
    load_weights(model, directory, progress=False)
    return model


def prompt(vocab_size: int, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def run(model: CausalDecoder, tokens: Tensor, prefilled: int, wide: int = 0) -> Tensor:
    """Logits of one request: `prefilled` tokens at once, then token by token, with a block table wider by `wide`."""
    blocks = -(-len(tokens) // BLOCK_SIZE)
    caches = allocate_kv_tensors(
        kv_cache_spec(model.config, ParallelLayout(), "float32"), blocks + 1, BLOCK_SIZE, torch.device("cpu")
    )
    table = torch.zeros(1, blocks + wide, dtype=torch.int32)
    table[0, :blocks] = torch.arange(1, blocks + 1)
    logits = []
    for start, stop in [(0, prefilled), *((at, at + 1) for at in range(prefilled, len(tokens)))]:
        if start == stop:
            continue
        positions = torch.arange(start, stop)
        decodes = stop == start + 1
        context = ForwardContext(
            positions=positions,
            slots=table[0, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_table=table,
            context_lens=torch.tensor([stop], dtype=torch.int32),
            num_decode=int(decodes),
            prefill_query_lens=() if decodes else (stop - start,),
            prefill_context_lens=() if decodes else (stop,),
        )
        logits.append(model.logits(model(tokens[start:stop], context, caches)))
    return torch.cat(logits)


@contextmanager
def watched_selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(scores [tokens, context], selection bool) of each layer of a prefill in one chunk."""
    seen: list[tuple[Tensor, Tensor]] = []
    plain = dsa.lightning_indexer_prefill

    def watch(query: Tensor, weights: Tensor, cache: Tensor, table: Tensor, *arguments: Any) -> Any:
        masks = plain(query, weights, cache, table, *arguments)
        keys = cache[table[0].long()].flatten(0, 2)[: len(query)]
        seen.append((indexer_scores(query[None], weights[None], keys[None])[0], masks[0]))
        return masks

    with monkeypatch.context() as patch:
        patch.setattr(dsa, "lightning_indexer_prefill", watch)
        yield seen


def their_selections(model: Any, tokens: Tensor) -> list[Tensor]:
    """int [tokens, topk] of each layer; where a token sees fewer, transformers fills up with later ones."""
    found: list[Tensor] = []
    hooks = [
        layer.self_attn.indexer.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(tokens[None])
    for hook in hooks:
        hook.remove()
    return found


def differing_tokens(scores: Tensor, ours: Tensor, theirs: Tensor) -> list[int]:
    """Tokens whose selections have other scores: the same scores may lie at other positions."""
    found = []
    for token in range(len(scores)):
        seen = theirs[token][theirs[token] <= token].long()
        mine, its = scores[token][ours[token]].sort().values, scores[token][seen].sort().values
        if mine.shape != its.shape or float((mine - its).abs().max()) > SAME:
            found.append(token)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_layer_selects_tokens_with_the_scores_that_transformers_selects(
    architecture: str, make_checkpoint: Callable[..., Path], reference_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(architecture)
    model = load(directory)
    tokens = prompt(model.config.vocab_size)
    with watched_selections(monkeypatch) as ours:
        run(model, tokens, LENGTH)
    theirs = their_selections(reference_model(directory), tokens)
    assert len(ours) == len(theirs) == model.config.num_layers
    for (scores, mask), selected in zip(ours, theirs, strict=True):
        assert mask.sum(-1).tolist() == [min(TOPK, token + 1) for token in range(LENGTH)]
        assert differing_tokens(scores, mask, selected) == []
        # Negative control: selections of the token before must be seen to differ.
        assert len(differing_tokens(scores, mask, selected.roll(1, 0))) > LENGTH // 2


def test_with_two_heads_many_scores_tie_and_the_selected_scores_still_equal_transformers(
    make_checkpoint: Callable[..., Path], reference_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint("DeepseekV32ForCausalLM", index_n_heads=2)
    model = load(directory)
    tokens = prompt(model.config.vocab_size)
    with watched_selections(monkeypatch) as ours:
        run(model, tokens, LENGTH)
    # The first layer only: whoever takes another of two equal tokens computes another context for the next layer.
    (scores, mask), selected = ours[0], their_selections(reference_model(directory), tokens)[0]
    assert differing_tokens(scores, mask, selected) == []
    zeros = (scores == 0) & torch.ones_like(scores, dtype=torch.bool).tril()
    split = zeros & mask
    cut = [token for token in range(LENGTH) if split[token].any() and (zeros[token] & ~mask[token]).any()]
    assert len(cut) > 5, "no selection ends among ties, so this tests nothing"
    for token in cut:
        chosen, left = split[token].nonzero(), (zeros[token] & ~mask[token]).nonzero()
        assert int(chosen.max()) < int(left.min()), "ties break to the lower position"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefilled", [LENGTH, 5])
def test_with_a_selection_as_long_as_the_context_it_is_dense_latent_attention(
    architecture: str, prefilled: int, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_checkpoint(architecture, index_topk=LENGTH)
    model = load(directory)
    tokens = prompt(model.config.vocab_size)
    narrow, wide = run(model, tokens, prefilled), run(model, tokens, prefilled, wide=20)
    monkeypatch.setattr(SparseMLAAttention, "forward", MLAAttention.forward)
    dense = run(model, tokens, prefilled)
    assert torch.equal(narrow, dense)  # the table has no more tokens than the selection: the indexer is left out
    assert float((wide - dense).abs().max()) < 1e-4 * float(dense.std())  # it selects, and finds everything
    monkeypatch.undo()
    for layer in model.layers:
        layer.attention.topk = TOPK  # type: ignore[union-attr]
    assert float((run(model, tokens, prefilled) - dense).abs().max()) > 0.01 * float(dense.std())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_and_decode_select_and_compute_the_same(
    architecture: str, make_checkpoint: Callable[..., Path]
) -> None:
    model = load(make_checkpoint(architecture))
    tokens = prompt(model.config.vocab_size)
    whole = run(model, tokens, LENGTH)
    for prefilled, wide in ((0, 0), (20, 0), (20, 9)):
        assert float((run(model, tokens, prefilled, wide) - whole).abs().max()) < 1e-4 * float(whole.std())


def test_bfloat16_keeps_the_weights_of_index_heads_and_the_key_norm_in_float32(
    make_checkpoint: Callable[..., Path],
) -> None:
    directory = make_checkpoint("DeepseekV32ForCausalLM")
    config = parse_config(json.loads((directory / "config.json").read_text()))
    model = resolve(config.architecture).load_class()(
        config, ParallelLayout(), dtype=torch.bfloat16, device=torch.device("meta")
    )
    kept = {name.split(".", 2)[2] for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert {name for name in kept if "indexer" in name} == {
        "attention.indexer.weights_proj",
        "attention.indexer.key_norm.weight",
        "attention.indexer.key_norm.bias",
    }
