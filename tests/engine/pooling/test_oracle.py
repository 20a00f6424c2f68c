"""Embeddings and scores against transformers and sentence-transformers, of re-randomised checkpoints."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from omni_engine import LLM, PoolingParams
from omni_engine.models.bert import BertEncoder
from omni_engine.models.layers.norm import LayerNorm

BOUND = 1e-4
MakeCheckpoint = Callable[..., Path]
TEXTS = [
    "The harbour lies below the town.",
    "A",
    "Was man nicht weiß, das eben brauchte man, und was man weiß, kann man nicht brauchen. Three plus four is seven.",
    "def step(self): return self.execute(plan)",
    "今天天气很好，我们去海边走走。 Привет, мир!",
]
PAIRS = [("Where is the harbour?", text) for text in TEXTS]
needs_sentence_transformers = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed"
)


def pooling(kind: str, size: int) -> tuple[str, dict[str, Any]]:
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    return "Pooling", {"word_embedding_dimension": size, **{f"pooling_mode_{name}": name == kind for name in names}}


def dense(inputs: int, outputs: int, activation: str, *, bias: bool = True) -> tuple[str, dict[str, Any]]:
    name = f"torch.nn.modules.{activation}"
    return "Dense", {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": name}


def token_ids(folder: Path, *texts: str) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(*texts, return_tensors="pt"))


def difference(outputs: list[Any], expected: list[torch.Tensor]) -> float:
    """The largest, over what every prompt came to."""
    return max(
        float(np.abs(output.outputs.data - one.detach().numpy()).max())
        for output, one in zip(outputs, expected, strict=True)
    )


def states(model: Any, folder: Path, text: str) -> torch.Tensor:
    with torch.no_grad():
        inputs = token_ids(folder, text)
        if model.config.model_type not in ("bert",):
            inputs.pop("token_type_ids", None)
        return model(**inputs).last_hidden_state[0]


@pytest.mark.parametrize("architecture", ["MistralModel", "Qwen3Model", "LlamaModel", "Qwen2Model"])
def test_a_decoder_pools_its_last_token(make_pooling_checkpoint: MakeCheckpoint, architecture: str) -> None:
    """As E5-Mistral (arXiv:2401.00368) is published: a body alone, the state of the end token, scaled to length 1."""
    overrides = {"sliding_window": 11} if architecture == "MistralModel" else {}
    folder = make_pooling_checkpoint(architecture, **overrides)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = [functional.normalize(states(model, folder, text)[-1], dim=0) for text in TEXTS]
    llm = LLM(str(folder), max_num_batched_tokens=16, max_num_seqs=3)
    assert difference(llm.encode(TEXTS, use_tqdm=False), expected) < BOUND
    raw = [states(model, folder, text)[-1] for text in TEXTS]
    outputs = llm.encode(TEXTS, PoolingParams(use_activation=False), use_tqdm=False)
    assert difference(outputs, raw) < BOUND
    wrong = [functional.normalize(states(model, folder, text)[-2], dim=0) for text in TEXTS]
    assert difference(llm.encode(TEXTS, use_tqdm=False), wrong) > 100 * BOUND


@pytest.mark.parametrize(("kind", "pick"), [("CLS", lambda s: s[0]), ("MEAN", lambda s: s.mean(0))])
def test_pieces_of_a_prompt_are_pooled_together(
    make_pooling_checkpoint: MakeCheckpoint, kind: str, pick: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    folder = make_pooling_checkpoint("Qwen3ForCausalLM")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = [functional.normalize(pick(states(model, folder, text)), dim=0) for text in TEXTS]
    config = {"seq_pooling_type": kind}
    llm = LLM(str(folder), runner="pooling", pooler_config=config, max_num_batched_tokens=7, max_num_seqs=3)
    assert max(len(token_ids(folder, text)["input_ids"][0]) for text in TEXTS) > 3 * 7
    for _ in range(2):  # what the prefix cache holds must not be missing the second time
        assert difference(llm.encode(TEXTS, use_tqdm=False), expected) < BOUND
    wrong = [functional.normalize(states(model, folder, text)[-1], dim=0) for text in TEXTS]
    assert difference(llm.encode(TEXTS, use_tqdm=False), wrong) > 100 * BOUND


@pytest.mark.parametrize("kind", ["LAST", "MEAN"])
def test_no_vector_depends_on_what_else_is_computed(make_pooling_checkpoint: MakeCheckpoint, kind: str) -> None:
    """Few blocks and more urgent prompts: pieces, cached prefixes, preemptions and steps in flight."""
    folder = make_pooling_checkpoint("Qwen3ForCausalLM")
    options: dict[str, Any] = {"runner": "pooling", "pooler_config": {"seq_pooling_type": kind}}
    generator = np.random.default_rng(4)
    shared = generator.integers(4, 400, size=30).tolist()
    prompts: list[Any] = [
        shared[: generator.integers(0, 30)] + generator.integers(4, 400, size=generator.integers(1, 34)).tolist()
        for _ in range(40)
    ]
    alone = LLM(str(folder), enable_prefix_caching=False, async_scheduling=False, **options)
    expected = [torch.tensor(alone.encode(prompt, use_tqdm=False)[0].outputs.data) for prompt in prompts]
    crowded = LLM(
        str(folder), num_gpu_blocks_override=22, block_size=4, max_model_len=64, max_num_seqs=6,
        max_num_batched_tokens=11, scheduling_policy="priority", **options,
    )  # fmt: skip
    engine = crowded.llm_engine
    found: dict[int, Any] = {}
    for index, prompt in enumerate(prompts):  # later ones are more urgent
        engine.add_request(str(index), prompt, PoolingParams(), priority=-index)
        for output in engine.step():
            found[int(output.request_id)] = output
    while engine.has_unfinished_requests():
        for output in engine.step():
            found[int(output.request_id)] = output
    engine.check_integrity()
    assert engine.stats().num_preemptions > 0
    assert (sum(output.num_cached_tokens for output in found.values()) > 0) == (kind == "LAST")
    assert difference([found[index] for index in range(len(prompts))], expected) < BOUND


def test_every_token_of_a_prompt_gets_a_vector(make_pooling_checkpoint: MakeCheckpoint) -> None:
    folder = make_pooling_checkpoint("Qwen3ForCausalLM")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = [functional.normalize(states(model, folder, text), dim=1) for text in TEXTS]
    llm = LLM(str(folder), runner="pooling", max_num_batched_tokens=9, max_num_seqs=3)
    for _ in range(2):
        outputs = llm.encode(TEXTS, pooling_task="token_embed", use_tqdm=False)
        assert [output.outputs.shape for output in outputs] == [tuple(one.shape) for one in expected]
        assert difference(outputs, expected) < BOUND


@pytest.mark.parametrize("architecture", ["BertModel", "XLMRobertaModel", "RobertaModel"])
def test_an_encoder_pools_its_first_token(make_pooling_checkpoint: MakeCheckpoint, architecture: str) -> None:
    folder = make_pooling_checkpoint(architecture)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    expected = [functional.normalize(states(model, folder, text)[0], dim=0) for text in TEXTS]
    llm = LLM(str(folder))
    assert difference(llm.encode(TEXTS, use_tqdm=False), expected) < BOUND


def test_a_pooling_engine_generates_nothing(make_pooling_checkpoint: MakeCheckpoint) -> None:
    llm = LLM(str(make_pooling_checkpoint("BertModel")))
    with pytest.raises(ValueError, match="cannot generate"):
        llm.generate("a", use_tqdm=False)
    with pytest.raises(ValueError, match="task"):
        llm.classify("a", use_tqdm=False)
    with pytest.raises(ValueError, match="matryoshka"):
        llm.embed("a", pooling_params=PoolingParams(dimensions=4), use_tqdm=False)
    with pytest.raises(ValueError, match="maximum context length is 130"):
        llm.embed({"prompt_token_ids": [5] * 131}, use_tqdm=False)
    longest = llm.embed({"prompt_token_ids": [5] * 130}, use_tqdm=False)
    assert len(longest[0].prompt_token_ids) == 130


def _shift_positions(model: BertEncoder) -> None:
    model.positions.weight.copy_(model.positions.weight.roll(1, 0))


def _drop_norm_bias(model: BertEncoder) -> None:
    for module in model.modules():
        if isinstance(module, LayerNorm):
            module.bias.zero_()


def _take_relu(model: BertEncoder) -> None:
    for layer in model.layers:
        layer.activation = "relu"  # type: ignore[assignment]


def _other_token_type(model: BertEncoder) -> None:
    model.token_types.weight.copy_(model.token_types.weight.flip(0))


@pytest.mark.parametrize("fault", [_shift_positions, _drop_norm_bias, _take_relu, _other_token_type])
def test_a_fault_in_an_encoder_is_noticed(
    make_pooling_checkpoint: MakeCheckpoint, fault: Callable[[BertEncoder], None]
) -> None:
    folder = make_pooling_checkpoint("BertModel")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    expected = [functional.normalize(states(model, folder, text)[0], dim=0) for text in TEXTS]
    llm = LLM(str(folder))
    with torch.no_grad():
        fault(llm.llm_engine._core.runner.model.body)
    assert difference(llm.encode(TEXTS, use_tqdm=False), expected) > BOUND


def logits(model: Any, folder: Path, *texts: str) -> torch.Tensor:
    with torch.no_grad():
        inputs = token_ids(folder, *texts)
        if model.config.model_type != "bert":
            inputs.pop("token_type_ids", None)
        return model(**inputs).logits[0]


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "XLMRobertaForSequenceClassification"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_cross_encoder_scores_pairs(
    make_pooling_checkpoint: MakeCheckpoint, architecture: str, num_labels: int
) -> None:
    folder = make_pooling_checkpoint(architecture, num_labels=num_labels)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    llm = LLM(str(folder))
    activate = torch.sigmoid if num_labels == 1 else (lambda values: values.softmax(-1))
    expected = [activate(logits(model, folder, *pair)) for pair in PAIRS]
    prompts: list[Any] = [{"prompt": query, "text_pair": text} for query, text in PAIRS]
    assert difference(llm.encode(prompts, use_tqdm=False), expected) < BOUND
    raw = [logits(model, folder, *pair) for pair in PAIRS]
    assert difference(llm.encode(prompts, PoolingParams(use_activation=False), use_tqdm=False), raw) < BOUND
    if num_labels == 1:
        scores = [output.outputs.score for output in llm.score(PAIRS[0][0], TEXTS, use_tqdm=False)]
        assert scores == pytest.approx([float(one) for one in expected], abs=BOUND)
        joined = [logits(model, folder, " ".join(pair)) for pair in PAIRS]  # the control: not as two texts
        assert max(abs(a - float(torch.sigmoid(b))) for a, b in zip(scores, joined, strict=True)) > 100 * BOUND
    else:
        probs = [output.outputs.probs for output in llm.classify(TEXTS, use_tqdm=False)]
        expected = [logits(model, folder, text).softmax(-1) for text in TEXTS]
        assert np.abs(np.array(probs) - torch.stack(expected).numpy()).max() < BOUND
        with pytest.raises(ValueError, match="one label"):
            llm.score("a", "b")


@pytest.mark.parametrize("architecture", ["Qwen2ForSequenceClassification", "LlamaForSequenceClassification"])
def test_a_decoder_classifies_by_its_last_token(make_pooling_checkpoint: MakeCheckpoint, architecture: str) -> None:
    folder = make_pooling_checkpoint(architecture, num_labels=4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    expected = [logits(model, folder, text).softmax(-1) for text in TEXTS]
    llm = LLM(str(folder), max_num_batched_tokens=16, max_num_seqs=4)
    assert difference(llm.encode(TEXTS, use_tqdm=False), expected) < BOUND


def test_yes_and_no_are_the_score_of_a_reranker(make_pooling_checkpoint: MakeCheckpoint) -> None:
    """Qwen3-Reranker's published rule (its model card): softmax over the logits of "no" and "yes" of the last token."""
    for tied in (False, True):
        folder = make_pooling_checkpoint("Qwen3ForCausalLM", tie_word_embeddings=tied)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        answers = [tokenizer.convert_tokens_to_ids(token) for token in ("no", "yes")]
        assert None not in answers and 3 not in answers
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        overrides = {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": ["no", "yes"],
            "is_original_qwen3_reranker": True,
        }
        llm = LLM(str(folder), hf_overrides=overrides, max_num_batched_tokens=16, max_num_seqs=4)
        template = "<Instruct>: judge\n<Query>: {{ messages[0].content }}\n<Document>: {{ messages[1].content }}"
        outputs = llm.score(PAIRS[0][0], TEXTS, chat_template=template, use_tqdm=False)
        expected = []
        for query, text in PAIRS:
            prompt = f"<Instruct>: judge\n<Query>: {query}\n<Document>: {text}"
            inputs = tokenizer(prompt, return_tensors="pt")
            with torch.no_grad():
                last = model(input_ids=inputs["input_ids"]).logits[0, -1]
            expected.append(float(last[answers].softmax(-1)[1]))
        scores = [output.outputs.score for output in outputs]
        assert scores == pytest.approx(expected, abs=BOUND)
        assert scores != pytest.approx([1 - one for one in expected], abs=100 * BOUND)


