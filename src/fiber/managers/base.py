"""`BaseManager`: starts the server of a manager, or connects to one, and has it make objects.

    start ─► Process ─► _run_server ─► Server.serve_forever
      ▲                      │
      └── its address, or why there is none

The server is a process of Fiber. So it ends with the session, however that ends, and so it can be
started from anywhere in it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing import managers as _mp
from multiprocessing.process import (  # type: ignore[attr-defined]
    AuthenticationString,
    current_process,
)
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any

from fiber.connection import Connection, Pipe
from fiber.errors import ProcessError, RemoteTraceback, StartError
from fiber.managers.links import Remote, remember
from fiber.managers.proxies import AutoProxy
from fiber.managers.references import Token
from fiber.managers.server import Server
from fiber.runtime import session

if TYPE_CHECKING:
    from fiber.process import Process

__all__ = ["BaseManager", "NotStarted", "State"]

State = _mp.State  # type: ignore[attr-defined]


class NotStarted(ProcessError, AssertionError, ValueError):
    """A manager has no server; AssertionError and ValueError are what multiprocessing raises."""


class BaseManager(_mp.BaseManager):
    """As `multiprocessing.managers.BaseManager`.

    What it does better: the server may be started from a worker of a pool or from a daemonic
    process; it, and what it started, ends with the session even if that is killed; and whoever
    waits for a server that is killed gets `PeerDied`.

    Args:
        address: where the server listens, as a path or as (host, port); None for a socket in the
            folder of the session.
        authkey: what clients must know; None for that of this process.
        serializer: "pickle", or "xmlrpclib".
        ctx: whose processes to use; None for the default context.
        shutdown_timeout: seconds that the server has to end, before it is terminated.
    """

    _Server = Server
    _auto_proxy: Callable[..., Any] = staticmethod(AutoProxy)

    if TYPE_CHECKING:
        _registry: dict[str, Any]
        _address: Any

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: Any = None,
        *,
        shutdown_timeout: float = 1.0,
    ) -> None:
        if ctx is None:
            from fiber.context import default

            ctx = default.get_context()
        if authkey is None:
            authkey = current_process().authkey
        self._address = address
        self._authkey = AuthenticationString(authkey)
        self._state = State()
        self._state.value = State.INITIAL
        self._serializer = serializer
        self._Listener, self._Client = _mp.listener_client[serializer]  # type: ignore[attr-defined]
        self._ctx = ctx
        self._shutdown_timeout = shutdown_timeout
        self._process: Process | None = None
        self._remote: Remote | None = None  # once there is a server
        self._finalizer: Finalize | None = None

    # Life

    def start(
        self, initializer: Callable[..., Any] | None = None, initargs: Iterable[Any] = ()
    ) -> None:
        """Start the server in a process of its own, and return when it can be used.

        Args:
            initializer: called there first, with `initargs`.
            initargs: its arguments.

        Raises:
            ProcessError: the manager was started, connected or shut down before.
            StartError: the process could not be started, or ended at once.
            what the initializer raises, and OSError if the address cannot be had.
        """
        self._check_new()
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        reader, writer = Pipe(duplex=False)
        with reader, writer:
            process = self._new_process(writer, initializer, initargs)
            process.start()
            try:
                name = f"the manager {process.name} (process {process.pid})"
                writer.close()
                address = reader.recv()
            except EOFError:
                address = None
            except BaseException:
                process.terminate()  # nobody would end it
                raise
        if address is None or isinstance(address, _Failure):
            process.join()
            if address is None:
                code = process.exitcode
                raise StartError(f"{name} ended with exit code {code} before it could be used")
            raise address.error(name) from RemoteTraceback(address.text)
        self._address, self._process = address, process
        remote = Remote(address, self._serializer, self._authkey, name)
        self._begin(remote)
        self._finalizer = Finalize(
            self,
            type(self)._finalize_manager,
            args=(process, remote, self._state, self._shutdown_timeout, session.current()),
            exitpriority=0,
        )

    def _new_process(self, writer: Connection, *initialization: Any) -> Process:
        facts = (self._registry, self._address, self._authkey, self._serializer, writer)
        target = type(self)._run_server
        process: Process = self._ctx.Process(target=target, args=(*facts, *initialization))
        number = ":".join(map(str, process._identity))
        process.name = f"{type(self).__name__}-{number}"
        return process

    def _begin(self, remote: Remote) -> None:
        state = self._state
        remote.has_shut_down = lambda: bool(state.value == State.SHUTDOWN)
        remember(remote)
        self._remote = remote
        self._state.value = State.STARTED

    def _check_new(self) -> None:
        if self._state.value == State.STARTED:
            raise ProcessError(f"{self._name} was started before")
        if self._state.value == State.SHUTDOWN:
            raise ProcessError(f"{self._name} was shut down; a manager cannot start twice")

    @property
    def _name(self) -> str:
        return f"this {type(self).__name__}" if self._remote is None else self._remote.name

    @classmethod
    def _run_server(
        cls,
        registry: dict[str, Any],
        address: Any,
        authkey: bytes,
        serializer: str,
        writer: Any,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        """In the new process: make a server, tell its address and run it."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end of its owner is its end
        try:
            if initializer is not None:
                initializer(*initargs)
            server = cls._Server(registry, address, authkey, serializer)
        except BaseException as error:
            writer.send(_Failure(error))
            raise SystemExit(1) from None
        writer.send(server.address)
        writer.close()
        server.serve_forever()

    def connect(self) -> None:
        """Connect to a server that runs at the manager's address.

        Raises:
            OSError: it cannot be reached.
            AuthenticationError: it has another authkey.
        """
        remote = Remote(self._address, self._serializer, self._authkey)
        remote.open()
        self._begin(remote)

    def get_server(self) -> Any:
        """Return a server, to be run in this process by its `serve_forever`; it has an `address`.

        Raises:
            ProcessError: the manager was started, connected or shut down before.
        """
        self._check_new()
        return self._Server(self._registry, self._address, self._authkey, self._serializer)

    def __enter__(self) -> Any:
        if self._state.value != State.STARTED:
            self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:  # type: ignore[override]
        """End the server that this manager has started; nothing happens if there is none.

        Raises:
            ProcessError: the manager only connected to a server, which is not its own to end.
        """
        if self._finalizer is not None:
            self._finalizer()
        elif self._state.value == State.STARTED:
            raise ProcessError(f"{self._name} can be shut down only by the manager that started it")

    @staticmethod
    def _finalize_manager(
        process: Process, remote: Remote, state: Any, timeout: float, current: session.Session
    ) -> None:
        """End the server; it has `timeout` seconds for each way to do so."""
        state.value = State.SHUTDOWN
        remote.close()
        _mp.BaseProxy._address_to_local.pop(remote.address, None)
        if current.loop.closed:
            return  # it has ended with the session
        if current.loop.held:  # the collector runs this in the midst of Fiber's own work
            process.terminate()
            return
        if process.is_alive():
            with contextlib.suppress(Exception):
                remote.ask_once("shutdown", timeout=timeout)
            process.join(timeout)
        if process.is_alive():
            process.terminate()
            process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        if isinstance(remote.address, str) and remote.address.startswith(current.folder):
            with contextlib.suppress(FileNotFoundError):  # it is there if the server was killed
                os.unlink(remote.address)

    # Objects

    @property
    def address(self) -> Any:
        """Where the server listens."""
        return self._address

    def _server(self) -> Remote:
        """Return the server.

        Raises:
            NotStarted: there is none.
        """
        if self._remote is None:
            raise NotStarted(f"{self._name} was not started")
        if self._state.value == State.SHUTDOWN:
            raise NotStarted(f"{self._name} was shut down")
        return self._remote

    def _create(self, typeid: str, /, *args: Any, **kwds: Any) -> tuple[Any, Any]:
        """Have the server make an object; return a token, and the names of its methods."""
        remote = self._server()
        if remote.kind().ours:
            token, exposed = remote.ask("create_token", (typeid, *args), kwds)
            token.address = self._address
            return token, exposed
        ident, exposed = remote.ask("create", (typeid, *args), kwds)
        return _mp.Token(typeid, self._address, ident), exposed

    @classmethod
    def register(
        cls,
        typeid: str,
        callable: Callable[..., Any] | None = None,
        proxytype: Any = None,
        exposed: Sequence[str] | None = None,
        method_to_typeid: Mapping[str, str] | None = None,
        create_method: bool = True,
    ) -> None:
        """Let managers of this class make objects of a type, by a method called `typeid`.

        Args:
            typeid: name of the type.
            callable: makes an object; lambdas and closures are fine. None for a manager that only
                connects.
            proxytype: class of the proxies; by default they have the public methods of the object.
            exposed: names of the methods that proxies may call; None for those of the proxytype.
            method_to_typeid: which methods return proxies, and of which type.
            create_method: whether there is to be a method.
        """
        proxytype = cls._auto_proxy if proxytype is None else proxytype
        super().register(typeid, callable, proxytype, exposed, method_to_typeid, False)
        if not create_method:
            return

        def create(self: BaseManager, /, *args: Any, **kwds: Any) -> Any:
            token, names = self._create(typeid, *args, **kwds)
            facts = {"manager": self, "authkey": self._authkey, "exposed": names}
            proxy = proxytype(token, self._serializer, **facts)
            if not isinstance(token, Token):
                self._server().ask("decref", (token.id,))  # the proxy has had itself counted
            return proxy

        create.__name__ = typeid
        setattr(cls, typeid, create)


class _Failure:
    """Why there is no server."""

    def __init__(self, error: BaseException) -> None:
        self.text = traceback.format_exc()
        self._error: bytes | None = None
        if isinstance(error, Exception):
            with contextlib.suppress(Exception):
                data = pickle.dumps(error)
                if type(pickle.loads(data)) is type(error):
                    self._error = data

    def error(self, name: str) -> Exception:
        """Return the exception; what cannot travel, by a `StartError`."""
        if self._error is not None:
            with contextlib.suppress(Exception):
                error: Exception = pickle.loads(self._error)
                return error
        last = self.text.rstrip().rpartition("\n")[2]
        return StartError(f"{name} could not start: {last}")
