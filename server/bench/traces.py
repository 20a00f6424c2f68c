"""Request traces: when requests came and how long they were, in Azure's CSV and Mooncake's JSON lines.

Azure LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens. Mooncake (FAST'25): timestamp in milliseconds,
input_length, output_length, and hash_ids, one for each block of 512 prompt tokens; equal ids mean equal blocks.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path

import numpy as np

from .prompts import BenchRequest, PromptMaker

BLOCK_TOKENS = 512
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d+)?")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class TraceRow:
    """One request: `arrival` in seconds, on the trace's own clock; lengths in tokens."""

    arrival: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: str, limit: int) -> list[TraceRow]:
    """The first `limit` requests, in the order of their arrival, the first at 0 s.

    Raises OSError, or ValueError with the line that is wrong.
    """
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        lines = chain([first], file)
        if first.startswith("{"):
            read = _mooncake_rows(lines)
        elif first.strip().split(",")[:3] == list(_AZURE):
            read = _azure_rows(lines)
        else:
            raise ValueError(
                f"not a trace: the file begins neither with {','.join(_AZURE)} nor with a JSON object: {path}"
            )
        rows = _checked(path, read, limit)
    if not rows:
        raise ValueError(f"the trace has no requests: {path}")
    rows.sort(key=lambda row: row.arrival)
    start = rows[0].arrival
    return [TraceRow(row.arrival - start, row.input_len, row.output_len, row.hash_ids) for row in rows]


def _checked(path: str, rows: Iterator[TraceRow], limit: int) -> list[TraceRow]:
    done: list[TraceRow] = []
    try:
        done.extend(islice(rows, limit))
    except (ValueError, KeyError, TypeError) as error:
        detail = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"a request of the trace cannot be read ({detail}): {path}") from error
    return done


def _azure_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    for row in csv.DictReader(lines):
        match = _TIME.match(row["TIMESTAMP"])
        if match is None:
            raise ValueError(f"not a time: {row['TIMESTAMP']}")
        day, time, fraction = match.groups()
        # The fraction has seven digits, more than Python's parser takes.
        moment = datetime.fromisoformat(f"{day}T{time}").replace(tzinfo=timezone.utc)
        arrival = moment.timestamp() + float(fraction or 0)
        yield TraceRow(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake_rows(lines: Iterable[str]) -> Iterator[TraceRow]:
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        yield TraceRow(
            float(row["timestamp"]) / 1000,
            int(row["input_length"]),
            int(row["output_length"]),
            tuple(int(hash_id) for hash_id in row.get("hash_ids", ())),
        )


def trace_requests(
    rows: Iterable[TraceRow], maker: PromptMaker, *, seed: int, time_scale: float = 1.0, length_scale: float = 1.0
) -> list[BenchRequest]:
    """Requests like the trace's. Times are multiplied by `time_scale`, lengths by `length_scale` (at least 1 token).

    A block's tokens depend on its hash id and the seed only, so equal ids give equal blocks, here and in another run.
    """
    block_tokens = max(1, round(BLOCK_TOKENS * length_scale))
    requests = []
    for index, row in enumerate(rows):
        wanted = max(1, round(row.input_len * length_scale))
        parts = []
        for hash_id in row.hash_ids:
            if wanted == 0:
                break
            block = maker.draw(np.random.default_rng([seed, 0, hash_id]), block_tokens)
            parts.append(block[:wanted])
            wanted -= len(parts[-1])
        if wanted:  # of what the blocks do not cover nothing is shared
            parts.append(maker.draw(np.random.default_rng([seed, 1, index]), wanted))
        prompt, length = maker.build(parts)
        output_len = max(1, round(row.output_len * length_scale))
        requests.append(BenchRequest(prompt, length, output_len, row.arrival * time_scale))
    return requests
