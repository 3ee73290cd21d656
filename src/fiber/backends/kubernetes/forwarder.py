"""The master's half of the relay: a port-forward through the API server, kept open by a thread.

    relay pod ══ kubelet ══ API server ══ WebSocket ─► Mux ─► 127.0.0.1:port of this process

When it breaks it is opened again; the connections through it are lost, and that is all. The
WebSocket is read and written here and not by Kubernetes' client, whose own thread would take any
amount of memory for a connection that nobody reads, and fails with more than 1024 file descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import struct
import threading

from fiber.backends.kubernetes.access import Access, ApiError
from fiber.backends.kubernetes.mux import Mux

__all__ = ["Forwarder", "WebSocket"]

_FIRST, _LAST = 0.1, 5.0  # seconds between two attempts
_BINARY, _CLOSE, _PING, _PONG = 2, 8, 9, 10
_DATA = b"\0"  # the channel of a port's bytes; 1 is that of its errors
_LARGEST = 16 * 1024 * 1024


class WebSocket:
    """The one connection of a `Mux` as a port-forward's WebSocket, after its handshake."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._out = bytearray()
        self._parts: list[bytes] = []
        self._in = bytearray()
        self._greeted: set[int] = set()
        self._channel = -1
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> bytes:
        """Return what has arrived of the port's bytes, b"" if there is nothing now."""
        while True:
            data = self._messages()
            if data:
                return data
            try:
                more = self.sock.recv(256 * 1024)
            except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return b""
            if not more:
                raise ConnectionResetError("the API server has closed the port-forward")
            self._in += more

    def _messages(self) -> bytes:
        """Take whole messages from what was received."""
        found = bytearray()
        done = 0
        with memoryview(self._in) as view:
            while len(view) - done >= 2:
                kind, size = view[done] & 15, view[done + 1] & 127
                head = done + 2
                if size == 126:
                    head += 2
                elif size == 127:
                    head += 8
                if len(view) < head:
                    break
                if head > done + 2:
                    size = int.from_bytes(view[done + 2 : head], "big")
                if size > _LARGEST:
                    raise ConnectionResetError("the API server sends what is no port-forward")
                if len(view) < head + size:
                    break
                done = head + size
                with view[head:done] as body:
                    self._message(kind, body, found)
        del self._in[:done]
        return bytes(found)

    def _message(self, kind: int, body: memoryview, found: bytearray) -> None:
        if kind == _CLOSE:
            raise ConnectionResetError("the API server has closed the port-forward")
        if kind == _PING:
            self._out += _frame(_PONG, bytes(body))
        elif kind == 0 and self._channel == 0:  # a proxy has cut the message in pieces
            found += body
        elif kind == _BINARY and len(body) > 0:
            channel = self._channel = body[0]
            if channel not in self._greeted:  # the first of each channel repeats the port
                self._greeted.add(channel)
            elif channel == 0:
                found += body[1:]
            else:
                raise ConnectionResetError(bytes(body[1:]).decode("utf-8", "replace").strip())

    def send(self, *parts: bytes) -> None:
        """Put bytes into the way; `flush` sends them."""
        self._parts += parts

    def flush(self) -> None:
        """Send what can be sent now."""
        if self._parts:
            self._out += _frame(_BINARY, b"".join((_DATA, *self._parts)))
            self._parts.clear()
        while self._out:
            try:
                sent = self.sock.send(memoryview(self._out)[: 256 * 1024].tobytes())
            except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            del self._out[:sent]

    @property
    def waiting(self) -> int:
        """How many bytes are in the way."""
        return len(self._out) + sum(map(len, self._parts))

    def close(self) -> None:
        """Close it."""
        self.sock.close()


def _frame(kind: int, body: bytes) -> bytes:
    size = len(body)
    if size < 126:
        head = struct.pack(">BB", 128 | kind, 128 | size)
    elif size < 65536:
        head = struct.pack(">BBH", 128 | kind, 128 | 126, size)
    else:
        head = struct.pack(">BBQ", 128 | kind, 128 | 127, size)
    # A client has to mask what it sends; as one large number that takes no loop.
    mask = os.urandom(4)
    pattern = int.from_bytes((mask * (size // 4 + 1))[:size], "little")
    return head + mask + (int.from_bytes(body, "little") ^ pattern).to_bytes(size, "little")


class Forwarder:
    """Keeps a port-forward open, and connects what comes through it to a port of this process.

    Args:
        name: of the relay's pod.
        control: the port in it that the forward leads to.
        port: of this process.
    """

    def __init__(self, access: Access, name: str, control: int, port: int) -> None:
        self._access = access
        self._name = name
        self._control = control
        self._port = port
        self._stop = threading.Event()
        self._ready = threading.Event()
        self.error: Exception | None = None
        self._mux = Mux(connect=self._connect)
        self._thread = threading.Thread(target=self._run, name="fiber-kubernetes-relay")
        self._thread.daemon = True
        self._thread.start()

    def wait(self, timeout: float) -> bool:
        """Wait until the relay has answered once."""
        return self._ready.wait(timeout)

    def close(self) -> None:
        """End it."""
        self._stop.set()
        self._mux.stop()
        self._thread.join(10)

    def _connect(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        error = sock.connect_ex(("127.0.0.1", self._port))
        if error and error != errno.EINPROGRESS:
            sock.close()
            raise OSError(error, os.strerror(error))
        return sock

    def _greeted(self, greeting: bytes) -> None:
        self._pause = _FIRST
        self._ready.set()

    def _run(self) -> None:
        self._pause = _FIRST
        while not self._stop.is_set():
            try:
                carrier = WebSocket(self._access.forward(self._name, self._control))
                self._mux.run(carrier, on_greeting=self._greeted)
            except (OSError, ApiError) as error:
                self.error = error
            self._stop.wait(self._pause)
            self._pause = min(2 * self._pause, _LAST)
        self._mux.close()
