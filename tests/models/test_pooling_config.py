"""How checkpoints are pooled, by their files: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_engine import EngineArgs
from omni_engine.engine.config import EngineConfig
from omni_engine.models.pooling_config import PoolingConfig

ENCODER = {
    "model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "vocab_size": 99,
}  # fmt: skip
DECODER = {
    "model_type": "qwen3", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64, "vocab_size": 99,
}  # fmt: skip
MODULES = ("Transformer", "Pooling", "Normalize")


def write(folder: Path, architecture: str, files: dict[str, Any] | None = None, **config: Any) -> Path:
    base = ENCODER if "ert" in architecture else DECODER
    everything = {"config.json": {**base, "architectures": [architecture], **config}, **(files or {})}
    for name, content in everything.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def resolve(folder: Path, **args: Any) -> EngineConfig:
    return EngineConfig.from_args(EngineArgs(str(folder), load_format="dummy", skip_tokenizer_init=True, **args))


def read(folder: Path, **args: Any) -> PoolingConfig:
    pooling = resolve(folder, **args).pooling
    assert pooling is not None
    return pooling


def sentence_files(*modules: str, **files: Any) -> dict[str, Any]:
    entries = [
        {"idx": index, "name": str(index), "path": f"{index}_{name}" if index else "", "type": f"a.b.{name}"}
        for index, name in enumerate(modules)
    ]
    return {"modules.json": entries, "1_Pooling/config.json": {"pooling_mode_mean_tokens": True}, **files}


def test_what_cannot_generate_is_pooled_without_a_flag(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a", "BertModel")).kind == "cls"
    assert read(write(tmp_path / "b", "Qwen3Model")).kind == "last"
    assert resolve(write(tmp_path / "c", "Qwen3ForCausalLM")).pooling is None
    assert read(tmp_path / "c", runner="pooling").tasks == ("embed", "token_embed")
    assert read(tmp_path / "c", convert="classify").tasks == ("classify", "token_classify")
    files = sentence_files(*MODULES)
    assert read(write(tmp_path / "d", "Qwen3ForCausalLM", files)).kind == "mean"
    assert resolve(tmp_path / "d", runner="generate").pooling is None


def test_the_files_of_sentence_transformers_decide(tmp_path: Path) -> None:
    dense = {
        "in_features": 24,
        "out_features": 7,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    files = sentence_files(
        "Transformer", "Pooling", "Dense",
        **{
            "2_Dense/config.json": dense,
            "sentence_bert_config.json": {"max_seq_length": 33, "do_lower_case": True},
            "config_sentence_transformers.json": {"prompts": {"q": "Q: "}, "default_prompt_name": "q"},
        },
    )  # fmt: skip
    config = resolve(write(tmp_path, "BertModel", files))
    pooling = config.pooling
    assert pooling is not None
    assert (pooling.kind, pooling.normalize, pooling.embedding_size, pooling.lowercase) == ("mean", False, 7, True)
    assert (pooling.default_prompt, config.max_model_len) == ("Q: ", 33)
    changed = read(tmp_path, pooler_config={"seq_pooling_type": "CLS", "use_activation": True})
    assert (changed.kind, changed.normalize) == ("cls", True)


def test_positions_of_roberta_begin_behind_its_padding(tmp_path: Path) -> None:
    config = resolve(write(tmp_path, "XLMRobertaModel", pad_token_id=1))
    assert config.model.encoder is not None and config.model.encoder.first_position == 2
    assert config.max_model_len == 62
    assert config.max_num_batched_tokens == 2048


@pytest.mark.parametrize(
    ("fields", "activation", "num_labels"),
    [
        ({"num_labels": 1}, "sigmoid", 1),
        ({"id2label": {"0": "x"}}, "sigmoid", 1),
        ({}, "softmax", 2),
        ({"num_labels": 3}, "softmax", 3),
        ({"num_labels": 1, "problem_type": "regression"}, "identity", 1),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sigmoid", 3),
        (
            {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "identity",
            1,
        ),
    ],
)
def test_what_makes_scores_of_logits(tmp_path: Path, fields: dict[str, Any], activation: str, num_labels: int) -> None:
    classifier = read(write(tmp_path, "BertForSequenceClassification", **fields)).classifier
    assert classifier is not None
    assert (classifier.activation, classifier.num_labels) == (activation, num_labels)


POOLINGS = {
    "max": {"pooling_mode_max_tokens": True},
    "two": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    "new name": {"pooling_mode": "weightedmean"},
}


@pytest.mark.parametrize(
    ("architecture", "files", "args", "message"),
    [
        ("BertModel", {}, {"runner": "generate"}, "cannot generate.*: BertModel"),
        ("Qwen3ForCausalLM", {}, {"runner": "generate", "convert": "embed"}, "convert makes"),
        ("Qwen3ForCausalLM", {}, {"runner": "pooling", "convert": "none"}, "convert none"),
        ("Qwen3ForCausalLM", {}, {"pooler_config": {"seq_pooling_type": "CLS"}}, "needs runner pooling"),
        ("Qwen3Model", {}, {"require_graph": True}, "require_graph"),
        ("Qwen3Model", {}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculate"),
        ("Qwen3Model", {}, {"pooler_config": {"seq_pooling_type": "MAX"}}, "LAST, CLS, MEAN: 'MAX'"),
        ("Qwen3Model", {}, {"pooler_config": {"colour": 1}}, "colour"),
        ("BertModel", {}, {"convert": "classify"}, "classifier"),
        ("BertForSequenceClassification", {}, {"pooler_config": {"seq_pooling_type": "MEAN"}}, "first token"),
        ("BertModel", sentence_files("Transformer", "Pooling", "LSTM"), {}, "Transformer Pooling LSTM"),
        ("BertModel", sentence_files("Transformer", "Normalize"), {}, "Transformer Normalize"),
        *(
            ("BertModel", sentence_files(*MODULES, **{"1_Pooling/config.json": pooling}), {}, "cls, mean and lasttoken")
            for pooling in POOLINGS.values()
        ),
        (
            "BertModel",
            sentence_files(*MODULES, **{"1_Pooling/config.json": {"include_prompt": False}}),
            {},
            "include_prompt",
        ),
        (
            "BertModel",
            sentence_files(
                "Transformer", "Pooling", "Dense", **{"2_Dense/config.json": {"in_features": 5, "out_features": 6}}
            ),
            {},
            "in_features must be 24: 5",
        ),
        (
            "BertModel",
            sentence_files(
                "Transformer", "Pooling", "Dense",
                **{"2_Dense/config.json": {"in_features": 24, "out_features": 6, "activation_function": "os.system"}},
            ),
            {},
            "os.system",
        ),
        ("BertModel", {"config_sentence_transformers.json": {"default_prompt_name": "q"}}, {}, "default_prompt_name"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, architecture: str, files: dict[str, Any], args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(write(tmp_path, architecture, files), **args)


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "relative_key"}, {"hidden_act": "swiglu"}, {"is_decoder": True},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)  # fmt: skip
def test_an_encoder_that_computes_otherwise_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        resolve(write(tmp_path, "BertModel", **fields))


def test_a_bidirectional_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is_causal"):
        resolve(write(tmp_path, "Qwen3Model", is_causal=False))
