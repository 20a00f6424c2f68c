"""One entry of the graph cache: a folder with a package and its manifest, and the checks it must pass."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from .key import CacheKey, canonical_json

FORMAT = 1
PACKAGE_NAME = "graph.pt2"
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
_CHUNK_BYTES = 2**20


class BrokenEntryError(ValueError):
    """An entry that must not be loaded; the text says what is wrong with it."""


@dataclass(frozen=True)
class GraphEntry:
    """A compiled graph in the cache."""

    digest: str  # its key's
    path: Path  # of the package
    fields: dict[str, Any] = field(compare=False)  # its key's; empty if the manifest cannot be read
    details: dict[str, Any] = field(
        compare=False
    )  # what is known of it beside: created (seconds since 1970), compile_seconds, ...
    num_bytes: int  # size of the package
    last_used: float  # seconds since 1970

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def created(self) -> float:
        """Seconds since 1970; 0 if unknown."""
        created = self.details.get("created")
        return float(created) if isinstance(created, (int, float)) else 0.0


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What manifest.json says. `checksum` is the sha256 of the canonical JSON of everything else."""

    format: int
    fields: dict[str, Any]
    details: dict[str, Any]
    package_bytes: int
    package_sha256: str
    checksum: str = ""

    def expected_checksum(self) -> str:
        fields = msgspec.structs.asdict(self)
        del fields["checksum"]
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def seal_entry(folder: Path, key: CacheKey, details: dict[str, Any]) -> None:
    """Write the manifest for the package in `folder`, and bring both to the disk.

    BrokenEntryError if there is no package; OSError if the disk is full.
    """
    package = folder / PACKAGE_NAME
    if package.is_symlink() or not package.is_file():
        raise BrokenEntryError(f"{PACKAGE_NAME} is missing")
    package.chmod(0o600)
    with _open_private(package) as (file, size):
        sha256 = _sha256(file)
        os.fsync(file)
    manifest = Manifest(FORMAT, key.fields, details, size, sha256)
    manifest.checksum = manifest.expected_checksum()
    write_synced(folder / MANIFEST_NAME, canonical_json(msgspec.structs.asdict(manifest)).encode() + b"\n")
    sync_folder(folder)


def read_entry(folder: Path, *, contents: bool) -> GraphEntry:
    """The entry in `folder`, checked; with `contents` the digest of the package is computed too.

    FileNotFoundError if there is none, BrokenEntryError if it must not be loaded.
    """
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode):
        raise BrokenEntryError("it is not a folder")
    _check_owner("the folder", state)
    manifest = _read_manifest(folder / MANIFEST_NAME)
    if CacheKey(manifest.fields).digest != folder.name:
        raise BrokenEntryError(f"the key in {MANIFEST_NAME} is another graph's")
    with _open_private(folder / PACKAGE_NAME) as (file, size):
        if size != manifest.package_bytes:
            raise BrokenEntryError(f"{PACKAGE_NAME} has {size} bytes instead of {manifest.package_bytes}")
        if contents and _sha256(file) != manifest.package_sha256:
            raise BrokenEntryError(f"the content of {PACKAGE_NAME} is not what was stored")
    return GraphEntry(
        folder.name, folder / PACKAGE_NAME, manifest.fields, manifest.details, size, last_used=state.st_mtime
    )


def broken_entry(folder: Path) -> GraphEntry:
    """What can be told about an entry that cannot be read."""
    package = folder / PACKAGE_NAME
    try:
        num_bytes, last_used = package.lstat().st_size, folder.lstat().st_mtime
    except OSError:
        num_bytes, last_used = 0, 0.0
    return GraphEntry(folder.name, package, {}, {}, num_bytes, last_used)


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file that only its owner may read, through to the disk."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> Manifest:
    with _open_private(path) as (file, size):
        if size > MAX_MANIFEST_BYTES:
            raise BrokenEntryError(f"{path.name} has {size} bytes, more than any manifest")
        content = os.read(file, MAX_MANIFEST_BYTES)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
        sound = manifest.checksum == manifest.expected_checksum()
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BrokenEntryError(f"{path.name} is not a manifest ({error})") from error
    if manifest.format != FORMAT:
        raise BrokenEntryError(f"{path.name} has format {manifest.format}, which this version does not read")
    if not sound:
        raise BrokenEntryError(f"the content of {path.name} is not what was stored")
    return manifest


@contextmanager
def _open_private(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a plain file that nobody else can write to; BrokenEntryError for anything else."""
    try:
        # Without following links, and without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise BrokenEntryError(f"{path.name} is missing") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BrokenEntryError(f"{path.name} is a link") from error
        raise BrokenEntryError(f"{path.name} cannot be read ({error.strerror})") from error
    try:
        # The checks are of the opened file, which nobody can exchange any more.
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise BrokenEntryError(f"{path.name} is not a plain file")
        _check_owner(path.name, state)
        yield descriptor, state.st_size
    finally:
        os.close(descriptor)


def _check_owner(name: str, state: os.stat_result) -> None:
    if state.st_uid != os.geteuid():
        raise BrokenEntryError(f"{name} belongs to another user ({state.st_uid})")
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BrokenEntryError(f"{name} can be written to by others")


def _sha256(descriptor: int) -> str:
    digest = hashlib.sha256()
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()
