"""Many connections over one: what the relay's pod runs, and the other half in the master.

    workers ══► relay pod: Mux ── port-forward through the API server ── Mux ══► the master's port
     (each its own connection)        (one connection, frames)        (each its own connection)

    frame: stream (4 bytes), kind (1), number (4: length of the data, or a credit)

Each side may send as much of a stream as the other has given it credit for, and gets new credit
when the bytes have left for their socket. So a connection that nobody reads holds up itself and no
other, and takes no more memory than its credit.

The bytes are those of TLS between worker and master; nobody here can read them. As a program this
file is sent into the pod as the text of a command: standard library only, and no import of Fiber.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

OPEN, DATA, END, RESET, CREDIT, PING, HELLO = range(1, 8)
HEADER = struct.Struct(">IBI")
WINDOW = 512 * 1024  # credit of a stream at its beginning
CHUNK = 64 * 1024
FULL = 1024 * 1024  # so much may wait for the one connection before streams are read no more
BEAT = 10.0  # seconds between two pings
SILENCE = 35.0  # after which the other side is taken for dead
ALONE = 900.0  # seconds for which the relay waits for a master that is away

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Plain:
    """The one connection as a plain socket; a WebSocket looks the same from outside."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.out = bytearray()
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> bytes:
        """Return what has arrived: b"" if there is nothing now. Raises OSError at the end."""
        try:
            data = self.sock.recv(4 * CHUNK)
        except (BlockingIOError, InterruptedError):
            return b""
        if not data:
            raise ConnectionResetError("the other side is gone")
        return data

    def send(self, *parts: bytes) -> None:
        """Put bytes into the way; `flush` sends them."""
        for part in parts:
            self.out += part

    def flush(self) -> None:
        """Send what can be sent now."""
        while self.out:
            try:
                sent = self.sock.send(self.out)
            except (BlockingIOError, InterruptedError):
                return
            del self.out[:sent]

    @property
    def waiting(self) -> int:
        """How many bytes are in the way."""
        return len(self.out)

    def close(self) -> None:
        """Close it."""
        self.sock.close()


class Stream:
    """One connection among the many."""

    def __init__(self, number: int, sock: socket.socket, connecting: bool = False) -> None:
        self.number = number
        self.sock = sock
        self.connecting = connecting
        self.out = bytearray()  # for the socket
        self.credit = WINDOW  # how much may be sent to the other side
        self.owed = 0  # how much has left for the socket that the other side has no credit for yet
        self.read_ended = False
        self.write_ended = False  # the other side has sent its end
        self.shut = False
        self.events = 0


