"""The peers: one small adapter each, all with the same four methods (see `Peer`).

Creating an adapter imports the library and starts a pool of `workers` processes; leaving its `with`
block closes the pool and waits until it is gone. `chunksize=None` is the peer's own default. A peer
without a chunk size (dask) ignores it.

Peers that have a way of their own to give many tasks one large value also have `share` (see
`Sharing`).

Peers that have multiprocessing's other objects too, its queues and locks, give them by `context`
(see `Objects`).
"""

from __future__ import annotations

from importlib import import_module

from benchmarks import tasks

# `typing` takes milliseconds to load and some peers would find it there for free (see __init__).
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, Protocol

    class Peer(Protocol):
        """What a measurement may use of a peer."""

        statement: str

        def __init__(self, workers: int) -> None: ...
        def __enter__(self) -> Peer: ...
        def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...
        def map(
            self, func: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None
        ) -> list[Any]: ...
        def imap_unordered(
            self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None
        ) -> Iterator[Any]: ...
        def apply(self, func: Callable[[Any], Any], argument: Any) -> Any: ...

    class Sharing(Peer, Protocol):
        """A peer that shares values."""

        def share(self, value: Any) -> Any: ...  # what tasks get it from: see `tasks.use`

    class Objects(Protocol):
        """What a measurement may use of a peer's queues, pipes, locks and managers."""

        @classmethod
        def context(cls) -> Any: ...  # has Process, Queue, Pipe, Lock, Value, Manager
        @staticmethod
        def served_lock(context: Any) -> Any: ...  # a lock that other machines can have too


