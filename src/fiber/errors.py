"""The exceptions of Fiber, each a sentence for its reader and attributes for code.

    FiberError
    ├── ConfigError (ValueError)        a setting that is unknown or has a bad value
    ├── StartError (ProcessError)       a process, or the job it should live in, did not start
    ├── PoolError                       the pool itself cannot go on
    │   ├── PoolBroken                  its workers keep dying before they are ready
    │   ├── PoolClosed (ValueError)     it was closed, and takes no more calls
    │   └── PoolTerminated              it was terminated while results were awaited
    ├── WorkerDied                      a task's worker died, more often than it may be retried
    ├── TaskTimeout (WaitTimeout)       a task took longer than its time-out
    ├── RingBroken                      a member of a ring failed
    ├── PeerDied (ConnectionError, EOFError)  what an object needs lived in a process that is gone
    ├── SerializationError (TypeError)  something could not be pickled or unpickled on its way
    │   └── MaybeEncodingError          the result of a task could not be pickled
    └── RemoteError                     stands in for a remote exception that cannot travel

    multiprocessing.ProcessError        is `fiber.ProcessError`, as are its other exceptions
    └── multiprocessing.TimeoutError
        └── WaitTimeout (TimeoutError)  a wait ran out; the builtin one catches it as well

A task's own exception arrives as its own type; its cause is a `RemoteTraceback` that prints the
traceback of the worker.
"""

from __future__ import annotations

import builtins
from multiprocessing.context import (
    AuthenticationError,
    BufferTooShort,
    ProcessError,
    TimeoutError,
)
from typing import Any

__all__ = [
    "AuthenticationError",
    "BufferTooShort",
    "ConfigError",
    "FiberError",
    "MaybeEncodingError",
    "PeerDied",
    "PoolBroken",
    "PoolClosed",
    "PoolError",
    "PoolTerminated",
    "ProcessError",
    "RemoteError",
    "RemoteTraceback",
    "RingBroken",
    "SerializationError",
    "StartError",
    "TaskTimeout",
    "TimeoutError",
    "WaitTimeout",
    "WorkerDied",
]


class FiberError(Exception):
    """The root of Fiber's own exceptions."""


class ConfigError(FiberError, ValueError):
    """A setting that is unknown or has a bad value."""


class StartError(FiberError, ProcessError):
    """A process, or the job that it should live in, did not start."""


class WaitTimeout(TimeoutError, builtins.TimeoutError):
    """A wait ran out; caught as multiprocessing's `TimeoutError` and as the builtin one."""


class PoolError(FiberError):
    """The pool itself cannot go on."""


class PoolBroken(PoolError):
    """The workers of a pool keep dying before they are ready."""


class PoolClosed(PoolError, ValueError):
    """The pool was closed, and takes no more calls; a ValueError, as multiprocessing's."""


class PoolTerminated(PoolError):
    """The pool was terminated while results were awaited."""


class RingBroken(FiberError):
    """A member of a ring failed; its own exception, if it raised one, is the cause.

    Attributes:
        rank: of the first that failed.
        exitcode: of its process, as `Process.exitcode`.
    """

    def __init__(self, message: str, rank: int = 0, exitcode: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.exitcode = exitcode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.rank, self.exitcode)


class PeerDied(FiberError, ConnectionError, EOFError):
    """A process is gone that an object lives in, or that owed what was waited for."""


class SerializationError(FiberError, TypeError):
    """An argument, a result or a function could not be pickled or unpickled."""


class MaybeEncodingError(SerializationError):
    """The result of a task could not be pickled; multiprocessing's pool has it by this name.

    Attributes:
        exc: the reason, as text.
        value: the result, as text.
    """

    def __init__(self, message: str, exc: str = "", value: str = "") -> None:
        super().__init__(message)
        self.exc = exc
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.exc, self.value)


class RemoteError(FiberError):
    """Stands in for a remote exception that cannot be pickled; it prints the same.

    Attributes:
        type_name: qualified name of the exception's class.
        traceback: the remote traceback as text.
    """

    def __init__(self, message: str, type_name: str = "", traceback: str = "") -> None:
        super().__init__(message)
        self.type_name = type_name
        self.traceback = traceback

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.type_name, self.traceback)


class RemoteTraceback(Exception):
    """The traceback of a worker as text: the cause of the exception that it raised."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    @property
    def tb(self) -> str:
        """The text, as multiprocessing calls it."""
        return self.text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


class WorkerDied(FiberError):
    """A task's worker died, more often than the task may be retried.

    Attributes:
        item: index of the item in its call (0 for `apply`).
        attempts: how often a worker died while it ran this item.
        exitcode: of the last worker, as `Process.exitcode` (negative: a signal); None if unknown.
        pid: of the last worker.
        stderr: the last lines that it wrote to its standard error.
    """

    def __init__(
        self,
        message: str,
        item: int = 0,
        attempts: int = 0,
        exitcode: int | None = None,
        pid: int | None = None,
        stderr: str = "",
    ) -> None:
        super().__init__(message)
        self.item = item
        self.attempts = attempts
        self.exitcode = exitcode
        self.pid = pid
        self.stderr = stderr

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self.item, self.attempts, self.exitcode, self.pid, self.stderr)
        return type(self), (*self.args, *facts)


class TaskTimeout(FiberError, WaitTimeout):
    """A task took longer than its time-out; its worker was ended, other items go on.

    Attributes:
        item: index of the item in its call (0 for `apply`).
        timeout: the time-out, in seconds.
    """

    def __init__(self, message: str, item: int = 0, timeout: float = 0.0) -> None:
        super().__init__(message)
        self.item = item
        self.timeout = timeout

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.item, self.timeout)
