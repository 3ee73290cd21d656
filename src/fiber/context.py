"""Contexts: the public functions, bound to a backend as multiprocessing's are to a start method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fiber import process as _process
from fiber.backends import registry
from fiber.errors import AuthenticationError, BufferTooShort, ProcessError, TimeoutError
from fiber.resources import cpu_count

if TYPE_CHECKING:
    from fiber.pool import Pool as PoolType

__all__ = ["FiberContext", "get_context"]


class FiberContext:
    """What `get_context` returns: processes and pools of one backend.

    Args:
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

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend
        self.Process = _process_class(backend)

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

    def get_context(self, method: str | None = None) -> FiberContext:
        """Return this context, or that of the backend called `method`."""
        return self if method is None else get_context(method)


def _process_class(backend: str | None) -> type[_process.Process]:
    return _process.Process if backend is None else _CLASSES[backend]


class LocalProcess(_process.Process):
    """A process on this machine, whatever is configured."""

    _backend = "local"


_CLASSES: dict[str, type[_process.Process]] = {"local": LocalProcess}
_START_METHODS = (None, "spawn", "fork", "forkserver")
_contexts: dict[str | None, FiberContext] = {}


def get_context(method: str | None = None) -> FiberContext:
    """Return the context of a backend.

    Args:
        method: a backend's name; None, or one of multiprocessing's start methods for programs that
            pass one, for the configured backend.

    Raises:
        ValueError: there is no such backend.
    """
    name = None if method in _START_METHODS else registry.check(str(method))
    if name not in _contexts:
        _contexts[name] = FiberContext(name)
    return _contexts[name]
