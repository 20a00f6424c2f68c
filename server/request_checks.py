"""The rules that a well-typed request must keep, and its translation into `SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..scheduler.sampling_params import MAX_NUM_SEQUENCES, RequestOutputKind, SamplingParams
from .body import check_types, value_error
from .environment import read_count
from .errors import RequestError, not_supported
from .parsing.tool_choice import ToolChoice, read_tool_choice
from .pooling_protocol import InputBody
from .protocol import (
    MAX_CACHE_SALT_CHARACTERS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    TokenizeRequest,
    Tools,
)
from .structured_outputs import read_constraint

# vLLM's names, so that a deployment's settings carry over.
MAX_STOP_STRINGS = read_count("VLLM_MAX_STOP_STRINGS", 64)
MAX_PROMPTS = read_count("VLLM_MAX_COMPLETION_PROMPTS", 1024)

_SALT_FORBIDDEN = frozenset("@/\\\0")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


# Fields that would change the result but are not built, and the values that ask for nothing.
_NOT_BUILT: dict[str, Callable[[Any], bool]] = {
    "use_beam_search": _is_empty,
    "logits_processors": _is_empty,
    "logprob_token_ids": _is_empty,
    "kv_transfer_params": _is_empty,
    "vllm_xargs": _is_empty,
    "repetition_detection": _is_empty,
    "stream_interval": lambda value: value in (None, 1),
    "watermarking": _is_empty,
    "guided_json": lambda value: value is None,
    "guided_regex": lambda value: value is None,
    "guided_choice": lambda value: value is None,
    "guided_grammar": lambda value: value is None,
    "suffix": _is_empty,
    "prompt_embeds": _is_empty,
    "functions": _is_empty,
    "function_call": lambda value: value in (None, "none"),
}


def check_request(request: GenerationRequest) -> None:
    """Rules of both APIs; raises `RequestError` (400)."""
    for name, asks_for_nothing in _NOT_BUILT.items():
        if not asks_for_nothing(getattr(request, name, None)):
            raise not_supported(name)
    if request.stream_options is not None and not request.stream:
        raise value_error("Stream options can only be defined when `stream=True`.", "stream_options")
    wanted = request.prompt_logprobs
    if wanted is not None:
        if request.stream and (wanted > 0 or wanted == -1):
            raise value_error("`prompt_logprobs` are not available when `stream=True`.", "prompt_logprobs")
        if wanted < -1:
            raise value_error("`prompt_logprobs` must be a non-negative value or -1.", "prompt_logprobs")
    if isinstance(request.stop, list) and len(request.stop) > MAX_STOP_STRINGS:
        raise value_error(f"`stop` may hold at most {MAX_STOP_STRINGS} strings, got {len(request.stop)}.", "stop")
    if request.truncation_side not in (None, "left", "right"):
        raise value_error("`truncation_side` must be left or right.", "truncation_side")
    check_cache_salt(request.cache_salt)


def check_cache_salt(salt: str | None) -> None:
    """Raises `RequestError` (400) for a salt that vLLM would not take."""
    if salt is not None and (not salt or len(salt) > MAX_CACHE_SALT_CHARACTERS or not _SALT_FORBIDDEN.isdisjoint(salt)):
        raise value_error(
            f"`cache_salt` must have 1 to {MAX_CACHE_SALT_CHARACTERS} characters, and no @, /, \\ or NUL.", "cache_salt"
        )


def check_completion(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of the request, each text or token ids."""
    check_request(request)
    if request.logprobs is not None and request.logprobs < -1:
        raise value_error("`logprobs` must be a non-negative value or -1.", "logprobs")
    prompts = _split_prompts(request.prompt)
    if len(prompts) > MAX_PROMPTS:
        raise value_error(f"`prompt` may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}.", "prompt")
    if len(prompts) > 1 and len(prompts) * max(request.n or 1, 1) > MAX_NUM_SEQUENCES:
        raise value_error(
            f"the number of prompts times n must be at most {MAX_NUM_SEQUENCES}, got {len(prompts)} times {request.n}.",
            "n",
        )
    return prompts


