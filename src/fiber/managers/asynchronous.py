"""`AsyncManager`: a manager whose proxies do not wait for what they have called.

    proxy.method(...) ─► Handle          Handle.get ─► result
           │                                 ▲
           └─► Line ─► Server ─► the object ─┘

Each proxy has a connection of its own, which is in the loop of the session: nobody waits while a
request is sent, no thread waits for replies, and when the server dies all handles learn of it.
"""

from __future__ import annotations

import os
import pickle
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from fiber.errors import PeerDied, TimeoutError
from fiber.managers import proxies
from fiber.managers.links import TOKEN, Link, Remote
from fiber.managers.proxies import BaseProxy, auto_proxy
from fiber.managers.references import Reference, reference_to
from fiber.managers.sync import SyncManager
from fiber.runtime import session
from fiber.runtime.loop import Event, Loop
from fiber.runtime.poller import READ, WRITE

__all__ = ["AsyncAutoProxy", "AsyncBaseProxy", "AsyncManager", "Handle"]

_SIZE, _LARGE_SIZE, _MOST = struct.Struct("!i"), struct.Struct("!Q"), 0x7FFFFFFF
_CHUNK = 1 << 18  # bytes read at a time
_TOKEN_REPLY = pickle.dumps((TOKEN,), pickle.HIGHEST_PROTOCOL).partition(TOKEN.encode())[0]
_connecting = threading.Lock()


class Handle:
    """The answer, to come, to a call of a method by an `AsyncBaseProxy`."""

    def __init__(self, proxy: AsyncBaseProxy, loop: Loop) -> None:
        self._proxy: AsyncBaseProxy | None = proxy  # in use until it is answered
        self._loop = loop
        self._answered = Event()
        self._reply: bytes | None = None
        self._reference: Reference | None = None  # keeps what a reply refers to
        self._settling = threading.Lock()
        self._result: Any = None
        self._error: BaseException | None = None

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer and return it.

        Args:
            timeout: seconds to wait at the most.

        Raises:
            what the method raised, with the traceback of the server as its cause.
            TimeoutError: there was no answer in time.
            PeerDied: the server has ended.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"there was no answer within {timeout:g} seconds")
        self._settle()
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the exception would refer to itself, by its traceback and this frame
        return self._result

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the answer, at most `timeout` seconds; return whether there is one."""
        return self._answered.is_set or self._loop.wait(self._answered, timeout)

    def ready(self) -> bool:
        """Return whether there is an answer."""
        if not self._answered.is_set and not self._loop.closed:
            self._loop.poll()
        return self._answered.is_set

    def successful(self) -> bool:
        """Return whether the method has returned, and not raised, something.

        Raises:
            ValueError: there is no answer yet.
        """
        if not self.ready():
            raise ValueError(f"{self!r} has no answer yet")
        self._settle()
        return self._error is None

    def _settle(self) -> None:
        """Unpickle the answer, for whoever is the first to ask."""
        with self._settling:
            if self._reply is not None and self._proxy is not None:
                try:
                    self._result = self._proxy._result(*pickle.loads(self._reply))
                except Exception as error:
                    self._error = error
                self._reply = self._proxy = self._reference = None

    def _answer(self, reply: bytes) -> None:
        """Take the answer. Within the loop, so it is not unpickled: that runs the user's code."""
        if reply.startswith(TOKEN.encode(), len(_TOKEN_REPLY)):
            # It may be asked for too late, when the server would have let go of the object.
            _, (address, target, _) = pickle.loads(reply)
            self._reference = reference_to(address, target)
        self._reply = reply
        self._answered.set()

    def _fail(self, error: BaseException) -> None:
        """There will be no answer. Within the loop."""
        self._error = error
        self._proxy = None
        self._answered.set()


class Line:
    """The connection of one proxy, in the loop.

    Args:
        remote: the server.

    Raises:
        PeerDied: the server has ended.
    """

    def __init__(self, remote: Remote) -> None:
        with remote.failures_told():
            self._link: Link = remote.connect()
        self.pid = os.getpid()
        self.loop = session.current().loop
        self.dumps = self._link.dumps
        self._fd = self._link.fileno()
        self._remote = remote
        self._handles: deque[Handle] = deque()  # not answered yet, the oldest first
        self._outbox: deque[memoryview] = deque()
        self._inbox = bytearray()
        self._waits_to_send = False
        self._error: PeerDied | None = None
        os.set_blocking(self._fd, False)
        with self.loop:
            self.loop.register(self._fd, READ, self._ready)

    def post(self, request: bytes, handle: Handle) -> None:
        """Send a request, and give the reply to `handle`. Within the loop."""
        if self._error is not None:
            handle._fail(self._error)
            return
        self._handles.append(handle)
        self._outbox.append(memoryview(_head(request) + request))
        if not self._waits_to_send:
            self._flush()

    def _flush(self) -> None:
        try:
            while self._outbox:
                message = self._outbox[0]
                sent = os.write(self._fd, message)
                if sent < len(message):
                    self._outbox[0] = message[sent:]
                else:
                    self._outbox.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()  # reading will tell
        waits = bool(self._outbox)
        if waits != self._waits_to_send:
            self._waits_to_send = waits
            self.loop.modify(self._fd, READ | WRITE if waits else READ)

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if not events & READ:
            return
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lose()
            return
        self._inbox += data
        for reply in _cut(self._inbox):
            self._handles.popleft()._answer(reply)

    def _lose(self) -> None:
        self._error = self._remote.died()
        self.close()
        while self._handles:
            self._handles.popleft()._fail(self._error)

    def close(self) -> None:
        """Close it. Within the loop."""
        if self._fd >= 0:
            self.loop.unregister(self._fd)
            self._fd = -1
            self._link.close()


