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

from fiber._version import __version__
from fiber.config import config
from fiber.context import FiberContext, get_context
from fiber.errors import (
    AuthenticationError,
    BufferTooShort,
    ConfigError,
    FiberError,
    PoolBroken,
    PoolClosed,
    PoolError,
    PoolTerminated,
    ProcessError,
    RemoteError,
    SerializationError,
    StartError,
    TaskTimeout,
    TimeoutError,
    WorkerDied,
)
from fiber.pool import Pool
from fiber.process import Process, active_children, current_process, parent_process
from fiber.resources import cpu_count, meta

__all__ = [
    "AuthenticationError",
    "BufferTooShort",
    "ConfigError",
    "FiberContext",
    "FiberError",
    "Pool",
    "PoolBroken",
    "PoolClosed",
    "PoolError",
    "PoolTerminated",
    "Process",
    "ProcessError",
    "RemoteError",
    "SerializationError",
    "StartError",
    "TaskTimeout",
    "TimeoutError",
    "WorkerDied",
    "__version__",
    "active_children",
    "config",
    "cpu_count",
    "current_process",
    "get_context",
    "init",
    "meta",
    "parent_process",
    "reset",
]


def init(**values: object) -> None:
    """Set configuration keys, as `fiber.config.key = value`; `ConfigError` if one is wrong."""
    config.init(**values)


def reset() -> None:
    """Forget what code has configured: back to environment, `.fiberconfig` and defaults."""
    config.reset()
