"""The measurements of many workers: a thousand of them on this machine."""

from __future__ import annotations

import statistics
import time

from benchmarks import tasks
from benchmarks.measure import FEW, QUICK, clock, gather, memory_of, processor_time, rate, warm_up

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.measure import Adapter, Figures
    from benchmarks.peers import Peer

THOUSAND = 1024
LOOK_AGAIN = 0.02  # seconds
LOOKED_AT = 64  # workers whose memory is read
CALLS = 5  # of as many tasks as took long enough
MOST_TASKS = 4_000_000  # what is paid once for each of a thousand workers is to be little of it


def thousand(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Start, memory, cost of a task and close with 1,024 workers; the cost also with 2."""
    assert adapter is not None
    workers = THOUSAND if seconds > QUICK else FEW
    with adapter(2) as peer:
        warm_up(peer, 2)
        _, few, few_cpu = _cost(peer, seconds)
    start = clock()
    with adapter(workers) as peer:
        if hasattr(peer, "ready"):
            while peer.ready < workers:
                time.sleep(LOOK_AGAIN)
            yield "up", clock() - start
        pids = gather(peer, workers)
        yield "ready", clock() - start
        looked_at = pids[:: max(1, workers // LOOKED_AT)]
        yield "uss", sum(memory_of(pid)["uss"] for pid in looked_at) / len(looked_at)
        yield "pss", sum(memory_of(pid)["pss"] for pid in looked_at) / len(looked_at)
        first, many, many_cpu = _cost(peer, seconds)
        yield "few", few
        yield "many-first", first
        yield "many", many
        yield "times", many / few
        yield "few-cpu", few_cpu
        yield "many-cpu", many_cpu
        start = clock()
    yield "close", clock() - start


def _cost(peer: Peer, seconds: float) -> tuple[float, float, float]:
    """What an empty task of a large call takes, µs: in the first, in those after it, of the master.

    In the first most workers take the memory that they need from the system.
    """
    count, spent = 0, 0.0

    def run(many: int) -> int:
        nonlocal count, spent
        before = processor_time()
        done = len(peer.map(tasks.nothing, range(many), chunksize=1))
        count, spent = many, (processor_time() - before) / many
        return done

    first = 1e6 / rate(run, seconds, most=MOST_TASKS)
    later = []
    for _ in range(CALLS):
        start = clock()
        run(count)
        later.append((1e6 * (clock() - start) / count, 1e6 * spent))
    took, master = map(statistics.median, zip(*later, strict=True))
    return first, took, master


MEASURES: dict[str, Callable[[str, Adapter, float], Figures]] = {"thousand": thousand}
