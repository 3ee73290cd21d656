"""The rows of pools with a few workers; the measurements are in `measure`."""

from __future__ import annotations

from benchmarks.rows.base import Case, Metric, Row, single
from benchmarks.rows.scale import SLEEP

POOLS = (
    Row(
        "empty",
        "Empty tasks",
        "`map` of empty tasks over a warm pool of 2 workers, tasks/s: more is better.",
        (
            single("chunksize=1", "chunksize=1", "tasks/s"),
            single("default", "default chunksize", "tasks/s"),
        ),
    ),
    Row(
        "stream",
        "A stream of empty tasks",
        "`imap_unordered` of empty tasks with the peer's default chunksize, 2 workers, tasks/s: "
        "more is better. Executors have `submit` and `as_completed` in its place.",
        (single("stream", "imap_unordered", "tasks/s"),),
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
    SLEEP,
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
        (single("import", "import", "ms"),),
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
        (single("cpu", "a task", "µs"),),
    ),
)
