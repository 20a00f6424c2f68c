"""omni-engine: a standalone compiled-graph inference engine for large language models.

The public names below are resolved on first use: importing this package imports nothing, so that the HTTP process
and the command line start without torch.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # the name type checkers know, without importing typing
if TYPE_CHECKING:
    from .engine.async_engine import AsyncEngine, AsyncLLM, AsyncLLMEngine
    from .engine.config import AsyncEngineArgs, EngineArgs
    from .engine.engine import Engine, LLMEngine
    from .engine.inputs import PromptType, TextPrompt, TokensPrompt
    from .engine.llm import LLM
    from .engine.outputs import CompletionOutput, Logprob, RequestOutput
    from .engine.pooling.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        PoolingOutput,
        PoolingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from .models.registry import ModelRegistry, register_model
    from .scheduler.pooling_params import PoolingParams
    from .scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
    from .scheduler.structured_outputs import ReasoningSpan, StructuredOutputsParams

_PUBLIC_NAMES = {
    "AsyncEngine": "engine.async_engine",
    "AsyncEngineArgs": "engine.config",
    "AsyncLLM": "engine.async_engine",
    "AsyncLLMEngine": "engine.async_engine",
    "ClassificationOutput": "engine.pooling.outputs",
    "ClassificationRequestOutput": "engine.pooling.outputs",
    "CompletionOutput": "engine.outputs",
    "EmbeddingOutput": "engine.pooling.outputs",
    "EmbeddingRequestOutput": "engine.pooling.outputs",
    "Engine": "engine.engine",
    "EngineArgs": "engine.config",
    "LLM": "engine.llm",
    "LLMEngine": "engine.engine",
    "Logprob": "engine.outputs",
    "ModelRegistry": "models.registry",
    "PoolingOutput": "engine.pooling.outputs",
    "PoolingParams": "scheduler.pooling_params",
    "PoolingRequestOutput": "engine.pooling.outputs",
    "PromptType": "engine.inputs",
    "ReasoningSpan": "scheduler.structured_outputs",
    "RequestOutput": "engine.outputs",
    "RequestOutputKind": "scheduler.sampling_params",
    "SamplingParams": "scheduler.sampling_params",
    "ScoringOutput": "engine.pooling.outputs",
    "ScoringRequestOutput": "engine.pooling.outputs",
    "StructuredOutputsParams": "scheduler.structured_outputs",
    "TextPrompt": "engine.inputs",
    "TokensPrompt": "engine.inputs",
    "ValidationError": "scheduler.sampling_params",
    "register_model": "models.registry",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Engine",
    "EngineArgs",
    "LLMEngine",
    "Logprob",
    "ModelRegistry",
    "PoolingOutput",
    "PoolingParams",
    "PoolingRequestOutput",
    "PromptType",
    "ReasoningSpan",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "ValidationError",
    "__version__",
    "register_model",
]


def __getattr__(name: str) -> object:
    if name in _PUBLIC_NAMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PUBLIC_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
