"""What the front process and the engine core say to each other: tagged msgpack structs, each in a length-led frame."""

from __future__ import annotations

from typing import Any, Union

import msgspec

from ..scheduler.request import RequestInput, RequestUpdate
from ..scheduler.scheduler import SchedulerStats
from .load import CoreLoad
from .phases import Phase

FRAME_HEADER_BYTES = 4  # length of the message that follows, little-endian


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message: the fields of `EngineArgs`."""

    args: dict[str, Any]


class Add(msgspec.Struct, frozen=True, tag=True):
    request: RequestInput


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Answered by an `Answer` with the same number, as `Profile` is."""

    number: int


class Profile(msgspec.Struct, frozen=True, tag=True):
    """Start to profile the steps, or stop and write down what was seen."""

    number: int
    starts: bool


class Watch(msgspec.Struct, frozen=True, tag=True):
    """From here on tell of every step, or stop telling."""

    wanted: bool


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End the core once this is read; whatever runs is dropped."""


class CoreInfo(msgspec.Struct, frozen=True, tag=True):
    """The core can serve: what only loading could find out."""

    max_model_len: int
    num_blocks: int
    block_size: int
    phases: list[Phase] = []
    gears: list[int] = []


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The core ends: why, in one line for the operator."""

    message: str


class Updates(msgspec.Struct, frozen=True, tag=True):
    """What one step, or an abort, changed."""

    updates: list[RequestUpdate]
    stats: SchedulerStats
    load: CoreLoad | None = None  # while the core is watched


class Answer(msgspec.Struct, frozen=True, tag=True):
    """To the question of this number: whether it was done, or the error that kept it from being done."""

    number: int
    done: bool = False
    error: str | None = None


ToCore = Union[Start, Add, Abort, ResetPrefixCache, Profile, Watch, Stop]  # noqa: UP007  (evaluated on Python 3.10 too)
FromCore = Union[CoreInfo, Failed, Updates, Answer]  # noqa: UP007

_encoder = msgspec.msgpack.Encoder()
to_core_decoder = msgspec.msgpack.Decoder(ToCore)
from_core_decoder = msgspec.msgpack.Decoder(FromCore)


def frame(message: msgspec.Struct) -> bytes:
    """One message as it goes over the socket."""
    body = _encoder.encode(message)
    return len(body).to_bytes(FRAME_HEADER_BYTES, "little") + body
