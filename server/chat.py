"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from msgspec import UNSET

from ..engine.outputs import CompletionOutput, RequestOutput
from ..scheduler.sampling_params import SamplingParams
from .answers import AnswerFormat, ChoiceReader
from .body import read_body
from .context import CONTEXT, ServerContext
from .errors import caller_errors, json_response
from .logprobs import LogprobFormat, prompt_logprobs
from .parsing.messages import DeltaMessage
from .parsing.tool_choice import ToolChoice
from .protocol import ChatCompletionRequest, chat_decoder
from .request_checks import chat_params, check_chat, check_tools
from .responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletionResponse,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from .streaming import merge_outputs, send_events
from .structured_outputs import constrain_to_calls


async def create_chat_completion(request: web.Request) -> web.StreamResponse:
    """Answer a conversation, n times."""
    return await answer_chat(request, await read_body(request, chat_decoder))


async def answer_chat(request: web.Request, body: ChatCompletionRequest) -> web.StreamResponse:
    """The response to a chat request, whole or as a stream."""
    context = request.app[CONTEXT]
    chat = await open_chat(request, body, context.response_id("chatcmpl", request, body))
    if body.stream:
        return await send_events(request, chat.chunks(), context.settings.keep_alive_seconds)
    return json_response(await chat.response())


async def open_chat(request: web.Request, body: ChatCompletionRequest, response_id: str) -> ChatCompletion:
    """A chat request once it has passed its checks and the engine is ready; nothing is computed yet.

    Raises `RequestError` or `ValidationError` for what the client must correct.
    """
    context = request.app[CONTEXT]
    check_chat(body, trust_chat_template=context.settings.trust_request_chat_template)
    tool_choice = check_tools(body, serves_auto=context.tool_parser is not None)
    context.check_model(body.model)
    await context.engine.wait_ready()
    answers = _answer_format(context, body, tool_choice)
    with caller_errors():
        if answers.needs_special_tokens:
            body.skip_special_tokens = False
    constrain_to_calls(body, tool_choice, context.tool_parser)
    params = chat_params(body, context.engine.default_sampling_params)
    context.log_request(response_id, params)
    return ChatCompletion(context, body, answers, params, response_id, context.priority(request, body))


def template_options(context: ServerContext, body: ChatCompletionRequest) -> dict[str, Any]:
    """The variables of the chat template: the server's, under the request's own."""
    effort = body.reasoning_effort
    options = dict(context.settings.default_chat_template_kwargs)
    if effort is not None:
        options["enable_thinking"] = effort != "none"
    options.update(body.chat_template_kwargs or {})
    if effort is not None:
        options["reasoning_effort"] = effort
    return options


