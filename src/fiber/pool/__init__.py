"""`Pool`: many workers that run a function on many items.

    Pool (here) ─► master ─► scheduler
                     │  ▲
               BATCH ▼  │ RESULTS
                   workers

The interface is multiprocessing's. Beyond it: `retries`, a `timeout` for each item, results with
exceptions in their places by `return_exceptions`, and `stats`.
"""

from __future__ import annotations

import operator
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, TracebackType
from typing import Any

from fiber.backends import registry
from fiber.errors import MaybeEncodingError, PoolError, RemoteTraceback
from fiber.pool.calls import Options
from fiber.pool.crew import Settings
from fiber.pool.master import Master
from fiber.pool.protocol import APPLY, MAP, STARMAP
from fiber.pool.results import AsyncResult, IMapIterator, IMapUnorderedIterator, MapResult
from fiber.pool.source import SEQUENCES
from fiber.pool.stats import PoolStats
from fiber.process import Process
from fiber.resources import Resources, cpu_count, meta_of
from fiber.runtime import main
from fiber.runtime.loop import Loop

__all__ = [
    "ApplyResult",
    "AsyncResult",
    "IMapIterator",
    "IMapUnorderedIterator",
    "MapResult",
    "MaybeEncodingError",
    "Pool",
    "PoolStats",
    "RemoteTraceback",
]

ApplyResult = AsyncResult


