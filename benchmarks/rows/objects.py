"""The rows of queues, pipes, locks and their kin; the measurements are in `objects`."""

from __future__ import annotations

from benchmarks.peers import OBJECTS
from benchmarks.rows.base import Case, Metric, Row, single

SHARED = (
    Row(
        "queue",
        "Small messages through a queue",
        "A small int and a small tuple in turn through a `Queue`, between the main process and one "
        "child or two, messages/s: more is better.",
        (
            single("to-main", "child to main", "messages/s"),
            single("to-child", "main to child", "messages/s"),
            single("2-to-main", "2 children to main", "messages/s"),
            single("to-2", "main to 2 children", "messages/s"),
        ),
        peers=OBJECTS,
    ),
    Row(
        "queue-large",
        "Large messages through a queue",
        "Messages of 1 MB through a `Queue` between the main process and one child, GB/s: more is "
        "better. The arrays are numpy's, of float64. Who takes a message reads one byte of each of "
        "its pages and compares it.",
        (
            single("bytes-to-main", "bytes, child to main", "GB/s"),
            single("bytes-to-child", "bytes, main to child", "GB/s"),
            single("array-to-main", "arrays, child to main", "GB/s"),
            single("array-to-child", "arrays, main to child", "GB/s"),
        ),
        peers=OBJECTS,
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
            single("to-main", "1 MB, child to main", "GB/s"),
            single("to-child", "1 MB, main to child", "GB/s"),
            single("to-main-at-hand", "1 MB, child to main, memory at hand", "GB/s"),
            single("to-child-at-hand", "1 MB, main to child, memory at hand", "GB/s"),
        ),
        peers=OBJECTS,
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
            single("alone", "alone", "µs"),
            single("contended", "contended by 2", "µs"),
        ),
        floor="multiprocessing's plain `Lock`",
        against_floor=True,
        peers=OBJECTS,
    ),
    Row(
        "manager",
        "Manager",
        "A child sets and gets an item of `Manager().dict()`, µs for each: less is better.",
        (
            single("set", "set", "µs"),
            single("get", "get", "µs"),
        ),
        peers=OBJECTS,
    ),
    Row(
        "value",
        "Value",
        "Two children do `with value.get_lock(): value.value += 1` on the same `Value`, µs for "
        "each of all that are done: less is better. multiprocessing's is memory of one machine.",
        (single("value", "contended by 2", "µs"),),
        peers=OBJECTS,
    ),
)
