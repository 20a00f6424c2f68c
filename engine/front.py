"""The torch-free half of an engine: tokenizer, chat template, and the way in and out of the core."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..models.chat_encodings import CHAT_ENCODINGS, built_in_encoding
from ..models.chat_template import ChatTemplate, select_chat_template
from ..models.tokenizer import Tokenizer, load_tokenizer
from ..scheduler.sampling_params import SamplingParams, ValidationError
from .config import EngineConfig
from .input_processor import InputProcessor
from .inputs import is_conversation
from .output_processor import OutputProcessor
from .pooling.input import PoolingInputProcessor
from .structured.checker import GrammarChecker
from .structured.worker import WorkerJob

logger = logging.getLogger(__name__)


class Front:
    """What turns callers' requests into the core's and the core's updates into callers' outputs."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.tokenizer: Tokenizer | None = None
        if config.tokenizer_path is not None:
            self.tokenizer = load_tokenizer(config.tokenizer_path)
            if config.pooling is not None and config.pooling.lowercase:
                self.tokenizer.lowercase()
        # Operators have one or two templates; each is compiled once.
        self._compile_template = lru_cache(maxsize=8)(self._compile_template)
        self.outputs = OutputProcessor(self.tokenizer)
        self.grammars: GrammarChecker | None = None
        if config.tokenizer_path is not None:
            model = config.model
            self.grammars = GrammarChecker(
                WorkerJob(str(config.tokenizer_path), model.vocab_size, list(model.eos_token_ids))
            )

    def input_processor(self, max_model_len: int) -> InputProcessor:
        """Made once the core has said how long a sequence may be."""
        config = self.config
        if config.pooling is not None:
            encoder = config.model.encoder
            return PoolingInputProcessor(
                self.tokenizer,
                config.pooling,
                vocab_size=config.model.vocab_size,
                max_model_len=max_model_len,
                model_name=config.args.model,
                num_token_types=1 if encoder is None else encoder.num_token_types,
            )
        eos_token_id = self.tokenizer.eos_token_id if self.tokenizer is not None else None
        config_eos = config.model.eos_token_ids
        if eos_token_id is None and config_eos:
            eos_token_id = config_eos[0]
        eos_ids = [eos_token_id, *(config.extra_eos_token_ids or config_eos)]
        outside = [token for token in eos_ids if token is not None and not 0 <= token < config.model.vocab_size]
        if outside:
            logger.warning("end-of-sequence ids outside the vocabulary of %d are ignored: %s",
                           config.model.vocab_size, outside)  # fmt: skip
        return InputProcessor(
            self.tokenizer,
            vocab_size=config.model.vocab_size,
            max_model_len=max_model_len,
            max_logprobs=config.args.max_logprobs,
            eos_token_id=None if eos_token_id in outside else eos_token_id,
            extra_eos_token_ids=[token for token in eos_ids[1:] if token is not None and token not in outside],
            seed=config.args.seed,
        )

    def default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: the model's generation_config.json over the plain defaults."""
        return SamplingParams.from_optional(**self.config.sampling_defaults)

    def check_grammar(self, params: SamplingParams) -> str | None:
        """The grammar of a request's constraint, None if it has none; waits and raises as `GrammarChecker.check`."""
        if params.structured_outputs is None:
            return None
        return self.grammar_checker.check(params.structured_outputs)

    @property
    def grammar_checker(self) -> GrammarChecker:
        """Raises `ValidationError` where there is no tokenizer."""
        if self.grammars is None:
            raise ValidationError(
                "structured_outputs needs a tokenizer, but this engine was started without one",
                parameter="structured_outputs",
            )
        return self.grammars

    def tokenizer_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says; empty where there is none."""
        folder = self.config.tokenizer_path
        path = None if folder is None else folder / "tokenizer_config.json"
        if path is None or not path.is_file():
            return {}
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}

    def close(self) -> None:
        """End what works in the background."""
        if self.grammars is not None:
            self.grammars.close()

    def _compile_template(self, source: str) -> ChatTemplate:
        assert self.tokenizer is not None
        return ChatTemplate(source, sort_tools=self.tokenizer.sorts_tools, **self.tokenizer.special_tokens_map)

    def read_chat(self, prompt: Any) -> Any:
        """A prompt of chat messages as text and token ids; any other prompt as it is. Raises `ValidationError`."""
        if is_conversation(prompt):
            prompt = {"messages": prompt}
        if not isinstance(prompt, Mapping) or "messages" not in prompt:
            return prompt
        options = {name: value for name, value in prompt.items() if name not in ("messages", "cache_salt")}
        try:
            text = self.render_chat(prompt["messages"], **options)
        except TypeError as error:
            raise ValidationError(f"not an option of a chat prompt: {error}", parameter="prompt") from error
        except ValueError as error:
            raise ValidationError(str(error), parameter="messages") from error
        assert self.tokenizer is not None  # render_chat needs it
        # The template has written the special tokens itself.
        read = {"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)}
        return {**read, "cache_salt": prompt["cache_salt"]} if "cache_salt" in prompt else read

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; raises ValueError with the template's own message."""
        if self.tokenizer is None:
            raise ValidationError("chat needs a tokenizer, but this engine was started without one")
        render = self._chat_renderer(chat_template, has_tools=bool(tools))
        return render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=chat_template_kwargs,
        )

    def render_pair(self, query: str, document: str, chat_template: str) -> str:
        """One prompt of a query and a document, by a template that knows messages of the roles query and document."""
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        return self.render_chat(messages, add_generation_prompt=False, chat_template=chat_template)

    def _chat_renderer(self, chat_template: str | None, *, has_tools: bool) -> Callable[..., str]:
        """The template that is asked for, else the mode's format, else the tokenizer's template, else the model's."""
        assert self.tokenizer is not None
        encoding = CHAT_ENCODINGS.get(self.config.args.tokenizer_mode)
        if encoding is None and not self.tokenizer.chat_template:
            encoding = built_in_encoding(self.config.model)
        if encoding is not None and not chat_template:
            return encoding
        source = chat_template or select_chat_template(self.tokenizer.chat_template, has_tools=has_tools)
        return self._compile_template(source).render
