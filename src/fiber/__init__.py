"""Fiber: multiprocessing for one machine and for the cluster.

    import fiber

    def square(x):
        return x * x

    if __name__ == "__main__":
        with fiber.Pool() as pool:
            print(pool.map(square, range(10)))

The names and their behaviour are multiprocessing's; what is Fiber's own is in the documentation of
each. Processes start on this machine, or where the configuration says (see `fiber.config`).
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from fiber._version import __version__
from fiber.config import config
from fiber.context import (
    FiberContext,
    get_all_start_methods,
    get_context,
    get_start_method,
    set_start_method,
)
from fiber.context import default as _default
from fiber.errors import (
    AuthenticationError,
    BufferTooShort,
    ConfigError,
    FiberError,
    PeerDied,
    PoolBroken,
    PoolClosed,
    PoolError,
    PoolTerminated,
    ProcessError,
    RemoteError,
    RingBroken,
    SerializationError,
    StartError,
    TaskTimeout,
    TimeoutError,
    WorkerDied,
)
from fiber.pool import Pool
from fiber.process import Process, active_children, current_process, parent_process
from fiber.resources import cpu_count, meta

Array = _default.Array
Barrier = _default.Barrier
BoundedSemaphore = _default.BoundedSemaphore
Condition = _default.Condition
Event = _default.Event
JoinableQueue = _default.JoinableQueue
Lock = _default.Lock
Manager = _default.Manager
Pipe = _default.Pipe
Queue = _default.Queue
RLock = _default.RLock
RawArray = _default.RawArray
RawValue = _default.RawValue
Semaphore = _default.Semaphore
SimpleQueue = _default.SimpleQueue
Value = _default.Value
allow_connection_pickling = _default.allow_connection_pickling
freeze_support = _default.freeze_support
get_logger = _default.get_logger
log_to_stderr = _default.log_to_stderr
put = _default.put
set_executable = _default.set_executable
set_forkserver_preload = _default.set_forkserver_preload

__all__ = [
    "Array",
    "AuthenticationError",
    "Barrier",
    "BoundedSemaphore",
    "BufferTooShort",
    "Condition",
    "ConfigError",
    "Event",
    "FiberContext",
    "FiberError",
    "JoinableQueue",
    "Lock",
    "Manager",
    "ObjectRef",
    "PeerDied",
    "Pipe",
    "Pool",
    "PoolBroken",
    "PoolClosed",
    "PoolError",
    "PoolTerminated",
    "Process",
    "ProcessError",
    "Queue",
    "RLock",
    "RawArray",
    "RawValue",
    "RemoteError",
    "Ring",
    "RingBroken",
    "Semaphore",
    "SerializationError",
    "SimpleQueue",
    "StartError",
    "TaskTimeout",
    "TimeoutError",
    "Value",
    "WorkerDied",
    "__version__",
    "active_children",
    "allow_connection_pickling",
    "config",
    "cpu_count",
    "current_process",
    "freeze_support",
    "get_all_start_methods",
    "get_context",
    "get_logger",
    "get_start_method",
    "init",
    "log_to_stderr",
    "meta",
    "parent_process",
    "put",
    "reducer",
    "reset",
    "set_executable",
    "set_forkserver_preload",
    "set_start_method",
]

_MODULES = (
    "connection",
    "constants",
    "dummy",
    "experimental",
    "heap",
    "managers",
    "queues",
    "reduction",
    "resource_sharer",
    "resource_tracker",
    "ring",
    "shared_memory",
    "sharedctypes",
    "spawn",
    "synchronize",
    "util",
)


if _TYPE_CHECKING:
    from fiber.constants import ObjectRef
    from fiber.ring import Ring


def __getattr__(name: str) -> _Any:
    """Import what multiprocessing's users find as attributes, when it is asked for."""
    if name == "Ring":
        return _importlib.import_module("fiber.ring").Ring
    if name == "ObjectRef":
        return _importlib.import_module("fiber.constants").ObjectRef
    if name == "reducer":  # as multiprocessing calls it
        name = "reduction"
    if name in _MODULES:
        return _importlib.import_module(f"fiber.{name}")
    raise AttributeError(f"module 'fiber' has no attribute {name!r}")


def init(**values: object) -> None:
    """Set configuration keys, as `fiber.config.key = value`; `ConfigError` if one is wrong."""
    config.init(**values)


def reset() -> None:
    """Forget what code has configured: back to environment, `.fiberconfig` and defaults."""
    config.reset()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
