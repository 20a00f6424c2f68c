"""Starting the core's process: early and cheaply, so that it loads while the front still imports its own modules."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass

DEFAULT_STEP_TIMEOUT_SECONDS = 300.0  # a long prefill on a CPU must not count as a hang


@dataclass
class LaunchedCore:
    """A core process that has not been told yet what to load, and the front's ends of its two sockets."""

    process: subprocess.Popen[bytes]
    messages: socket.socket
    pings: socket.socket

    def kill(self) -> None:
        """End the process by force if it has not ended, and close the sockets."""
        self.messages.close()
        self.pings.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def launch_core() -> LaunchedCore:
    """Start the process; it imports torch and waits for `Start`. It dies with the thread that calls this."""
    messages, their_messages = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pings, their_pings = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with their_messages, their_pings:
        files = (their_messages.fileno(), their_pings.fileno())
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.core_process", *map(str, files)],
            pass_fds=files,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the front's group must not end the core before it has drained
        )
    return LaunchedCore(process, messages, pings)
