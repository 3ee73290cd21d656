"""The server of a manager: keeps its objects, and runs their methods for whoever has a proxy.

    accept ─► handshake ─► first request ─┬─► answered, and closed         (multiprocessing's way)
                                          └─► accept_connection ─► requests, answered in turn

There is a thread for each connection, as in multiprocessing, for a method may take its time, or
block. Objects are let go of by the main thread, so that nobody waits for a destructor.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from multiprocessing import managers as _mp
from multiprocessing.managers import public_methods as _public_methods  # type: ignore[attr-defined]
from multiprocessing.pool import rebuild_exc as _rebuild_exc  # type: ignore[attr-defined]
from multiprocessing.process import (  # type: ignore[attr-defined]
    AuthenticationString,
    current_process,
)
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from fiber.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from fiber.errors import AuthenticationError, RemoteTraceback
from fiber.managers import objects
from fiber.managers.links import HELLO, TOKEN, Link, limit
from fiber.managers.references import Referents, Token
from fiber.runtime import session
from fiber.wire.framing import Buffer
from fiber.wire.pickling import PLAIN

__all__ = ["Server"]

_HANDSHAKE_TIMEOUT = 10.0  # seconds that a step of a handshake may take
_PAUSE = 0.1  # seconds before the next try to accept, when that failed

Reply = tuple[str, Any]

if TYPE_CHECKING:

    class _Base:
        stop_event: threading.Event
        public: list[str]
        fallback_mapping: dict[str, Any]

        def incref(self, c: Any, ident: str) -> None: ...
        def shutdown(self, c: Any) -> None: ...

else:
    _Base = _mp.Server


class _ConnectionEnded(BaseException):
    """The client of this thread has closed its connection."""


class _StopEvent(threading.Event):
    """Wakes the main thread as well, which waits for objects to let go of."""

    def __init__(self, dropped: SimpleQueue[str | None]) -> None:
        super().__init__()
        self._dropped = dropped

    def set(self) -> None:
        super().set()
        self._dropped.put(None)


class Server(_Base):
    """As `multiprocessing.managers.Server`.

    Args:
        registry: what `BaseManager.register` was told, by typeid.
        address: where to listen; None for a socket in the folder of the session.
        authkey: what clients must know.
        serializer: "pickle" or "xmlrpclib".
    """

    public = [*_mp.Server.public, "create_token", "make"]  # noqa: RUF012

    def __init__(
        self, registry: dict[str, Any], address: Any, authkey: bytes, serializer: str
    ) -> None:
        if not isinstance(authkey, bytes):
            raise TypeError(f"an authkey is bytes, not {authkey!r}")
        self.registry = registry
        self.authkey = AuthenticationString(authkey)
        self.listener = Listener(address, backlog=1024)
        self.address = self.listener.address
        self.id_to_obj: dict[str, Any] = {"0": (None, ())}
        self.id_to_refcount: dict[str, int] = {}
        self.id_to_local_proxy_obj: dict[str, Any] = {}
        self.mutex = threading.Lock()
        self._serializer = serializer
        self._creating = threading.Lock()
        self._dropped: SimpleQueue[str | None] = SimpleQueue()
        self._referents = Referents(self.authkey, self._keep, self._let_go, self._dropped.put)

    @property
    def name(self) -> str:
        """The manager and its process, for messages."""
        return f"the manager {current_process().name} (process {os.getpid()})"

    def _keep(self, ident: str) -> None:
        self.incref(None, ident)

    def _let_go(self, ident: str) -> None:
        self.decref(None, ident)

    # Connections

    def serve_forever(self) -> None:
        """Serve until a client asks to shut down; then raise SystemExit."""
        self.stop_event = _StopEvent(self._dropped)
        current_process()._manager_server = self  # type: ignore[attr-defined]
        threading.Thread(target=self.accepter, daemon=True).start()
        try:
            while not self.stop_event.is_set():
                ident = self._dropped.get()
                if ident is not None:
                    self.decref(None, ident)
        except (KeyboardInterrupt, SystemExit):
            pass
        finally:
            self.stop_event.set()
            with contextlib.suppress(OSError), Client(self.address):
                pass  # so that the accepter wakes, and ends
            if sys.stdout != sys.__stdout__:
                sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            sys.exit(0)

    def accepter(self) -> None:
        """Accept connections, and have each served by a thread of its own."""
        while not self.stop_event.is_set():
            try:
                connection = self.listener.accept()
            except OSError:  # no descriptor is left, or the listener was closed
                time.sleep(_PAUSE)
                continue
            threading.Thread(target=self.handle_request, args=(connection,), daemon=True).start()

    def handle_request(self, conn: Connection) -> None:
        """Serve a new connection to its end."""
        try:
            with Link.of(conn, self._serializer) as link:
                limit(link, _HANDSHAKE_TIMEOUT)
                deliver_challenge(link, self.authkey)
                answer_challenge(link, self.authkey)
                limit(link, 0)
                link.write(self._answer(link, link.read()))
        except (_ConnectionEnded, EOFError, OSError, AuthenticationError, AssertionError):
            pass  # a client that is gone, or one who does not know the key

    def accept_connection(self, c: Any, name: str) -> None:
        """Serve a thread of a client, called `name`, to its end."""
        threading.current_thread().name = name
        c.send(("#RETURN", self._facts()))
        self.serve_client(c)

    def _facts(self) -> dict[str, str] | None:
        """Return what clients that are Fiber as well need to know; others do not look at it."""
        if self._serializer != "pickle":
            return None
        current = session.current()
        with current.loop:
            return {"name": self.name, "home": current.home.endpoint.address}

    def serve_client(self, c: Any) -> None:
        """Answer one request after the other."""
        while not self.stop_event.is_set():
            try:
                request = c.read()
            except (EOFError, OSError):
                break
            reply = self._answer(c, request)
            if reply:
                c.write(reply)
        raise _ConnectionEnded

    # Requests

    def _answer(self, link: Link, request: Any) -> list[Buffer]:
        """Do what a request asks for; return the reply, nothing if none is expected."""
        try:
            ident, name, args, kwds = link.loads(request)
            if ident is not None:
                reply = self._call(link, ident, name, args, kwds)
            elif name == HELLO:
                link.fiber, (link.ours,) = True, args
                return []
            elif name in self.public:
                reply = "#RETURN", getattr(self, name)(link, *args, **kwds)
            else:
                raise LookupError(f"{self.name} has no function {name!r}")
        except _ConnectionEnded:
            raise
        except BaseException:  # for one, SystemExit
            reply = "#TRACEBACK", traceback.format_exc()
        try:
            return link.dumps(reply, type(reply[1]) in PLAIN or reply[0] == TOKEN)
        except Exception:
            return link.dumps(("#UNSERIALIZABLE", traceback.format_exc()))

    def _call(self, link: Link, ident: str, name: str, args: Any, kwds: Any) -> Reply:
        """Call a method of an object and return the reply."""
        entry = self.id_to_obj.get(ident) or self.id_to_local_proxy_obj.get(ident)
        if entry is None:
            raise KeyError(ident)
        obj, exposed, typeids = entry
        if name not in exposed:
            if name not in self.fallback_mapping:
                raise AttributeError(
                    f"method {name!r} of {type(obj)} object is not in exposed={exposed}"
                )
            return "#RETURN", self.fallback_mapping[name](self, link, ident, obj, *args, **kwds)
        method = getattr(obj, name)
        try:
            result = method(*args, **kwds)
        except BaseException as error:
            return self._raised(link, error)
        typeid = typeids.get(name) if typeids else None
        if typeid is None:
            return "#RETURN", result
        if link.ours:
            token, exposed = self.create_token(link, typeid, result)
            delivery: Any = token.reference
            packed = b"".join(link.dumps((exposed, token, self.registry[typeid][-1])))
            return TOKEN, (*delivery.facts, packed)
        ident, exposed = self.create(link, typeid, result)
        return "#PROXY", (exposed, _mp.Token(typeid, self.address, ident))

    def _raised(self, link: Link, error: BaseException) -> Reply:
        """Return the reply that has the client raise `error`."""
        frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
        text = "".join(traceback.format_exception(type(error), error, frames))
        try:
            if not isinstance(error, Exception):
                raise TypeError
            copy = link.loads(b"".join(link.dumps(error)))
            if type(copy) is not type(error):
                raise TypeError
        except Exception:  # it cannot travel as itself
            return "#TRACEBACK", text
        if self._serializer != "pickle":
            return "#ERROR", error
        return "#ERROR", _Raised(error, text, link.fiber)

    # Objects

    def create(self, c: Any, typeid: str, /, *args: Any, **kwds: Any) -> tuple[str, Any]:
        """Make an object, or take one that is there; count it as referred to once more.

        Returns:
            Its ident, and the names of its methods.
        """
        make, exposed, method_to_typeid, _ = self.registry[typeid]
        if make is None:
            if kwds or len(args) != 1:
                raise ValueError("without a callable, there must be one positional argument")
            obj = args[0]
        else:
            with self._creating:  # one at a time, as programs for multiprocessing may rely on
                obj = make(*args, **kwds)
        names = set(_public_methods(obj) if exposed is None else exposed)
        names.update(method_to_typeid or ())
        ident = f"{id(obj):x}"
        with self.mutex:
            self.id_to_obj[ident] = (obj, names, method_to_typeid)
            self.id_to_refcount[ident] = self.id_to_refcount.get(ident, 0) + 1
        return ident, tuple(names)

    def create_token(self, c: Any, typeid: str, /, *args: Any, **kwds: Any) -> tuple[Token, Any]:
        """As `create`, for a client of the same session: the token keeps the object, no count."""
        ident, names = self.create(c, typeid, *args, **kwds)
        try:
            delivery = self._referents.deliver(ident)
        finally:
            self.decref(c, ident)
        return Token(typeid, self.address, ident, self.name, delivery), names

    def make(self, c: Any, typeid: str, /, *args: Any, **kwds: Any) -> Any:
        """Make an object that clients use without a proxy, for a client of the same session."""
        return objects.KINDS[typeid](*args, **kwds)

    def decref(self, c: Any, ident: str) -> None:
        """Count an object as referred to once less; let go of it after the last."""
        with self.mutex:
            if ident not in self.id_to_refcount and ident in self.id_to_local_proxy_obj:
                return
            self.id_to_refcount[ident] -= 1
            if self.id_to_refcount[ident]:
                return
            del self.id_to_refcount[ident]
            dropped = self.id_to_obj.pop(ident)
        del dropped  # not before: it may hold proxies, whose end comes back here


class _Raised:
    """An exception on its way to a client, where it gets the server's traceback as its cause."""

    def __init__(self, error: Exception, text: str, fiber: bool) -> None:
        self._facts = error, text
        self._rebuild = _with_traceback if fiber else _rebuild_exc

    def __reduce__(self) -> tuple[Any, ...]:
        return self._rebuild, self._facts


def _with_traceback(error: Exception, text: str) -> Exception:
    error.__cause__ = RemoteTraceback(text)
    return error
