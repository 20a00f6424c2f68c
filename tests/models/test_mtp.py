"""The prediction layer against transformers' own and the paper's formula; what it stores, drafts and loads."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from omni_engine.engine.config import DEMO_MODEL
from omni_engine.kvcache.tensors import allocate_kv_tensors
from omni_engine.models.config import ModelConfig
from omni_engine.models.config_parser import parse_config
from omni_engine.models.forward_context import ForwardContext
from omni_engine.models.kv_spec import kv_cache_spec
from omni_engine.models.layers.decoder import CausalDecoder
from omni_engine.models.layers.mtp import MultiTokenPredictor
from omni_engine.models.layers.placement import Placement
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve
from omni_engine.models.weights import load_weights

BOUND = 1e-4  # of the standard deviation of what is compared
CPU = torch.device("cpu")
BLOCK_SIZE = 4
CHUNK = 13
LENGTHS = (40, 9, 27, 53)  # chunks of 13 leave one token over, which decodes beside the chunks
DEMOS = ("deepseek", "deepseek-v32")
ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
MODELS = (*ARCHITECTURES, *DEMOS)


@pytest.fixture
def predicting(make_predicting_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """`predicting(name)`: a demo model, or a random checkpoint of the architecture."""
    return lambda name: DEMO_MODEL.parent / name if name in DEMOS else make_predicting_checkpoint(name)


def built(folder: Path) -> tuple[CausalDecoder, MultiTokenPredictor]:
    config = parse_config(json.loads((folder / "config.json").read_text()))
    model = resolve(config.architecture).load_class()(config, ParallelLayout(), dtype=torch.float32, device=CPU)
    return model, MultiTokenPredictor(model, Placement(ParallelLayout(), torch.float32, CPU, model.ops))


def loaded(folder: Path) -> tuple[CausalDecoder, MultiTokenPredictor]:
    model, predictor = built(folder)
    load_weights(model, folder, progress=False)
    load_weights(predictor, folder, progress=False)
    return model, predictor


def texts_of(name: str, config: ModelConfig) -> list[Tensor]:
    """Random tokens; for the demos the beginnings of two chapters, longer than the sparse one reads."""
    if name in DEMOS:
        return [tokens[:150] for tokens in chapters()]
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(config.vocab_size, (length,), generator=generator) for length in LENGTHS]


def chapters() -> list[Tensor]:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    excerpt = (DEMO_MODEL / "held_out.txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    return [torch.tensor([*tokenizer.encode(text).ids, 1]) for text in excerpt]


class PagedRun:
    """Requests through one paged cache of decoder and prediction layer, whose blocks are dealt out in random order."""

    def __init__(self, config: ModelConfig, lengths: list[int]) -> None:
        self.lengths = lengths
        needed = [-(-length // BLOCK_SIZE) for length in lengths]
        shuffled = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)) + 1  # 0: the null block
        self.tables = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
        for row, blocks in enumerate(shuffled.split(needed)):
            self.tables[row, : len(blocks)] = blocks
        spec = kv_cache_spec(config, ParallelLayout(), "float32", num_extra_layers=1)
        caches = allocate_kv_tensors(spec, sum(needed) + 1, BLOCK_SIZE, CPU)
        assert len(caches) == config.num_layers + 1
        for part in (part for cache in caches for part in cache):
            part.fill_(30.0)  # whoever reads a slot that was not written is seen
        self.decoder_caches, self.predictor_caches = caches[:-1], caches[-1:]

    def steps(self, chunk: int, as_decode: bool) -> Iterator[tuple[list[tuple[int, slice]], ForwardContext]]:
        """Every request goes on by `chunk` tokens, or what it has left. Yields which tokens of which request, in the
        order of the context; single tokens decode, if `as_decode`."""
        for start in range(0, max(self.lengths), chunk):
            counts = {row: min(chunk, length - start) for row, length in enumerate(self.lengths) if length > start}
            decoding = [row for row, count in counts.items() if count == 1 and as_decode]
            order = decoding + [row for row in counts if row not in decoding]
            yield (
                [(row, slice(start, start + counts[row])) for row in order],
                self.context({row: range(start, start + counts[row]) for row in order}, len(decoding)),
            )

    def context(self, tokens: dict[int, range], num_decode: int) -> ForwardContext:
        positions = torch.cat([torch.arange(part.start, part.stop) for part in tokens.values()])
        rows = torch.cat([torch.full((len(part),), row) for row, part in tokens.items()])
        chunks = list(tokens.values())[num_decode:]
        return ForwardContext(
            positions=positions,
            slots=self.tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_table=self.tables[list(tokens)],
            context_lens=torch.tensor([part.stop for part in tokens.values()], dtype=torch.int32),
            num_decode=num_decode,
            prefill_query_lens=tuple(len(part) for part in chunks),
            prefill_context_lens=tuple(part.stop for part in chunks),
        )


def decoder_states(model: CausalDecoder, texts: list[Tensor]) -> list[Tensor]:
    """The decoder's states [tokens, hidden] of whole texts."""
    run = PagedRun(model.config, [len(text) for text in texts])
    ((parts, context),) = run.steps(max(run.lengths), as_decode=True)
    assert [row for row, _ in parts] == list(range(len(texts)))
    return list(model(torch.cat(texts), context, run.decoder_caches).split(run.lengths))


