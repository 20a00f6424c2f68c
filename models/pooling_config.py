"""How hidden states become vectors: `PoolingConfig`, from config.json and the files of sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, read_json
from .config import ModelConfig
from .config_parsers.reader import MAX_INTEGER, ConfigReader, shown

POOLING_KINDS = ("last", "cls", "mean")
ACTIVATIONS = {  # torch's names in sentence-transformers' files
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
}
# What stands behind the body of each architecture that classifies, and those that are bodies alone.
_CLASSIFIERS = {
    "BertForSequenceClassification": "bert",
    "LlamaForSequenceClassification": "score",
    "MistralForSequenceClassification": "score",
    "Qwen2ForRewardModel": "reward",
    "Qwen2ForSequenceClassification": "score",
    "Qwen3ForSequenceClassification": "score",
    "RobertaForSequenceClassification": "roberta",
    "XLMRobertaForSequenceClassification": "roberta",
}
_BODIES = frozenset({
    "BertForMaskedLM", "BertModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "RobertaForMaskedLM",
    "RobertaModel", "XLMRobertaForMaskedLM", "XLMRobertaModel",
})  # fmt: skip
_MODES = {  # sentence-transformers' names; the older files have a flag for each
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True)
class DenseConfig:
    """A linear layer over the pooled vector, in a folder of its own. `activation`: a value of ACTIVATIONS."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True)
class ClassifierConfig:
    """What makes scores of hidden states.

    `kind`: score (one matrix) | bert (pooler, then a matrix) | roberta (two layers) | reward (two layers, ReLU between)
    | tokens (rows of the language model's head; of two with one label, the second one's logit less the first one's).
    """

    kind: str
    num_labels: int
    activation: str  # softmax | sigmoid | identity: what turns logits into scores, unless a request wants none
    labels: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()  # of kind tokens


@dataclass(frozen=True)
class PoolingConfig:
    """Everything between hidden states and what a caller gets."""

    kind: str  # one of POOLING_KINDS
    normalize: bool = True  # an embedding is scaled to length 1, unless a request wants none
    dense: tuple[DenseConfig, ...] = ()
    classifier: ClassifierConfig | None = None
    hidden_size: int = 0
    matryoshka: tuple[int, ...] | None = None  # dimensions a request may ask for: these, with () any, with None none
    max_length: int | None = None  # tokens, by sentence-transformers' files
    lowercase: bool = False
    prompts: tuple[tuple[str, str], ...] = ()  # name and text put before inputs
    default_prompt: str = ""  # put before the inputs of requests that name none

    @property
    def tasks(self) -> tuple[str, ...]:
        """What requests may ask for, the usual one first."""
        if self.classifier is None:
            return ("embed", "token_embed")
        if self.classifier.kind == "reward":
            return ("token_classify", "classify")
        return ("classify", "token_classify")

    @property
    def embedding_size(self) -> int:
        return self.dense[-1].out_features if self.dense else self.hidden_size

    @property
    def needs_all_tokens(self) -> bool:
        """Whether a prompt's vector depends on the states of more than its last token."""
        return self.kind != "last"


def pools_only(architecture: str) -> bool:
    """Whether models of this architecture cannot generate."""
    return architecture in _CLASSIFIERS or architecture in _BODIES


def has_pooling_files(folder: Path) -> bool:
    """Whether sentence-transformers saved the checkpoint, with modules behind the transformer."""
    return (folder / "modules.json").is_file()


def read_pooling(
    checkpoint: Checkpoint,
    model: ModelConfig,
    *,
    convert: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    token_ids: tuple[int, ...] = (),
) -> PoolingConfig:
    """How the checkpoint is pooled. `convert`: auto | embed | classify, what a generating model becomes; `overrides`:
    --pooler-config; `token_ids`: those of classifier_from_token in config.json. Raises ValueError for what is not
    supported, naming it.
    """
    reader = ConfigReader(checkpoint.config)
    kind = _CLASSIFIERS.get(model.architecture)
    if kind is None and convert == "classify":
        if model.encoder is not None:
            raise ValueError(
                f"convert classify needs an architecture with a classifier, or a generating one: {model.architecture}"
            )
        kind = "score"
    if kind == "score" and token_ids:
        kind = "tokens"
    if convert == "embed":
        kind = None
    matryoshka = reader.integers("matryoshka_dimensions", minimum=1)
    settings: dict[str, Any] = {
        "kind": "last" if model.encoder is None else "cls",
        "hidden_size": model.hidden_size,
        "matryoshka": matryoshka if matryoshka or reader.boolean("is_matryoshka", False) else None,
    }
    if kind is not None:
        settings["classifier"] = _read_classifier(reader, kind, token_ids)
    settings.update(_read_modules(checkpoint.path, classifies=kind is not None))
    settings.update(_read_overrides(overrides or {}, classifies=kind is not None))
    return _checked(PoolingConfig(**settings))