def test_a_reward_model_rates_every_token(make_pooling_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Qwen2.5-Math-RM's head (its published modeling code): two linear layers with ReLU between, of each state."""
    from safetensors.torch import load_file, save_file

    source = make_pooling_checkpoint("Qwen2ForCausalLM")
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    hidden = tensors["model.norm.weight"].shape[0]
    tensors.pop("lm_head.weight", None)
    tensors |= {
        "score.0.weight": torch.randn(hidden, hidden, generator=generator) / hidden**0.5,
        "score.0.bias": torch.randn(hidden, generator=generator),
        "score.2.weight": torch.randn(1, hidden, generator=generator) / hidden**0.5,
        "score.2.bias": torch.randn(1, generator=generator),
    }
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2ForRewardModel"]}))
    body = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    expected = [
        functional.linear(
            functional.relu(
                functional.linear(states(body, source, text), tensors["score.0.weight"], tensors["score.0.bias"])
            ),
            tensors["score.2.weight"],
            tensors["score.2.bias"],
        )
        for text in TEXTS
    ]
    llm = LLM(str(tmp_path), max_num_batched_tokens=16, max_num_seqs=4)
    assert difference(llm.reward(TEXTS, use_tqdm=False), expected) < BOUND
    last = llm.classify(TEXTS, use_tqdm=False)
    assert [one.outputs.probs[0] for one in last] == pytest.approx([float(one[-1, 0]) for one in expected], abs=BOUND)


SENTENCE_CASES = {
    "bert-mean": ("BertModel", (pooling("mean_tokens", 48), ("Normalize", {})), {}),
    "bert-cls-raw": ("BertModel", (pooling("cls_token", 48),), {}),
    "xlmr-mean-dense": (
        "XLMRobertaModel",
        (
            pooling("mean_tokens", 48),
            dense(48, 40, "activation.Tanh"),
            dense(40, 20, "linear.Identity", bias=False),
            ("Normalize", {}),
        ),
        {},
    ),
    "qwen3-last": ("Qwen3ForCausalLM", (pooling("lasttoken", 64), ("Normalize", {})), {}),
    "qwen3-mean-new-names": (
        "Qwen3ForCausalLM",
        (("Pooling", {"embedding_dimension": 64, "pooling_mode": "mean"}),),
        {},
    ),
    "mistral-last": ("MistralModel", (pooling("lasttoken", 64), ("Normalize", {})), {"sliding_window": None}),
}


@needs_sentence_transformers
@pytest.mark.parametrize("name", SENTENCE_CASES)
def test_embeddings_are_those_of_sentence_transformers(
    make_pooling_checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    architecture, modules, overrides = SENTENCE_CASES[name]
    prompts = {"prompts": {"query": "Find what answers: ", "document": ""}, "default_prompt_name": "query"}
    saved_by = "Qwen3Model" if architecture == "Qwen3ForCausalLM" else None
    folder = make_pooling_checkpoint(architecture, modules, prompts, saved_by, **overrides)
    reference = SentenceTransformer(str(folder), device="cpu", model_kwargs={"attn_implementation": "eager"})
    reference.save_pretrained(str(tmp_path))  # as its present version names things
    assert LLM(str(tmp_path)).llm_engine.config.pooling == LLM(str(folder)).llm_engine.config.pooling
    llm = LLM(str(folder))
    long = " ".join(TEXTS * 9)  # cut by both
    params = PoolingParams(truncate_prompt_tokens=-1)
    for prompt_name in (None, "query", "document"):
        expected = reference.encode([*TEXTS, long], prompt_name=prompt_name)
        outputs = llm.embed([*TEXTS, long], pooling_params=params, prompt_name=prompt_name, use_tqdm=False)
        found = np.array([output.outputs.embedding for output in outputs])
        assert np.abs(found - expected).max() < BOUND
        if prompt_name == "document":  # the control: another prompt
            other = reference.encode([*TEXTS, long], prompt_name="query")
            assert np.abs(found - other).max() > 10 * BOUND


@needs_sentence_transformers
def test_a_cross_encoder_scores_as_sentence_transformers(make_pooling_checkpoint: MakeCheckpoint) -> None:
    from sentence_transformers import CrossEncoder  # pyright: ignore[reportMissingImports]

    for activation in (None, "torch.nn.modules.linear.Identity"):
        config = {} if activation is None else {"sentence_transformers": {"activation_fn": activation}}
        folder = make_pooling_checkpoint("BertForSequenceClassification", num_labels=1, **config)
        reference = CrossEncoder(str(folder), device="cpu")
        expected = reference.predict(PAIRS)
        scores = [output.outputs.score for output in LLM(str(folder)).score(PAIRS[0][0], TEXTS, use_tqdm=False)]
        assert scores == pytest.approx(expected.tolist(), abs=BOUND)
