"""`omni-engine run-batch`: the requests of a file in OpenAI's batch format, answered into another file.

They go through the same application as those of `serve`, over a socket that only this process can reach.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import msgspec
from aiohttp import ClientSession, ClientTimeout, UnixConnector, web

from ..engine.async_engine import AsyncEngine
from .app import build_app
from .arguments import CommandParser, add_engine_arguments, engine_args
from .config_file import parse_with_config
from .serve_arguments import add_api_arguments, serve_parser, server_settings, take_model_argument
from .settings import ServerSettings

MAX_CONCURRENT = 512  # more wait here than in the engine's queue
SOCKET_NAME = "s"  # short: the path of a socket has 107 bytes


class BatchLine(msgspec.Struct):
    """A line of the input file: the request `method url` with its body, and the client's own name for it."""

    custom_id: str
    url: str
    body: dict[str, Any]
    method: str = "POST"


_decoder = msgspec.json.Decoder(BatchLine)


def batch_parser() -> CommandParser:
    parser = CommandParser(
        "run-batch", "-i FILE -o FILE [MODEL]", "Answer a file of requests in OpenAI's batch format."
    )
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    parser.add_argument("-i", "--input-file", required=True, help="JSON lines with custom_id, method, url and body")
    parser.add_argument("-o", "--output-file", required=True, help="where the answers go, one line for each request")
    parser.add_argument("--config", help="YAML file of flags and their values; the command line goes before it")
    add_api_arguments(parser.add_argument_group("API"))
    add_engine_arguments(parser)
    # What `serve` asks for beside these has no effect on a batch.
    others = {action.dest: action.default for action in serve_parser()._actions}
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{name: value for name, value in others.items() if name not in known})
    return parser


def run_batch(words: Sequence[str]) -> int:
    """Answer the file; the exit status is 0 also where single requests have failed: their lines say so."""
    parser = batch_parser()
    arguments = parse_with_config(parser, words)
    take_model_argument(parser, arguments)
    for name in ("input_file", "output_file"):
        if "://" in getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')} must be a file, addresses are not supported: "
                f"{getattr(arguments, name)}")  # fmt: skip
    args = engine_args(arguments)
    # Nobody but this process reaches the server, so it needs no keys, and its log no line per request.
    settings = dataclasses.replace(server_settings(arguments, args), api_keys=(), access_log=False)
    with open(arguments.input_file, encoding="utf-8") as source:
        lines = read_lines(source, arguments.input_file)
    engine = AsyncEngine.from_engine_args(args, served_model_name=(settings.served_model_names or (args.model,))[0])
    output = Path(arguments.output_file)
    # A file that is half written must not look like a whole one.
    partial = output.with_name(f".{output.name}.partial")
    with open(partial, "w", encoding="utf-8") as target:
        num_failed = asyncio.run(_answer_all(engine, settings, lines, target))
    os.replace(partial, output)
    print(f"{len(lines)} requests answered, {num_failed} of them with an error: {output}", file=sys.stderr)
    return 0


def read_lines(source: Iterable[str], name: str) -> list[BatchLine]:
    """The requests of a file; raises ValueError with the place of the first line that is none."""
    lines: list[BatchLine] = []
    for number, text in enumerate(source, start=1):
        if not text.strip():
            continue
        try:
            line = _decoder.decode(text)
        except msgspec.DecodeError as error:
            raise ValueError(f"not a request in the batch format ({error}): {name}, line {number}") from error
        if line.method != "POST" or not line.url.startswith("/"):
            raise ValueError(f"a request must be POST with a path as its url: {name}, line {number}")
        lines.append(line)
    return lines


async def _answer_all(engine: AsyncEngine, settings: ServerSettings, lines: list[BatchLine], target: TextIO) -> int:
    """Answer `lines` into `target`, in their order; how many failed."""
    runner = web.AppRunner(build_app(engine, settings), handler_cancellation=True, access_log=None)
    await engine.start()
    await runner.setup()
    try:
        await engine.wait_ready()
        with tempfile.TemporaryDirectory() as folder:  # only its owner may enter it
            path = os.path.join(folder, SOCKET_NAME)
            await web.UnixSite(runner, path).start()
            connector = UnixConnector(path, limit=MAX_CONCURRENT)
            headers = {"Authorization": f"Bearer {settings.api_keys[0]}"} if settings.api_keys else {}
            async with ClientSession(
                connector=connector, timeout=ClientTimeout(total=None), headers=headers
            ) as session:
                return await _write_answers(session, lines, target)
    finally:
        await engine.shutdown()
        await runner.cleanup()


async def _write_answers(session: ClientSession, lines: list[BatchLine], target: TextIO) -> int:
    num_failed = 0
    remaining: Iterator[BatchLine] = iter(lines)
    tasks: list[asyncio.Task[dict[str, Any]]] = []
    try:
        while True:
            while len(tasks) < MAX_CONCURRENT and (line := next(remaining, None)) is not None:
                tasks.append(asyncio.create_task(_answer(session, line)))
            if not tasks:
                return num_failed
            answer = await tasks[0]
            tasks.pop(0)
            num_failed += answer["error"] is not None
            target.write(json.dumps(answer, ensure_ascii=False) + "\n")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(session: ClientSession, line: BatchLine) -> dict[str, Any]:
    """The line of the output file for `line`. What failed has no response but an error, as in vLLM."""
    if line.body.get("stream"):
        status, body = 400, {"error": {"message": "a batch has no streams", "param": "stream", "code": 400}}
    else:
        async with session.post(f"http://engine{line.url}", json=line.body) as response:
            status, body = response.status, await response.text()
            with suppress(ValueError):
                body = json.loads(body)
    request_id = body.get("id") if isinstance(body, dict) else None
    answer = {"status_code": status, "request_id": request_id or f"vllm-batch-{uuid.uuid4().hex}", "body": body}
    failed = status >= 400
    return {
        "id": f"vllm-{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": {**answer, "body": None} if failed else answer,
        "error": body if failed else None,
    }