class Mux:
    """Carries streams over one connection, in the thread that calls `run`.

    Args:
        connect: returns a socket for a stream that the other side opens; None: it opens none.
        listener: a socket whose connections become streams, or None.
        successor: a listening socket; who connects to it is to take the place of the connection.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket] | None = None,
        listener: socket.socket | None = None,
        successor: socket.socket | None = None,
    ) -> None:
        self.connect = connect
        self.listener = listener
        self.successor = successor
        self.selector = selectors.DefaultSelector()
        self.streams: dict[int, Stream] = {}
        self.paused: set[Stream] = set()
        self.number = 0
        self.carrier: Any = None  # a Plain, or what looks so
        self.rest = bytearray()
        self.on_greeting: Callable[[bytes], None] | None = None
        self.wake_in, self.wake_out = socket.socketpair()
        self.wake_in.setblocking(False)
        self.selector.register(self.wake_in, READ, None)
        self.stopped = False

    def stop(self) -> None:
        """Let `run` return; from any thread."""
        self.stopped = True
        with contextlib.suppress(OSError):
            self.wake_out.send(b"x")

    def close(self) -> None:
        """Release what it has; after `run`."""
        self.selector.close()
        self.wake_in.close()
        self.wake_out.close()

    def run(
        self,
        carrier: Any,
        greeting: bytes | None = None,
        on_greeting: Callable[[bytes], None] | None = None,
    ) -> None:
        """Carry streams until the connection or `stop` ends it; all streams are closed then."""
        self.carrier, self.rest, self.on_greeting = carrier, bytearray(), on_greeting
        carrier_events = READ
        self.selector.register(carrier.sock, READ, carrier)
        listeners = [sock for sock in (self.listener, self.successor) if sock is not None]
        for sock in listeners:
            self.selector.register(sock, READ, sock)
        heard = beat = time.monotonic()
        try:
            if greeting is not None:
                self.post(0, HELLO, len(greeting), greeting)
            while not self.stopped:
                carrier.flush()
                wanted = READ | (WRITE if carrier.waiting else 0)
                if wanted != carrier_events:
                    self.selector.modify(carrier.sock, wanted, carrier)
                    carrier_events = wanted
                if self.paused and carrier.waiting < FULL // 2:
                    paused, self.paused = self.paused, set()
                    for stream in paused:
                        self.interest(stream)
                for key, events in self.selector.select(1.0):
                    owner: Any = key.data
                    if owner is carrier:
                        data = carrier.receive()
                        while data:
                            heard = time.monotonic()
                            self.arrived(data)
                            data = carrier.receive()
                    elif owner is None:
                        self.wake_in.recv(100)
                    elif owner is self.successor:
                        raise ConnectionResetError("the other side has come again")
                    elif owner is self.listener:
                        self.accept()
                    elif owner.events:  # not dropped a moment ago
                        self.stream_ready(owner, events)
                now = time.monotonic()
                if now - beat > BEAT:
                    beat = now
                    self.post(0, PING, 0)
                if now - heard > SILENCE:
                    raise TimeoutError("the other side is silent")
        finally:
            for stream in list(self.streams.values()):
                self.drop(stream)
            self.paused.clear()
            self.selector.unregister(carrier.sock)
            for sock in listeners:
                self.selector.unregister(sock)
            carrier.close()

    def post(self, stream: int, kind: int, number: int, *parts: bytes) -> None:
        self.carrier.send(HEADER.pack(stream, kind, number), *parts)

    def accept(self) -> None:
        assert self.listener is not None
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return
        self.number = self.number % 0x7FFFFFFF + 1
        self.add(Stream(self.number, sock))
        self.post(self.number, OPEN, 0)

    def add(self, stream: Stream) -> None:
        stream.sock.setblocking(False)
        with contextlib.suppress(OSError):
            stream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.streams[stream.number] = stream
        self.interest(stream)

    def interest(self, stream: Stream) -> None:
        """Watch a stream's socket for what can be done with it now."""
        if self.streams.get(stream.number) is not stream:
            return
        events = 0
        if stream.connecting or stream.out:
            events |= WRITE
        if not stream.connecting and not stream.read_ended and stream.credit > 0:
            if self.carrier.waiting < FULL:
                events |= READ
            else:
                self.paused.add(stream)
        if events == stream.events:
            return
        if not stream.events:
            self.selector.register(stream.sock, events, stream)
        elif not events:
            self.selector.unregister(stream.sock)
        else:
            self.selector.modify(stream.sock, events, stream)
        stream.events = events

    def drop(self, stream: Stream) -> None:
        if self.streams.pop(stream.number, None) is None:
            return
        if stream.events:
            self.selector.unregister(stream.sock)
            stream.events = 0
        stream.sock.close()

    def fail(self, stream: Stream) -> None:
        self.post(stream.number, RESET, 0)
        self.drop(stream)

    def stream_ready(self, stream: Stream, events: int) -> None:
        try:
            if events & WRITE:
                if stream.connecting:
                    error = stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if error:
                        raise OSError(error, os.strerror(error))
                    stream.connecting = False
                self.write(stream)
            if events & READ and stream.credit > 0 and not stream.read_ended:
                self.read(stream)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.fail(stream)
            return
        self.settle(stream)

    def read(self, stream: Stream) -> None:
        if self.carrier.waiting >= FULL:
            return
        data = stream.sock.recv(min(CHUNK, stream.credit))
        if data:
            stream.credit -= len(data)
            self.post(stream.number, DATA, len(data), data)
        else:
            stream.read_ended = True
            self.post(stream.number, END, 0)

    def write(self, stream: Stream) -> None:
        while stream.out:
            sent = stream.sock.send(stream.out)
            del stream.out[:sent]
            stream.owed += sent
        if stream.write_ended and not stream.shut:
            stream.shut = True
            stream.sock.shutdown(socket.SHUT_WR)

    def settle(self, stream: Stream) -> None:
        """After something was done with a stream: give credit, close it, or watch it."""
        if stream.owed >= WINDOW // 4 and not stream.write_ended:
            self.post(stream.number, CREDIT, stream.owed)
            stream.owed = 0
        if stream.read_ended and stream.shut:
            self.drop(stream)
        else:
            self.interest(stream)

    def arrived(self, data: bytes) -> None:
        """Take frames from what the one connection brought."""
        self.rest += data
        view = memoryview(self.rest)
        done = 0
        try:
            while len(view) - done >= HEADER.size:
                number, kind, size = HEADER.unpack_from(view, done)
                body = size if kind in (DATA, HELLO) else 0
                if body > FULL:
                    raise ConnectionResetError("that is no frame")
                end = done + HEADER.size + body
                if len(view) < end:
                    break
                with view[done + HEADER.size : end] as part:
                    self.frame(number, kind, size, part)
                done = end
        finally:
            view.release()
        del self.rest[:done]

    def frame(self, number: int, kind: int, size: int, body: memoryview) -> None:
        if kind == HELLO:
            if self.on_greeting is not None:
                self.on_greeting(bytes(body))
            return
        if kind == OPEN and self.connect is not None:
            try:
                self.add(Stream(number, self.connect(), connecting=True))
            except OSError:
                self.post(number, RESET, 0)
            return
        stream = self.streams.get(number)
        if stream is None:  # a ping, or it was dropped here meanwhile
            return
        if kind == RESET:
            self.drop(stream)
            return
        if kind == CREDIT:
            stream.credit += size
        elif kind == DATA:
            if len(stream.out) + size > 2 * WINDOW:
                self.fail(stream)  # it sends more than it may
                return
            stream.out += body
        elif kind == END:
            stream.write_ended = True
        if not stream.connecting and kind in (DATA, END):
            try:
                self.write(stream)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.fail(stream)
                return
        self.settle(stream)


