"""The forms a prompt may take: text, token ids, or a dict of either."""

from __future__ import annotations

from typing import TypedDict, Union


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


PromptType = Union[str, list[int], TextPrompt, TokensPrompt]  # noqa: UP007  (evaluated on Python 3.10 too)
