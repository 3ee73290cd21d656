"""Contexts: the public functions, bound to a backend as multiprocessing's are to a start method.

    fiber.Queue() ─► default context ──┐
    get_context("docker").Queue() ─────┴─► fiber.queues.Queue

The start methods of multiprocessing all mean the same here: a process of the configured backend,
which begins as one of `spawn` does. So programs that choose one run as they are. A context of a
backend's name starts its processes there; it is made when it is first asked for, since packages may
add backends, and is the same one from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from multiprocessing import context as _mp_context
from typing import TYPE_CHECKING, Any, TypeVar

from fiber import process as _process
from fiber.backends import registry
from fiber.config import config
from fiber.errors import AuthenticationError, BufferTooShort, ProcessError, TimeoutError
from fiber.resources import cpu_count

if TYPE_CHECKING:
    from logging import Logger

    from fiber import managers, queues, sharedctypes, synchronize
    from fiber.connection import Connection
    from fiber.constants import ObjectRef
    from fiber.pool import Pool as PoolType

    _Base = object  # that of multiprocessing is typed for its own start methods only
else:
    _Base = _mp_context.BaseContext  # libraries look for it

__all__ = [
    "FiberContext",
    "get_all_start_methods",
    "get_context",
    "get_start_method",
    "set_start_method",
]

_T = TypeVar("_T")

START_METHODS = ("spawn", "fork", "forkserver")


class FiberContext(_Base):
    """What `get_context` returns: the names of multiprocessing, for one backend.

    Attributes:
        backend: its name; None for the one that is configured when a process is started.
    """

    ProcessError = ProcessError
    BufferTooShort = BufferTooShort
    TimeoutError = TimeoutError
    AuthenticationError = AuthenticationError

    active_children = staticmethod(_process.active_children)
    cpu_count = staticmethod(cpu_count)
    current_process = staticmethod(_process.current_process)
    parent_process = staticmethod(_process.parent_process)

    Process: type[_process.Process] = _process.Process
    backend: str | None = None
    _name: str | None = None

    def __reduce__(self) -> str | tuple[Any, ...]:
        return get_context, (self._name,)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> PoolType:
        """Return a `fiber.Pool` of this context's backend."""
        from fiber.pool import Pool

        return Pool(
            processes,
            initializer,
            initargs,
            maxtasksperchild,
            self,
            retries=retries,
            timeout=timeout,
        )

    def Manager(self) -> managers.SyncManager:
        """Return a started manager: a process that keeps objects for others."""
        from fiber.managers import SyncManager

        manager = SyncManager(ctx=self.get_context())
        manager.start()
        return manager

    def Pipe(self, duplex: bool = True) -> tuple[Connection, Connection]:
        """Return the two ends of a pipe; if it is not duplex, the first one only receives."""
        from fiber.connection import Pipe

        return Pipe(duplex)

    def Lock(self) -> synchronize.Lock:
        """Return a lock."""
        from fiber.synchronize import Lock

        return Lock()

    def RLock(self) -> synchronize.RLock:
        """Return a lock that its owner may acquire again."""
        from fiber.synchronize import RLock

        return RLock()

    def Condition(
        self, lock: synchronize.Lock | synchronize.RLock | None = None
    ) -> synchronize.Condition:
        """Return a condition."""
        from fiber.synchronize import Condition

        return Condition(lock)

    def Semaphore(self, value: int = 1) -> synchronize.Semaphore:
        """Return a semaphore of `value` permits."""
        from fiber.synchronize import Semaphore

        return Semaphore(value)

    def BoundedSemaphore(self, value: int = 1) -> synchronize.BoundedSemaphore:
        """Return a semaphore that never has more than `value` permits."""
        from fiber.synchronize import BoundedSemaphore

        return BoundedSemaphore(value)

    def Event(self) -> synchronize.Event:
        """Return a flag that processes can wait for."""
        from fiber.synchronize import Event

        return Event()

    def Barrier(
        self,
        parties: int,
        action: Callable[[], Any] | None = None,
        timeout: float | None = None,
    ) -> synchronize.Barrier:
        """Return a barrier for so many parties; see `fiber.synchronize.Barrier`."""
        from fiber.synchronize import Barrier

        return Barrier(parties, action, timeout)

    def Queue(self, maxsize: int = 0) -> queues.Queue:
        """Return a queue; `maxsize` bounds how many items it holds."""
        from fiber.queues import Queue

        return Queue(maxsize)

    def JoinableQueue(self, maxsize: int = 0) -> queues.JoinableQueue:
        """Return a queue whose items are marked as done, and that can be waited for."""
        from fiber.queues import JoinableQueue

        return JoinableQueue(maxsize)

    def SimpleQueue(self) -> queues.SimpleQueue:
        """Return a queue with the least of methods."""
        from fiber.queues import SimpleQueue

        return SimpleQueue()

    def RawValue(self, typecode_or_type: Any, *args: Any) -> Any:
        """Return a ctypes object in shared memory."""
        from fiber.sharedctypes import RawValue

        return RawValue(typecode_or_type, *args)

    def RawArray(self, typecode_or_type: Any, size_or_initializer: Any) -> Any:
        """Return a ctypes array in shared memory."""
        from fiber.sharedctypes import RawArray

        return RawArray(typecode_or_type, size_or_initializer)

    def Value(
        self, typecode_or_type: Any, *args: Any, lock: Any = True
    ) -> sharedctypes.SynchronizedBase[Any] | Any:
        """Return a ctypes object in shared memory, with a lock unless `lock` is False."""
        from fiber.sharedctypes import Value

        return Value(typecode_or_type, *args, lock=lock, ctx=self.get_context())

    def Array(
        self, typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True
    ) -> sharedctypes.SynchronizedArray[Any] | Any:
        """Return a ctypes array in shared memory, with a lock unless `lock` is False."""
        from fiber.sharedctypes import Array

        return Array(typecode_or_type, size_or_initializer, lock=lock, ctx=self.get_context())

    def put(self, obj: _T) -> ObjectRef[_T]:
        """Return a handle of `obj`, which each host fetches once; see `fiber.constants.put`."""
        from fiber.constants import put

        return put(obj)

    def get_context(self, method: str | None = None) -> FiberContext:
        """Return this context, or that of the backend or start method called `method`."""
        return self if method is None else get_context(method)

    def get_start_method(self, allow_none: bool = False) -> str:
        """Return the name of this context."""
        return self._name or "spawn"

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Refuse: a context's method cannot be changed."""
        raise ValueError("cannot set start method of concrete context")

    def freeze_support(self) -> None:
        """Do nothing: it is for frozen programs on Windows, where Fiber does not run."""

    def get_logger(self) -> Logger:
        """Return multiprocessing's logger; Fiber's own is `logging.getLogger("fiber")`."""
        from multiprocessing.util import get_logger

        return get_logger()

    def log_to_stderr(self, level: Any = None) -> Logger:
        """Have multiprocessing's logger write to standard error; return it."""
        from multiprocessing.util import log_to_stderr

        return log_to_stderr(level)

    def allow_connection_pickling(self) -> None:
        """Do nothing: Fiber's connections can always be pickled."""

    def set_executable(self, executable: str) -> None:
        """Have processes that start as fresh interpreters run `executable`.

        Args:
            executable: path of a Python interpreter.
        """
        from multiprocessing import spawn

        spawn.set_executable(executable)

    def set_forkserver_preload(self, module_names: list[str]) -> None:
        """Do nothing: the main module, with all that it imports, is loaded ahead anyway."""
        if not all(isinstance(name, str) for name in module_names):
            raise TypeError("module_names must be a list of strings")

    def _check_available(self) -> None:
        pass