class _Pool:
    """Peers with multiprocessing's API; a subclass makes `pool`."""

    pool: Any

    def __enter__(self) -> Peer:
        return self  # type: ignore[return-value]  # the subclass has `statement` and `__init__`

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.pool.close()
        else:
            self.pool.terminate()
        self.pool.join()

    def map(
        self, func: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None
    ) -> list[Any]:
        return list(self.pool.map(func, items, chunksize))

    def imap_unordered(
        self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        more = () if chunksize is None else (chunksize,)
        return iter(self.pool.imap_unordered(func, items, *more))

    def apply(self, func: Callable[[Any], Any], argument: Any) -> Any:
        return self.pool.apply(func, (argument,))


class Fiber(_Pool):
    statement = "import fiber"

    def __init__(self, workers: int) -> None:
        self.pool = self.context().Pool(workers)

    @classmethod
    def context(cls) -> Any:
        return import_module("fiber")

    @property
    def ready(self) -> int:
        """Workers that are up, which the other peers do not tell."""
        return int(self.pool.stats().ready)

    def share(self, value: Any) -> Any:
        return self.context().put(value)

    @staticmethod
    def served_lock(context: Any) -> Any:
        return context.Lock()


class Multiprocessing(_Pool):
    statement = "import multiprocessing"
    start_method = "fork"

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.pool = self.context().Pool(workers)
        self.idle = [self.pool]

    @classmethod
    def context(cls) -> Any:
        return import_module("multiprocessing").get_context(cls.start_method)

    def share(self, value: Any) -> Any:
        # An initializer gets it, and that only a new pool can have.
        self.pool = self.context().Pool(self.workers, tasks.keep, (value,))
        self.idle.append(self.pool)
        return tasks.Kept()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for pool in self.idle:
            self.pool = pool
            super().__exit__(kind, *rest)

    @staticmethod
    def served_lock(context: Any) -> Any:
        return context.Manager().Lock()  # the lock keeps its manager alive


class MultiprocessingSpawn(Multiprocessing):
    start_method = "spawn"


class Ray(_Pool):
    statement = "import ray"

    def __init__(self, workers: int) -> None:
        self.ray = import_module("ray")
        self.ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        self.pool = import_module("ray.util.multiprocessing").Pool(workers)

    def share(self, value: Any) -> Any:
        return tasks.RayHandle(self.ray.put(value))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        super().__exit__(kind, *rest)
        self.ray.shutdown()


class Executor:
    """Peers with the API of concurrent.futures; a subclass makes `executor`."""

    executor: Any

    def __enter__(self) -> Peer:
        return self  # type: ignore[return-value]  # the subclass has `statement` and `__init__`

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown(wait=True)

    def map(
        self, func: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None
    ) -> list[Any]:
        options = {} if chunksize is None else {"chunksize": chunksize}
        return list(self.executor.map(func, items, **options))

    def imap_unordered(
        self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        as_completed = import_module("concurrent.futures").as_completed
        futures = [self.executor.submit(func, item) for item in items]
        return (future.result() for future in as_completed(futures))

    def apply(self, func: Callable[[Any], Any], argument: Any) -> Any:
        return self.executor.submit(func, argument).result()


class ConcurrentFutures(Executor):
    statement = "from concurrent.futures import ProcessPoolExecutor"

    def __init__(self, workers: int) -> None:
        futures = import_module("concurrent.futures")
        # fork, as the multiprocessing it is compared with; the default changes with Python 3.14.
        fork = import_module("multiprocessing").get_context("fork")
        self.executor = futures.ProcessPoolExecutor(workers, mp_context=fork)


class Loky(Executor):
    statement = "import loky"

    def __init__(self, workers: int) -> None:
        self.executor = import_module("loky").ProcessPoolExecutor(workers)


class Joblib:
    """With its default backend, loky, and arrays larger than 1 MB in files that all map."""

    statement = "import joblib"

    def __init__(self, workers: int) -> None:
        self.joblib = import_module("joblib")
        self.workers = workers
        self.apply(tasks.nothing, None)  # starts the workers, which the next calls find

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        executor = import_module("joblib.externals.loky").get_reusable_executor
        executor(max_workers=self.workers, reuse=True).shutdown(wait=True)

    def _run(
        self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None, kind: str
    ) -> Any:
        batch = "auto" if chunksize is None else chunksize
        parallel = self.joblib.Parallel(n_jobs=self.workers, batch_size=batch, return_as=kind)
        return parallel(self.joblib.delayed(func)(item) for item in items)

    def map(
        self, func: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None
    ) -> list[Any]:
        return list(self._run(func, items, chunksize, "list"))

    def imap_unordered(
        self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        return iter(self._run(func, items, chunksize, "generator_unordered"))

    def apply(self, func: Callable[[Any], Any], argument: Any) -> Any:
        return self._run(func, [argument], 1, "list")[0]


class Dask:
    statement = "import distributed"

    def __init__(self, workers: int) -> None:
        self.distributed = import_module("distributed")
        self.client = self.distributed.Client(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.shutdown()

    def share(self, value: Any) -> Any:
        return self.client.scatter(value, broadcast=True)  # in a task it is the value itself

    # pure=False: dask would otherwise run equal calls once and answer the rest from its cache.
    def map(
        self, func: Callable[[Any], Any], items: Sequence[Any], chunksize: int | None = None
    ) -> list[Any]:
        return list(self.client.gather(self.client.map(func, items, pure=False)))

    def imap_unordered(
        self, func: Callable[[Any], Any], items: Iterable[Any], chunksize: int | None = None
    ) -> Iterator[Any]:
        futures = self.client.map(func, list(items), pure=False)
        done = self.distributed.as_completed(futures, with_results=True)
        return (result for _, result in done)

    def apply(self, func: Callable[[Any], Any], argument: Any) -> Any:
        return self.client.submit(func, argument, pure=False).result()


PEERS: dict[str, type[Peer]] = {
    "fiber": Fiber,
    "multiprocessing": Multiprocessing,
    "multiprocessing-spawn": MultiprocessingSpawn,
    "concurrent.futures": ConcurrentFutures,
    "loky": Loky,
    "joblib": Joblib,
    "ray": Ray,
    "dask": Dask,
}


# Those that are measured only in rows that name them, or in which the start method matters.
SPECIAL = ("multiprocessing-spawn", "joblib")
# Those with `Objects`, and those with `share`.
OBJECTS = ("fiber", "multiprocessing")
SHARING = ("fiber", "multiprocessing", "ray", "dask")


# Fiber as it was: the harness gives its processes the source of an older commit (see `against`).
BEFORE = "before"


def load(name: str) -> type[Peer]:
    """The adapter called `name`: one of `PEERS`, or `module:Class` for one of your own."""
    if ":" not in name:
        return PEERS["fiber" if name == BEFORE else name]
    module, _, attribute = name.partition(":")
    adapter: type[Peer] = getattr(import_module(module), attribute)
    return adapter
