"""Where built code is kept between runs: a folder that only its owner may write to, because what lies there is run."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class CacheFolderError(Exception):
    """A cache folder that cannot be used, with the reason and what to change."""


def cache_root() -> Path:
    """$OMNI_ENGINE_CACHE, else $XDG_CACHE_HOME/omni-engine, else ~/.cache/omni-engine. Nothing is created."""
    own = os.environ.get("OMNI_ENGINE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache") / "omni-engine"


def private_folder(path: Path) -> Path:
    """`path`, created where it is missing, as its missing parents are, for its owner only (mode 0700).

    Raises CacheFolderError if it cannot be created, belongs to another user, or may be written to by the group or by
    others: code from such a folder must not be loaded.
    """
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir(mode=0o700, exist_ok=True)  # exist_ok: another process may be first
        found = path.stat()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheFolderError(
            f"cannot create the cache folder ({reason}); set OMNI_ENGINE_CACHE to a folder of yours: {path}"
        ) from error
    if found.st_uid != os.geteuid():
        raise CacheFolderError(
            f"the cache folder belongs to user {found.st_uid}, and code from it would run as user {os.geteuid()}; "
            f"set OMNI_ENGINE_CACHE to a folder of your own: {path}"
        )
    if stat.S_IMODE(found.st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheFolderError(
            f"others may write to the cache folder (mode {stat.S_IMODE(found.st_mode):04o}), and code from it would be "
            f"run; chmod 700 it, or set OMNI_ENGINE_CACHE to a private folder: {path}"
        )
    return path