class SpawnProcess(_process.Process):
    """A process of the configured backend."""

    _chosen = "spawn"


class ForkProcess(_process.Process):
    """As `SpawnProcess`, for programs that ask for `fork`."""

    _chosen = "fork"


class ForkServerProcess(_process.Process):
    """As `SpawnProcess`, for programs that ask for `forkserver`."""

    _chosen = "forkserver"


_PREFIX = "BackendProcess_"


def _process_of(backend: str) -> type[_process.Process]:
    """Return the class of the processes of `backend`, which is the same one each time."""
    # It is pickled by its name in this module, where `__getattr__` finds it. Who unpickles it need
    # not have the backend; and the name of a backend may have signs that no name here can have.
    attribute = _PREFIX + backend.encode().hex()
    if attribute not in globals():
        namespace = {
            "__module__": __name__,
            "__qualname__": attribute,
            "__doc__": f"A process of the backend {backend!r}, whatever is configured.",
            "_backend": backend,
            "_chosen": backend,
        }
        made = type(f"{backend.capitalize()}Process", (_process.Process,), namespace)
        globals().setdefault(attribute, made)
    found: type[_process.Process] = globals()[attribute]
    return found


def __getattr__(name: str) -> Any:
    """Return the class of a backend's processes, which pickle asks for by its name."""
    if name.startswith(_PREFIX):
        return _process_of(bytes.fromhex(name[len(_PREFIX) :]).decode())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class SpawnContext(FiberContext):
    """Processes of the configured backend."""

    _name = "spawn"
    Process = SpawnProcess