async def render_prompt(
    context: ServerContext, body: ChatCompletionRequest, options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The conversation as text, and in the engine's form. `options` are the template's variables."""
    variables = dict(options)
    own_template = variables.pop("chat_template", None) or body.chat_template
    with caller_errors():
        text = await context.engine.render_chat(
            body.messages,
            tools=body.tools,
            documents=body.documents,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            chat_template=own_template or context.settings.chat_template,
            chat_template_kwargs=variables,
        )
        # The template writes the special tokens itself.
        return text, await context.encode_prompt(body, text, add_special_tokens=bool(body.add_special_tokens))


def _answer_format(context: ServerContext, body: ChatCompletionRequest, tool_choice: ToolChoice) -> AnswerFormat:
    options = template_options(context, body)
    return AnswerFormat(
        context.engine.tokenizer, body, tool_choice, context.tool_parser, context.reasoning_parser, options
    )


@dataclass(frozen=True)
class ChatPiece:
    """What one output of the engine adds to the one choice of a chat; `usage` counts up to and with it."""

    deltas: list[DeltaMessage]
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    usage: Usage
    output: RequestOutput


class ChatCompletion:
    """One request while it is being answered."""

    def __init__(
        self,
        context: ServerContext,
        body: ChatCompletionRequest,
        answers: AnswerFormat,
        params: SamplingParams,
        response_id: str,
        priority: int,
    ) -> None:
        self.context = context
        self.body = body
        self.answers = answers
        self.shows_tokens = bool(body.return_token_ids) and not answers.hides_reasoning
        self.shows_logprobs = bool(body.logprobs) and not answers.hides_reasoning
        self.params = params
        self.id = response_id
        self.priority = priority
        self.created = int(time.time())
        self.prompt_text = ""  # known once rendered
        self.format = LogprobFormat(body.top_logprobs or 0, context.tokens_as_ids(body), context.engine.tokenizer)
        last_role = body.messages[-1]["role"]
        self.role = context.settings.response_role if body.add_generation_prompt is not False else last_role
        # An answer that continues the last message may be asked to repeat it.
        self.echoed_text = _content_text(body.messages[-1]) if body.echo and last_role == self.role else ""

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """The engine's outputs."""
        prompt: Any
        self.prompt_text, prompt = await render_prompt(self.context, self.body, self.answers.template_options)
        token_ids = prompt.get("prompt_token_ids")
        with caller_errors():
            if token_ids is None and self.answers.reasoning_parser is not None:
                token_ids = await self.context.engine.tokenize(self.prompt_text)
            params = self.answers.mark_reasoning(self.params, token_ids)
        stream = self.context.engine.generate(prompt, params, self.id, priority=self.priority)
        log = self.context.output_log(self.id)
        async with aclosing(merge_outputs([stream])) as merged:
            async for _, output in merged:
                if log is not None:
                    log.add(output)
                yield output

    async def pieces(self) -> AsyncGenerator[ChatPiece, None]:
        """What the one choice says, in the order in which it says it, for APIs that tell it in a form of their own."""
        reader: ChoiceReader | None = None
        num_tokens = 0
        async with aclosing(self.outputs()) as outputs:
            async for output in outputs:
                if reader is None:
                    reader = self.answers.reader(output.prompt_token_ids)
                (completion,) = output.outputs
                num_tokens += len(completion.token_ids)
                yield ChatPiece(
                    reader.deltas(completion),
                    self._logprobs(completion),
                    reader.finish_reason(completion.finish_reason),
                    completion.stop_reason,
                    self._usage(output, num_tokens, [reader]),
                    output,
                )

    async def response(self) -> ChatCompletionResponse:
        """The whole answer."""
        final: RequestOutput | None = None
        async with aclosing(self.outputs()) as outputs:
            async for output in outputs:
                final = output
        assert final is not None  # the engine ends a stream with an output or an error
        num_tokens = sum(len(completion.token_ids) for completion in final.outputs)
        readers = [self.answers.reader(final.prompt_token_ids) for _ in final.outputs]
        choices = [self._choice(completion, reader) for completion, reader in zip(final.outputs, readers, strict=True)]
        return ChatCompletionResponse(
            self.id,
            self.created,
            self.context.model_name,
            choices,
            self._usage(final, num_tokens, readers),
            system_fingerprint=self.context.settings.fingerprint,
            prompt_logprobs=prompt_logprobs(final.prompt_logprobs),
            prompt_token_ids=final.prompt_token_ids if self.body.return_token_ids else None,
            prompt_text=self.prompt_text if self.body.return_prompt_text else None,
            metrics=self.context.metrics(final, num_tokens) if self.params.n == 1 else None,
        )

    def _choice(self, completion: CompletionOutput, reader: ChoiceReader) -> ChatChoice:
        return ChatChoice(
            completion.index,
            reader.message(self.role, completion, self.echoed_text),
            self._logprobs(completion),
            reader.finish_reason(completion.finish_reason),
            completion.stop_reason,
            token_ids=completion.token_ids if self.shows_tokens else None,
        )

    def _logprobs(self, completion: CompletionOutput) -> ChatLogprobs | None:
        if not self.shows_logprobs:
            return None
        return self.format.chat(completion.token_ids, completion.logprobs or [])

    def _usage(self, output: RequestOutput, completion_tokens: int, readers: Sequence[ChoiceReader]) -> Usage:
        reasoning_tokens = None
        if self.context.reasoning_parser is not None:
            reasoning_tokens = sum(reader.count_reasoning_tokens() for reader in readers)
        return self.context.usage([output], completion_tokens, reasoning_tokens)

    async def chunks(self) -> AsyncGenerator[ChatChunk, None]:
        """The answer in pieces: the role of every choice, what they say, and at last the usage if asked for."""
        include_usage, always_usage = self.context.stream_usage(self.body)
        num_tokens = [0] * self.params.n
        num_running = self.params.n
        last: RequestOutput | None = None
        readers: list[ChoiceReader] = []
        async with aclosing(self.outputs()) as outputs:
            async for output in outputs:
                if last is None:
                    readers = [self.answers.reader(output.prompt_token_ids) for _ in num_tokens]
                    for chunk in self._first_chunks(output):
                        if always_usage:
                            chunk.usage = self._usage(output, 0, readers)
                        yield chunk
                last = output
                for completion in output.outputs:
                    num_tokens[completion.index] += len(completion.token_ids)
                    num_running -= completion.finish_reason is not None
                    reader = readers[completion.index]
                    choice = self._chunk_choice(completion, reader)
                    if choice is None:
                        continue
                    chunk = self._chunk([choice])
                    if not num_running and not include_usage:
                        self.context.sign(chunk)
                    if always_usage:
                        chunk.usage = self._usage(output, num_tokens[completion.index], [reader])
                    yield chunk
        if include_usage and last is not None:
            chunk = self._chunk([])
            chunk.usage = self._usage(last, sum(num_tokens), readers)
            metrics = self.context.metrics(last, num_tokens[0]) if self.params.n == 1 else None
            if metrics is not None:
                chunk.metrics = metrics
            self.context.sign(chunk)
            yield chunk

    def _first_chunks(self, output: RequestOutput) -> list[ChatChunk]:
        """The role of every choice, and the echoed message."""
        chunks = []
        for index in range(self.params.n):
            chunk = self._chunk([ChatChunkChoice(index, ChatDelta(role=self.role, content=""))])
            if self.body.return_token_ids:
                chunk.prompt_token_ids = output.prompt_token_ids
            chunks.append(chunk)
        if self.echoed_text:
            chunks += [
                self._chunk([ChatChunkChoice(index, ChatDelta(content=self.echoed_text))])
                for index in range(self.params.n)
            ]
        return chunks

    def _chunk_choice(self, completion: CompletionOutput, reader: ChoiceReader) -> ChatChunkChoice | None:
        """What is new in one choice; None if that is nothing."""
        delta = reader.delta(completion)
        ends = completion.finish_reason is not None
        if delta is None and not (ends or self.shows_tokens or self.shows_logprobs):
            return None
        return ChatChunkChoice(
            completion.index,
            ChatDelta() if delta is None else delta,
            self._logprobs(completion),
            reader.finish_reason(completion.finish_reason),
            completion.stop_reason if ends else UNSET,
            token_ids=completion.token_ids if self.shows_tokens else UNSET,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        return ChatChunk(self.id, self.created, self.context.model_name, choices)


def _content_text(message: dict[str, Any]) -> str:
    """The text of a message that the chat template has accepted or will refuse."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
