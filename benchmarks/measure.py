"""The measurements of pools: one generator a row, run in a fresh process (see `child`).

Each takes the case, the peer's adapter (None for the floor, which needs no peer) and the time to
spend, and yields pairs of a metric's key (as in `rows`) and its value as soon as it has them: a
peer that hangs later, in closing say, has still given its figures.

A rate is measured over as many tasks as take about `seconds`: the peers differ a thousandfold.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks import tasks

TYPE_CHECKING = False  # see peers
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from benchmarks.peers import Peer

    Figures = Iterator[tuple[str, float]]
    Adapter = type[Peer] | None

WORKERS = 2
SLEEPS = {"1s": 1.0, "100ms": 0.1, "10ms": 0.01, "1ms": 0.001}
MOST_TASKS = 2_000_000
QUICK = 0.1  # seconds to spend, up to which a run only has to show that it works
FEW = 8  # workers that are many in such a run

clock = time.perf_counter


def empty(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Tasks/s of `map` over empty tasks, with the chunk size that `case` names."""
    assert adapter is not None
    chunksize = 1 if case == "chunksize=1" else None
    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)
        yield case, rate(lambda n: len(peer.map(tasks.nothing, range(n), chunksize)), seconds)


def stream(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Tasks/s of `imap_unordered` over empty tasks, called as its documentation shows it."""
    assert adapter is not None
    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)
        yield case, rate(lambda n: _count(peer.imap_unordered(tasks.nothing, range(n))), seconds)


def apply(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Round trips of one empty task at a time, µs."""
    assert adapter is not None
    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)
        trips: list[float] = []
        end = clock() + seconds
        while clock() < end or len(trips) < 20:
            start = clock()
            peer.apply(tasks.nothing, None)
            trips.append((clock() - start) * 1e6)
        trips.sort()
        yield "median", trips[len(trips) // 2]
        yield "p99", trips[len(trips) * 99 // 100]


def sleepers(workers: int) -> Callable[[str, Adapter, float], Figures]:
    """The sleep test with so many workers; fewer in a quick run."""

    def sleep(case: str, adapter: Adapter, seconds: float) -> Figures:
        """The time that sleeping tasks take, as a multiple of the ideal."""
        count = workers if seconds > QUICK else min(workers, FEW)
        length = SLEEPS[case]
        share = max(1, round(seconds / length))  # tasks for each worker
        ideal = share * length
        if adapter is None:
            yield case, _sleeps_alone(length, share, count) / ideal
            return
        with adapter(count) as peer:
            (warm_up if count <= 5 else gather)(peer, count)
            start = clock()
            peer.map(tasks.sleep, [length] * (share * count), chunksize=1)
            yield case, (clock() - start) / ideal

    return sleep


def _sleeps_alone(length: float, share: int, workers: int) -> float:
    """The floor of `sleep`: processes that start together and sleep, with nobody to ask."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    together = context.Barrier(workers)
    times = context.SimpleQueue()

    def sleeper() -> None:
        together.wait()
        start = clock()
        for _ in range(share):
            time.sleep(length)
        times.put((start, clock()))  # this clock is the same in all processes of a machine

    processes = [context.Process(target=sleeper) for _ in range(workers)]
    for process in processes:
        process.start()
    starts, ends = zip(*(times.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return float(max(ends) - min(starts))


def first(case: str, adapter: Adapter, seconds: float) -> Figures:
    """From nothing to the first result, and closing; then again in the same program, ms."""
    assert adapter is not None
    for which in ("first", "second"):
        start = clock()
        with adapter(WORKERS) as peer:  # the adapter imports its library here
            peer.apply(tasks.nothing, None)
            yield f"{which}-result", (clock() - start) * 1e3
            start = clock()
        yield f"{which}-close", (clock() - start) * 1e3


def imports(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Wall time of a program that only imports the peer, less that of an empty program, ms."""
    import statistics
    import subprocess

    assert adapter is not None

    def run(program: str) -> float:
        start = clock()
        subprocess.run([sys.executable, "-c", program], check=True)
        return (clock() - start) * 1e3

    run(adapter.statement)  # compiles what was not compiled yet
    pairs = max(2, round(7 * seconds))
    figures = [(run(adapter.statement), run("pass")) for _ in range(pairs)]
    loaded, bare = zip(*figures, strict=True)
    yield "import", statistics.median(loaded) - statistics.median(bare)


def memory(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Memory of the master, of one worker, and of all the peer's processes, MB."""
    if adapter is None:
        yield from (("master-" + key, value) for key, value in memory_of(os.getpid()).items())
        return
    with adapter(WORKERS) as peer:
        workers = warm_up(peer, WORKERS)
        peer.map(tasks.nothing, range(round(1000 * seconds)), chunksize=1)
        yield from (("master-" + key, value) for key, value in memory_of(os.getpid()).items())
        # The leaner of two: the other one may have been the first and done the once-only work.
        worker = min((memory_of(pid) for pid in workers), key=lambda figures: figures["uss"])
        yield from (("worker-" + key, value) for key, value in worker.items())
        tree = [os.getpid(), *descendants(os.getpid())]
        yield "all-pss", sum(memory_of(pid)["pss"] for pid in tree)
        yield "processes", len(tree)


def cpu(case: str, adapter: Adapter, seconds: float) -> Figures:
    """Processor time, user and system, that the master spends on one empty task, µs."""
    assert adapter is not None
    spent = 0.0

    with adapter(WORKERS) as peer:
        warm_up(peer, WORKERS)

        def run(count: int) -> int:
            nonlocal spent
            start = processor_time()
            done = _count(peer.imap_unordered(tasks.nothing, range(count), chunksize=1))
            spent = (processor_time() - start) / count
            return done

        rate(run, seconds)
        yield "cpu", spent * 1e6


def gather(
    peer: Peer, workers: int, meet: Callable[[tuple[str, str]], int] = tasks.meet
) -> list[int]:
    """Have as many tasks as there are workers run at the same time; return their process ids.

        tasks ── a byte when it runs ─► fifo ─► usher
              ◄─ a byte when all do ─── fifo ◄──┘

    Nobody looks again and again: with a thousand workers that would be all they do.
    """
    import shutil
    import tempfile
    import threading

    folder = tempfile.mkdtemp(prefix="fiber-benchmark-")
    paths = os.path.join(folder, "here"), os.path.join(folder, "leave")
    for path in paths:
        os.mkfifo(path)
    here, leave = (os.open(path, os.O_RDWR) for path in paths)  # both ways: no end of file

    def usher() -> None:
        missing = workers
        while missing:
            missing -= len(os.read(here, missing))
        os.write(leave, b"." * workers)

    threading.Thread(target=usher, daemon=True).start()
    try:
        return peer.map(meet, [paths] * workers, chunksize=1)
    finally:
        os.close(here)
        os.close(leave)
        shutil.rmtree(folder)


def warm_up(peer: Peer, workers: int) -> set[int]:
    """Return the workers' process ids once all of them have worked (or have had ten chances)."""
    pids: set[int] = set()
    for _ in range(10):
        pids.update(peer.map(tasks.whoami, [0.01] * (2 * workers), chunksize=1))
        if len(pids) >= workers:
            break
    return pids


def _count(results: Iterator[object]) -> int:
    return sum(1 for _ in results)


def rate(
    run: Callable[[int], int], seconds: float, first: int = 64, most: int = MOST_TASKS
) -> float:
    """Tasks/s of the last, longest call of `run`, which takes a count and returns what it did."""
    count = first
    while True:
        start = clock()
        done = run(count)
        took = clock() - start
        if done != count:
            raise RuntimeError(f"{count} tasks gave {done} results")
        if took > 0.5 * seconds or count == most:
            return count / took
        # Not more than tenfold at once: the first, small runs are no measure of the speed.
        count = min(most, 10 * count, max(2 * count, round(count * seconds / took)))


def processor_time() -> float:
    """Processor time of this process until now, user and system, s."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory_of(pid: int) -> dict[str, float]:
    """Resident, proportional and private memory of a process, MB. Linux only."""
    path = f"/proc/{pid}/smaps_rollup"
    sizes: dict[str, int] = {}
    with open(path) as lines:
        next(lines)  # the range of addresses
        for line in lines:
            key, size, *_ = line.split()
            sizes[key.rstrip(":")] = int(size)
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    figures = {"rss": sizes["Rss"], "pss": sizes["Pss"], "uss": private}
    return {key: kilobytes / 1024 for key, kilobytes in figures.items()}


def descendants(pid: int) -> list[int]:
    """The process ids of the children, their children and so on. Linux only."""
    parents: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()  # after the name, in brackets
        except OSError:
            continue  # it ended since the folder was read
        parents.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for parent in found:  # grows on the way
        found += parents.get(parent, [])
    return found[1:]


MEASURES: dict[str, Callable[[str, Adapter, float], Figures]] = {
    "empty": empty,
    "stream": stream,
    "apply": apply,
    "sleep": sleepers(5),
    "sleep-64": sleepers(64),
    "sleep-1024": sleepers(1024),
    "first": first,
    "import": imports,
    "memory": memory,
    "cpu": cpu,
}

# Where the measurements of other rows are; only those modules are loaded that the row needs.
_ELSEWHERE = {
    "large": ("large-arguments", "large-results", "constant"),
    "scale": ("thousand",),
    "evolution": ("evolution",),
    "simulation": ("simulation",),
}


def find(row: str) -> Callable[[str, Any, float], Figures]:
    """The measurement of a row."""
    if row in MEASURES:
        return MEASURES[row]
    from importlib import import_module

    name = next((name for name, rows in _ELSEWHERE.items() if row in rows), "objects")
    measures: dict[str, Callable[[str, Any, float], Figures]]
    measures = import_module(f"benchmarks.{name}").MEASURES
    return measures[row]
