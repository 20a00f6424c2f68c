"""`/health` while the server's own modules are still being imported; imports little, so that it answers at once."""

from __future__ import annotations

import contextlib
import re
import selectors
import socket
import threading
from collections.abc import Iterable
from types import TracebackType

_PEEKED_BYTES = 8192
_QUESTION = re.compile(rb"GET (?P<path>\S+) HTTP/1\.[01]\r\n(?:[^\r\n]+\r\n)*\r\n")
_BODY = b'{"status":"loading"}'
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Connection: close\r\n\r\n%b" % (len(_BODY), _BODY)
)


class EarlyAnswers:
    """A thread that accepts the connections of `listener` and answers those that ask for one of `paths`.

    What a connection sends is looked at once and not taken, unless it is such a question, whole and alone. Every other
    connection waits, unread, for the server that `finish` hands it to. The listener is left as it was.
    """

    def __init__(self, listener: socket.socket, paths: Iterable[str]) -> None:
        self._listener = listener
        self._paths = frozenset(path.encode() for path in paths)
        self._selector = selectors.DefaultSelector()
        self._waiting: list[socket.socket] = []
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="early-answers", daemon=True)

    def __enter__(self) -> EarlyAnswers:
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self.finish():
            connection.close()

    def finish(self) -> list[socket.socket]:
        """Stop accepting; returns the connections that wait, which are now the caller's. Later calls return none."""
        with contextlib.suppress(OSError):
            self._wake.send(b".")
        self._thread.join()
        silent = [key.fileobj for key in self._selector.get_map().values()] if self._selector.get_map() else []
        self._selector.close()
        self._wake.close()
        self._woken.close()
        waiting = [*self._waiting, *(item for item in silent if isinstance(item, socket.socket))]
        self._waiting = []
        return [connection for connection in waiting if connection not in (self._listener, self._woken)]

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self._look_at(key.fileobj)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError:  # out of file descriptors: the rest waits in the kernel's queue
            self._selector.unregister(self._listener)
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ)

    def _look_at(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        try:
            data = connection.recv(_PEEKED_BYTES, socket.MSG_PEEK)
            question = _QUESTION.fullmatch(data)
            if question is not None and question["path"] in self._paths:
                connection.recv(len(data))
                connection.send(_ANSWER)
            elif data:
                self._waiting.append(connection)
                return
        except OSError:
            pass  # the client has gone
        connection.close()