def _checked(config: PoolingConfig) -> PoolingConfig:
    size = config.hidden_size
    for dense in config.dense:
        if dense.in_features != size:
            raise ValueError(f"{dense.folder}/config.json: in_features must be {size}: {dense.in_features}")
        size = dense.out_features
    if config.classifier is not None and config.classifier.kind in ("bert", "roberta") and config.kind != "cls":
        raise ValueError(f"the classifier of this architecture reads the first token, CLS, not: {config.kind}")
    return config


def _read_classifier(reader: ConfigReader, kind: str, token_ids: tuple[int, ...]) -> ClassifierConfig:
    labels = _read_labels(reader)
    # Of a reward model one is meant where nothing is said; transformers writes two labels for nothing, too.
    default = len(labels) or 2
    num_labels = reader.integer("num_labels", 1 if kind == "reward" and default == 2 else default)
    if kind == "tokens":
        num_labels = len(token_ids)
        if reader.boolean("is_original_qwen3_reranker", False):
            if num_labels != 2:
                raise ValueError(f"is_original_qwen3_reranker needs two tokens in classifier_from_token: {num_labels}")
            num_labels = 1
    if labels and len(labels) != num_labels:
        labels = ()
    activation = "identity" if kind == "reward" else "sigmoid" if num_labels == 1 else "softmax"
    problem = reader.string("problem_type", "")
    if problem == "regression":
        activation = "identity"
    elif problem == "multi_label_classification":
        activation = "sigmoid"
    sentence = reader.object("sentence_transformers") or {}
    named = sentence.get("activation_fn") or reader.raw.get("sbert_ce_default_activation_function")
    if named is not None:
        activation = _activation(named, "activation_fn of sentence_transformers in config.json")
        if activation not in ("sigmoid", "identity"):
            raise ValueError(f"activation_fn in config.json must be Sigmoid or Identity: {named}")
    return ClassifierConfig(kind, num_labels, activation, labels, token_ids)


def _read_labels(reader: ConfigReader) -> tuple[str, ...]:
    by_id = reader.object("id2label") or {}
    try:
        return tuple(str(by_id[key]) for key in sorted(by_id, key=int))
    except ValueError as error:
        raise reader.error("id2label", "an object from numbers to labels") from error


def _activation(name: Any, where: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"{where} must be one of {', '.join(ACTIVATIONS)}: {shown(name)}")
    return ACTIVATIONS[name]


def _read_modules(folder: Path, *, classifies: bool) -> dict[str, Any]:
    """Fields that sentence-transformers' files set."""
    fields = _read_sequence(folder) if has_pooling_files(folder) and not classifies else {}
    for name in ("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_xlm-roberta_config.json"):
        if (folder / name).is_file():
            reader = ConfigReader(read_json(folder / name), name)
            fields["max_length"] = reader.optional_integer("max_seq_length", None)
            fields["lowercase"] = reader.boolean("do_lower_case", False)
    tokenizer_file = folder / "tokenizer_config.json"
    if has_pooling_files(folder) and fields.get("max_length") is None and tokenizer_file.is_file():
        # where sentence-transformers keeps it since version 5; without a limit, tokenizers have an astronomic one
        length = read_json(tokenizer_file).get("model_max_length")
        if isinstance(length, int) and 0 < length <= MAX_INTEGER:
            fields["max_length"] = length
    if classifies:
        return fields
    file = folder / "config_sentence_transformers.json"
    if file.is_file():
        reader = ConfigReader(read_json(file), file.name)
        prompts = reader.object("prompts") or {}
        if not all(isinstance(text, (str, type(None))) for text in prompts.values()):
            raise ValueError(f"{file.name}: prompts must map names to texts: {shown(prompts)}")
        fields["prompts"] = tuple((name, prompts[name] or "") for name in sorted(prompts))
        default = reader.get("default_prompt_name")
        if default is not None:
            if default not in prompts:
                raise ValueError(f"{file.name}: default_prompt_name must be one of the prompts: {shown(default)}")
            fields["default_prompt"] = prompts[default] or ""
    return fields