def __getattr__(name: str) -> Any:
    """Return what else programs take from multiprocessing.pool, such as `ThreadPool`."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from multiprocessing import pool  # slow, and seldom asked for

    return getattr(pool, name)


Function = Callable[..., Any]
Callback = Callable[[Any], object]

_MAX_CHUNK = 1 << 31  # what fits on the wire; nobody has so many items
_JOIN_PATIENCE = 10.0  # seconds that terminate waits for workers which were sent SIGKILL


class Pool:
    """A pool of worker processes, as `multiprocessing.Pool`.

    A task whose worker died runs again elsewhere, each item has one result, and what cannot
    succeed fails with the reason; nothing waits for ever.

    Args:
        processes: how many workers; `cpu_count()` by default. Or a pair, the least and the most:
            then the pool has more while items wait, and those that were idle for
            `config.pool_idle_timeout` seconds end. With a least of 0 it begins with one.
        initializer: called once in each worker, before its first task. If it raises, the pool ends
            with that exception.
        initargs: its arguments.
        maxtasksperchild: items after which a worker is replaced by a fresh one.
        context: of multiprocessing's interface; a Fiber context says which backend to use.
        retries: how often an item runs again after it ended its worker; `config.retries` by
            default. The first death in a batch of several items is charged to none of them; with
            0 no item runs twice.
        timeout: seconds that an item may take; one that takes longer fails alone, with
            `TaskTimeout`, and its worker is ended.

    Raises:
        StartError: the workers cannot be started; the message says why.
        ValueError, TypeError: an argument makes no sense.
    """

    def __init__(
        self,
        processes: int | tuple[int, int] | None = None,
        initializer: Function | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> None:
        self._master: Master | None = None
        least, most = _range(cpu_count() if processes is None else processes)
        if maxtasksperchild is not None:
            try:
                maxtasksperchild = _integer("maxtasksperchild", maxtasksperchild, 1)
            except TypeError as error:
                raise ValueError(str(error)) from None  # as multiprocessing
        retries, timeout = _limits(retries, timeout)
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        main.check_loaded()  # before the choice, which needs what only the master may have
        backend = getattr(context, "backend", None) or registry.chosen()
        self._settings = Settings(
            backend, most, least, initializer, tuple(initargs), maxtasksperchild, retries, timeout
        )
        self._resources = Resources()
        self._used = False
        try:
            self._begin()
        except BaseException:
            self._drop()
            raise

    def _begin(self) -> None:
        # A Ctrl-C may come between any two of these: workers are the last thing that is made.
        master = Master(self._settings, self._resources)
        self._loop: Loop = master.loop
        # At exit before multiprocessing joins processes; it holds the master and not the pool, so
        # that a pool which is dropped can be collected.
        from multiprocessing import util  # not needed to import Fiber, and slow

        self._finalizer = util.Finalize(None, _terminate_at_exit, args=(master,), exitpriority=15)
        self._master = master
        _masters.add(master)
        master.begin()

    def _drop(self) -> None:
        """End the workers soon, if there are any; nobody has the pool any more."""
        if self._master is not None:
            self._finalizer.cancel()
            self._loop.call_soon(self._master.terminate)

    # Calls that wait ---------------------------------------------------------------------------

    def apply(
        self,
        func: Function,
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> Any:
        """Return `func(*args, **kwds)`, run by a worker."""
        options = _options(None, retries, timeout)
        master = self._ready(func)
        result = AsyncResult(self._loop, self)
        packed = master.packer.pack(func)
        items = [(tuple(args), dict(kwds) if kwds else {})]
        with self._loop as loop:
            master.submit(func, packed, APPLY, result, items, options)
            # Waiting at once, without leaving the loop in between, saves a good part of a trip.
            loop.wait_within(result._event)
        return result.get()

    def map(
        self,
        func: Function,
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """Return `[func(item) for item in iterable]`, run by the workers.

        Args:
            func: callable of one argument; lambdas and closures are fine.
            iterable: its items, all read before the first is run.
            chunksize: items that stay together. None (default) follows the duration of the tasks.
            retries: instead of the pool's.
            timeout: seconds for each item, instead of the pool's.
            return_exceptions: put exceptions in the places of the items that raised them.

        Raises:
            the exception of the first item that failed, when all have been run.
        """
        options = _options(chunksize, retries, timeout)
        result = self._map(MAP, func, iterable, options, return_exceptions)
        return result.get()  # type: ignore[no-any-return]

    def starmap(
        self,
        func: Function,
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        """As `map`, calling `func(*item)`."""
        options = _options(chunksize, retries, timeout)
        result = self._map(STARMAP, func, iterable, options, return_exceptions)
        return result.get()  # type: ignore[no-any-return]

    # Calls that do not -------------------------------------------------------------------------

    def apply_async(
        self,
        func: Function,
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> AsyncResult:
        """As `apply`, but return an `AsyncResult` at once.

        Args:
            func, args, kwds: what to call.
            callback: called with the result, before it is ready for `get`.
            error_callback: called with the exception if there is one.
            retries, timeout: instead of the pool's.
        """
        options = _options(None, retries, timeout)
        master = self._ready(func)
        result = AsyncResult(self._loop, self, callback, error_callback)
        packed = master.packer.pack(func)
        items = [(tuple(args), dict(kwds) if kwds else {})]
        with self._loop:
            master.submit(func, packed, APPLY, result, items, options)
        return result

    def map_async(
        self,
        func: Function,
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> MapResult:
        """As `map`, but return an `AsyncResult` at once; callbacks as for `apply_async`."""
        options = _options(chunksize, retries, timeout)
        return self._map(MAP, func, iterable, options, return_exceptions, callback, error_callback)

    def starmap_async(
        self,
        func: Function,
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> MapResult:
        """As `starmap`, but return an `AsyncResult` at once; callbacks as for `apply_async`."""
        options = _options(chunksize, retries, timeout)
        return self._map(
            STARMAP, func, iterable, options, return_exceptions, callback, error_callback
        )

    def imap(
        self,
        func: Function,
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> IMapIterator:
        """Apply `func` to each item, lazily, and iterate over the results in order.

        As `multiprocessing.Pool.imap`, but the iterable is read only as far as the workers and who
        takes the results keep up (`config.imap_buffer` items per worker or a few batches,
        whichever is more, and `config.imap_buffer_mb`), so that it may be endless.

        Args:
            func: callable of one argument; lambdas and closures are fine.
            iterable: its items; an exception that it raises is raised here, after the results
                before it.
            chunksize: items that stay together. None (default) follows the duration of the tasks.
            retries, timeout, return_exceptions: as for `map`.

        Raises (from `next`):
            the exception of the task itself, with the worker's traceback as its cause.
            WorkerDied: the item's worker died `retries + 1` times; the message says how.
            TimeoutError: `next(timeout)` seconds went by.
        """
        options = _options(chunksize, retries, timeout)
        results = IMapIterator(self._ready(func), self, return_exceptions)
        self._stream(func, results, iterable, options)
        return results

    def imap_unordered(
        self,
        func: Function,
        iterable: Iterable[Any],
        chunksize: int | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> IMapUnorderedIterator:
        """As `imap`, but iterate over the results as they come."""
        options = _options(chunksize, retries, timeout)
        results = IMapUnorderedIterator(self._ready(func), self, return_exceptions)
        self._stream(func, results, iterable, options)
        return results

    def _map(
        self,
        how: int,
        func: Function,
        iterable: Iterable[Any],
        options: Options,
        return_exceptions: bool,
        callback: Callback | None = None,
        error_callback: Callback | None = None,
    ) -> MapResult:
        master = self._ready(func)
        items = list(iterable)
        packer = master.packer
        packed, keeps = packer.share(packer.pack(func))
        constants = packer.constants_of(how, items)
        result = MapResult(
            self._loop, self, len(items), callback, error_callback, return_exceptions
        )
        with self._loop:
            master.submit(func, packed, how, result, items, options, constants, keeps)
        return result

    def _stream(
        self,
        func: Function,
        results: IMapUnorderedIterator,
        iterable: Iterable[Any],
        options: Options,
    ) -> None:
        assert self._master is not None
        packer = self._master.packer
        packed, keeps = packer.share(packer.pack(func))
        items = iterable if type(iterable) in SEQUENCES else iter(iterable)
        with self._loop:
            self._master.stream(func, packed, MAP, results, items, options, keeps)

    def _ready(self, func: Function) -> Master:
        """Return the master, with workers as the function's `@fiber.meta` asks for."""
        if not callable(func):
            raise TypeError(f"{func!r} is not callable")
        assert self._master is not None
        self._master.check_open()
        if isinstance(func, FunctionType) and not func.__dict__:  # the common case, in a hurry
            self._used = True
            return self._master
        wanted = meta_of(func)
        if wanted != self._resources and wanted != Resources():
            if self._used:
                raise PoolError(
                    f"{getattr(func, '__qualname__', func)} asks for {wanted}, but this pool's "
                    f"workers were made for {self._resources}; make another pool for it"
                )
            self.terminate()
            self._resources = wanted
            self._begin()
        self._used = True
        return self._master

    # The end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more calls; the workers end when all is done."""
        master = self._master
        assert master is not None
        if self._loop.held:  # see _terminate
            self._loop.call_soon(master.close)
            return
        with self._loop:
            master.close()

    def terminate(self) -> None:
        """End the workers now; what is still awaited raises `PoolTerminated`."""
        assert self._master is not None
        self._finalizer.cancel()
        _terminate(self._master)

    def join(self) -> None:
        """Wait for the workers to end; call `close` or `terminate` before."""
        assert self._master is not None
        if not self._master.closing:
            raise ValueError("Pool is still running")
        self._loop.wait(self._master.gone)

    def __enter__(self) -> Pool:
        assert self._master is not None
        self._master.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.terminate()

    def __del__(self) -> None:
        master = self._master
        if master is not None and not master.closing and not master.loop.closed:
            warnings.warn(
                f"unclosed running multiprocessing pool {self!r}",
                ResourceWarning,
                source=self,
                stacklevel=2,
            )
            self._drop()

    def __reduce__(self) -> Any:
        raise TypeError("a pool cannot be pickled or sent to another process")

    def __repr__(self) -> str:
        master = self._master
        state = "ended" if master is None or master.closing else "running"
        least, most = self._settings.least, self._settings.processes
        return f"<fiber.Pool {state} processes={most if least == most else (least, most)}>"

    # What it is doing --------------------------------------------------------------------------

    def stats(self) -> PoolStats:
        """Return how many workers and items there are, and what became of them."""
        assert self._master is not None
        self._loop.poll()
        with self._loop:
            return self._master.stats()

    @property
    def _pool(self) -> list[Process]:
        """The workers, by multiprocessing's private name for them, which libraries read."""
        assert self._master is not None
        with self._loop:
            return self._master.processes()

    @property
    def _processes(self) -> int:
        return self._settings.processes

    def pids(self) -> list[int]:
        """Return the process IDs of the workers."""
        assert self._master is not None
        self._loop.poll()
        with self._loop as loop:
            # What has done a task may have been faster than the word of its start.
            for started in self._master.unheard():
                loop.wait_within(started)
            return self._master.pids()


