"""Compilers as children that do not outlive this process: `run_child`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

# A compiler starts others, and none of them hears that we were killed. So they are a session of their own, which ends
# itself when the pipe that we hold is closed, by us or by our end. A session is scheduled as a group, which has a
# niceness of its own.
# Nobody may be left to reap the watcher, where the first process of a container is ours: its shell does.
_BEGIN = "exec 3<&0 </dev/null; (read -r _ <&3; kill -s KILL 0) >/dev/null 2>&1 & guard=$!; exec 3<&-; "
_END = '"$@"; status=$?; kill -s KILL $guard; wait $guard 2>/dev/null; exit $status'
_LOWEST_PRIORITY = "{ echo 19 >/proc/self/autogroup; } 2>/dev/null; nice -n 19 "


def run_child(
    command: Sequence[str], *, timeout: float, scratch: Path, low_priority: bool
) -> subprocess.CompletedProcess[str]:
    """Run `command` with its temporary files in the folder `scratch`; what it says is text of stdout and stderr.

    Raises OSError and subprocess.SubprocessError as `subprocess.run` does; `timeout` is in seconds. A command that is
    not there ends with status 126 or 127.
    """
    script = _BEGIN + (_LOWEST_PRIORITY if low_priority else "") + _END
    theirs, ours = os.pipe()
    try:
        try:
            return subprocess.run(
                ["sh", "-c", script, "sh", *command],
                stdin=theirs,
                capture_output=True,
                text=True,
                timeout=timeout,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(scratch)},
            )
        finally:
            os.close(theirs)
    finally:
        os.close(ours)
