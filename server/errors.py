"""How a failure is told to an HTTP client: the one error body, and which status each failure has."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from ..engine.errors import (
    EngineDeadError,
    EngineRestartError,
    EngineShutdownError,
    RequestRejectedError,
    WrongRunnerError,
)
from ..scheduler.sampling_params import ValidationError

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARACTERS = 1000
RETRY_SECONDS = "1"
ENGINE_DEAD_MESSAGE = "The engine has stopped and cannot serve requests; the server's log says why."
INTERNAL_MESSAGE = "Internal server error; the server's log says why."


class ErrorInfo(msgspec.Struct):
    """What went wrong: `type` names the kind of error, `param` the field to correct, `code` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    """The body of every error response but the one for a wrong API key."""

    error: ErrorInfo


class RequestError(Exception):
    """A request that is answered with an error. The default type is that of a body that fails validation."""

    def __init__(
        self, message: str, *, status: int = 400, error_type: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.info = ErrorInfo(_printable(message), error_type or HTTPStatus(status).phrase, param, status)


def invalid_value(message: str, param: str) -> RequestError:
    """A value of the body that breaks a rule: 400."""
    return RequestError(message, param=param)


def not_supported(param: str, message: str = "") -> RequestError:
    """A field that would change the result, but is not built: 400, never silence."""
    return RequestError(
        message or f"not supported yet by this server: {param}", error_type="BadRequestError", param=param
    )


def error_info(error: BaseException) -> ErrorInfo:
    """What the client is told of `error`. Nothing internal (paths, tracebacks) is in it; that goes to the log."""
    if isinstance(error, RequestError):
        return error.info
    if isinstance(error, WrongRunnerError):  # as for a route that is not there
        return ErrorInfo(_printable(str(error)), HTTPStatus.NOT_FOUND.phrase, None, 404)
    if isinstance(error, ValidationError):
        return ErrorInfo(_printable(str(error)), "BadRequestError", error.parameter, 400)
    if isinstance(error, RequestRejectedError):
        return ErrorInfo(_printable(str(error)), HTTPStatus.SERVICE_UNAVAILABLE.phrase, None, 503)
    if isinstance(error, (EngineRestartError, EngineShutdownError)):
        return ErrorInfo(_printable(str(error)), "ServiceUnavailableError", None, 503)
    if isinstance(error, EngineDeadError):
        return ErrorInfo(ENGINE_DEAD_MESSAGE, "ServiceUnavailableError", None, 503)
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        message = "The request body is larger than this server takes; send fewer or shorter prompts."
        return ErrorInfo(message, HTTPStatus.REQUEST_ENTITY_TOO_LARGE.phrase, None, 413)
    if isinstance(error, web.HTTPException):
        phrase = HTTPStatus(error.status).phrase
        return ErrorInfo(phrase, phrase, None, error.status)
    if isinstance(error, RecursionError):
        return ErrorInfo("The request is nested too deeply.", "BadRequestError", None, 400)
    logger.error("request failed", exc_info=error)
    return ErrorInfo(INTERNAL_MESSAGE, "InternalServerError", None, 500)


def error_response(error: BaseException) -> web.Response:
    """The HTTP response for `error`."""
    info = error_info(error)
    return json_response(ErrorResponse(info), status=info.code, headers=error_headers(error))


def error_headers(error: BaseException) -> dict[str, str]:
    """What an error response says in its headers."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return {"Allow": ", ".join(sorted(error.allowed_methods))}
    if isinstance(error, (RequestRejectedError, EngineRestartError)):
        return {"Retry-After": RETRY_SECONDS}
    return {}


def json_response(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`body`, a struct or plain data, as JSON."""
    return web.Response(body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json")


def _printable(text: str) -> str:
    """Cut to a sane length, without what UTF-8 cannot hold."""
    text = text if len(text) <= MAX_MESSAGE_CHARACTERS else text[:MAX_MESSAGE_CHARACTERS] + "..."
    return text.encode("utf-8", "replace").decode()


@contextmanager
def caller_errors() -> Iterator[None]:
    """Around calls into the engine: a ValueError there is the caller's (a template that refuses a conversation, …)."""
    try:
        yield
    except (ValidationError, UnicodeError):
        raise
    except ValueError as error:
        raise RequestError(_printable(str(error)), error_type="BadRequestError") from error