def reachable(candidates: list[str], timeout: float) -> list[str]:
    """Return those of `candidates` (HOST:PORT) that take a connection, in their order."""
    found = set()

    def attempt(candidate: str) -> None:
        host, _, port = candidate.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout).close()
            found.add(candidate)

    threads = [threading.Thread(target=attempt, args=(c,), daemon=True) for c in candidates]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout + 1.0)
    return [candidate for candidate in candidates if candidate in found]


def listen(host: str, port: int) -> socket.socket:
    """Listen for both families where there are both."""
    if host == "" and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
    return socket.create_server((host, port), backlog=1024)


def main(settings: dict[str, Any]) -> None:
    """The relay: see whether it is needed; if so, carry connections until the master is gone."""
    direct = reachable(settings["candidates"], settings["timeout"])
    if direct:
        with open(settings["report"], "w") as file:
            json.dump(direct, file)
        return
    listener = listen("", settings["port"])
    listener.setblocking(False)
    # Only a port-forward reaches this one, and no other pod.
    control = listen("127.0.0.1", settings["control"])
    control.settimeout(ALONE)
    mux = Mux(listener=listener, successor=control)
    while True:
        try:
            sock, _ = control.accept()
        except TimeoutError:
            return
        try:
            mux.run(Plain(sock), greeting=b"fiber")
        except OSError as error:
            print("the master's connection ended:", error, flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
