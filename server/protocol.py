"""The OpenAI requests as this server reads them, with vLLM's extensions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec

# Whatever number a client sends must fit the 64-bit integers of the engine's messages.
Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Truncation = Annotated[int, msgspec.Meta(ge=-1, le=2**63 - 1)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

MAX_CACHE_SALT_CHARACTERS = 128


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both APIs have in common. None means: not given, so the server's default holds.

    Fields of type Any are not built yet; `request_checks.check_not_built` refuses them when they are set.
    """

    model: str | None = None
    n: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Int | None = None
    min_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncation | None = None
    truncation_side: str | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    priority: Int | None = None
    request_id: str | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    # Without effect here, as for vLLM without the feature that reads them; still, a wrong type is a mistake.
    user: str | None = None
    session_id: str | None = None
    length_penalty: float | None = None

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    thinking_token_budget: Int | None = None

    use_beam_search: Any = None
    logits_processors: Any = None
    logprob_token_ids: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None
    repetition_detection: Any = None
    stream_interval: Any = None
    watermarking: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    prompt_embeds: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/completions."""

    # str | [str] | [token id] | [[token id]]; that a list is of one kind is checked afterwards.
    prompt: str | list[Union[str, TokenId, list[TokenId]]] | None = None  # noqa: UP007  (msgspec, Python 3.10)
    logprobs: Int | None = None
    suffix: Any = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None

    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    media_io_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    functions: Any = None
    function_call: Any = None


class FunctionDefinition(msgspec.Struct):
    """What is known of a function beside its own fields, which the chat template sees too."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(msgspec.Struct):
    """An element of `tools`."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


class Tools(msgspec.Struct):
    """The types that `tools` must have; requests keep them as the client wrote them."""

    tools: list[ToolDefinition]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # by default those of a completion, or of a chat
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


completion_decoder = msgspec.json.Decoder(CompletionRequest)
chat_decoder = msgspec.json.Decoder(ChatCompletionRequest)
tokenize_decoder = msgspec.json.Decoder(TokenizeRequest)
detokenize_decoder = msgspec.json.Decoder(DetokenizeRequest)
