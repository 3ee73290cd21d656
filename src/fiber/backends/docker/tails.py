"""The last lines that containers wrote, read from a socket each by one thread for all.

    attach socket ─┐
    attach socket ─┼─► selector ─► thread ─► Tail (16 KB) ─► logs
    attach socket ─┘

The engine removes the output of a container with it, so it is read as it comes. The sockets are
opened before the containers start: nothing is missed.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from typing import Any

__all__ = ["Tail", "Tails"]

_KEPT = 16 * 1024  # bytes
_HEADER = 8  # bytes before each piece: which stream, three zeros, length
_COMES_LATE = 2.0  # seconds, from a container's end to the end of its output


class Tail:
    """The end of what a container wrote, both of its streams in the order of arrival."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        """Set when there is no more to come, or nobody to read it."""
        self._kept = bytearray()
        self._header = bytearray()
        self._missing = 0

    def feed(self, data: bytes) -> None:
        """Take what the engine sent: pieces with headers, cut anywhere."""
        view = memoryview(data)
        while view:
            if self._missing:
                part = view[: self._missing]
                self._kept += part
                self._missing -= len(part)
            else:
                part = view[: _HEADER - len(self._header)]
                self._header += part
                if len(self._header) == _HEADER:
                    self._missing = int.from_bytes(self._header[4:], "big")
                    self._header.clear()
            view = view[len(part) :]
        del self._kept[:-_KEPT]

    def text(self, lines: int, *, whole: bool) -> str:
        """Return the last lines; `whole`: the container has ended, so wait for all of them."""
        if whole:
            self.ended.wait(_COMES_LATE)
        return "\n".join(bytes(self._kept).decode(errors="replace").splitlines()[-lines:])


class Tails:
    """Reads the sockets of all containers."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._new: list[tuple[Any, Tail]] = []
        self._closed = False
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="fiber-docker-tails", daemon=True)
        self._thread.start()

    def add(self, stream: Any, tail: Tail) -> None:
        """Read from `stream`, what the SDK's attach_socket returned, until its end."""
        tail.ended.clear()
        with self._lock:
            if not self._closed:
                self._new.append((stream, tail))
                self._ring.send(b"\0")
                return
        _finish(stream, tail)

    def close(self) -> None:
        """Close all sockets and end the thread."""
        with self._lock:
            self._closed = True
            self._ring.send(b"\0")
        self._thread.join()
        self._bell.close()
        self._ring.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._closed:
            for key, _ in self._selector.select():
                if key.fileobj is self._bell:
                    self._bell.recv(1024)
                else:
                    self._read(key)
            with self._lock:
                new, self._new = self._new, []
            for stream, tail in new:
                raw = _raw(stream)
                raw.setblocking(False)
                self._selector.register(raw, selectors.EVENT_READ, (stream, tail))
        for stream, tail in [key.data for key in self._selector.get_map().values() if key.data]:
            _finish(stream, tail)

    def _read(self, key: selectors.SelectorKey) -> None:
        stream, tail = key.data
        raw: Any = key.fileobj
        try:
            # A TLS socket may hold bytes that no selector sees, so it is read until it has none.
            while data := raw.recv(64 * 1024):
                tail.feed(data)
                if not isinstance(raw, ssl.SSLSocket):
                    return
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError:
            pass  # the engine is gone
        self._selector.unregister(raw)
        _finish(stream, tail)


def _raw(stream: Any) -> Any:
    # A socket.SocketIO on a Unix socket, a TLS socket, or the channel of an SSH client.
    return getattr(stream, "_sock", stream)


def _finish(stream: Any, tail: Tail) -> None:
    tail.ended.set()
    response = getattr(stream, "_response", None)
    for thing in (response, stream):  # the response holds the connection
        if thing is not None:
            with contextlib.suppress(OSError):
                thing.close()
