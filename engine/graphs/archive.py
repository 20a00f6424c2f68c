"""Graphs in one file, to carry them to another machine: a plain tar with a list of contents and the entries.

contents.json                 {"format": 1, "digests": [...]}
DIGEST/manifest.json
DIGEST/graph.pt2
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from .entry import FORMAT, MANIFEST_NAME, MAX_MANIFEST_BYTES, PACKAGE_NAME, GraphEntry

CONTENTS_NAME = "contents.json"
MAX_ENTRIES = 10_000
MAX_PACKAGE_BYTES = 4 * 2**30
_MEMBER = re.compile(rf"[0-9a-f]{{64}}/({re.escape(MANIFEST_NAME)}|{re.escape(PACKAGE_NAME)})")


class ArchiveError(ValueError):
    """A file that is not an archive of graphs, or one that has been changed."""


class Contents(msgspec.Struct, forbid_unknown_fields=True):
    """The list of what an archive holds, without which one that was cut off could look complete."""

    format: int
    digests: list[str]


def write_archive(path: Path, entries: Sequence[GraphEntry]) -> None:
    """Write `entries` into the file `path`, which appears at once when it is complete; raises OSError."""
    try:
        _write_archive(path, entries)
    except OSError as error:
        raise OSError(f"the archive cannot be written ({error.strerror}): {path}") from error


def _write_archive(path: Path, entries: Sequence[GraphEntry]) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            # No member needs more than the oldest format has, so no header has a length of its own.
            with tarfile.open(fileobj=file, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
                contents = msgspec.json.encode(Contents(FORMAT, [entry.digest for entry in entries]))
                archive.addfile(_member(CONTENTS_NAME, len(contents)), io.BytesIO(contents))
                for entry in entries:
                    for name in (MANIFEST_NAME, PACKAGE_NAME):
                        with open(entry.folder / name, "rb") as source:
                            size = os.fstat(source.fileno()).st_size
                            archive.addfile(_member(f"{entry.digest}/{name}", size), source)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = 0o600
    return member


def unpack_archive(path: Path, folder: Path) -> list[str]:
    """Write the entries of the archive `path` into the empty folder `folder`; returns their digests, of the keys.

    Only plain files with the names above are written, and none is trusted: the entries are still to be checked.
    ArchiveError if the file is anything else than what `write_archive` makes; OSError for a full disk.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise ArchiveError(f"the archive cannot be read ({error.strerror}): {path}") from error
        try:
            return _unpack(stack.enter_context(tarfile.open(fileobj=file, mode="r:")), folder)
        except (tarfile.TarError, EOFError) as error:
            raise ArchiveError(f"not an archive of omni-engine graphs ({error}): {path}") from error
        except ArchiveError as error:
            raise ArchiveError(f"{error}: {path}") from error


def _unpack(archive: tarfile.TarFile, folder: Path) -> list[str]:
    first = archive.next()
    if first is None or first.name != CONTENTS_NAME:
        raise ArchiveError(f"not an archive of omni-engine graphs, it does not begin with {CONTENTS_NAME}")
    _check_member(first, MAX_ENTRIES * 128)
    try:
        contents = msgspec.json.decode(_open(archive, first).read(), type=Contents)
    except msgspec.MsgspecError as error:
        raise ArchiveError(f"the archive's {CONTENTS_NAME} cannot be read ({error})") from error
    if contents.format != FORMAT:
        raise ArchiveError(f"the archive has a format that this version does not read, {contents.format}")
    wanted = {f"{digest}/{name}" for digest in contents.digests for name in (MANIFEST_NAME, PACKAGE_NAME)}
    while (member := archive.next()) is not None:
        # The pattern has no room for absolute names or "..".
        if _MEMBER.fullmatch(member.name) is None or member.name not in wanted:
            raise ArchiveError(f"the archive holds a file that does not belong there, {member.name!r:.200}")
        _check_member(member, MAX_MANIFEST_BYTES if member.name.endswith(MANIFEST_NAME) else MAX_PACKAGE_BYTES)
        wanted.remove(member.name)  # so that a second file of the name does not belong there
        target = folder / member.name
        target.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            shutil.copyfileobj(_open(archive, member), file, 2**20)
            file.flush()
            os.fsync(file.fileno())
    if wanted:
        raise ArchiveError(f"the archive is incomplete, it lacks {min(wanted)}")
    return list(dict.fromkeys(contents.digests))


def _check_member(member: tarfile.TarInfo, most_bytes: int) -> None:
    """ArchiveError unless the member is a plain file that is not too large; sparse ones could hide their size."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ArchiveError(f"the archive holds something else than a plain file, {member.name!r:.200}")
    if member.size > most_bytes:
        raise ArchiveError(f"the archive holds a file of {member.size} bytes where {most_bytes} are the most")


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo) -> io.BufferedReader:
    file = archive.extractfile(member)
    assert file is not None, "a plain file has content"
    return file  # pyright: ignore[reportReturnType]