_masters: weakref.WeakSet[Master] = weakref.WeakSet()


def _terminate(master: Master, error: BaseException | None = None) -> None:
    if master.loop.closed:
        return
    if master.loop.held:  # a finalizer, run by the collector while this thread does Fiber's I/O
        master.loop.call_soon(lambda: master.terminate(error))
        return
    with master.loop:
        master.terminate(error)
    master.loop.wait(master.gone, _JOIN_PATIENCE)


def _terminate_at_exit(master: Master) -> None:
    """End what still waits, which only daemonic threads do now, without a word."""
    _terminate(master, SystemExit("the program ended"))


def _terminate_if_interrupted() -> None:
    """At exit by Ctrl-C: end what other threads wait for.

    Python waits for threads before it ends; a thread in `map` would keep the program at its prompt
    for as long as the map takes.
    """
    if isinstance(getattr(sys, "last_value", None), KeyboardInterrupt):
        for master in list(_masters):
            _terminate_at_exit(master)


# As concurrent.futures does: these functions run before threads are waited for, atexit's after.
threading._register_atexit(_terminate_if_interrupted)  # type: ignore[attr-defined]


def _options(chunksize: int | None, retries: int | None, timeout: float | None) -> Options:
    """Check what a method was given."""
    chunk = 1 if chunksize is None else min(_integer("chunksize", chunksize, 1), _MAX_CHUNK)
    return Options(chunk, *_limits(retries, timeout))


def _range(processes: object) -> tuple[int, int]:
    """Return the least and the most workers that were asked for."""
    if not isinstance(processes, (tuple, list)):
        most = _integer("processes", processes, 1)
        return most, most
    if len(processes) != 2:
        raise ValueError(
            f"processes must be a number, or a pair of the least and the most, not {processes!r}"
        )
    least = _integer("the least of processes", processes[0], 0)
    most = _integer("the most of processes", processes[1], 1)
    if least > most:
        raise ValueError(f"processes must be the least and then the most, not {processes!r}")
    return least, most


def _integer(name: str, value: object, least: int) -> int:
    """Return a whole number, of numpy's too."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def _limits(retries: int | None, timeout: float | None) -> tuple[int | None, float | None]:
    if retries is not None:
        retries = _integer("retries", retries, 0)
    if timeout is not None:
        if isinstance(timeout, bool) or not hasattr(timeout, "__float__"):
            raise TypeError(f"timeout must be a number of seconds, not {timeout!r}")
        timeout = float(timeout)
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, not {timeout}")
    return retries, timeout