def _split_prompts(prompt: str | list[Any] | None) -> list[str | list[int]]:
    if not prompt:
        raise value_error("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise value_error("`prompt` must hold only texts, only token ids, or only lists of token ids.", "prompt")
    return [prompt] if kinds == {int} else prompt


def check_chat(request: ChatCompletionRequest, *, trust_chat_template: bool) -> None:
    """Rules of chat completions."""
    check_request(request)
    check_messages(request.messages)
    if request.top_logprobs:
        if request.top_logprobs < -1:
            raise value_error("`top_logprobs` must be a non-negative value or -1.", "top_logprobs")
        if not request.logprobs:
            raise value_error("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    check_template_options(request, trust_chat_template=trust_chat_template)


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Rules of every message; raises `RequestError` (400)."""
    if not messages:
        raise value_error("`messages` must not be empty.", "messages")
    for place, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise value_error("every message must have a role, a string.", f"body.messages.{place}.role")
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise value_error("content must be a string or a list of parts.", f"body.messages.{place}.content")


def check_template_options(request: ChatCompletionRequest | TokenizeRequest, *, trust_chat_template: bool) -> None:
    """Rules of how a conversation is to be written out; raises `RequestError` (400)."""
    if request.continue_final_message and request.add_generation_prompt is not False:
        raise value_error(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.", "continue_final_message"
        )
    check_own_template(request, trust_chat_template=trust_chat_template)


def check_own_template(
    request: ChatCompletionRequest | TokenizeRequest | InputBody, *, trust_chat_template: bool
) -> None:
    """Raises `RequestError` (400) for a chat template that the operator does not want from requests."""
    template_given = request.chat_template is not None or "chat_template" in (request.chat_template_kwargs or {})
    if template_given and not trust_chat_template:
        raise RequestError(
            "Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with "
            "untrusted chat template.",
            error_type="BadRequestError",
            param="chat_template",
        )


def check_tools(request: ChatCompletionRequest, *, serves_auto: bool) -> ToolChoice:
    """What the tools of a request are for; `serves_auto`: the server finds calls in answers."""
    choice = request.tool_choice
    if request.tools is not None:
        check_tool_types(request.tools)
    elif choice not in (None, "none"):
        raise value_error("When using `tool_choice`, `tools` must be set.", "tool_choice")
    try:
        found = read_tool_choice(choice, request.tools)
    except ValueError as error:
        raise value_error(str(error), "tool_choice") from error
    if found.kind == "auto" and not serves_auto:
        raise RequestError(
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            error_type="BadRequestError",
            param="tool_choice",
        )
    return found


def check_tool_types(tools: list[dict[str, Any]]) -> None:
    """Raises `RequestError` (400) unless there are tools and each is a function with a name."""
    if not tools:
        raise value_error("`tools` must not be an empty list: leave it out to use no tools.", "tools")
    check_types({"tools": tools}, Tools)


def completion_params(request: CompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """The `SamplingParams` of a completion. `defaults` are the server's, by field name."""
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is None and request.echo:
        prompt_logprobs = request.logprobs
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    if echoes_only(request):
        max_tokens = 1  # the engine computes the prompt when it samples; the token is not told
    return _sampling_params(request, defaults, max_tokens, request.logprobs, prompt_logprobs)


def echoes_only(request: CompletionRequest) -> bool:
    """Whether the prompt is to be returned and nothing generated."""
    return bool(request.echo) and request.max_tokens == 0


def chat_params(request: ChatCompletionRequest, defaults: Mapping[str, Any]) -> SamplingParams:
    """The `SamplingParams` of a chat completion; without max_tokens it may fill the context."""
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _sampling_params(request, defaults, max_tokens, logprobs, request.prompt_logprobs)


def _sampling_params(
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    fields = {name: getattr(request, name) for name in _PASSED_ON}
    for name in _DEFAULTED:
        if fields[name] is None:
            fields[name] = defaults.get(name)
    limit = defaults.get("max_tokens")  # caps every request, as in vLLM
    if limit is not None:
        max_tokens = limit if max_tokens is None else min(max_tokens, limit)
    return SamplingParams.from_optional(
        **fields,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        structured_outputs=read_constraint(request),
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_PASSED_ON = (
    *_DEFAULTED,
    "n", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "logit_bias",
    "allowed_token_ids", "bad_words", "skip_special_tokens", "spaces_between_special_tokens",
    "thinking_token_budget",
)  # fmt: skip
