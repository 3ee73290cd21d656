"""The catalogue of rows: what each measures, in which cases, and how its figures are printed.

The measurements themselves are in `measure` and `objects`, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass

BASELINE = "multiprocessing"
FLOOR = "floor"
COUNTED = ("tasks/s", "messages/s")  # units whose figures are printed with k and M


@dataclass(frozen=True)
class Metric:
    """One column: the key that the measurement yields, its heading and its unit."""

    key: str
    title: str
    unit: str
    ratio: bool = True  # whether a column with the ratio to the baseline follows


@dataclass(frozen=True)
class Case:
    """What one child process measures. `quick`: whether a quick run includes it."""

    name: str
    metrics: tuple[Metric, ...]
    quick: bool = True


@dataclass(frozen=True)
class Row:
    """One table of the report."""

    name: str
    title: str
    text: str
    cases: tuple[Case, ...]
    floor: str | None = None
    against_floor: bool = False  # a ratio to the floor stands beside the one to the baseline
    starts: bool = False  # the start method matters, so multiprocessing's spawn is measured too
    objects: bool = False  # only for peers that have multiprocessing's queues, locks and so on

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return tuple(metric for case in self.cases for metric in case.metrics)


def _single(key: str, title: str, unit: str, *, quick: bool = True) -> Case:
    return Case(key, (Metric(key, title, unit),), quick)


_ROWS = (
    Row(
        "empty",
        "Empty tasks",
        "`map` of empty tasks over a warm pool of 2 workers, tasks/s: more is better.",
        (
            _single("chunksize=1", "chunksize=1", "tasks/s"),
            _single("default", "default chunksize", "tasks/s"),
        ),
    ),
    Row(
        "stream",
        "A stream of empty tasks",
        "`imap_unordered` of empty tasks with the peer's default chunksize, 2 workers, tasks/s: "
        "more is better. Executors have `submit` and `as_completed` in its place.",
        (_single("stream", "imap_unordered", "tasks/s"),),
    ),
    Row(
        "apply",
        "Round trip",
        "`apply` of one empty task at a time, 2 workers, µs: less is better.",
        (
            Case(
                "apply",
                (Metric("median", "median", "µs"), Metric("p99", "99th percentile", "µs")),
            ),
        ),
    ),
    Row(
        "sleep",
        "The sleep test of the Fiber paper",
        "5, 50, 500 and 5,000 tasks that sleep 1 s, 100 ms, 10 ms and 1 ms on 5 workers, "
        "chunksize=1 where the peer has one. Total time over the ideal of 1 s: less is better, "
        "and 1.00 is perfect. The floor is five plain processes that each sleep their share in a "
        "loop; *x floor* is the ratio to it.",
        (
            _single("1s", "1 s", "", quick=False),
            _single("100ms", "100 ms", ""),
            _single("10ms", "10 ms", ""),
            _single("1ms", "1 ms", ""),
        ),
        floor="the sleeps alone",
        against_floor=True,
    ),
    Row(
        "first",
        "First result",
        "From nothing to the first result of a pool of 2, ms: less is better. The first pool of a "
        "program includes the import of the library. Closing (and waiting for the workers to be "
        "gone) is separate.",
        (
            Case(
                "first",
                (
                    Metric("first-result", "first pool", "ms"),
                    Metric("first-close", "its close", "ms"),
                    Metric("second-result", "second pool", "ms"),
                    Metric("second-close", "its close", "ms"),
                ),
            ),
        ),
        starts=True,
    ),
    Row(
        "import",
        "Import",
        "A program that only imports the library, over a program that does nothing, ms: less is "
        "better.",
        (_single("import", "import", "ms"),),
    ),
    Row(
        "memory",
        "Memory",
        "With 2 idle workers after some tasks, MB: less is better. RSS counts shared pages fully, "
        "PSS by their share, private (USS) not at all. The last columns are all processes of the "
        "program together (workers, helpers, servers) and their number. The floor is the harness "
        "without a peer.",
        (
            Case(
                "memory",
                (
                    Metric("master-rss", "master, RSS", "MB", ratio=False),
                    Metric("master-pss", "master, PSS", "MB", ratio=False),
                    Metric("master-uss", "master, private", "MB"),
                    Metric("worker-rss", "worker, RSS", "MB", ratio=False),
                    Metric("worker-pss", "worker, PSS", "MB", ratio=False),
                    Metric("worker-uss", "worker, private", "MB"),
                    Metric("all-pss", "all, PSS", "MB"),
                    Metric("processes", "processes", "", ratio=False),
                ),
            ),
        ),
        floor="no peer",
        starts=True,
    ),
    Row(
        "cpu",
        "Processor time of the master",
        "User and system time of the master for each empty task of an `imap_unordered` with "
        "chunksize=1, µs: less is better.",
        (_single("cpu", "a task", "µs"),),
    ),
    Row(
        "queue",
        "Small messages through a queue",
        "A small int and a small tuple in turn through a `Queue`, between the main process and one "
        "child or two, messages/s: more is better.",
        (
            _single("to-main", "child to main", "messages/s"),
            _single("to-child", "main to child", "messages/s"),
            _single("2-to-main", "2 children to main", "messages/s"),
            _single("to-2", "main to 2 children", "messages/s"),
        ),
        objects=True,
    ),
    Row(
        "queue-large",
        "Large messages through a queue",
        "Messages of 1 MB through a `Queue` between the main process and one child, GB/s: more is "
        "better. The arrays are numpy's, of float64. Who takes a message reads one byte of each of "
        "its pages and compares it.",
        (
            _single("bytes-to-main", "bytes, child to main", "GB/s"),
            _single("bytes-to-child", "bytes, main to child", "GB/s"),
            _single("array-to-main", "arrays, child to main", "GB/s"),
            _single("array-to-child", "arrays, main to child", "GB/s"),
        ),
        objects=True,
    ),
    Row(
        "pipe",
        "Pipe",
        "Over a `Pipe` between the main process and one child: a small message there and back, "
        "µs, less is better; bytes of 1 MB one way, GB/s, more is better. *Memory at hand*: both "
        "processes have freed a large block before, and their C library has kept it; otherwise it "
        "takes the memory of each message from the system.",
        (
            Case(
                "ping-pong",
                (
                    Metric("median", "there and back, median", "µs"),
                    Metric("p99", "99th percentile", "µs"),
                ),
            ),
            _single("to-main", "1 MB, child to main", "GB/s"),
            _single("to-child", "1 MB, main to child", "GB/s"),
            _single("to-main-at-hand", "1 MB, child to main, memory at hand", "GB/s"),
            _single("to-child-at-hand", "1 MB, main to child, memory at hand", "GB/s"),
        ),
        objects=True,
    ),
    Row(
        "lock",
        "Lock",
        "`acquire` and `release` of a lock by a child, alone or with another child that does the "
        "same, µs for each of all that are done: less is better. multiprocessing's is "
        "`Manager().Lock()`: like Fiber's it is served by a process, and can be had from other "
        "machines. Its plain `Lock` is a semaphore in the memory of one machine; *x floor* is the "
        "ratio to that.",
        (
            _single("alone", "alone", "µs"),
            _single("contended", "contended by 2", "µs"),
        ),
        floor="multiprocessing's plain `Lock`",
        against_floor=True,
        objects=True,
    ),
    Row(
        "manager",
        "Manager",
        "A child sets and gets an item of `Manager().dict()`, µs for each: less is better.",
        (
            _single("set", "set", "µs"),
            _single("get", "get", "µs"),
        ),
        objects=True,
    ),
    Row(
        "value",
        "Value",
        "Two children do `with value.get_lock(): value.value += 1` on the same `Value`, µs for "
        "each of all that are done: less is better. multiprocessing's is memory of one machine.",
        (_single("value", "contended by 2", "µs"),),
        objects=True,
    ),
)

ROWS = {row.name: row for row in _ROWS}
