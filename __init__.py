"""omni-engine: a standalone compiled-graph inference engine for large language models.

The public names below are resolved on first use: importing this package imports nothing, so that the HTTP process
and the command line start without torch.
"""

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "AsyncEngine": "engine.async_engine",
    "AsyncEngineArgs": "engine.config",
    "AsyncLLM": "engine.async_engine",
    "AsyncLLMEngine": "engine.async_engine",
    "CompletionOutput": "engine.outputs",
    "Engine": "engine.engine",
    "EngineArgs": "engine.config",
    "LLM": "engine.llm",
    "LLMEngine": "engine.engine",
    "Logprob": "engine.outputs",
    "ModelRegistry": "models.registry",
    "PromptType": "engine.inputs",
    "RequestOutput": "engine.outputs",
    "RequestOutputKind": "scheduler.sampling_params",
    "SamplingParams": "scheduler.sampling_params",
    "TextPrompt": "engine.inputs",
    "TokensPrompt": "engine.inputs",
    "ValidationError": "scheduler.sampling_params",
    "register_model": "models.registry",
}

__all__ = [*_PUBLIC_NAMES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _PUBLIC_NAMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_PUBLIC_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
