"""What a compiled graph depends on: its key in the cache, and the versions of the code that made it."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import __version__

_PACKAGE = Path(__file__).parents[2]
_CODE_FOLDERS = ("engine", "kvcache", "models", "ops")  # what a step is traced from
_CODE_SUFFIXES = (".py", ".cpp", ".h", ".cu")


@dataclass(frozen=True)
class CacheKey:
    """Everything that a compiled graph depends on, by name; equal fields mean that the graph may be used.

    `fields` holds what JSON can: text, integers, finite numbers, booleans, lists, mappings. ValueError for anything
    else. The commands show num_requests, tokens_per_request, sampler, backend, torch and model by these names, of an
    entry's details or, where they say nothing, of its key.
    """

    fields: dict[str, Any] = field(compare=False)
    digest: str = field(init=False)  # sha256 of the canonical JSON, in hex

    def __post_init__(self) -> None:
        text = canonical_json(self.fields)
        object.__setattr__(self, "fields", json.loads(text))  # a copy of its own, with lists for tuples
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())


def canonical_json(value: Any) -> str:
    """The one JSON text of a value, whatever the order of its mappings; ValueError where there is none."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a graph's key holds only what JSON can ({error}): {value!r:.200}") from error


@dataclass(frozen=True)
class GraphShape:
    """The sizes that all graphs of an engine share."""

    num_blocks: int  # of the KV cache
    max_num_seqs: int  # rows of the batch
    max_model_len: int


@functools.cache
def installed_versions() -> dict[str, str]:
    """The fields of a key that change with an installation: omni_engine, code and torch."""
    try:
        torch_version = version("torch")  # of the installed package, as importing it takes seconds
    except PackageNotFoundError:
        torch_version = "none"
    return {"omni_engine": __version__, "code": _code_digest(), "torch": torch_version}


def _code_digest() -> str:
    """Digest of the source files that a step is traced from, so that no edit ever runs an older graph."""
    digest = hashlib.sha256()
    for folder in _CODE_FOLDERS:
        for path in sorted((_PACKAGE / folder).rglob("*")):
            if path.suffix in _CODE_SUFFIXES and path.is_file():
                content = path.read_bytes()
                digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()[:16]