class ForkContext(FiberContext):
    """As `SpawnContext`, for programs that ask for `fork`."""

    _name = "fork"
    Process = ForkProcess


class ForkServerContext(FiberContext):
    """As `SpawnContext`, for programs that ask for `forkserver`."""

    _name = "forkserver"
    Process = ForkServerProcess


class BackendContext(FiberContext):
    """Processes of one backend, whatever is configured."""

    def __init__(self, backend: str) -> None:
        self.backend = self._name = backend
        self.Process = _process_of(backend)

    def __reduce__(self) -> tuple[Any, ...]:
        return _context, (self.backend,)  # who unpickles it need not have the backend


class DefaultContext(FiberContext):
    """What the functions of `fiber` itself are methods of: the start method can be set, once."""

    def __reduce__(self) -> str:
        return "default"

    def get_context(self, method: str | None = None) -> FiberContext:
        """As the function."""
        if method is not None:
            return get_context(method)
        if _process.start_method is None:
            _process.start_method = "spawn"
        return _context(_process.start_method)

    def get_start_method(self, allow_none: bool = False) -> Any:
        """As the function."""
        if _process.start_method is None and allow_none:
            return None
        return self.get_context()._name

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """As the function."""
        if _process.start_method is not None and not force:
            raise RuntimeError("context has already been set")
        if method is None and force:
            _process.start_method = None
            return
        context = get_context(str(method))
        _process.start_method = context._name
        if context.backend is not None:
            config.backend = context.backend

    def get_all_start_methods(self) -> list[str]:
        """As the function."""
        return list(START_METHODS)


_contexts: dict[str, FiberContext] = {
    "spawn": SpawnContext(),
    "fork": ForkContext(),
    "forkserver": ForkServerContext(),
}
default = DefaultContext()


def _context(name: str) -> FiberContext:
    context = _contexts.get(name)
    return context or _contexts.setdefault(name, BackendContext(name))


def get_context(method: str | None = None) -> FiberContext:
    """Return the context of a backend.

    Args:
        method: a backend's name, such as "docker"; None, or one of multiprocessing's start methods
            for programs that pass one, for the configured backend.

    Raises:
        ConfigError: there is no such backend; it is a ValueError, too.
    """
    if method is None:
        return default.get_context()
    return _context(method if method in _contexts else registry.check(method))


def get_start_method(allow_none: bool = False) -> Any:
    """Return the start method that was set, "spawn" if none was.

    Args:
        allow_none: return None instead, and leave it open.
    """
    return default.get_start_method(allow_none)


def set_start_method(method: str | None, force: bool = False) -> None:
    """Set the backend by its name; multiprocessing's start methods all leave the configured one.

    Args:
        method: a backend, or one of `get_all_start_methods()`.
        force: whether it may have been set before.

    Raises:
        RuntimeError: it was set before, and not by force.
        ValueError: there is no such start method or backend.
    """
    default.set_start_method(method, force)


def get_all_start_methods() -> list[str]:
    """Return multiprocessing's start methods; to Fiber they all mean the same."""
    return default.get_all_start_methods()
