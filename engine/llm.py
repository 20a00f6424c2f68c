"""vLLM's offline face, as a thin form of `Engine`: `LLM(model=…).generate / chat`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ..models.tokenizer import Tokenizer
from ..scheduler.sampling_params import SamplingParams, ValidationError
from .config import EngineArgs
from .engine import Engine
from .inputs import PromptType
from .outputs import RequestOutput


class LLM:
    """An engine for offline use. Keywords are the fields of `EngineArgs`; no periodic statistics by default."""

    def __init__(self, model: str, **kwargs: Any) -> None:
        self.llm_engine = Engine(model, **{"disable_log_stats": True, **kwargs})

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLM:
        llm = cls.__new__(cls)
        llm.llm_engine = Engine(args=args)
        return llm

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs are in the order of the prompts."""
        for name, value in (("lora_request", lora_request), ("tokenization_kwargs", tokenization_kwargs)):
            if value:
                raise ValidationError("not supported yet by LLM.generate", parameter=name, value=value)
        return self.llm_engine.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        options = {
            "tools": tools,
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        prompts: list[Any] = [{"messages": conversation, **options} for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request, priority=priority)

    def get_tokenizer(self) -> Tokenizer | None:
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self.llm_engine.get_default_sampling_params()

    def reset_prefix_cache(self) -> bool:
        return self.llm_engine.reset_prefix_cache()

    def encode(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        _needs_pooling("encode")

    def embed(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        _needs_pooling("embed")

    def classify(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        _needs_pooling("classify")

    def score(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        _needs_pooling("score")


def _needs_pooling(method: str) -> NoReturn:
    raise ValueError(f"LLM.{method} needs --runner pooling, which this version does not have yet; use generate or chat")