def _head(data: bytes) -> bytes:
    """Return what goes before a message."""
    size = len(data)
    return _SIZE.pack(size) if size <= _MOST else _SIZE.pack(-1) + _LARGE_SIZE.pack(size)


def _cut(data: bytearray) -> list[bytes]:
    """Remove all whole messages from the beginning of `data` and return them."""
    messages = []
    at = 0
    while len(data) >= at + 4:
        (size,) = _SIZE.unpack_from(data, at)
        begin = at + 4
        if size == -1:
            begin = at + 12
            if len(data) < begin:
                break
            (size,) = _LARGE_SIZE.unpack_from(data, at + 4)
        if len(data) < begin + size:
            break
        at = begin + size
        messages.append(bytes(memoryview(data)[begin:at]))
    del data[:at]
    return messages


class AsyncBaseProxy(BaseProxy):
    """The base of proxies whose methods return a `Handle` at once.

    Calls by one proxy are answered in their order. Those by different proxies run at the same time,
    also by proxies of the same object.
    """

    _line: Line | None = None

    def _callmethod(self, methodname: str, args: Any = (), kwds: Any = {}) -> Any:  # noqa: B006
        """Call a method of the object; return the handle of its answer."""
        handle = Handle(self, session.current().loop)
        try:
            line = self._own_line()
        except PeerDied as error:
            with handle._loop:
                handle._fail(error)
            return handle
        request = b"".join(line.dumps((self._id, methodname, args, kwds)))
        with line.loop:
            line.post(request, handle)
        return handle

    def _own_line(self) -> Line:
        line = self._line
        if line is None or line.pid != os.getpid() or line.loop.closed:
            with _connecting:
                if self._line is line:
                    self._line = Line(self._remote)
                line = self._line
        assert line is not None
        return line

    def _getvalue(self) -> Any:
        """Return a copy of the object, at once."""
        return self._callmethod("#GETVALUE").get()

    def __str__(self) -> str:
        try:
            text: str = self._callmethod("__repr__").get()
            return text
        except Exception:
            return f"{repr(self)[:-1]}; '__str__()' failed>"

    def __del__(self) -> None:
        line = self._line
        if line is not None and not line.loop.closed and line.pid == os.getpid():
            line.loop.call_soon(line.close)


def AsyncAutoProxy(
    token: Any,
    serializer: str,
    manager: Any = None,
    authkey: bytes | None = None,
    exposed: Any = None,
    incref: bool = True,
    manager_owned: bool = False,
) -> BaseProxy:
    """As `AutoProxy`, of an `AsyncBaseProxy`."""
    return auto_proxy(
        AsyncBaseProxy, token, serializer, manager, authkey, exposed, incref, manager_owned
    )


AsyncBaseProxy._auto = staticmethod(AsyncAutoProxy)


class AsyncIteratorProxy(AsyncBaseProxy, proxies.IteratorProxy):
    """Of an iterator; `next` returns handles, the last of which raises StopIteration."""


class AsyncListProxy(AsyncBaseProxy, proxies.ListProxy):
    """Of a list."""


class AsyncDictProxy(AsyncBaseProxy, proxies.DictProxy):
    """Of a dictionary."""


class AsyncArrayProxy(AsyncBaseProxy, proxies.ArrayProxy):
    """Of an `array.array`."""


class AsyncNamespaceProxy(AsyncBaseProxy, proxies.NamespaceProxy):
    """Of an object whose attributes are read as handles."""


class AsyncValueProxy(AsyncBaseProxy, proxies.ValueProxy):
    """Of an object whose `value` is read as a handle."""


class AsyncPoolProxy(AsyncBaseProxy, proxies.PoolProxy):
    """Of a pool whose master is the server."""


class AsyncManager(SyncManager):
    """As `SyncManager`, but a method of a proxy returns a `Handle` at once.

        manager = AsyncManager()
        manager.start()
        environments = [manager.Environment() for _ in range(4)]
        handles = [environment.step(action) for environment in environments]
        observations = [handle.get() for handle in handles]

    What has no proxies, such as locks and queues, is as a SyncManager has it. Results whose type is
    fixed by the language, such as that of `len`, cannot be handles: call `proxy.__len__()`.
    """

    _auto_proxy: Callable[..., Any] = staticmethod(AsyncAutoProxy)


for _typeid, _proxytype in (
    ("list", AsyncListProxy),
    ("dict", AsyncDictProxy),
    ("Array", AsyncArrayProxy),
    ("Namespace", AsyncNamespaceProxy),
    ("Value", AsyncValueProxy),
    ("Pool", AsyncPoolProxy),
    ("Iterator", AsyncIteratorProxy),
    ("AsyncResult", None),
):
    _callable = SyncManager._registry[_typeid][0]
    _made = _typeid not in ("Iterator", "AsyncResult")
    AsyncManager.register(_typeid, _callable, _proxytype, create_method=_made)
