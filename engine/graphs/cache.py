"""The compiled graphs on disk, which are executable code: found by key, verified, stored at once or not at all.

<cache root>/graphs/                    of this user, writable for nobody else
    <digest of the key>/graph.pt2       the package
    <digest of the key>/manifest.json   key, details, size and digest of the package
    .lock, .build-<digest>              held by processes that change the folder, or compile a graph
    .tmp-*                              entries in the making
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...ops.cache_folder import CacheFolderError, cache_root, private_folder
from ...ops.file_lock import file_lock
from .archive import ArchiveError, unpack_archive, write_archive
from .entry import PACKAGE_NAME, BrokenEntryError, GraphEntry, broken_entry, read_entry, seal_entry, sync_folder
from .key import CacheKey

logger = logging.getLogger(__name__)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNWRITABLE = (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM)
_LOCK_SECONDS = 60.0  # renaming and removing takes milliseconds; who holds the lock this long is stopped


class GraphCacheError(OSError):
    """The cache cannot be used; the text says what to do."""


class Imported(NamedTuple):
    """What came of an archive."""

    stored: list[GraphEntry]
    kept: list[GraphEntry]  # were there already


class GraphCache:
    """The graphs under `root`, by default the folder of all caches. Safe for several processes at once."""

    def __init__(self, root: Path | None = None) -> None:
        try:
            # Without links, which somebody else could turn to another folder after it was checked.
            self.root = Path(cache_root() if root is None else root).expanduser().resolve()
        except RuntimeError as error:  # a user id without an entry, as some containers give; or links in a circle
            raise GraphCacheError(
                f"the cache folder cannot be told ({error}); set OMNI_ENGINE_CACHE to one, for user: {os.geteuid()}"
            ) from error
        self.folder = self.root / "graphs"
        self.num_found = 0  # by this object
        self.num_stored = 0

    def check_folder(self) -> None:
        """Make the folder if it is not there; GraphCacheError if it cannot be used."""
        with self._told():
            self._make_folder()
            with self._changing():
                pass

    def find(self, key: CacheKey) -> GraphEntry | None:
        """The graph of `key`, whose content has just been verified; None if there is none that may be loaded.

        A broken entry is removed with a warning. Needs no right to write. GraphCacheError if the folder is not ours.
        """
        if not self._has_folder():
            return self._missed(key)
        folder = self.folder / key.digest
        try:
            entry = read_entry(folder, contents=True)
        except FileNotFoundError:
            return self._missed(key)
        except BrokenEntryError:
            # Perhaps it was being replaced just then; nobody does so while we hold the lock.
            entry = self._read_or_remove(folder)
            if entry is None:
                return None
        with contextlib.suppress(OSError):  # a cache on a read-only disk is as good
            os.utime(folder)
        self.num_found += 1
        logger.debug("graph found: %s", key.digest)
        return entry

    def store(self, key: CacheKey, build: Callable[[Path], None] | Path, details: Mapping[str, Any]) -> GraphEntry:
        """Store what `build` writes into the path it gets, or a copy of the file `build`.

        The entry appears at once when it is complete; a sound one that somebody else stored meanwhile is kept. Errors
        of `build` pass through; GraphCacheError if the disk is full or the folder cannot be written to. To `details`
        are added created (seconds since 1970) and, of `build`, compile_seconds.
        """
        with self._told():
            self._make_folder()
        known: dict[str, Any] = {"created": round(time.time(), 3)}
        with self._temporary_folder() as temporary:
            package = temporary / PACKAGE_NAME
            if callable(build):
                start = time.monotonic()
                self._build(build, package)
                known["compile_seconds"] = round(time.monotonic() - start, 3)
            else:
                with open(build, "rb") as source, self._told(), open(package, "xb") as file:
                    shutil.copyfileobj(source, file, 2**20)
            with self._told():
                seal_entry(temporary, key, {**known, **details})
                entry, stored = self._commit(temporary, self.folder / key.digest)
        self.num_stored += stored
        logger.debug("graph %s: %s", "stored" if stored else "was there already", key.digest)
        return entry

    @contextlib.contextmanager
    def building(self, key: CacheKey, timeout: float = 3600.0) -> Iterator[GraphEntry | None]:
        """Be the only process that compiles the graph of `key`: what is found once the others are done, or None.

        GraphCacheError after `timeout` seconds of waiting for another, or if the folder cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            with self._told():
                self._make_folder()
                stack.enter_context(file_lock(self.folder / f".build-{key.digest}", timeout))
            yield self.find(key)

    def entries(self) -> list[GraphEntry]:
        """The entries that look sound, the newest first; their contents are not read."""
        return [entry for entry, problem in self.verify(contents=False) if problem is None]

    def verify(self, *, contents: bool = True) -> list[tuple[GraphEntry, str | None]]:
        """Every entry with what is wrong with it; `contents`: read the packages too. Changes nothing."""
        if not self._has_folder():
            return []
        with self._told():
            folders = [path for path in self.folder.iterdir() if _DIGEST.fullmatch(path.name)]
        found: list[tuple[GraphEntry, str | None]] = []
        for folder in folders:
            try:
                found.append((read_entry(folder, contents=contents), None))
            except FileNotFoundError:
                continue  # removed by another process just now
            except BrokenEntryError as error:
                found.append((broken_entry(folder), str(error)))
        return sorted(found, key=lambda item: (-item[0].created, item[0].digest))

    def prune(
        self,
        *,
        digests: Collection[str] = (),
        older_than: float | None = None,
        keep_current: Mapping[str, Any] | None = None,
        max_bytes: int | None = None,
        all: bool = False,
        dry_run: bool = False,
    ) -> list[tuple[GraphEntry, str]]:
        """Remove broken entries, what dead processes left, and what the rules name; each with the reason.

        older_than: not used for so many seconds. keep_current: any of these fields differs, for example those of
        `installed_versions`. max_bytes: all but those used last that together have no more bytes than this.
        """
        now = time.time()
        removed: list[tuple[GraphEntry, str]] = []
        left = 0
        for entry, problem in sorted(self.verify(), key=lambda item: item[0].last_used, reverse=True):
            reason = None
            if problem is not None:
                reason = f"broken: {problem}"
            elif all:
                reason = "all"
            elif entry.digest in digests:
                reason = "named"
            elif older_than is not None and now - entry.last_used > older_than:
                reason = "not used for long"
            elif keep_current is not None and (other := _differences(entry, keep_current)):
                reason = f"made by another version: {', '.join(other)}"
            elif max_bytes is not None and left + entry.num_bytes > max_bytes:
                reason = "over the size limit"
            if reason is None:
                left += entry.num_bytes
            else:
                removed.append((entry, reason))
        if dry_run or not self._has_folder():
            return removed
        with self._told(), self._changing():
            self._sweep()
            for entry, _ in removed:
                _remove(entry.folder)
        return removed

    def export(self, path: Path, entries: Collection[GraphEntry]) -> None:
        """Write `entries` into one file; BrokenEntryError if one of them is broken, OSError if it cannot be written."""
        for entry in entries:
            try:
                read_entry(entry.folder, contents=True)
            except BrokenEntryError as error:
                raise BrokenEntryError(
                    f"a broken graph is not exported ({error}), remove it with omni-engine graph prune: {entry.digest}"
                ) from error
        write_archive(path, list(entries))

    def import_(self, path: Path, *, trust: bool) -> Imported:
        """Store the graphs of the archive `path`, after all of them are checked; those that are here already are kept.

        ValueError without `trust`; ArchiveError if the file is no sound archive; GraphCacheError as with `store`.
        """
        if not trust:
            raise ValueError(
                "the archive holds executable code, which would run with all your rights; its digests show damage, not "
                f"who made it; if you trust where it comes from, add --trust: {path}"
            )
        with self._told():
            self._make_folder()
        result = Imported([], [])
        with self._temporary_folder() as temporary:
            try:
                with self._told():
                    digests = unpack_archive(path, temporary)
                for digest in digests:
                    read_entry(temporary / digest, contents=True)
            except BrokenEntryError as error:
                raise ArchiveError(f"the archive holds a broken graph ({error}): {path}") from error
            with self._told():
                for digest in digests:
                    sync_folder(temporary / digest)
                    entry, stored = self._commit(temporary / digest, self.folder / digest)
                    (result.stored if stored else result.kept).append(entry)
        return result

    def _missed(self, key: CacheKey) -> None:
        logger.debug("graph not found: %s", key.digest)

    def _read_or_remove(self, folder: Path) -> GraphEntry | None:
        """The entry, if it is sound by now; else it is removed."""
        try:
            with self._changing():
                try:
                    return read_entry(folder, contents=True)
                except FileNotFoundError:
                    return None
                except BrokenEntryError as error:
                    logger.warning("a compiled graph is refused and removed (%s): %s", error, folder)
                    _remove(folder)
        except OSError as error:
            logger.warning("a compiled graph is refused and cannot be removed (%s): %s", error, folder)
        return None

    def _build(self, build: Callable[[Path], None], package: Path) -> None:
        try:
            build(package)
        except OSError as error:
            # Other errors are not of the disk: a compiler that is not there, for example.
            if error.errno in _UNWRITABLE:
                raise self._error(error) from error
            raise
        if not package.is_file():
            raise RuntimeError(f"the compiler wrote no package: {package}")

    def _commit(self, temporary: Path, folder: Path) -> tuple[GraphEntry, bool]:
        """Give the entry its name; False if a sound one has it already."""
        with self._changing():
            try:
                return read_entry(folder, contents=True), False
            except FileNotFoundError:
                pass
            except BrokenEntryError as error:
                logger.warning("a broken compiled graph is replaced (%s): %s", error, folder)
                _remove(folder)
            os.rename(temporary, folder)
            sync_folder(self.folder)
        return read_entry(folder, contents=False), True

    @contextlib.contextmanager
    def _temporary_folder(self) -> Iterator[Path]:
        """A new folder beside the entries, locked as long as this process lives, and removed in the end."""
        with contextlib.ExitStack() as stack:
            with self._told(), self._changing():
                self._sweep()
                path = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.folder))
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                fcntl.flock(descriptor, fcntl.LOCK_UN)

    def _sweep(self) -> None:
        """Remove what dead processes left; only while `_changing`, so that no new folder is still unlocked."""
        for path in self.folder.glob(".tmp-*"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # its process lives
            finally:
                os.close(descriptor)
        for path in self.folder.glob(".build-*"):
            with contextlib.suppress(TimeoutError), file_lock(path, timeout=0):
                pass  # nobody held it, and leaving it removes it

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        return file_lock(self.folder / ".lock", _LOCK_SECONDS)

    def _has_folder(self) -> bool:
        with self._told():
            if not self.folder.is_dir():
                return False
            self._make_folder()
            return True

    def _make_folder(self) -> None:
        private_folder(self.root)
        private_folder(self.folder)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns errors of the disk into GraphCacheError."""
        try:
            yield
        except GraphCacheError:
            raise
        except CacheFolderError as error:
            raise GraphCacheError(str(error)) from error
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> GraphCacheError:
        if error.errno in _FULL:
            text = f"there is no room for compiled graphs ({error.strerror}); free some, for example with omni-engine "
            return GraphCacheError(f"{text}graph prune, or set OMNI_ENGINE_CACHE to a folder with room: {self.folder}")
        if error.errno is None:
            return GraphCacheError(str(error))  # the text is our own
        return GraphCacheError(
            f"the folder of compiled graphs cannot be used ({error.strerror}); make it readable and writable for this "
            f"user, or set OMNI_ENGINE_CACHE to another folder: {self.folder}"
        )


def _differences(entry: GraphEntry, wanted: Mapping[str, Any]) -> list[str]:
    return [name for name, value in wanted.items() if entry.fields.get(name) != value]


def _remove(path: Path) -> None:
    """Take an entry out of the way at once, and then delete it; raises OSError."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.parent / f".tmp-{secrets.token_hex(8)}"  # needs no room, so it works on a full disk
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
