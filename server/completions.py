"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from aiohttp import web
from msgspec import UNSET

from ..engine.outputs import CompletionOutput, RequestOutput
from ..scheduler.sampling_params import SamplingParams
from .body import read_body
from .context import CONTEXT, ServerContext
from .errors import caller_errors, json_response
from .logprobs import LogprobFormat, prompt_logprobs
from .protocol import CompletionRequest, completion_decoder
from .request_checks import check_completion, completion_params, echoes_only
from .responses import (
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    CompletionResponse,
)
from .streaming import merge_outputs, send_events


async def create_completion(request: web.Request) -> web.StreamResponse:
    """Complete each prompt n times; choice i of prompt p has index p·n + i."""
    context = request.app[CONTEXT]
    body = await read_body(request, completion_decoder)
    prompts = check_completion(body)
    context.check_model(body.model)
    await context.engine.wait_ready()
    params = completion_params(body, context.engine.default_sampling_params)
    response_id = context.response_id("cmpl", request, body)
    completion = _Completion(context, body, prompts, params, response_id, context.priority(request, body))
    context.log_request(response_id, params)
    if body.stream:
        return await send_events(request, completion.chunks(), context.settings.keep_alive_seconds)
    return json_response(await completion.response())


@dataclass
class _Choice:
    """How far one choice of a stream has come."""

    num_tokens: int = 0
    text_length: int = 0  # characters, an echoed prompt included
    begun: bool = False


class _Completion:
    """One request while it is being answered."""

    def __init__(
        self,
        context: ServerContext,
        body: CompletionRequest,
        prompts: list[str | list[int]],
        params: SamplingParams,
        response_id: str,
        priority: int,
    ) -> None:
        self.context = context
        self.body = body
        self.prompts = prompts
        self.params = params
        self.id = response_id
        self.priority = priority
        self.created = int(time.time())
        self.echoes_only = echoes_only(body)
        self.format = LogprobFormat(body.logprobs or 0, context.tokens_as_ids(body), context.engine.tokenizer)

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The engine's outputs over all prompts, each with the place of its prompt."""
        engine, body = self.context.engine, self.body
        with caller_errors():
            prompts = [
                await self.context.encode_prompt(body, prompt, add_special_tokens=body.add_special_tokens is not False)
                for prompt in self.prompts
            ]
        streams = [
            engine.generate(prompt, self.params, f"{self.id}-{place}", priority=self.priority)  # type: ignore[arg-type]
            for place, prompt in enumerate(prompts)
        ]
        logs = [self.context.output_log(f"{self.id}-{place}") for place in range(len(streams))]
        async with aclosing(merge_outputs(streams)) as merged:
            async for place, output in merged:
                if (log := logs[place]) is not None:
                    log.add(output)
                yield place, output

    async def response(self) -> CompletionResponse:
        """The whole answer."""
        async with aclosing(self.outputs()) as outputs:
            finals = {place: output async for place, output in outputs}
        choices = [
            self._choice(place, finals[place], completion)
            for place in sorted(finals)
            for completion in finals[place].outputs
        ]
        num_tokens = sum(len(completion.token_ids) for output in finals.values() for completion in output.outputs)
        usage = self.context.usage(list(finals.values()), 0 if self.echoes_only else num_tokens)
        fingerprint = self.context.settings.fingerprint
        return CompletionResponse(
            self.id, self.created, self.context.model_name, choices, usage, system_fingerprint=fingerprint,
            metrics=self.context.metrics(finals[0], num_tokens) if len(choices) == 1 else None,
        )  # fmt: skip

    def _choice(self, place: int, output: RequestOutput, completion: CompletionOutput) -> CompletionChoice:
        text, logprobs = self._content(place, output, completion, echo=bool(self.body.echo), offset=0)
        return CompletionChoice(
            place * self.params.n + completion.index,
            text,
            logprobs,
            completion.finish_reason,
            completion.stop_reason,
            token_ids=completion.token_ids if self.body.return_token_ids else None,
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            prompt_token_ids=output.prompt_token_ids if self.body.return_token_ids else None,
        )

    def _content(
        self, place: int, output: RequestOutput, completion: CompletionOutput, *, echo: bool, offset: int
    ) -> tuple[str, CompletionLogprobs | None]:
        """Text and logprobs of a choice or of what is new in it, behind those of the prompt if it is echoed."""
        text, token_ids = completion.text, completion.token_ids
        entries = list(completion.logprobs or [])
        if self.echoes_only:
            text, token_ids, entries = "", [], []
        if echo:
            text = self._prompt_text(place, output) + text
            token_ids = [*output.prompt_token_ids, *token_ids]
            entries = [*(output.prompt_logprobs or [None] * len(output.prompt_token_ids)), *entries]
        if self.body.logprobs is None:
            return text, None
        return text, self.format.completion(token_ids, entries, offset)

    def _prompt_text(self, place: int, output: RequestOutput) -> str:
        prompt = self.prompts[place]
        if isinstance(prompt, str):
            return prompt
        tokenizer = self.context.engine.tokenizer
        return "" if tokenizer is None else tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)

    async def chunks(self) -> AsyncGenerator[CompletionChunk, None]:
        """The answer in pieces, one choice in each, and at last its usage if that is asked for."""
        include_usage, always_usage = self.context.stream_usage(self.body)
        choices = [_Choice() for _ in range(len(self.prompts) * self.params.n)]
        num_running = len(choices)
        prompts: dict[int, RequestOutput] = {}  # the first output of each
        async with aclosing(self.outputs()) as outputs:
            async for place, output in outputs:
                prompts.setdefault(place, output)
                for completion in output.outputs:
                    state = choices[place * self.params.n + completion.index]
                    num_running -= completion.finish_reason is not None
                    chunk = self._chunk(place, prompts[place], completion, state)
                    if not num_running and not include_usage:
                        self.context.sign(chunk)
                    if always_usage:
                        chunk.usage = self.context.usage([output], state.num_tokens)
                    yield chunk
        if include_usage:
            chunk = CompletionChunk(self.id, self.created, self.context.model_name, [])
            chunk.usage = self.context.usage(list(prompts.values()), sum(state.num_tokens for state in choices))
            metrics = self.context.metrics(prompts[0], choices[0].num_tokens) if len(choices) == 1 else None
            if metrics is not None:
                chunk.metrics = metrics
            self.context.sign(chunk)
            yield chunk

    def _chunk(self, place: int, first: RequestOutput, completion: CompletionOutput, state: _Choice) -> CompletionChunk:
        """What is new in one choice; `first` is the first output of its prompt and holds the prompt's logprobs."""
        begins = not state.begun
        text, logprobs = self._content(
            place, first, completion, echo=begins and bool(self.body.echo), offset=state.text_length
        )
        state.begun = True
        state.text_length += len(text)
        if not self.echoes_only:
            state.num_tokens += len(completion.token_ids)
        choice = CompletionChunkChoice(
            place * self.params.n + completion.index,
            text,
            logprobs,
            completion.finish_reason,
            completion.stop_reason,
            prompt_token_ids=first.prompt_token_ids if begins and self.body.return_token_ids else UNSET,
            token_ids=completion.token_ids if self.body.return_token_ids else UNSET,
        )
        return CompletionChunk(self.id, self.created, self.context.model_name, [choice])
