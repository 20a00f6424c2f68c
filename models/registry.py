"""Which architectures can be built: their names in config.json, their model classes and their config parsers."""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .config import ModelConfig

if TYPE_CHECKING:
    from importlib import metadata

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "omni_engine.models"
ConfigParser = Callable[[Mapping[str, Any]], ModelConfig]


@dataclass(frozen=True)
class RegisteredModel:
    """One architecture. `model` is a class, or "package.module:Class"; `config` a function from config.json to
    ModelConfig, "package.module:function", or the name of the architecture whose config.json it shares."""

    architecture: str
    model: str | type
    config: ConfigParser | str

    def load_class(self) -> type:
        """The model class; imports torch. ImportError names the architecture where it cannot be imported."""
        return _imported(self.model, self.architecture) if isinstance(self.model, str) else self.model

    def load_config_parser(self) -> ConfigParser:
        if not isinstance(self.config, str):
            return self.config
        if ":" in self.config:
            return _imported(self.config, self.architecture)
        return resolve(self.config).load_config_parser()


_models: dict[str, RegisteredModel] = {}
_plugins_lock = threading.RLock()
_plugins_loaded = False


def register_model(architecture: str, model: str | type, *, config: ConfigParser | str | None = None) -> None:
    """Adds an architecture, or replaces a registered one (whose config parser stays where `config` is None).

    `model`: a class, or "package.module:Class", imported when a checkpoint needs it. `config`: a function from
    config.json to ModelConfig, the same as "package.module:function", or the name of a registered architecture with the
    same config.json. Raises ValueError for a spelling that names neither, and for a new architecture without `config`.
    """
    if not architecture or not isinstance(architecture, str):
        raise ValueError(f"an architecture is a name as in config.json's architectures: {architecture!r}")
    known = _models.get(architecture)
    if isinstance(model, str) and not _is_import_path(model):
        raise ValueError(f'model must be a class or "package.module:Class": {model!r}')
    if config is None:
        if known is None:
            raise ValueError(
                "register_model needs config=, a function from config.json to ModelConfig or the name of an "
                f"architecture with the same config.json, for the new architecture: {architecture}"
            )
        config = known.config
    if isinstance(config, str) and ":" in config and not _is_import_path(config):
        raise ValueError(f'config must be a function, "package.module:function" or an architecture: {config!r}')
    if config == architecture:
        if known is None:
            raise ValueError(f"config names the architecture that is being registered: {architecture}")
        config = known.config
    if known is not None and known.model != model:
        logger.warning("the model of %s is replaced: %s", architecture, model)
    _models[architecture] = RegisteredModel(architecture, model, config)


def supported_architectures() -> list[str]:
    """Every registered name, sorted."""
    _load_plugins()
    return sorted(_models)


def resolve(architecture: str) -> RegisteredModel:
    """The entry of an architecture. ValueError naming it and what is supported where there is none."""
    _load_plugins()
    entry = _models.get(architecture)
    if entry is None:
        raise ValueError(f"the architecture is not supported; supported: {', '.join(sorted(_models))}: {architecture}")
    return entry


class ModelRegistry:
    """vLLM's name for the registry."""

    @staticmethod
    def get_supported_archs() -> list[str]:
        return supported_architectures()

    @staticmethod
    def register_model(model_arch: str, model_cls: str | type, *, config: ConfigParser | str | None = None) -> None:
        register_model(model_arch, model_cls, config=config)


def _is_import_path(path: str) -> bool:
    module, separator, name = path.partition(":")
    return bool(separator) and all(part.isidentifier() for part in [*module.split("."), name])


def _imported(path: str, architecture: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{path}, registered for {architecture}, cannot be imported: {error}") from error


def _load_plugins() -> None:
    """Calls every entry point of the group once; each registers its models.

    A broken one raises RuntimeError naming it, at every lookup: a server must not start without a model it was given.
    """
    from importlib import metadata  # slow to import, and a server listens before it looks anything up

    global _plugins_loaded
    with _plugins_lock:
        if _plugins_loaded:
            return
        _plugins_loaded = True  # before the calls: a plugin may look an architecture up
        try:
            for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
                _load_plugin(entry_point)
        except RuntimeError:
            _plugins_loaded = False
            raise


def _load_plugin(entry_point: metadata.EntryPoint) -> None:
    try:
        entry_point.load()()
    except Exception as error:
        package = entry_point.dist.name if entry_point.dist else "an unknown package"
        raise RuntimeError(
            f"the entry point {entry_point.name} = {entry_point.value} of {package} (group {ENTRY_POINT_GROUP}) "
            f"failed; fix or uninstall the package: {type(error).__name__}: {error}"
        ) from error


def _register_built_in(architecture: str, module: str, config: str, body: str | None = None) -> None:
    _models[architecture] = RegisteredModel(
        architecture, f"{__package__}.{module}:{body or architecture}", f"{__package__}.config_parsers.{config}"
    )


_register_built_in("LlamaForCausalLM", "llama", "llama:parse_llama")
_register_built_in("MistralForCausalLM", "llama", "llama:parse_mistral")
_register_built_in("Qwen2ForCausalLM", "qwen", "qwen:parse_qwen2")
_register_built_in("Qwen3ForCausalLM", "qwen", "qwen:parse_qwen3")
_register_built_in("Qwen3MoeForCausalLM", "qwen", "qwen:parse_qwen3_moe")
_register_built_in("DeepseekV2ForCausalLM", "deepseek", "deepseek:parse_deepseek_v2")
_register_built_in("DeepseekV3ForCausalLM", "deepseek", "deepseek:parse_deepseek_v3")
_register_built_in("DeepseekV32ForCausalLM", "deepseek", "deepseek:parse_deepseek_v32")
_register_built_in("GlmMoeDsaForCausalLM", "glm", "deepseek:parse_glm_moe_dsa")

# Architectures that are pooled only, by the model class of their body; what stands behind it: `pooling_config`.
for _family, _module, _parser in (
    ("Llama", "llama", "llama:parse_llama"),
    ("Mistral", "llama", "llama:parse_mistral"),
    ("Qwen2", "qwen", "qwen:parse_qwen2"),
    ("Qwen3", "qwen", "qwen:parse_qwen3"),
):
    for _ending in ("Model", "ForSequenceClassification"):
        _register_built_in(f"{_family}{_ending}", _module, _parser, f"{_family}ForCausalLM")
_register_built_in("Qwen2ForRewardModel", "qwen", "qwen:parse_qwen2", "Qwen2ForCausalLM")
for _family, _parser in (("Bert", "bert"), ("Roberta", "roberta"), ("XLMRoberta", "roberta")):
    for _ending in ("Model", "ForMaskedLM", "ForSequenceClassification"):
        _register_built_in(f"{_family}{_ending}", "bert", f"bert:parse_{_parser}", "BertEncoder")
