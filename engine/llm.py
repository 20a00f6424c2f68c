"""vLLM's offline face, as a thin form of `Engine`: `LLM(model=…).generate / chat / embed / classify / score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..models.tokenizer import Tokenizer
from ..scheduler.pooling_params import PoolingParams
from ..scheduler.sampling_params import SamplingParams, ValidationError
from .config import EngineArgs
from .engine import Engine
from .inputs import PromptType, as_prompt_list
from .outputs import RequestOutput
from .pooling.outputs import (
    ClassificationOutput,
    EmbeddingOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
)


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

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: str | None = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pool every prompt by `pooling_task` (embed, token_embed, classify, token_classify; by default the model's
        own); outputs are in the order of the prompts."""
        if pooling_task is not None:
            pooling_params = _with_task(pooling_params, pooling_task)
        return self.llm_engine.encode(prompts, pooling_params, use_tqdm=use_tqdm, priority=priority)

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[EmbeddingOutput]]:
        """An embedding of every prompt. `prompt_name`: which of the model's prompts is put before each text."""
        if prompt_name is not None:
            prompts = [_named(prompt, prompt_name) for prompt in as_prompt_list(prompts)]
        outputs = self.encode(prompts, pooling_params, pooling_task="embed", use_tqdm=use_tqdm)
        return [output.holding(EmbeddingOutput(output.outputs.tolist())) for output in outputs]

    def classify(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[ClassificationOutput]]:
        """The probabilities of the labels of every prompt."""
        outputs = self.encode(prompts, pooling_params, pooling_task="classify", use_tqdm=use_tqdm)
        return [output.holding(ClassificationOutput(output.outputs.tolist())) for output in outputs]

    def reward(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """The rewards of every prompt's tokens."""
        return self.encode(prompts, pooling_params, pooling_task="token_classify", use_tqdm=use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How alike one text and every other, or as many texts in pairs, are: by a cross-encoder, else the cosine of
        their embeddings."""
        return self.llm_engine.score(data_1, data_2, pooling_params, use_tqdm=use_tqdm, chat_template=chat_template)


def _with_task(params: PoolingParams | Sequence[PoolingParams] | None, task: str) -> Any:
    if params is None or isinstance(params, PoolingParams):
        return (params or PoolingParams()).clone(task=task)
    return [each.clone(task=task) for each in params]


def _named(prompt: Any, prompt_name: str) -> Any:
    return {**(prompt if isinstance(prompt, Mapping) else {"prompt": prompt}), "prompt_name": prompt_name}
