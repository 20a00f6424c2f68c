"""The forms a prompt may take: text, token ids, chat messages, or a dict of one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypedDict, Union, cast

from ..scheduler.sampling_params import ValidationError


class _Salted(TypedDict, total=False):
    cache_salt: str  # requests share prefix blocks only with requests of the same salt


class TextPrompt(_Salted):
    """A prompt given as text."""

    prompt: str


class _WithText(_Salted, total=False):
    prompt: str  # the text the ids came from, if known


class TokensPrompt(_WithText):
    """A prompt given as token ids."""

    prompt_token_ids: list[int]


class _ChatOptions(_Salted, total=False):
    tools: Sequence[Mapping[str, Any]]
    documents: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str
    chat_template_kwargs: Mapping[str, Any]


class ChatPrompt(_ChatOptions):
    """A conversation, put into the model's chat template."""

    messages: Sequence[Mapping[str, Any]]


# A list of messages is a ChatPrompt without options. (Union: evaluated on Python 3.10 too.)
PromptType = Union[str, list[int], TextPrompt, TokensPrompt, ChatPrompt, list[Mapping[str, Any]]]  # noqa: UP007


def is_conversation(prompt: Any) -> bool:
    """Whether `prompt` is a list of chat messages."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in prompt)
    )


def as_prompt_list(prompts: Any) -> list[PromptType]:
    """One prompt or a sequence of them, as a list; raises `ValidationError` for what is neither."""
    if isinstance(prompts, (str, Mapping)) or is_conversation(prompts):
        return [cast(PromptType, prompts)]
    if isinstance(prompts, (bytes, bytearray, set, frozenset)) or not hasattr(prompts, "__iter__"):
        raise ValidationError(
            f"prompts are text, token ids, chat messages, dicts of these, or a list of such, not "
            f"{type(prompts).__name__}",
            parameter="prompts",
        )
    many = list(prompts)
    if many and all(isinstance(item, Integral) for item in many):
        return [cast(PromptType, many)]
    return many
