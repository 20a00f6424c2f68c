"""What the handlers share: the engine, the server's settings, the names it serves."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from aiohttp import web

from ..engine.outputs import RequestOutput
from ..engine.pooling.outputs import PoolingRequestOutput
from ..scheduler.sampling_params import SamplingParams
from .environment import read_flag
from .errors import RequestError, invalid_value
from .parsing.reasoning_parser import ReasoningParser
from .parsing.registry import REASONING_PARSERS, TOOL_PARSERS
from .parsing.tool_parser import ToolParser
from .pooling_protocol import PoolingBody
from .protocol import GenerationRequest
from .request_log import OutputLog
from .request_metrics import RequestMetrics, request_metrics
from .responses import ChatChunk, CompletionChunk, CompletionTokensDetails, PromptTokensDetails, Usage
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)
PRIORITY_HEADER = "X-Vllm-Priority"
SKIP_MODEL_NAME_VALIDATION = read_flag("VLLM_SKIP_MODEL_NAME_VALIDATION")


class ServerContext:
    """One server's engine and settings, and the small decisions that both APIs make alike."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        self.engine = engine
        self.settings = settings
        self.model_names = settings.served_model_names or (settings.model,)
        self.created = int(time.time())
        self.load = 0  # requests in progress, if they are tracked
        self.openapi: dict[str, Any] | None = None  # made when it is asked for
        self.tool_parser: type[ToolParser] | None = None  # for tool_choice auto
        if settings.enable_auto_tool_choice and settings.tool_call_parser:
            self.tool_parser = TOOL_PARSERS.get(settings.tool_call_parser)
        self.reasoning_parser: type[ReasoningParser] | None = None
        if settings.reasoning_parser:
            self.reasoning_parser = REASONING_PARSERS.get(settings.reasoning_parser)

    @property
    def model_name(self) -> str:
        """The name that responses report."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raises 404 for a model that is not served; none given means the one that is."""
        if name and name not in self.model_names and not SKIP_MODEL_NAME_VALIDATION:
            aliases = ", ".join(self.model_names)
            raise RequestError(
                f"The model `{name}` does not exist. Valid aliases: {aliases}.",
                status=404,
                error_type="NotFoundError",
                param="model",
            )

    def response_id(self, prefix: str, request: web.Request, body: GenerationRequest | PoolingBody) -> str:
        """The client's own id if it sent one, behind the API's prefix."""
        return f"{prefix}-{self.request_id(request, body)}"

    def request_id(self, request: web.Request, body: GenerationRequest | PoolingBody) -> str:
        """The id that the client sent, or a new one."""
        return printable(request.headers.get("X-Request-Id") or body.request_id or uuid.uuid4().hex)

    def priority(self, request: web.Request, body: GenerationRequest | PoolingBody) -> int:
        """The header goes before the body: it is set by whoever stands between the client and this server."""
        text = request.headers.get(PRIORITY_HEADER)
        if text is None:
            return body.priority or 0
        try:
            priority = int(text)
        except ValueError as error:
            message = f"the header {PRIORITY_HEADER} must be an integer: {printable(text)}"
            raise invalid_value(message, "priority") from error
        if not -(2**63) <= priority < 2**63:
            raise invalid_value(f"the header {PRIORITY_HEADER} must fit 64 bits: {priority}", "priority")
        return priority

    def log_request(self, response_id: str, params: SamplingParams) -> None:
        if self.settings.enable_log_requests:
            logger.info("Received request %s: params: %s", response_id, params)

    def output_log(self, request_id: str) -> OutputLog | None:
        """Where the answer to a request is logged, if the operator wants that."""
        settings = self.settings
        return OutputLog(request_id, settings.max_log_len) if settings.enable_log_outputs else None

    def sign(self, chunk: CompletionChunk | ChatChunk) -> None:
        """The last chunk of a stream tells the fingerprint."""
        if self.settings.fingerprint is not None:
            chunk.system_fingerprint = self.settings.fingerprint

    def stream_usage(self, body: GenerationRequest) -> tuple[bool, bool]:
        """Whether a stream ends with a usage chunk, and whether every chunk has usage."""
        if self.settings.enable_force_include_usage:
            return True, True
        options = body.stream_options
        include = options is not None and bool(options.include_usage)
        return include, include and options is not None and bool(options.continuous_usage_stats)

    def metrics(self, output: RequestOutput, num_tokens: int) -> RequestMetrics | None:
        """What the operator wants requests of one sequence to tell about themselves."""
        if not self.settings.enable_per_request_metrics:
            return None
        return request_metrics(output.metrics, num_tokens)

    def tokens_as_ids(self, body: GenerationRequest) -> bool:
        if body.return_tokens_as_token_ids is None:
            return self.settings.return_tokens_as_token_ids
        return body.return_tokens_as_token_ids

    def usage(
        self,
        outputs: Sequence[RequestOutput] | Sequence[PoolingRequestOutput[Any]],
        completion_tokens: int,
        reasoning_tokens: int | None = None,
    ) -> Usage:
        """Token counts over one output of each prompt; without `reasoning_tokens` nothing is said of reasoning."""
        prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        details = None
        if self.settings.enable_prompt_tokens_details:
            details = PromptTokensDetails(sum(output.num_cached_tokens or 0 for output in outputs))
        reasoning = None if reasoning_tokens is None else CompletionTokensDetails(reasoning_tokens)
        return Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens, details, reasoning)

    async def encode_prompt(
        self, body: GenerationRequest, prompt: str | list[int], *, add_special_tokens: bool
    ) -> dict[str, Any]:
        """The engine's form of a prompt. Text is left to the engine, unless the request says how to tokenize it."""
        encoded: dict[str, Any] = {}
        cuts = body.truncation_side is not None and body.truncate_prompt_tokens is not None
        if isinstance(prompt, str):
            encoded["prompt"] = prompt
            if cuts or not add_special_tokens:
                token_ids = await self.engine.tokenize(prompt, add_special_tokens=add_special_tokens)
                encoded["prompt_token_ids"] = token_ids
        else:
            encoded["prompt_token_ids"] = prompt
        if cuts:
            limit = body.truncate_prompt_tokens or 0
            limit = self.engine.max_model_len - 1 if limit == -1 else limit
            token_ids = encoded["prompt_token_ids"]
            first = max(len(token_ids) - limit, 0) if body.truncation_side == "left" else 0
            encoded["prompt_token_ids"] = token_ids[first : first + limit]
        if body.cache_salt is not None:
            encoded["cache_salt"] = body.cache_salt
        return encoded


CONTEXT = web.AppKey("omni_engine.server_context", ServerContext)


def printable(text: str) -> str:
    """`text` without what UTF-8 cannot hold; headers and paths may carry such bytes."""
    return text.encode("utf-8", "replace").decode()
