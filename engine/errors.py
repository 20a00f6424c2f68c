"""The ways an engine can fail a caller; `ValidationError`, for input that can be corrected, is with the parameters."""

from __future__ import annotations

from ..scheduler.sampling_params import ValidationError


class WrongRunnerError(ValidationError):
    """Text was asked of an engine that pools, or a vector of one that generates."""


class EngineDeadError(RuntimeError):
    """The engine core failed or ended; no request can be served any more."""


class EngineRestartError(EngineDeadError):
    """The engine core was lost with the request in it; a new one is being started, so it may be sent again."""


class EngineShutdownError(EngineDeadError):
    """The engine ends because it was told to; its message is for the caller."""


class RequestRejectedError(RuntimeError):
    """The request was refused because too many are waiting; it may be sent again later."""


class RequestFailedError(RuntimeError):
    """The engine could not finish this request, through no fault of the caller."""
