"""The measurements of large data: many arrays as arguments or results, and one array for all tasks.

All that is sent is read where it arrives, one number of each page, and compared. The arrays are new
in every call, so that nobody can answer from what an earlier call has left somewhere, and making
them is not part of the time.
"""

from __future__ import annotations

from benchmarks import tasks
from benchmarks.measure import WORKERS, clock, warm_up

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from benchmarks.measure import Adapter, Figures
    from benchmarks.peers import Peer, Sharing

ARRAYS = 64
CONSTANT = 32_000_000  # numbers of 8 bytes
USES = 100
KINDS = 3  # of them
CALLS = 3  # at least, of those that count as warm

# Executors send tasks singly unless they are told otherwise; so they get the chunks that
# multiprocessing makes of `USES` tasks for two workers.
CHUNK = 13


def arguments(case: str, adapter: Adapter, seconds: float) -> Figures:
    """GB/s of arrays of 8 MB as arguments of tasks that return a number."""
    import numpy as np

    def call(peer: Peer, count: int, turn: int) -> float:
        arrays = [np.arange(tasks.LARGE, dtype=np.float64) + turn + n for n in range(count)]
        wanted = [tasks.reduce(array) for array in arrays]
        start = clock()
        found = peer.map(tasks.reduce, arrays, chunksize=1)
        took = clock() - start
        _compare(found, wanted)
        return took

    return _calls(adapter, seconds, call)


def results(case: str, adapter: Adapter, seconds: float) -> Figures:
    """GB/s of arrays of 8 MB as results."""

    def call(peer: Peer, count: int, turn: int) -> float:
        numbers = range(turn, turn + count)
        start = clock()
        found = [tasks.reduce(array) for array in peer.map(tasks.made, numbers, chunksize=1)]
        took = clock() - start
        pages = len(range(0, tasks.LARGE, tasks.PAGE))
        _compare(found, [number * pages for number in numbers])
        return took

    return _calls(adapter, seconds, call)


def _calls(adapter: Adapter, seconds: float, call: Callable[[Peer, int, int], float]) -> Figures:
    """The figures of the first call, and of the median of those after it."""
    assert adapter is not None
    count = max(2, round(ARRAYS * min(1.0, seconds)))
    gigabytes = count * tasks.LARGE * 8 / 1e9
    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)
        yield "first", gigabytes / call(peer, count, 0)
        times: list[float] = []
        while len(times) < CALLS or sum(times) < seconds:
            times.append(call(peer, count, len(times) + 1))
        yield "warm", gigabytes / sorted(times)[len(times) // 2]


def constant(case: str, adapter: Adapter, seconds: float) -> Figures:
    """The time of 100 tasks that use the same large array, and of 100 more, s.

    They read a little of it, or work through all of it ("evaluated"). The pool is warm, but for who
    shares by an initializer: its time begins with a new pool.
    """
    import numpy as np

    from benchmarks.peers import Executor

    assert adapter is not None
    array = np.arange(round(CONSTANT * min(1.0, seconds)), dtype=np.float64)
    task = tasks.evaluate if case == "evaluated" else tasks.use
    kinds = [task((array, number)) for number in range(KINDS)]
    wanted = [kinds[number % KINDS] for number in range(USES)]
    chunksize = CHUNK if issubclass(adapter, Executor) else None
    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)
        source: Any = array
        for which in ("first", "again"):
            start = clock()
            if case != "plain" and which == "first":
                sharing: Sharing = peer  # type: ignore[assignment]
                source = sharing.share(array)
            items = [(source, number % KINDS) for number in range(USES)]
            found = peer.map(task, items, chunksize)
            took = clock() - start
            _compare(found, wanted)
            yield f"{case}-{which}", took


def _compare(found: list[Any], wanted: list[Any]) -> None:
    if found != wanted:
        raise RuntimeError("an array is not what was sent")


MEASURES: dict[str, Callable[[str, Adapter, float], Figures]] = {
    "large-arguments": arguments,
    "large-results": results,
    "constant": constant,
}
