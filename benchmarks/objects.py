"""The measurements of what processes share: queues, pipes, locks, managers and values.

As those of `measure`, each yields its figures; here an adapter is asked for its `context` only, a
module or context with the names of multiprocessing. Every measurement has the same shape:

    main ──► order: a count ──► children, which carry it out ──► reply: a count ──► main
                                 ▲    the object measured  ▲
                                 └─────────────────────────┘

An order costs one message over a pipe, and is for as many operations as take a while.
"""

from __future__ import annotations

from benchmarks import tasks
from benchmarks.measure import clock, rate

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from benchmarks.measure import Figures
    from benchmarks.peers import Objects

    Adapter = type[Objects] | None

# A share of the time to spend: these rows have many cases, and their rates are soon steady.
SHARE = 0.25
MOST_LARGE = 512  # messages of 1 MB; a queue without a bound may hold all of them at once
SMALL = (7, (3, 0.5, "name"))

# case -> what the children do and how many they are; the main process does the opposite, alone.
ROUTES = {
    "to-main": (tasks.produce, 1),
    "to-child": (tasks.consume, 1),
    "2-to-main": (tasks.produce, 2),
    "to-2": (tasks.consume, 2),
}


def queue(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Small messages/s through a Queue, along the route that `case` names."""
    yield case, _through_queue(adapter, case, SMALL, seconds)


def queue_large(case: str, adapter: Adapter, seconds: float) -> Figures:
    """GB/s of 1 MB messages through a Queue; `case` names their type and the route."""
    kind, _, route = case.partition("-")
    message: Any = tasks.BLOB
    if kind == "array":
        import numpy as np

        message = np.frombuffer(tasks.BLOB, np.float64).copy()
    yield case, _through_queue(adapter, route, (message,), seconds, large=True) * _GIGABYTES


def _through_queue(
    adapter: Adapter, route: str, messages: tuple[Any, ...], seconds: float, large: bool = False
) -> float:
    assert adapter is not None
    context = adapter.context()
    passed = context.Queue()
    task, count = ROUTES[route]
    with _Children(context, task, count, passed, messages, large) as children:

        def run(count: int) -> int:
            children.order(count)
            if task is tasks.produce:
                return tasks.take(passed, len(children), large)
            tasks.put(passed, messages, count, len(children))
            return children.reply()

        try:
            return _rate(run, seconds, large)
        except BaseException:
            passed.cancel_join_thread()  # what nobody takes any more would hold up the end
            raise


def pipe(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Round trips of a small message over a Pipe, µs, or GB/s of 1 MB messages one way."""
    assert adapter is not None
    if case == "ping-pong":
        yield from _ping_pong(adapter, seconds)
        return
    task = tasks.send if case.startswith("to-main") else tasks.receive
    at_hand = case.endswith("at-hand")
    if at_hand:
        tasks.have_memory_at_hand()
    with _Children(adapter.context(), task, 1, at_hand) as children:
        connection = children.lines[0]

        def run(count: int) -> int:
            connection.send(count)
            if task is tasks.send:
                return sum(tasks.look(connection.recv()) for _ in range(count))
            for _ in range(count):
                connection.send(tasks.BLOB)
            return int(connection.recv())

        yield case, _rate(run, seconds, large=True) * _GIGABYTES


def _ping_pong(adapter: Adapter, seconds: float) -> Figures:
    assert adapter is not None
    message = SMALL[1]
    trips: list[float] = []
    with _Children(adapter.context(), tasks.echo, 1) as children:
        connection = children.lines[0]
        for _ in range(20):  # the first ones find everything cold
            connection.send(message)
            connection.recv()
        end = clock() + SHARE * seconds
        while clock() < end or len(trips) < 100:
            start = clock()
            connection.send(message)
            connection.recv()
            trips.append((clock() - start) * 1e6)
        trips.sort()
        yield "median", trips[len(trips) // 2]
        yield "p99", trips[len(trips) * 99 // 100]


def lock(case: str, adapter: Adapter, seconds: float) -> Figures:
    """One acquire and release, µs, by one child or by two together."""
    if adapter is None:
        from benchmarks.peers import Multiprocessing

        context = Multiprocessing.context()
        shared = context.Lock()
    else:
        context = adapter.context()
        shared = adapter.served_lock(context)
    yield case, _each(context, tasks.lock, 2 if case == "contended" else 1, seconds, shared)


def manager(case: str, adapter: Adapter, seconds: float) -> Figures:
    """One operation of a child on a manager's dict, µs."""
    assert adapter is not None
    context = adapter.context()
    with context.Manager() as served:
        task = tasks.write if case == "set" else tasks.read
        yield case, _each(context, task, 1, seconds, served.dict({tasks.KEY: 0}))


def value(case: str, adapter: Adapter, seconds: float) -> Figures:
    """One increment of a Value under its lock, µs, by two children together."""
    assert adapter is not None
    context = adapter.context()
    counter = context.Value("q", 0)
    wanted = 0
    with _Children(context, tasks.increment, 2, counter) as children:

        def run(count: int) -> int:
            nonlocal wanted
            wanted += count
            children.order(count)
            return children.reply()

        took = 1e6 / _rate(run, seconds)
        if counter.value != wanted:
            raise RuntimeError(f"{wanted} increments made {counter.value}")
        yield case, took


def _each(
    context: Any, task: Callable[..., None], children: int, seconds: float, shared: object
) -> float:
    """Time for one of the operations that the children do together on what they share, µs."""
    with _Children(context, task, children, shared) as crew:

        def run(count: int) -> int:
            crew.order(count)
            return crew.reply()

        return 1e6 / _rate(run, seconds)


def _rate(run: Callable[[int], int], seconds: float, large: bool = False) -> float:
    run(8)  # the first operations find everything cold: imports in the children, say
    if large:
        return rate(run, SHARE * seconds, first=16, most=MOST_LARGE)
    return rate(run, SHARE * seconds)


class _Children:
    """Processes of a peer that carry out `task(connection, *shared)`, until they are told None."""

    def __init__(self, context: Any, task: Callable[..., None], count: int, *shared: Any) -> None:
        pipes = [context.Pipe() for _ in range(count)]
        self.lines = [here for here, _ in pipes]
        self.ends = [there for _, there in pipes]
        self.processes = [
            context.Process(target=task, args=(there, *shared), daemon=True) for there in self.ends
        ]

    def __len__(self) -> int:
        return len(self.lines)

    def __enter__(self) -> _Children:
        for process, end in zip(self.processes, self.ends, strict=True):
            process.start()
            end.close()  # the child alone holds it now: `reply` hears of its death
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for line, process in zip(self.lines, self.processes, strict=True):
            if kind is None:
                line.send(None)
            else:
                process.terminate()
        for process in self.processes:
            process.join()

    def order(self, count: int) -> None:
        """Have the children do `count` operations together."""
        share, rest = divmod(count, len(self))
        for number, line in enumerate(self.lines):
            line.send(share + (number < rest))

    def reply(self) -> int:
        """Wait for all children, and return how many operations they have done."""
        try:
            return sum(line.recv() for line in self.lines)
        except EOFError:
            # A child has died. Its own last words are to be the last: the harness reports those.
            raise SystemExit(1) from None


_GIGABYTES = len(tasks.BLOB) / 1e9

MEASURES: dict[str, Callable[[str, Any, float], Figures]] = {
    "queue": queue,
    "queue-large": queue_large,
    "pipe": pipe,
    "lock": lock,
    "manager": manager,
    "value": value,
}
