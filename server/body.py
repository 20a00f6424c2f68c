"""From a request's body to a typed request: content type, size, JSON, types."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from .errors import RequestError

MAX_BODY_BYTES = 32 * 2**20
_CONTENT_TYPE_MESSAGE = "Unsupported Media Type: Only 'application/json' is allowed"
_LOCATION = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_PATH_PART = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")
_MISSING = re.compile(r"missing required field `(?P<name>\w+)`")

Body = TypeVar("Body", bound=msgspec.Struct)


async def read_body(request: web.Request, decoder: msgspec.json.Decoder[Body]) -> Body:
    """The body of `request`, decoded; raises `RequestError` (400) or aiohttp's 413."""
    if request.content_type != "application/json":
        raise RequestError(_CONTENT_TYPE_MESSAGE)
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_BODY_BYTES, request.content_length or 0)
    try:
        data = await request.read()
    except RequestPayloadError as error:
        raise _invalid("json_invalid", ["body"], f"the body cannot be read: {error}") from error
    return decode_body(data, decoder)


def decode_body(data: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode JSON; unknown fields are ignored. Raises `RequestError` naming the field that is wrong."""
    try:
        # msgspec does not look into fields that it skips.
        data.decode()
    except UnicodeDecodeError as error:
        raise _invalid("json_invalid", ["body"], f"the body is not valid UTF-8 (byte {error.start})") from error
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error
    except msgspec.DecodeError as error:
        raise _invalid("json_invalid", ["body"], f"JSON decode error: {error}") from error
    except RecursionError as error:
        raise _invalid("json_invalid", ["body"], "the body is nested too deeply") from error


def check_types(value: Any, type_: Any) -> None:
    """Raises `RequestError` naming the field where `value`, a part of a body, is not of a struct's types."""
    try:
        msgspec.convert(value, type_)
    except msgspec.ValidationError as error:
        raise _wrong_type(str(error)) from error


def value_error(message: str, param: str | None = None) -> RequestError:
    """A body that is well-typed but breaks a rule of the API."""
    return _invalid("value_error", ["body"], message, param=param)


def _wrong_type(text: str) -> RequestError:
    """msgspec's "Expected `str`, got `int` - at `$.messages[0].role`" in the form of the API."""
    match = _LOCATION.match(text)
    assert match is not None  # every part of the pattern is optional
    what, path = match["what"], match["path"] or ""
    location: list[str | int] = ["body"]
    for part in _PATH_PART.finditer(path):
        if part["name"]:
            location.append(part["name"])
        elif part["index"]:
            location.append(int(part["index"]))
    missing = _MISSING.search(what)
    if missing:
        return _invalid("missing", [*location, missing["name"]], "Field required")
    kind = "less_than_equal" if "<=" in what else "greater_than_equal" if ">=" in what else "type_error"
    return _invalid(kind, location, what)


def _invalid(kind: str, location: list[str | int], message: str, param: str | None = None) -> RequestError:
    dotted = ".".join(map(str, location))
    detail = {"type": kind, "loc": dotted, "msg": message}
    if param is None and len(location) > 1:
        param = dotted
    return RequestError(f"1 validation error:\n  {detail}", param=param)