def predicted(
    predictor: MultiTokenPredictor,
    config: ModelConfig,
    states: list[Tensor],
    next_ids: list[Tensor],
    chunk: int = CHUNK,
    as_decode: bool = True,
    stored_steps: int = 0,
    lost_step: int | None = None,
) -> list[Tensor]:
    """The layer's states [tokens, hidden] per request, step by step; the first `stored_steps` only store and leave NaN.
    What `lost_step` writes goes to the null block."""
    run = PagedRun(config, [len(ids) for ids in next_ids])
    outputs = [torch.full_like(part[: len(ids)], torch.nan) for part, ids in zip(states, next_ids, strict=True)]
    for step, (parts, context) in enumerate(run.steps(chunk, as_decode)):
        if step == lost_step:
            context = replace(context, slots=torch.zeros_like(context.slots))
        arguments = (
            torch.cat([states[row][part] for row, part in parts]),
            torch.cat([next_ids[row][part] for row, part in parts]),
            context,
            run.predictor_caches,
        )
        if step < stored_steps:
            predictor.store(*arguments)
            continue
        output = predictor(*arguments).split([part.stop - part.start for _, part in parts])
        for (row, part), of_request in zip(parts, output, strict=True):
            outputs[row][part] = of_request
    return outputs


# The references: `(states [tokens, hidden], next ids) -> states [tokens, hidden]` of one request without a cache.
Reference = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def transformers_layer(reference_model: Callable[[Path], Any]) -> Callable[[Path], Reference]:
    """transformers' MtpModel, which finds the layer in the checkpoint by itself."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")

    def make(folder: Path) -> Reference:
        model = reference_model(folder)
        number = model.config.num_hidden_layers
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{number}\."]  # it knows the published number only
        model.config.num_mtp_layers = 1
        model.config.mtp_layer_types, model.config.mtp_mlp_layer_types = ["full_attention"], ["sparse"]
        predictor = layers.MtpModel.from_pretrained(model).eval()
        # GLM's layer returns the tokens it selected too, which MtpModel of transformers 5.23 does not expect
        predictor.layers[0].mtp_block.register_forward_hook(
            lambda _, __, output: output[0] if isinstance(output, tuple) else output
        )

        def predict(states: Tensor, next_ids: Tensor) -> Tensor:
            positions = torch.arange(len(next_ids))[None]
            return predictor.forward_layer(0, states[None], positions, None, input_ids=next_ids[None])[0]

        return predict

    return make


@pytest.fixture(scope="module")
def paper_layer(
    reference_model: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Reference]:
    """The paper's formula, equations 21 to 23: h' = M [RMSNorm(h); RMSNorm(Emb(t))] (the published matrix has the
    halves the other way round), through a transformer block. The block is the checkpoint's layer as the only one of a
    transformers model, whose last norm is the layer's."""

    def make(folder: Path) -> Reference:
        raw = json.loads((folder / "config.json").read_text())
        number, epsilon = raw["num_hidden_layers"], raw["rms_norm_eps"]
        stored = load_file(folder / "model.safetensors")
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        alone = tmp_path_factory.mktemp("block")
        own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
        tensors = {f"model.layers.0.{name}": tensor for name, tensor in layer.items() if name not in own}
        tensors |= {name: stored[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
        save_file(tensors | {"model.norm.weight": layer[own[3]]}, alone / "model.safetensors", {"format": "pt"})
        raw |= {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
        (alone / "config.json").write_text(json.dumps(raw))
        block = reference_model(alone)
        embedding = stored["model.embed_tokens.weight"].float()
        token_norm, state_norm, matrix = (layer[name].float() for name in own[:3])

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight

        def predict(states: Tensor, next_ids: Tensor) -> Tensor:
            joined = torch.cat((norm(embedding[next_ids], token_norm), norm(states, state_norm)), dim=-1) @ matrix.T
            return block.model(inputs_embeds=joined[None]).last_hidden_state[0]

        return predict

    return make


@dataclass(frozen=True)
class Case:
    """What both sides start from."""

    model: CausalDecoder
    predictor: MultiTokenPredictor
    texts: list[Tensor]
    states: list[Tensor]  # of all tokens of each text but the last, by transformers
    reference: Reference


@pytest.fixture(params=["transformers_layer", "paper_layer"])
def case_of(
    request: pytest.FixtureRequest, predicting: Callable[[str], Path], reference_model: Callable[[Path], Any]
) -> Callable[[str], Case]:
    make_reference = request.getfixturevalue(request.param)

    def make(name: str) -> Case:
        folder = predicting(name)
        model, predictor = loaded(folder)
        texts = texts_of(name, model.config)
        body = reference_model(folder).model
        states = [body(text[None]).last_hidden_state[0, :-1] for text in texts]
        return Case(model, predictor, texts, states, make_reference(folder))

    return make


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest of any element, in standard deviations of theirs."""
    worst = max(float((mine - its).abs().max()) for mine, its in zip(ours, theirs, strict=True))
    return worst / float(torch.cat(theirs).std())


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_drafts_of_three_depths_equal_the_references(name: str, case_of: Callable[[str], Case]) -> None:
    """From our decoder's states on; a deeper draft is made of this layer's own states and the tokens that follow."""
    case = case_of(name)
    states = decoder_states(case.model, case.texts)
    ours, theirs = [part[:-1] for part in states], case.states
    for depth in (1, 2, 3):
        ids = [text[depth:] for text in case.texts]
        ours = predicted(case.predictor, case.model.config, ours, ids)
        theirs = [case.reference(part[: len(of)], of) for part, of in zip(theirs, ids, strict=True)]
        bound = depth * BOUND  # each layer adds its rounding to that of the layers before
        assert difference(ours, theirs) <= bound
        logits = [[case.predictor.logits(part) for part in parts] for parts in (ours, theirs)]
        assert torch.equal(logits[1][0], functional.linear(theirs[0], case.model.head.weight))
        assert difference(*logits) <= bound


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("chunk", "as_decode"), [(1000, True), (CHUNK, True), (7, True), (1, True), (1, False)])
@torch.inference_mode()
def test_drafts_do_not_depend_on_the_chunks(
    name: str, chunk: int, as_decode: bool, case_of: Callable[[str], Case]
) -> None:
    case = case_of(name)
    ids = [text[1:] for text in case.texts]
    expected = [case.reference(*pair) for pair in zip(case.states, ids, strict=True)]
    ours = predicted(case.predictor, case.model.config, case.states, ids, chunk, as_decode)
    assert difference(ours, expected) <= BOUND


class NoNorm(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def add(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + residual, hidden + residual


def with_swapped_halves(case: Case) -> list[Tensor]:
    weight = case.predictor.join_proj.weight
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
    return run_of(case)


def with_the_tokens_themselves(case: Case) -> list[Tensor]:
    return run_of(case, [text[:-1] for text in case.texts])


def without_token_norm(case: Case) -> list[Tensor]:
    case.predictor.token_norm = NoNorm()  # type: ignore[assignment]
    return run_of(case)


def without_hidden_norm(case: Case) -> list[Tensor]:
    case.predictor.hidden_norm = NoNorm()  # type: ignore[assignment]
    return run_of(case)


def without_last_norm(case: Case) -> list[Tensor]:
    case.predictor.norm = NoNorm()  # type: ignore[assignment]
    return run_of(case)


def with_a_lost_cache_write(case: Case) -> list[Tensor]:
    return run_of(case, lost_step=1)


def with_the_last_decoder_layer(case: Case) -> list[Tensor]:
    case.predictor.layer = case.model.layers[-1]  # type: ignore[assignment]
    return run_of(case)


def run_of(case: Case, next_ids: list[Tensor] | None = None, **arguments: Any) -> list[Tensor]:
    next_ids = next_ids or [text[1:] for text in case.texts]
    return predicted(case.predictor, case.model.config, case.states, next_ids, **arguments)


FAULTS = (
    with_swapped_halves,
    with_the_tokens_themselves,
    without_token_norm,
    without_hidden_norm,
    without_last_norm,
    with_a_lost_cache_write,
    with_the_last_decoder_layer,
)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fault", FAULTS)
@torch.inference_mode()
def test_the_comparison_fails_when_a_part_is_wrong(
    name: str, fault: Callable[[Case], list[Tensor]], case_of: Callable[[str], Case]
) -> None:
    case = case_of(name)
    expected = [case.reference(state, text[1:]) for state, text in zip(case.states, case.texts, strict=True)]
    assert difference(run_of(case), expected) <= BOUND
    assert difference(fault(case), expected) > 100 * BOUND


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("chunk", "stored_steps"), [(CHUNK, 1), (4, 5), (1, 8)])
@torch.inference_mode()
def test_tokens_that_were_only_stored_are_attended_to_as_others(
    name: str, chunk: int, stored_steps: int, predicting: Callable[[str], Path]
) -> None:
    model, predictor = loaded(predicting(name))
    texts = [text[:60] for text in texts_of(name, model.config)]
    states, ids = decoder_states(model, texts), [text[1:] for text in texts]
    states = [part[:-1] for part in states]
    whole = predicted(predictor, model.config, states, ids, chunk)
    rest = predicted(predictor, model.config, states, ids, chunk, stored_steps=stored_steps)
    first = chunk * stored_steps
    assert all(part[:first].isnan().all() for part in rest)
    compared = [row for row, part in enumerate(rest) if len(part) > first]
    assert difference([rest[row][first:] for row in compared], [whole[row][first:] for row in compared]) <= BOUND
    lost = predicted(predictor, model.config, states, ids, chunk, stored_steps=stored_steps, lost_step=0)
    assert difference([lost[row][first:] for row in compared], [whole[row][first:] for row in compared]) > 100 * BOUND


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("DeepseekV32ForCausalLM", {}),
        ("DeepseekV3ForCausalLM", {"attention_bias": True}),
        ("DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    ],
    ids=["sparse", "biases", "no-low-rank-query"],
)
@torch.inference_mode()
def test_storing_writes_what_the_layer_writes_and_nothing_else(
    architecture: str, overrides: dict[str, Any], make_predicting_checkpoint: Callable[..., Path]
) -> None:
    model, predictor = loaded(make_predicting_checkpoint(architecture, **overrides))
    (text, *_) = texts_of("", model.config)
    (states,) = decoder_states(model, [text])
    runs = [PagedRun(model.config, [len(text) - 1]) for _ in range(2)]
    for run, call in zip(runs, (predictor, predictor.store), strict=True):
        ((_, context),) = run.steps(1000, as_decode=True)
        call(states[:-1], text[1:], context, run.predictor_caches)
    for stored, written in zip(runs[1].predictor_caches[0], runs[0].predictor_caches[0], strict=True):
        torch.testing.assert_close(stored, written, rtol=1e-5, atol=1e-5)
        assert int((stored != 30.0).flatten(2).any(-1).sum()) == len(text) - 1  # a slot per token
    for cache in runs[1].decoder_caches:
        assert all(bool((part == 30.0).all()) for part in cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_decode_step_is_exported_and_reads_nothing_on_the_host(
    architecture: str, make_predicting_checkpoint: Callable[..., Path]
) -> None:
    """With a dense feed-forward: the plain experts do read on the host, as in the decoder."""
    model, predictor = loaded(make_predicting_checkpoint(architecture, first_k_dense_replace=4))
    run = PagedRun(model.config, [20, 30])
    context = run.context({0: range(19, 20), 1: range(29, 30)}, 2)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = predictor

        def forward(
            self, states: Tensor, next_ids: Tensor, tensors: tuple[Tensor, ...], caches: list[tuple[Tensor, ...]]
        ) -> tuple[Tensor, Tensor]:
            context = ForwardContext(*tensors, num_decode=2)
            self.predictor.store(states, next_ids, context, caches)
            deeper = self.predictor(states, next_ids, context, caches)
            return deeper, self.predictor.logits(deeper)

    tensors = (context.positions, context.slots, context.block_table, context.context_lens)
    states, next_ids = torch.randn(2, model.config.hidden_size), torch.tensor([3, 5])
    copies = [tuple(part.clone() for part in cache) for cache in run.predictor_caches]
    expected = Step()(states, next_ids, tensors, copies)
    program = torch.export.export(Step(), (states, next_ids, tensors, run.predictor_caches), strict=False)
    outputs = program.module()(states, next_ids, tensors, run.predictor_caches)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)
    for part, wanted in zip(run.predictor_caches[0], copies[0], strict=True):
        torch.testing.assert_close(part, wanted)


# Drafts as a server makes them


@pytest.fixture
def demo_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """`demo_model(name)`: the demo as its training script has it, with the bundled weights."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(DEMO_MODEL.parent))

    def load(name: str) -> Any:
        scripts = importlib.import_module("model")
        model = scripts.dense_model() if name == "deepseek" else importlib.import_module("sparse").sparse_model()
        assert scripts.load_published(model, DEMO_MODEL.parent / name) == []
        return model.eval()

    yield load
    for name in {"corpus", "model", "sparse"} - before:
        sys.modules.pop(name, None)


def drafts_of(
    model: CausalDecoder, predictor: MultiTokenPredictor, text: Tensor, states: Tensor, places: list[int], depth: int
) -> list[list[int]]:
    """Greedy drafts behind text[: place + 1] for each place: the known entries in one chunk, then token by token, each
    at the position after the last, over the entries that earlier drafts left there."""
    run = PagedRun(model.config, [len(text) + depth])
    ((_, context),) = PagedRun(model.config, [len(text) - 1]).steps(len(text), as_decode=True)
    context = replace(run.context({0: range(len(text) - 1)}, 0), positions=context.positions)
    first = predictor(states[: len(text) - 1], text[1:], context, run.predictor_caches)
    entries = [part.clone() for part in run.predictor_caches[0]]
    drafts = []
    for place in places:
        for part, known in zip(run.predictor_caches[0], entries, strict=True):
            part.copy_(known)
        state, of_place = first[place - 1 : place], []
        for position in range(place, place + depth):
            of_place.append(int(predictor.logits(state).argmax()))
            if len(of_place) < depth:
                context = run.context({0: range(position, position + 1)}, 1)
                state = predictor(state, torch.tensor(of_place[-1:]), context, run.predictor_caches)
        drafts.append(of_place)
    return drafts


@pytest.mark.parametrize("name", DEMOS)
@torch.inference_mode()
def test_greedy_drafts_of_the_demo_are_those_of_its_training_script(
    name: str, demo_model: Callable[[str], Any]
) -> None:
    """Over all of `models/demo/model.py`, whose drafts attend to the known tokens and the drafts before, no cache."""
    reference = demo_model(name)
    model, predictor = loaded(DEMO_MODEL.parent / name)
    agreed, swapped_agreed, drafted = [0, 0, 0], 0, 0
    for text in chapters():
        states = decoder_states(model, [text])[0]
        places = list(range(9, len(text) - 1, 23))
        expected = [reference.draft(text[: place + 1], states[:place], 3) for place in places]
        weight = predictor.join_proj.weight
        ours = drafts_of(model, predictor, text, states, places, 3)
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
        swapped = drafts_of(model, predictor, text, states, places, 3)
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))
        for depth in range(3):
            agreed[depth] += sum(mine[depth] == its[depth] for mine, its in zip(ours, expected, strict=True))
        swapped_agreed += sum(wrong == its for wrong, its in zip(swapped, expected, strict=True))
        drafted += len(places)
    assert drafted > 50
    assert agreed == [drafted] * 3
    assert swapped_agreed < 0.1 * drafted


@pytest.mark.parametrize("name", DEMOS)
@torch.inference_mode()
def test_the_demo_drafts_as_its_training_recorded(name: str) -> None:
    """The share of the excerpt's tokens for which the layer's choice is the decoder's, given the text."""
    model, predictor = loaded(DEMO_MODEL.parent / name)
    texts = chapters()
    states = decoder_states(model, texts)
    ids = [text[1:] for text in texts]
    recorded = json.loads((DEMO_MODEL.parent / name / "training.json").read_text())["excerpt"]["mtp_agrees_with_greedy"]
    chosen = torch.cat([model.logits(part[1:-1]).argmax(-1) for part in states])

    def agreement(next_ids: list[Tensor]) -> float:
        drafts = predicted(predictor, model.config, states, next_ids, chunk=64)
        return float((torch.cat([predictor.logits(part[:-1]).argmax(-1) for part in drafts]) == chosen).float().mean())

    assert agreement(ids) == pytest.approx(recorded, abs=0.002)
    assert agreement([text[:-1] for text in texts]) < recorded - 0.2