def _read_sequence(folder: Path) -> dict[str, Any]:
    """Fields by modules.json."""
    modules = _read_list(folder / "modules.json")
    fields: dict[str, Any] = {"normalize": False}
    dense: list[DenseConfig] = []
    seen: list[str] = []
    for module in modules:
        kind = str(module.get("type", "")).rpartition(".")[2]
        path = str(module.get("path", ""))
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"modules.json must name folders of its own folder: {path}")
        if kind == "Transformer" and not seen:
            if path:
                raise ValueError(f"modules.json: the transformer must lie in the checkpoint's own folder: {path}")
        elif kind == "Pooling" and seen == ["Transformer"]:
            fields["kind"] = _read_pooling_kind(folder / path / "config.json")
        elif kind == "Dense" and seen and seen[-1] in ("Pooling", "Dense"):
            dense.append(_read_dense(folder, path))
        elif kind == "Normalize" and seen and seen[-1] in ("Pooling", "Dense"):
            fields["normalize"] = True
        elif kind != "Dropout":
            raise ValueError(
                "modules.json: supported are Transformer, Pooling, Dense and Normalize, in this order: "
                f"{' '.join([*seen, kind])}"
            )
        else:
            continue
        seen.append(kind)
    if "Pooling" not in seen:
        raise ValueError(f"modules.json must name a Pooling module: {' '.join(seen)}")
    fields["dense"] = tuple(dense)
    return fields


def _read_list(file: Path) -> list[dict[str, Any]]:
    import json

    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be UTF-8 JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{file} must hold a list of objects: {shown(value)}")
    return value


def _read_pooling_kind(file: Path) -> str:
    raw = read_json(file)
    modes = raw.get("pooling_mode")
    if modes is None:
        modes = [name for name, value in raw.items() if name.startswith("pooling_mode_") and value is True] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _MODES:
        raise ValueError(f"{file} must pool by one of cls, mean and lasttoken: {shown(modes)}")
    if raw.get("include_prompt") is False:
        raise ValueError(f"{file}: include_prompt false is not supported, tokens of the prompt are pooled too: False")
    return _MODES[modes[0]]


def _read_dense(folder: Path, path: str) -> DenseConfig:
    raw = read_json(folder / path / "config.json")
    reader = ConfigReader(raw, f"{path}/config.json")
    where = f"{path}/config.json: activation_function"
    inputs, outputs = (raw.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name"))
    if reader.boolean("use_residual", False) or {inputs, outputs or inputs} != {"sentence_embedding"}:
        raise ValueError(f"{path}/config.json: a residual, and other inputs than the pooled vector, are not supported")
    return DenseConfig(
        folder=path,
        in_features=reader.integer("in_features"),
        out_features=reader.integer("out_features"),
        bias=reader.boolean("bias", True),
        activation=_activation(raw.get("activation_function", "torch.nn.modules.activation.Tanh"), where),
    )


def _read_overrides(overrides: Mapping[str, Any], *, classifies: bool) -> dict[str, Any]:
    """Fields by --pooler-config."""
    fields: dict[str, Any] = {}
    for key, value in overrides.items():
        if key in ("pooling_type", "seq_pooling_type"):
            if not isinstance(value, str) or value.lower() not in POOLING_KINDS:
                raise ValueError(f"{key} in pooler_config must be one of LAST, CLS, MEAN: {shown(value)}")
            fields["kind"] = value.lower()
        elif key == "use_activation" and not classifies:
            if not isinstance(value, bool):
                raise ValueError(f"use_activation in pooler_config must be true or false: {shown(value)}")
            fields["normalize"] = value
        else:
            raise ValueError(
                f"pooler_config takes seq_pooling_type and, for embeddings, use_activation; not supported: {key}"
            )
    return fields
